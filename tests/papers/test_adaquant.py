"""AdaQuant and AdaRound: what training against the output gains over rounding, and what only one of the two can do."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.formats.base import Scales
from finebits.quantizers._family import LARGE, Adam, damped, searched, times
from finebits.quantizers.adaquant import AdaQuant
from finebits.quantizers.adaround import AdaRound
from finebits.quantizers.mse import MSE
from finebits.quantizers.rtn import RTN
from finebits.stats.gram import Gram
from finebits.stats.mean_square import MeanSquare
from papers.gram import inputs, output_error, seen


def split(n: int) -> tuple[dict, torch.Tensor]:
    """Statistics of one half of the rows, and the Gram matrix of the other."""
    X = inputs(800, n, decay=1)
    return seen(X[:400], None, Gram, MeanSquare), X[400:].mT @ X[400:] / 400


@pytest.mark.parametrize("quantizer", [AdaQuant(), AdaRound()], ids=str)
@pytest.mark.parametrize("bits", [2, 3])
def test_the_output_error_of_other_rows_falls(quantizer: AdaQuant, bits: int) -> None:
    W, (stats, R) = torch.randn(16, 90), split(90)
    error = lambda q: output_error(q(W, fb.Int(bits, 32, symmetric=False), stats).dequantize(), W, R)  # noqa: E731
    assert error(quantizer) <= (0.7 if isinstance(quantizer, AdaQuant) else 0.75) * error(RTN())
    assert error(quantizer) <= 0.9 * error(MSE(weighting="inputs"))


def test_free_weights_and_scales_matter_at_two_bits_and_rounding_alone_suffices_at_four() -> None:
    W, (stats, R) = torch.randn(16, 90), split(90)
    error = lambda q, bits: output_error(q(W, fb.Int(bits, 32, symmetric=False), stats).dequantize(), W, R)  # noqa: E731
    assert error(AdaQuant(), 2) < 0.95 * error(AdaRound(), 2)
    assert error(AdaRound(), 4) < 1.2 * error(AdaQuant(), 4)


@pytest.mark.parametrize("format", [fb.NF(3, 16), fb.Int(2, 16, symmetric=False), fb.Int(3, 16)], ids=str)
def test_adaround_stays_between_the_two_levels_around_every_weight(format: fb.NF) -> None:
    W, (stats, _) = torch.randn(5, 50), split(50)
    q = AdaRound()(W, format, stats)
    scales = format.scales({k: v for k, v in q.parts.items() if k != "codes"}, 50)
    grid = torch.stack([format.decode(torch.full((5, 50), c, dtype=torch.uint8), scales) for c in range(2**format.bits)]).sort(0).values
    got = q.dequantize()
    inside = (W <= grid[-1]) & (W >= grid[0])
    between = (grid > torch.minimum(W, got) + 1e-5) & (grid < torch.maximum(W, got) - 1e-5)
    assert not (between & inside).any() and inside.float().mean() > 0.6
    nearest = format.decode(format.encode(W, scales), scales)
    assert 0.02 < (got != nearest).float().mean() < 0.6


def test_adaround_comes_near_the_best_of_all_roundings() -> None:
    """Seven columns, one scale: 2^7 choices, tried one by one."""
    W, format = torch.randn(40, 7), fb.Int(3, 16)
    stats = seen(torch.randn(60, 7) @ torch.randn(7, 7), None, Gram)
    R = damped(stats[Gram].value(), 0.01)
    held = format.scales(format.hold(searched(format, W, R.diagonal()), W), 7)
    u = W / held.scale
    ups = torch.cartesian_prod(*[torch.arange(2.0)] * 7)
    every = (u.floor() + ups[:, None]).clamp(-3, 3) * held.scale - W
    losses = ((every @ R) * every).sum(-1)  # (128, 40)
    D = AdaRound(steps=500)(W, format, stats).dequantize() - W
    ours = ((D @ R) * D).sum(-1)
    plain = losses[(ups == ((u - u.floor()) > 0.5)[:, None].float()).all(-1).int().argmax(1), torch.arange(40)]
    best = losses.amin(0)
    assert (ours - best).sum() < 0.25 * (plain - best).sum()


def test_adaquants_gradients_are_those_of_the_straight_through_estimator() -> None:
    """One step of Adam goes against the sign of the gradient: autograd's, with round replaced by the identity."""
    W, format = torch.randn(4, 16), fb.Int(2, 16, symmetric=False)
    X = inputs(50, 16)
    H = damped(seen(X, None, Gram)[Gram].value(), 0.01)
    scale, shift = searched(format, W, H.diagonal())[:2]
    V, a, z = (torch.zeros_like(t, requires_grad=True) for t in (W, scale, shift))
    s, low = scale * (1 + a), shift + z * scale
    u = (W + V * scale - low) / s
    q = u.clamp(0, 3)
    q = q + (q.round() - q).detach()
    D = q * s + low - W
    ((D @ H) * D).sum().backward()
    found: list[list[torch.Tensor]] = []
    was = Adam.step

    def step(self: Adam, grads: list[torch.Tensor], share: float) -> None:
        found.append([g.clone() for g in grads])
        was(self, grads, share)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Adam, "step", step)
        AdaQuant(steps=1)(W, format, seen(X, None, Gram))
    for ours, theirs in zip(found[0], (V.grad, a.grad, z.grad), strict=True):
        torch.testing.assert_close(2 * ours, theirs, rtol=1e-3, atol=1e-4)


def test_no_step_is_the_search_and_settings_are_checked() -> None:
    W, (stats, _) = torch.randn(5, 50), split(50)
    scales = searched(fb.NF(3), W, damped(stats[Gram].value(), 0.01).diagonal())
    q = AdaQuant(steps=0)(W, fb.NF(3), stats)
    rtn = RTN()(W, fb.NF(3), stats)
    kept = (q.parts["scale"] != rtn.parts["scale"]).any(-1)
    torch.testing.assert_close(q.parts["scale"][kept], Scales(scales.scale).scale[kept])
    for cls in (AdaQuant, AdaRound):
        for setting in ({"steps": -1}, {"lr": 0.0}, {"damp": -1.0}):
            with pytest.raises(ValueError, match="needs lr > 0, steps >= 0"):
                cls(**setting)


def test_adam_is_torchs() -> None:
    ours, theirs = [torch.ones(3, 2), torch.zeros(4)], [torch.ones(3, 2), torch.zeros(4)]
    adam = Adam(ours, (0.1, 0.02), (0.5, 0.99))
    reference = torch.optim.Adam([{"params": [p], "lr": lr} for p, lr in zip(theirs, (0.1, 0.02), strict=True)], betas=(0.5, 0.99))
    for _ in range(5):
        grads = [torch.randn(3, 2), torch.randn(4)]
        adam.step(grads)
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_large_products_are_rounded_and_no_more_than_that() -> None:
    n = int(LARGE**0.5)
    R = torch.randn(n, n) / n**0.5
    D = torch.randn(3, n)
    torch.testing.assert_close(times(R)(D), D @ R, rtol=0, atol=0.05)
    assert torch.equal(times(R[:9, :9])(D[:, :9]), D[:, :9] @ R[:9, :9])
