"""PV-Tuning: Beyond Straight-Through Estimation for Extreme LLM Compression.  Malinovskii et al., NeurIPS 2024.  arXiv:2405.14852v2.
Use it for vector codebooks (vq), whose codes nothing else refines; for integers take efficient_qat.

A quantized weight x has a partition P (its codes: which of its entries are equal) and values V (its words and scales). Alternately (Alg. 1)

    P step    argmin f(y) over y of the partition of x:    gradient steps on words and scales under the codes as they are
    V step    argmin f(y) over y with the values of x:     other codes

The V step in its form for large spaces (Alg. 2) is linearised, and restricted to a subspace S, the share τ of atoms with large gradients:

    y = argmin ‖y − (x − η ∇f(x))‖² over S, the rest as it is,    f(y) ≤ f(x) for η ≤ 1/L_S

With L for all atoms at once η is so small that each keeps its code; with L_S of a few it is not. No weight is kept beside the codes, as
straight-through estimation does, and so none drifts from what the codes say.

Deviations: S is drawn by squared gradients, since the largest of all may belong to atoms that no other code serves better. 1/L_S is not known:
atoms move by `step` times their own size at first, along gradients of earlier batches that decay by `momentum`, and the next batch judges: a V
step that does not lower its loss is undone and halves the steps after it, a good one makes them a tenth longer. (Judged by a batch of its own
gradient, every step passes, and the model fits one batch after the other.) The authors use Adam here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.refine import _family as family
from finebits.refine.base import Matching, Refine

SHORTER, LONGER = 0.5, 1.1


@dataclass(frozen=True)
class PVTuning(Refine):
    """`epochs` passes over the calibration batches: for each a V step on the `share` τ of atoms, and a P step at learning rates that fall from
    `lr` to 0. The `scope` is all blocks together, as in the paper, or "block", in the memory of one. `chunk` bounds the logits at once.

    >>> from finebits.refine._words import WordedWeight
    >>> from finebits.refine.base import Matching, Refine
    >>> W, x = torch.randn(16, 32), torch.randn(64, 32)
    >>> one = WordedWeight(fb.quantize(W, fb.VQ(M=1, K=16, g=4)))
    >>> ours, theirs = (lambda i: (x @ one.dense().mT)[None]), (lambda i: (x @ W.mT)[None])
    >>> losses = fb.PVTuning(epochs=30, share=0.05, scope="block")(Matching(ours, theirs, [], 1, scales=one.tensors, words=[one]))
    >>> losses[-1] < 0.9 * losses[0]
    True
    """

    epochs: int = 2
    lr: float = 1e-3
    share: float = 0.01
    step: float = 0.5
    momentum: float = 0.9
    chunk: int = 256
    scope: Literal["block", "model"] = "model"  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        family.check(self, epochs=self.epochs, lr=self.lr, share=self.share, step=self.step, chunk=self.chunk)
        if self.share > 1 or not 0 <= self.momentum < 1:
            raise Invalid(f"share is {self.share} and momentum {self.momentum}; share is at most 1, and momentum at least 0 and below 1")
        if self.scope not in ("block", "model"):
            raise Invalid(f"scope is {self.scope!r}; it can be block or model")

    @property
    def moves(self) -> frozenset[str]:
        """Codes, with words and scales.

        >>> sorted(fb.PVTuning().moves)
        ['scales', 'words']
        """
        return frozenset({"scales", "words"})

    def __call__(self, matching: Matching) -> list[float]:
        loss = family.compared(matching, self.scope, "PVTuning", self.chunk)
        return family.descend(matching, loss, self.epochs, self.lr, self.lr, self._v_step(matching, loss))

    def _v_step(self, matching: Matching, loss: Callable[[int], Tensor]) -> Callable[[int], None]:
        step, gen = self.step, torch.Generator().manual_seed(0)

        @torch.no_grad()
        def moved(batch: int) -> None:
            nonlocal step
            at = {one: one.drawn(self.share, gen) for one in matching.words if one.pull is not None}
            if not at:
                return
            value = float(loss(batch))
            before = {one: one.move(chosen, step * one.unit(chosen)) for one, chosen in at.items()}
            lower = float(loss(batch)) <= value
            step *= LONGER if lower else SHORTER
            for one, codes in before.items():
                if not lower:
                    one.undo(at[one], codes)
                one.fade(self.momentum)

        return moved
