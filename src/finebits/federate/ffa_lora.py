"""FFA-LoRA: Improving LoRA in Privacy-preserving Federated Learning.  Sun, Li, Li, Ding, ICLR 2024.  arXiv:2403.12313v1.

A is drawn once, from a seed that all have, and frozen; B starts at 0 and is all that is trained and sent:

    B ← Σ pₖ Bₖ    ⇒    B A = Σ pₖ Bₖ A,    exactly

Noise ξ on B comes out as ξ A, linear in it; on both factors there is ξ_B ξ_A beside. Bytes of a client and a round: b·r·m up, the same down.
Deviations: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from finebits.federate.base import Usual


@dataclass(frozen=True)
class FFALoRA(Usual):
    """The mean of B over one A.

    >>> from finebits.federate.base import Sent, Server
    >>> one, two = (Sent({"q": {"B": torch.full((2, 1), v)}}, 1) for v in (0.0, 4.0))
    >>> FFALoRA()(Server({}), [one, two]).server.tensors["q"]["B"]
    tensor([[2.],
            [2.]])
    """

    adapter: ClassVar[str] = "lora_fa"
    init: ClassVar[str | None] = "zeros"
    sends: ClassVar[tuple[str, ...]] = ("B",)
    linear: ClassVar[bool] = True
