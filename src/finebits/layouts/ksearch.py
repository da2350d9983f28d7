"""Scales and minima of GGUF's super-blocks (finebits.layouts.kquants), searched for the least Σ w_j (ŵ_j − x_j)².

1. Every group alone, in float32: scales that put its end onto FACTORS of the last code; of the codes which each gives, the scale (and minimum)
   that is their weighted least squares answer; the best of them, and REFITS rounds of codes to nearest and least squares again.
2. Steps d and e so that the largest scale and minimum are reached, and ROUNDS times: the integer scale of a group among three neighbours, its
   minimum the least squares answer to their codes, codes to nearest; then d and e as least squares over all groups, rounded to float16 and
   kept where the error of the super-block becomes smaller.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from finebits.errors import Invalid
from finebits.layouts.kquants import KINDS, SUPER, Kind, Supers, to_bytes
from finebits.quantizers.base import check_finite

FACTORS = [t / 10 for t in range(-9, 10, 2)]
REFITS, ROUNDS = 2, 3
AT_ONCE = 512  # super-blocks: what is on the way stays in a cache


def encode(W: Float[Tensor, "*e m n"], kind: str, weight: Float[Tensor, " n"] | None = None) -> np.ndarray:
    """Bytes (*e, m, n/256·size); `weight`, of columns, says how much an error in them counts. Raises ValueError where rows are no whole
    super-blocks, or a weight is not finite.

    >>> encode(torch.randn(2, 512), "Q4_K").shape
    (2, 288)
    """
    n, k = W.shape[-1], KINDS[kind]
    if n % SUPER:
        raise Invalid(f"{kind} has super-blocks of {SUPER}, and rows of this weight are {n}: take a type with blocks of 32")
    check_finite(W)
    x = W.reshape(-1, SUPER // k.group, k.group)
    w = torch.ones(1, n) if weight is None else weight.float().clamp(min=1e-12)[None]
    w = w.reshape(-1, *x.shape[1:])
    out = torch.empty(len(x), k.size, dtype=torch.uint8)
    for i in range(0, len(x), AT_ONCE):
        part = x[i : i + AT_ONCE].float()
        out[i : i + AT_ONCE] = to_bytes(found(part, w[torch.arange(i, i + len(part)) % len(w)], k), kind)
    return out.reshape(*W.shape[:-1], -1).numpy()


def found(x: Float[Tensor, "k g b"], w: Float[Tensor, "k g b"], kind: Kind) -> Supers:
    """The super-blocks.

    >>> found(torch.zeros(1, 16, 16), torch.ones(1, 16, 16), KINDS["Q6_K"]).values().abs().max()
    tensor(0.)
    """
    s, m = alone(x, w, kind)
    d = _reaching(s, kind)
    e = None if m is None else (m.amax(-1, keepdim=True) / kind.deepest).half()
    scales = _steps(s, d).clamp(kind.least, kind.most)
    minima = None if m is None or e is None else _steps(m, e).clamp(0, kind.deepest)
    best = _coded(x, w, kind, scales, minima, d, e)
    for _ in range(ROUNDS):
        best = _neighbours(x, w, kind, *best)
        d, e = _steps_of(x, w, best[0])
        again = _coded(x, w, kind, best[0].scales.float(), _float(best[0].minima), d, e)
        less = again[1].sum(-1, keepdim=True) < best[1].sum(-1, keepdim=True)
        best = _chosen(less, again, best)
    return best[0]


def plain(
    x: Float[Tensor, "k b"], low: int, high: int, minimum: bool, weight: Float[Tensor, "k b"] | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Blocks that stand alone: codes from `low` to `high`, float16 scales (k, 1), and minima −m of any sign, or none. `weight` says how much
    errors count.

    >>> codes, scale, shift = plain(torch.arange(4.0)[None] + 5, 0, 3, True)
    >>> scale * codes + shift
    tensor([[5., 6., 7., 8.]])
    """
    kind, w = Kind(low, high, x.shape[-1], 0, 0, int(minimum), 0, -torch.inf), torch.ones_like(x) if weight is None else weight
    s, m = alone(x, w, kind)
    best, kept = torch.full_like(s, torch.inf), (x, s.half(), None if m is None else m.half())
    for _ in range(REFITS):
        s, m = s.half().float(), None if m is None else m.half().float()
        q = _codes(x, s, m, kind)
        error = _error(x, w, q, s, m)
        less, best = error < best, torch.minimum(error, best)
        codes, shift = (
            torch.where(less[..., None], q, kept[0]),
            None if m is None or kept[2] is None else torch.where(less, m.half(), kept[2]),
        )
        kept = codes, torch.where(less, s.half(), kept[1]), shift
        s, m = _answer(x, w, q, kind)
    return kept[0], kept[1][..., None], None if kept[2] is None else -kept[2][..., None]


def alone(x: Tensor, w: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """1: scales and minima (k, g) of groups as if each were held in float32."""
    if kind.deepest:
        m = (-x.amin(-1)).clamp(min=kind.floor)
        tries = [(x.amax(-1) + m) / (kind.high + f) for f in FACTORS]
    else:
        m, end = None, x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]
        tries = [end / (last + f) for last in ((kind.low, kind.high) if kind.high < 8 else (kind.low,)) for f in FACTORS]
    best, s_best, m_best = torch.full_like(x[..., 0], torch.inf), torch.zeros_like(x[..., 0]), None if m is None else torch.zeros_like(m)

    def meet(s: Tensor, m: Tensor | None) -> None:
        nonlocal best, s_best, m_best
        q = _codes(x, s, m, kind)
        s, m = _answer(x, w, q, kind)
        error = _error(x, w, q, s, m)
        less = error < best
        best, s_best = torch.where(less, error, best), torch.where(less, s, s_best)
        m_best = m if m is None or m_best is None else torch.where(less, m, m_best)

    for s in tries:
        meet(s, m)
    for _ in range(REFITS):
        meet(s_best, m_best)
    return s_best, m_best


