"""OwLore: Outlier-weighed Layerwise Sampled Low-Rank Projection for LLM Fine-tuning.  Li et al., 2024.  arXiv:2405.18380v2.
Use it as lisa, with training.optim galore: blocks with more outliers are trained more often, their gradients through a thin basis.

Blocks are drawn as in LISA, with weights p_l ∝ D_l, the share of outliers among A_jk = ‖X_k‖ |W_jk| over all matrices of a block (section 3.2):

    D_l = #{A_jk > M mean(A)} / #{A_jk},    X_k: column k of the matrix's inputs,    M = 13

Deviations: the inputs are those of the first step, in which any block is as likely as another, as they are where fewer than γ blocks have any
outliers; the mean is of a matrix's own A. Weights without replacement are no inclusion probabilities: blocks of large D_l are drawn a little
less often than that. The low-rank gradients are an optimizer's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.qtensor import dense
from finebits.rules import _family as family
from finebits.rules._layers import Sampled
from finebits.rules.base import Run, Scene


class OwLore(Sampled):
    """`blocks` is γ, `every` K, `times` M.

    >>> rule = fb.OwLore(blocks=1, every=10)
    >>> rule.shares = [0.0, 0.3, 0.1]
    >>> counts = [0, 0, 0]
    >>> for interval in range(1, 1001):
    ...     counts[rule.chosen(interval, layers=3)[0]] += 1
    >>> counts[0], round(counts[1] / counts[2])
    (0, 3)
    """

    def __init__(self, blocks: int = 2, every: int = 20, times: float = 13.0, seed: int = 0) -> None:
        if not times > 0:
            raise Invalid(f"OwLore counts what is above times the mean, and times is {times}: it must be above 0")
        super().__init__(blocks, every, seed)
        self.times = times
        self.shares: list[float] = []  # D_l
        self.squares: dict[str, Tensor] = {}
        self.span = contextlib.ExitStack()

    def weights(self, layers: int) -> Sequence[float]:
        known = sum(share > 0 for share in self.shares) >= self.active(layers)
        return self.shares if known else [1.0] * layers

    def work(self, scene: Scene) -> int:
        """‖X_k‖² of the first step."""
        return sum(4 * on.n for on in scene.adapters) if self.every else 0

    def before_forward(self, run: Run) -> None:
        self.span.close()
        super().before_forward(run)
        if self.every and not self.shares:
            for block in family.blocks(run.model, self):
                for name, linear in _linears(run.model.get_submodule(block)):
                    self.span.callback(linear.register_forward_hook(self._seen(f"{block}.{name}")).remove)

    def _seen(self, name: str) -> Any:
        def hook(linear: nn.Module, inputs: tuple[Tensor, ...], out: Any) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            self.squares[name] = self.squares.get(name, torch.zeros(())) + x.square().sum(0).cpu()

        return hook

    @torch.no_grad()
    def after_backward(self, run: Run) -> None:
        self.span.close()
        if not self.every or self.shares:
            return
        shares = []
        for block in family.blocks(run.model, self):
            above = count = 0
            for name, linear in _linears(run.model.get_submodule(block)):
                if (squares := self.squares.get(f"{block}.{name}")) is not None:
                    A = dense(linear.weight.detach(), torch.float32).abs() * squares.sqrt().to(linear.weight.device)
                    above, count = above + int((A > self.times * A.mean()).sum()), count + A.numel()
            shares.append(above / max(count, 1))
        self.shares, self.squares = shares, {}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"shares": self.shares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.shares = list(state["shares"])


def _linears(block: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in block.named_modules() if isinstance(m, nn.Linear)]
