"""PV-Tuning on a quadratic loss, where all that the paper claims can be computed, and on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import finebits as fb
import tiny_llama
from finebits import store
from finebits.build import hosts
from finebits.refine._words import WordedWeight
from finebits.refine.base import Matching

FORMAT = fb.VQ(M=1, K=16, g=4)


class Quadratic:
    """f(Ŵ) = tr((Ŵ − W) H (Ŵ − W)ᵀ) / m for inputs whose second moment is H."""

    def __init__(self, seed: int, format: fb.VQ = FORMAT) -> None:
        gen = torch.Generator().manual_seed(seed)
        self.W = torch.randn(32, 32, generator=gen)
        self.H = (A := torch.randn(32, 64, generator=gen) * torch.linspace(0.7, 1.4, 32)[:, None]) @ A.mT / 64
        self.one = WordedWeight(fb.quantize(self.W, format))

    def __call__(self, W: Tensor | None = None) -> Tensor:
        D = (self.one.dense() if W is None else W) - self.W
        return ((D @ self.H) * D).sum() / len(D)

    def gradient(self) -> None:
        self.one.pull = None
        self().backward()

    def matching(self) -> Matching:
        root = torch.linalg.cholesky(self.H + 1e-6 * torch.eye(32))
        states = lambda W: (root.mT @ W.mT)[None]  # noqa: E731
        return Matching(lambda i: states(self.one.dense()), lambda i: states(self.W), [], 1, scales=self.one.tensors, words=[self.one])


def test_gradients_of_words_and_scales_are_sums_over_their_atoms() -> None:
    for format in (FORMAT, fb.VQ(M=2, K=8, g=4)):
        f = Quadratic(0, format)
        f.gradient()
        C, s = (p.detach().clone().requires_grad_() for p in (f.one.book.float(), f.one.scale))
        q = f.one.codes.long()[0]
        W = s * sum(C[i][q[:, i]] for i in range(format.M)).reshape(32, 32)  # type: ignore[union-attr]
        f(W).backward()
        wanted = C.grad.clone()  # type: ignore[union-attr]
        wanted[:, 0] = 0  # word 0 stays zero
        torch.testing.assert_close(f.one.tensors[0].grad, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(f.one.tensors[1].grad, s.grad * f.one.scale, rtol=1e-4, atol=1e-4)  # type: ignore[operator]


@pytest.mark.parametrize("share", [0.02, 0.2, 1.0])
def test_a_v_step_of_one_over_L_of_its_subspace_never_loses(share: float) -> None:
    """The theorem of the linearised V step: f(y) ≤ f(x) for η ≤ 1/L_S. With all atoms hardly a code moves, with few of them many do."""
    f, changed, gen = Quadratic(1), 0, torch.Generator().manual_seed(0)
    for _ in range(6):
        f.gradient()
        at, before = f.one.drawn(share, gen), float(f().detach())
        columns = at % 8  # of atoms in a row of 32
        worst = 0.0
        for r in (at // 8).unique():
            c = (4 * columns[at // 8 == r, None] + torch.arange(4)).flatten()
            worst = max(worst, float(torch.linalg.eigvalsh(2 / 32 * f.H[c][:, c])[-1]))
        was = f.one.move(at, 1 / worst)
        assert float(f().detach()) <= before * (1 + 1e-6)
        changed += int((f.one.codes.flatten(0, 1)[at] != was).sum())
    assert changed > 0 if share < 0.1 else changed < 0.05 * 6 * share * 256


def words_alone(f: Quadratic, steps: int = 60) -> float:
    optimizer = torch.optim.Adam(f.one.tensors, lr=5e-3)
    for _ in range(steps):
        f.gradient()
        optimizer.step()
        optimizer.zero_grad()
    return float(f().detach())


def straight_through(f: Quadratic, lr: float, steps: int = 60) -> float:
    """A buffer of the whole weight takes gradients at what it rounds to; the last iterate, as training keeps it."""
    buffer, at = f.one.dense().detach(), torch.arange(256)
    optimizer = torch.optim.Adam(f.one.tensors, lr=5e-3)
    for _ in range(steps):
        f.gradient()
        buffer = buffer - lr * f.one.pull
        optimizer.step()
        optimizer.zero_grad()
        f.one.pull = f.one.dense().detach() - buffer  # so that atoms move to what is nearest to the buffer
        f.one.move(at, 1.0)
    return float(f().detach())


def test_it_beats_words_alone_and_straight_through() -> None:
    f = Quadratic(0)
    losses = fb.PVTuning(epochs=60, lr=5e-3, share=0.1, scope="block")(f.matching())
    ours = float(f().detach())
    assert losses[-1] < losses[0] and ours < 0.97 * words_alone(Quadratic(0))
    assert ours < min(straight_through(Quadratic(0), lr) for lr in (0.1, 0.3))


def test_a_share_bounds_what_changes_and_bad_steps_are_undone() -> None:
    f = Quadratic(2)
    before = f.one.codes.clone()
    fb.PVTuning(epochs=9, lr=1e-9, share=0.05, step=0.5, scope="block")(f.matching())
    assert 0 < int((f.one.codes != before).any(-1).sum()) <= 8 * int(0.05 * 256)  # no step before the first gradient
    g = Quadratic(2)
    fb.PVTuning(epochs=3, lr=1e-9, share=1.0, step=1e4, scope="block")(g.matching())
    assert torch.equal(g.one.codes, before)


def run(model: Any, batch: Any) -> Tensor:
    return model.base_model(input_ids=batch, use_cache=False)[0]


def swept(refine: tuple, watch: Any = lambda name, losses: None, format: Any = fb.VQ(2, 16, 4)) -> Any:
    gen = torch.Generator().manual_seed(3)
    text = [torch.randint(3, 128, (2, 24), generator=gen) for _ in range(3)]
    model = tiny_llama.fresh()
    return fb.sweep(model, tiny_llama.plan(format=format, init=fb.QERA()), text, run, refine=refine, head=model.lm_head, watch=watch)


@pytest.mark.parametrize("scope", ["model", "block"])
def test_a_model_comes_nearer_in_the_same_bytes(scope: Any, tmp_path: Path) -> None:
    told: dict[str, list[float]] = {}
    plain, model = swept(()), swept((fb.PVTuning(epochs=4, scope=scope),), told.__setitem__)
    assert len(told) == (1 if scope == "model" else 2)
    for name, losses in told.items():
        assert sum(losses[-3:]) < 0.97 * sum(losses[:3]), name
    changed = 0
    for (_, a), (_, b) in zip(hosts(plain), hosts(model), strict=True):
        changed += int((a.weight.codes() != b.weight.codes()).sum())
        assert b.weight.nbytes == a.weight.nbytes and not torch.equal(a.weight.parts["book"], b.weight.parts["book"])
        assert not b.weight.parts["book"][:, 0].any() and not b.weight.requires_grad
    assert changed > 0
    fb.save(model, tmp_path / "a")
    back = store.apply(tiny_llama.fresh(), store.read(tmp_path / "a"))
    assert torch.equal(tiny_llama.logits(model), tiny_llama.logits(back))


def test_experts_have_books_of_their_own() -> None:
    W, G = torch.randn(2, 8, 16), torch.randn(2, 8, 16)
    both = WordedWeight(fb.quantize(W, FORMAT))
    (both.dense() * G).sum().backward()
    for e in range(2):
        alone = WordedWeight(fb.quantize(W[e], FORMAT))
        (alone.dense() * G[e]).sum().backward()
        torch.testing.assert_close(both.tensors[0].grad[e], alone.tensors[0].grad)
        alone.move(torch.arange(32), 0.3)
        both.move(torch.arange(32) + 32 * e, 0.3)
        assert torch.equal(both.codes[e], alone.codes[0])


def test_other_formats_and_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="PVTuning moves codes among the words of codebooks, and Int.* take efficient_qat"):
        swept((fb.PVTuning(),), format=fb.Int(2))
    with pytest.raises(ValueError, match="share is at most 1"):
        fb.PVTuning(share=2.0)
    with pytest.raises(ValueError, match="it can be block or model"):
        fb.PVTuning(scope="all")  # type: ignore[arg-type]
