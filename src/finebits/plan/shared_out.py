"""What one of several processes holds while it trains a model that is cut among them (FSDP2).

Of each of L blocks every one of N processes holds some rows, and two blocks at a time whole: the one that computes, and the one that is
gathered meanwhile; of the first its gradients too. What is not in a block is held whole by all.
"""

from __future__ import annotations

from collections.abc import Mapping

CUT = ("linear weights", "adapters", "frozen factors", "optimizer", "gradients")
GATHERED = ("linear weights", "adapters", "frozen factors")


def part(memory: Mapping[str, int], layers: int, processes: int) -> dict[str, int]:
    """A plan's terms of memory, for each of so many processes.

    >>> part({"linear weights": 1000, "adapters": 100, "gradients": 100, "embeddings": 50}, layers=10, processes=2)
    {'linear weights': 500, 'adapters': 50, 'gradients': 50, 'embeddings': 50, 'gathered blocks': 230}
    """
    own = {k: -(-v // processes) if k in CUT else v for k, v in memory.items()}
    block = lambda names: -(-sum(memory.get(k, 0) for k in names) // layers)  # noqa: E731
    return own | {"gathered blocks": min(2, layers) * block(GATHERED) + block(("gradients",))}
