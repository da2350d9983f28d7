"""What an optimizer is: a price of its state for the planner, and a torch optimizer for the trainer."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from finebits import registry
from finebits.errors import Invalid

if TYPE_CHECKING:
    import torch


@runtime_checkable
class Optimizer(Protocol):
    hf: ClassVar[str]  # what transformers.TrainingArguments.optim calls it; nothing where it has no such optimizer
    same: ClassVar[tuple[str, ...]]  # what it calls the same arithmetic in other hands
    label: ClassVar[str]  # how a plan tells that it is used; nothing where that is usual
    devices: ClassVar[tuple[str, ...]]  # that it works on
    adaptive: ClassVar[bool]  # does it read β₁, β₂ and ε of Adam?
    rowwise: ClassVar[bool]  # does torch move a number by its own gradients alone, wherever other rows of the tensor are?
    only: ClassVar[str | None]  # the adapter whose tensors are all that it can step; None: it steps any
    smaller: ClassVar[str | None]  # the optimizer of the same updates and less state that a plan may take instead

    @property
    def layerwise(self) -> bool:
        """Does a weight move as soon as its gradient is there, so that no other is there beside it?"""
        ...

    def state(self, numbers: int) -> int:
        """Bytes that it holds between two steps for so many trained numbers, float32 ones in large tensors."""
        ...

    def matrix(self, m: int, n: int) -> int:
        """The same for a trained weight of this shape."""
        ...

    def make(self, groups: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
        """The optimizer over parameters or groups of them; what it does not know is left aside."""
        ...


@functools.cache
def known() -> dict[str, Optimizer]:
    """Every optimizer by its names: its own and, behind these, transformers'.

    >>> sorted(name for name, kind in known().items() if kind.hf == "adamw_torch")
    ['adamw', 'adamw_torch', 'adamw_torch_fused']
    """
    own = {name: registry.load("optim", name)() for name in registry.names("optim")}
    return own | {name: kind for kind in own.values() for name in (kind.hf, *kind.same) if name}


def named(name: str | Optimizer) -> Optimizer:
    """An optimizer by any of its names, with its own settings; one that is there already is that. Raises ValueError with the nearest where
    there is none.

    >>> named("adamw").hf, named("adamw_torch").state(1000)
    ('adamw_torch', 8000)
    """
    if not isinstance(name, str):
        return name
    if name not in known():
        near = difflib.get_close_matches(name, known(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise Invalid(f"finebits has no optimizer {name!r}.{hint} Known: {', '.join(known())}.")
    return known()[name]
