"""A weight in codes of additive codebooks whose codes learn, beside the books and the scales (PV-Tuning's two sets of variables).

    atom i of row r:  ŵ = s_r Σ_m C_m[q_im],    s = s₀ e^θ

    ∂f/∂C_m[k] = Σ_{i: q_im = k} s ∂f/∂ŵ_i,    ∂f/∂s = Σ_row ∂f/∂ŵ · ŵ/s

C and s are used as the format stores them, and gradients pass the stores as if they were exact. Word 0 of every book stays zero. What is left
of ∂f/∂Ŵ adds up in `pull`, from which `drawn` and `move` read which atoms get other codes, and which.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from finebits.blocks import pack
from finebits.formats.vq import VQ
from finebits.qtensor import QTensor
from finebits.refine._scales import MOST


class WordedWeight:
    """A weight (*e, m, n) in words: `tensors` are C and θ, `codes` (experts, atoms, M) what is written of it, one a byte."""

    def __init__(self, q: QTensor) -> None:
        self.q, self.format = q, cast(VQ, q.format)
        self.book, self.scale = q.parts["book"], q.parts["scale"].float()
        self.codes = q.codes().unflatten(-1, (-1, self.format.M)).reshape(self.experts, -1, self.format.M).clone()
        self.start = self.codes.clone()
        self.tensors = [nn.Parameter(self.book.float().clone()), nn.Parameter(torch.zeros_like(self.scale))]
        self.pull: Tensor | None = None

    @property
    def experts(self) -> int:
        return self.book.shape[:-3].numel()

    def dense(self) -> Tensor:
        """The weight as it would be saved, with gradients of C and θ."""
        return _Read.apply(self.tensors[0], self._grown(), self)

    def packed(self) -> QTensor:
        """The weight in its new codes and words; the very same one where nothing has moved."""
        if torch.equal(self.codes, self.start) and not self.tensors[1].any() and torch.equal(self.tensors[0], self.book.float()):
            return self.q
        with torch.no_grad():
            return self.stored(self.tensors[0], self._grown())

    def stored(self, book: Tensor, scale: Tensor) -> QTensor:
        format, q = self.format, self.q
        codes = pack(self.codes.reshape(*q.shape[:-1], -1), format.bits)
        parts = format.rescaled(q.parts, scale) | {"codes": codes, "book": book.to(self.book.dtype)}
        return QTensor(parts, format, q.shape, q.dtype)

    def _grown(self) -> Tensor:
        return self.scale * self.tensors[1].clamp(-MOST, MOST).exp()

    def atoms(self, W: Tensor) -> Float[Tensor, "e a g"]:
        return W.reshape(self.experts, -1, self.format.g)

    def drawn(self, share: float, gen: torch.Generator) -> Int[Tensor, " s"]:
        """Atoms drawn by the squares of their gradients without being put back, `share` of them and at least one."""
        size = self.atoms(cast(Tensor, self.pull)).square().sum(-1).flatten()
        chance = torch.empty(size.shape).exponential_(generator=gen).to(size.device)  # Gumbel's way to draw several at once
        return (size / chance).topk(max(1, int(share * len(size)))).indices

    @torch.no_grad()
    def unit(self, at: Int[Tensor, " s"]) -> float:
        """‖ŵ‖ / ‖∂f/∂ŵ‖ over these atoms: the step that would move them by as much as they are."""
        W, G = (self.atoms(t).flatten(0, 1)[at] for t in (self.dense().float(), cast(Tensor, self.pull)))
        return float(W.norm() / G.norm().clamp_min(1e-30))

    @torch.no_grad()
    def move(self, at: Int[Tensor, " s"], step: float) -> UInt8[Tensor, "s M"]:
        """The V step: these atoms take the codes nearest to ŵ − step·∂f/∂ŵ, or keep theirs where they are as near. Gives the codes they had."""
        book = self.tensors[0].to(self.book.dtype).float().reshape(-1, *self.book.shape[-3:])
        s = self._grown().to(self.q.parts["scale"].dtype).float()
        row = s.flatten()[at // (self.q.shape[-1] // self.format.g), None]
        goal = self.atoms(cast(Tensor, self.pull)).flatten(0, 1)[at] * torch.where(row != 0, -step / row, 0.0)
        which, flat = at // self.codes.shape[1], self.codes.flatten(0, 1)
        before = flat[at]
        read = lambda codes: sum(book[which, i, codes[:, i].long()] for i in range(self.format.M))  # noqa: E731
        goal = goal + read(before)
        found = before.clone()
        for e in which.unique():
            found[which == e] = self.format.search(goal[which == e], book[e])
        nearer = (read(found) - goal).square().sum(-1) < (read(before) - goal).square().sum(-1)
        flat[at] = torch.where(nearer[:, None], found, before)
        return before

    def fade(self, momentum: float) -> None:
        """Let the gradients that came weigh less than those that come."""
        cast(Tensor, self.pull).mul_(momentum)

    def undo(self, at: Int[Tensor, " s"], before: UInt8[Tensor, "s M"]) -> None:
        self.codes.flatten(0, 1)[at] = before


class _Read(torch.autograd.Function):
    """Books and scales -> the dense weight. Packed parts alone are held for the way back."""

    @staticmethod
    def forward(ctx: Any, book: Tensor, scale: Tensor, of: WordedWeight) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.held, ctx.of = of.stored(book, scale), of
        return ctx.held.dequantize()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        q, of, G = ctx.held, ctx.of, grads[0].float()
        s, C = q.parts["scale"].float(), torch.zeros(of.experts * of.format.M * of.format.K, of.format.g, device=G.device)
        of.pull = G.clone() if of.pull is None else of.pull.add_(G)
        first = torch.arange(of.experts * of.format.M, device=G.device).view(of.experts, 1, -1) * of.format.K
        at, to = of.codes.long() + first, of.atoms(G * s).flatten(0, 1)
        for i in range(of.format.M):
            C.index_add_(0, at[..., i].flatten(), to)
        C = C.view(of.book.shape).clone()
        C[..., 0, :] = 0
        to_scale = (G * q.dequantize(torch.float32)).sum(-1, keepdim=True) * torch.where(s != 0, 1 / s, 0.0)
        return C, to_scale, None
