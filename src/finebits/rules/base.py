"""What a rule is: something that acts at four moments of an optimizer step. Rules are the only methods with state.

No rule changes a parameter's shape or the module tree: capacity is allocated once, and rank is a mask. `after_backward` fires once an
optimizer step, when the gradients of all micro-batches are there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finebits.errors import Invalid


@dataclass
class Run:
    """What a rule may look at: the model, its hosts by name, the optimizer, and where the run stands (steps done, steps in all).

    >>> run = fb.Run(torch.nn.Linear(2, 2), hosts={}, step=5, total=100)
    >>> run.step / run.total
    0.05
    """

    model: nn.Module
    hosts: dict[str, Any]
    optimizer: torch.optim.Optimizer | None = None
    step: int = 0
    total: int = 0


class Rule:
    """All four moments are optional. `null` is a setting at which the rule vanishes: training is then training without it, bit for bit.

    >>> class Decay(fb.Rule):
    ...     null = {"rate": 0.0}
    ...     rate = 0.5
    ...     def penalty(self, run):
    ...         return self.rate * sum(p.square().sum() for p in run.model.parameters())
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> model.weight.data = torch.tensor([[1.0, 3.0]])
    >>> Decay().penalty(fb.Run(model, {})).detach()  # ½ (1² + 3²)
    tensor(5.)
    """

    null: ClassVar[dict[str, Any]]

    def before_forward(self, run: Run) -> None:
        """Before the first micro-batch of a step."""

    def penalty(self, run: Run) -> Tensor | float:
        """Added to the loss of every micro-batch, in proportion to its share of the step."""
        return 0.0

    def after_backward(self, run: Run) -> None:
        """Gradients exist, clipping and the optimizer's step come next."""

    def after_step(self, run: Run) -> None:
        """Parameters have moved, gradients are still there; run.step counts this step."""

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers: everything that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of state_dict.

        >>> fb.Rule().load_state_dict({"mean": 1.0})
        Traceback (most recent call last):
            ...
        finebits.errors.Invalid: Rule has no state to load, and the checkpoint holds mean
        """
        if state:
            raise Invalid(f"{type(self).__name__} has no state to load, and the checkpoint holds {', '.join(state)}")