def _codes(x: Tensor, s: Tensor, m: Tensor | None, kind: Kind) -> Tensor:
    inverse = torch.where(s == 0, 0, 1 / s)[..., None]
    shifted = x if m is None else x + m[..., None]
    return (shifted * inverse).nan_to_num_(0.0).round_().clamp_(kind.low, kind.high)


def _error(x: Tensor, w: Tensor, q: Tensor, s: Tensor, m: Tensor | None) -> Tensor:
    y = s[..., None] * q - x
    return (w * (y if m is None else y - m[..., None]).square_()).sum(-1)


def _answer(x: Tensor, w: Tensor, q: Tensor, kind: Kind) -> tuple[Tensor, Tensor | None]:
    """argmin over s (and m ≥ floor) of Σ w (s q − m − x)², by group."""
    wq = w * q
    qq, qx = (wq * q).sum(-1), (wq * x).sum(-1)
    through = torch.where(qq > 0, qx / qq, 0)
    if not kind.deepest:
        return through, None
    one, q1, x1 = w.sum(-1), wq.sum(-1), (w * x).sum(-1)
    D = one * qq - q1 * q1
    s = torch.where(D > 0, (one * qx - q1 * x1) / D, through)
    m = (s * q1 - x1) / one
    s, m = torch.where(m < kind.floor, through, s), m.clamp(min=kind.floor)
    return s.clamp(min=0), torch.where(s > 0, m, (-x1 / one).clamp(min=kind.floor))


def _reaching(s: Tensor, kind: Kind) -> Tensor:
    """d (k, 1): the largest scale is `most` steps, or `least` where scales have signs: there is one more of these."""
    end = s.gather(-1, s.abs().argmax(-1, keepdim=True))
    return (end / (kind.least or kind.most)).half()


def _steps(value: Tensor, step: Tensor) -> Tensor:
    return torch.where(step == 0, 0, value / step.float()).nan_to_num_(0.0).round()


Held = tuple[Supers, Tensor]  # and the errors of groups


def _coded(x: Tensor, w: Tensor, kind: Kind, scales: Tensor, minima: Tensor | None, d: Tensor, e: Tensor | None) -> Held:
    s, m = d.float() * scales, None if minima is None or e is None else e.float() * minima
    q = _codes(x, s, m, kind)
    whole = None if minima is None else minima.to(torch.int16)
    return Supers(q.to(torch.int16), scales.to(torch.int16), d, whole, e), _error(x, w, q, s, m)


def _neighbours(x: Tensor, w: Tensor, kind: Kind, supers: Supers, error: Tensor) -> Held:
    """The best scale of each group among three, with the minimum that answers its codes."""
    best = supers, error
    for step in (-1, 0, 1):
        scales, minima = (supers.scales.float() + step).clamp(kind.least, kind.most), _float(supers.minima)
        if minima is not None and supers.e is not None:
            q = _codes(x, supers.d.float() * scales, supers.e.float() * minima, kind)
            m = ((supers.d.float() * scales)[..., None] * q - x).mul_(w).sum(-1) / w.sum(-1)
            minima = _steps(m, supers.e).clamp(0, kind.deepest)
        again = _coded(x, w, kind, scales, minima, supers.d, supers.e)
        best = _chosen(again[1] < best[1], again, best)
    return best


def _steps_of(x: Tensor, w: Tensor, s: Supers) -> tuple[Tensor, Tensor | None]:
    """d (and e) as the least squares answer to all else of a super-block."""
    sum_ = lambda y: y.flatten(-2).sum(-1, keepdim=True)  # noqa: E731
    a = s.scales.float()[..., None] * s.codes
    aa, ax = sum_(w * a * a), sum_(w * a * x)
    if s.minima is None or s.e is None:
        return torch.where(aa > 0, ax / aa, 0).half(), None
    b = -s.minima.float()[..., None].expand_as(a)
    bb, ab, bx = sum_(w * b * b), sum_(w * a * b), sum_(w * b * x)
    D = aa * bb - ab * ab
    good = D > 1e-6 * aa * bb
    d, e = torch.where(good, (bb * ax - ab * bx) / D, s.d.float()), torch.where(good, (aa * bx - ab * ax) / D, s.e.float())
    return d.half(), e.half()


def _chosen(which: Tensor, a: Held, b: Held) -> Held:
    """a where `which` (of groups, or of super-blocks) says so, else b."""
    if which.shape[-1] == 1:
        d, e = torch.where(which, a[0].d, b[0].d), None if a[0].e is None or b[0].e is None else torch.where(which, a[0].e, b[0].e)
    else:
        d, e = b[0].d, b[0].e
    minima = None if a[0].minima is None or b[0].minima is None else torch.where(which, a[0].minima, b[0].minima)
    codes, scales = torch.where(which[..., None], a[0].codes, b[0].codes), torch.where(which, a[0].scales, b[0].scales)
    return Supers(codes, scales, d, minima, e), torch.where(which, a[1], b[1])


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float()
