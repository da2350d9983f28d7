"""Reducing Transformer Depth on Demand with Structured Dropout (LayerDrop).  Fan, Grave & Joulin, ICLR 2020.  arXiv:1909.11556v1.
With Deep Networks with Stochastic Depth.  Huang et al., ECCV 2016.  arXiv:1603.09382v3.
Use it to train faster by the share of blocks that are left out, as a regulariser, or where blocks are to be taken out afterwards.

Block l of L is x + f_l(x). In every training step it is left out with probability p_l, and not computed:

    x ← x + m_l f_l(x),    m_l ~ Bernoulli(1 − p_l)

"uniform": p_l = p (LayerDrop). "linear": p_l = p l/L, and f_l of a block that stays is divided by 1 − p_l (stochastic depth). Evaluation
takes all blocks. Which are left out comes of (seed, step) alone: it is the same for all micro-batches of a step, for a block that is
computed again on the way back, for all processes, and in a run that was resumed.
Deviations: one mask a step, where the papers draw with every batch; stochastic depth multiplies by 1 − p_l in evaluation instead of
dividing in training; the adapters of a block that was left out have a gradient, of zeros, so that processes have the same to exchange and
other rules something to look at; a block that gives more than its states is computed without a gradient for the rest of what it gives.
"""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.rules import _family as family
from finebits.rules.base import Across, Rule, Run


class LayerDrop(Rule):
    """`p` is the share of blocks that are left out, or that of the last one where the depth is "linear".

    >>> fb.LayerDrop(p=0.2).shares(4), fb.LayerDrop(p=0.2, depth="linear").shares(4)
    ([0.2, 0.2, 0.2, 0.2], [0.05, 0.1, 0.15000000000000002, 0.2])
    """

    null: ClassVar[dict[str, Any]] = {"p": 0.0}
    across: ClassVar[Across] = "rows"

    def __init__(self, p: float = 0.2, depth: Literal["uniform", "linear"] = "uniform", seed: int = 0) -> None:
        if not 0 <= p <= 1:
            raise Invalid(f"LayerDrop needs p from 0 to 1; got {p}")
        if depth not in ("uniform", "linear"):
            raise Invalid(f"LayerDrop's depth is uniform or linear, not {depth!r}")
        self.p, self.depth, self.seed = p, depth, seed
        self.single: dict[type, bool] = {}  # does a kind of block give its states and nothing else?
        self.span = contextlib.ExitStack()

    def shares(self, blocks: int) -> list[float]:
        """p_l of every block."""
        return [self.p * (1.0 if self.depth == "uniform" else (i + 1) / blocks) for i in range(blocks)]

    def dropped(self, step: int, blocks: int) -> list[bool]:
        """The blocks that a step leaves out."""
        drawn = torch.rand(blocks, generator=family.generator(self.seed, f"LayerDrop/{step}")).tolist()
        return [u < p for u, p in zip(drawn, self.shares(blocks), strict=True)]

    def suit(self, model: nn.Module) -> None:
        family.blocks(model, self)

    def before_forward(self, run: Run) -> None:
        self.span.close()
        if not self.p:
            return
        blocks = [run.model.get_submodule(name) for name in family.blocks(run.model, self)]
        for block, drop, p in zip(blocks, self.dropped(run.step, len(blocks)), self.shares(len(blocks)), strict=True):
            if drop or self.depth == "linear":
                self._replace(block, drop, 1 - p)

    def _replace(self, block: nn.Module, drop: bool, kept: float) -> None:
        own = vars(block).get("forward")
        forward = block.forward

        def left_out(*args: Any, **kwargs: Any) -> Any:
            x = _states(args, kwargs)
            if not self.single.get(type(block), False):
                with torch.no_grad():
                    out = forward(*args, **kwargs)
                self.single[type(block)] = isinstance(out, Tensor)
                if not isinstance(out, Tensor):
                    return (_still(x, block), *out[1:])
            return _still(x, block)

        def stays(*args: Any, **kwargs: Any) -> Any:
            x, out = _states(args, kwargs), forward(*args, **kwargs)
            more = lambda y: x + (y - x) / kept  # noqa: E731
            return more(out) if isinstance(out, Tensor) else (more(out[0]), *out[1:])

        block.forward = left_out if drop else stays
        self.span.callback(lambda: vars(block).pop("forward") if own is None else setattr(block, "forward", own))

    def after_backward(self, run: Run) -> None:
        self.span.close()


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _still(x: Tensor, block: nn.Module) -> Tensor:
    """x, of which what is trained in the block is a part that adds nothing."""
    trained = [p.flatten()[:0].sum().to(x.dtype) for p in block.parameters() if p.requires_grad]
    return x + torch.stack(trained).sum() if trained else x
