"""What rules share that train a few blocks of a model at a time: who is trained, and what goes with those that are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as distributed
from torch import nn

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Across, Rule, Run


class Sampled(Rule):
    """`blocks` of a model's blocks are trained for `every` steps, then others; 0 steps: all of them, always. Abstract.

    What was trained of the others stays as it is to the bit: it asks for no gradient, has none, and the optimizer forgets what it knows of it.
    What is trained outside of the blocks (embeddings, a head, norms) is trained always.
    """

    null: ClassVar[dict[str, Any]] = {"every": 0}
    across: ClassVar[Across] = "one"

    def __init__(self, blocks: int, every: int, seed: int) -> None:
        who = type(self).__name__
        if blocks < 1 or every < 0:
            raise Invalid(f"{who} needs blocks of 1 or more and every of 0 or more; got {blocks} and {every}")
        self.blocks, self.every, self.seed = blocks, every, seed
        self.names: list[list[str]] = []  # of what is trained of each block
        self.inside: list[list[nn.Parameter]] = []
        self.drawn: list[int] | None = None

    def suit(self, model: nn.Module) -> None:
        family.blocks(model, self)

    def active(self, layers: int, steps: int | None = None) -> int:
        """Of so many blocks, the most that are trained at a time."""
        return min(self.blocks, layers) if self.every else layers

    def weights(self, layers: int) -> Sequence[float]:
        """How likely blocks are to be drawn; any scale."""
        return [1.0] * layers

    def chosen(self, interval: int, layers: int) -> list[int]:
        """The blocks of an interval: without replacement, out of (seed, interval) alone."""
        gen = family.generator(self.seed, f"{type(self).__name__}/{interval}")
        share = torch.tensor(self.weights(layers), dtype=torch.float64)
        return sorted(torch.multinomial(share, self.active(layers), generator=gen).tolist())

    def before_forward(self, run: Run) -> None:
        if not self.every:
            return
        if not self.inside:
            self._meet(run)
        drawn = self.chosen(run.step // self.every, len(self.inside))
        if drawn == self.drawn:
            return
        for i, held in enumerate(self.inside):
            for p in held:
                p.requires_grad_(i in drawn)
                if i not in drawn:
                    p.grad = None  # an optimizer moves what has a gradient
                    if run.optimizer is not None:
                        run.optimizer.state.pop(p, None)
        self.drawn = drawn

    def _meet(self, run: Run) -> None:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise Invalid(f"{type(self).__name__} changes which weights have gradients, which DDP does not take: train in one process")
        parameters = dict(run.model.named_parameters())
        if not self.names:
            free = [name for name, p in parameters.items() if p.requires_grad]
            self.names = [[name for name in free if name.startswith(f"{block}.")] for block in family.blocks(run.model, self)]
        self.inside = [[parameters[name] for name in names] for names in self.names]
        if not any(self.inside):
            raise Invalid(f"{type(self).__name__} trains blocks, and nothing in them is trained: take adapter full")

    def state_dict(self) -> dict[str, Any]:
        """Who is trained: of a model that stands in the middle of it some ask for no gradient."""
        return {"names": self.names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names = [list(names) for names in state["names"]]
