"""What quantizers of this folder share: experts one by one, the Gram matrix and what is made of it once, a search for the scale of every
block, the choice between two candidates.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from finebits import kernels
from finebits.errors import Invalid
from finebits.formats._stores import stored
from finebits.formats.base import Format, Parts, Scales, level_tensor
from finebits.linalg import check_statistic
from finebits.qtensor import QTensor
from finebits.quantizers.base import check_finite
from finebits.stats.base import Stats, need
from finebits.stats.gram import Gram

FACTORS = (1.0, 0.85, 0.7, 0.55, 0.4)  # of the format's own scale
REFITS = 3


def experts(W: Float[Tensor, "*e m n"], one: Callable[[Tensor], QTensor]) -> QTensor:
    """A quantizer of matrices over a stack of them."""
    if W.ndim == 2:
        return one(W)
    flat = [one(w) for w in W.flatten(0, -3)]
    parts = {k: torch.stack([q.parts[k] for q in flat]).unflatten(0, W.shape[:-2]) for k in flat[0].parts}
    return QTensor(parts, flat[0].format, W.shape, flat[0].dtype)


def calibrated(
    W: Float[Tensor, "*e m n"],
    format: Format,
    stats: Stats,
    who: str,
    round_: Callable[[Tensor, Tensor], tuple[Tensor, Parts]],
) -> QTensor:
    """A quantizer of matrices that reads the Gram matrix R of the inputs: `round_(w, R)` gives codes and scales, w in float32.

    A row that rounding to nearest serves better (measured by R) keeps it. Raises ValueError where W or R holds NaN or Inf, or R is missing
    or another module's.
    """
    check_finite(W)
    format.row_codes(W.shape[-1])  # refuses a row that its atoms do not divide
    R = need(stats, Gram, who).to(W.device)
    check_gram(R, W, who)

    def one(w: Tensor) -> QTensor:
        codes, parts = round_(w.float(), R)
        q = QTensor.from_codes(codes, parts, format, dtype_of(w))
        return better(q, plain(w, format), lambda q: output_error(q, w, R))

    return experts(W, one)


def trained(
    who: Any, W: Float[Tensor, "*e m n"], format: Format, stats: Stats, train: Callable[[Tensor, Tensor], tuple[Tensor, Parts]]
) -> QTensor:
    """`calibrated` of a quantizer that trains against the Gram matrix with `who.damp` of its mean on the diagonal: `train(w, H)` gives codes
    and scales. Vector formats are rounded to nearest."""

    def round_(w: Tensor, R: Tensor) -> tuple[Tensor, Parts]:
        if is_vector(format):
            parts = format.fit(w)
            return format.encode(w, format.scales(parts, w.shape[-1])), parts
        return train(w, damped(R, who.damp))

    return calibrated(W, format, stats, type(who).__name__, round_)


_cache: dict[str, tuple[weakref.ref[Tensor], Hashable, Tensor]] = {}


def once(stats: Stats, key: tuple[str, Hashable], make: Callable[[], Tensor]) -> Tensor:
    """make(), which depends on the Gram matrix and the key alone, or what it gave when the same quantizer was last called with the same.

    Alternations quantize one matrix many times under one statistic, and modules that read the same tensor share theirs. One value is held a
    name (the key's first part), and a statistic that takes in more, or is gone, is another one.
    """
    total = stats[Gram].total
    assert total is not None
    cached = _cache.get(key[0])
    if cached is None or cached[0]() is not total or cached[1] != key[1]:
        cached = _cache[key[0]] = weakref.ref(total, lambda _: _cache.pop(key[0], None)), key[1], make()
    return cached[2]


def independent(format: Format) -> bool:
    """Whether the scale of a block is held without a look at other blocks, so that it can be fitted when the block is reached."""
    return format.store.alone is not None and isinstance(format.block, int) and format.unit is None and not format.shared


def dtype_of(W: Tensor) -> torch.dtype:
    """The dtype that a quantized W gives back."""
    return W.dtype if W.is_floating_point() else torch.float32


def is_vector(format: Format) -> bool:
    """Whether codes stand for several columns, looked up in books that were made for this weight."""
    return "book" in format.shared


def atom(format: Format) -> int:
    """Columns that are coded together."""
    return getattr(format, "g", 1) if is_vector(format) else 1


def search(format: Format, W: Float[Tensor, "m n"], weight: Float[Tensor, " n"] | None = None) -> Parts:
    """Scales as stored: the best of `searched`. Vector formats keep their own fit, since their books follow the scale."""
    return format.fit(W.float()) if is_vector(format) else format.hold(searched(format, W, weight), W.float())


def fitted(how: str, format: Format, W: Float[Tensor, "m n"], weight: Float[Tensor, " n"]) -> Parts:
    """Scales as stored: the format's own (`how` is "format"), or those of a search under `weight` ("search")."""
    return search(format, W, weight) if how == "search" else format.fit(W)


def searched(format: Format, W: Float[Tensor, "m n"], weight: Float[Tensor, " n"] | None = None) -> Scales:
    """For every block the scales with the least Σ weight·(ŵ − w)² that were met, not yet as stored: FACTORS of the format's own scale, and from
    the best of them REFITS rounds of codes to nearest, then the scale (and shift) that is the least squares answer to these codes.

    A block with a shift shrinks about its middle. Where a scale is held under a second level, the candidates are compared as they would be
    held if all blocks took theirs.
    """
    W = W.float()
    n, ideal = W.shape[-1], format.ideal(W)
    native = _natively(format, W, weight, ideal)
    if native is not None:
        return native
    levels = level_tensor(format.levels(), W.device)
    middle = (levels.max() + levels.min()) / 2
    d = torch.ones_like(W[:1]) if weight is None else weight.float()[None]
    best, chosen, L = torch.full_like(ideal.scale, torch.inf), ideal, W  # L: the level of every weight under what was chosen

    def meet(candidate: Scales) -> None:
        nonlocal best, chosen, L
        as_stored = format.scales(format.hold(candidate, W), n)
        codes = format.encode(W, as_stored)
        loss = format.cut((format.decode(codes, as_stored) - W).square() * d).sum(-1)
        less = loss < best
        best = torch.where(less, loss, best)
        shift = None if candidate.shift is None or chosen.shift is None else torch.where(less, candidate.shift, chosen.shift)
        chosen = Scales(torch.where(less, candidate.scale, chosen.scale), shift)
        L = torch.where(format.spread(less, n), levels.take(codes.long()), L)

    for factor in FACTORS:
        shift = None if ideal.shift is None else ideal.shift + (1 - factor) * ideal.scale * middle
        meet(Scales(factor * ideal.scale, shift))
    for _ in range(REFITS):
        meet(_least_squares(format, W, L, d, chosen))
    return chosen


def _natively(format: Format, W: Float[Tensor, "m n"], weight: Float[Tensor, " n"] | None, ideal: Scales) -> Scales | None:
    """`searched` by a kernel: where the blocks of a row are held without a look at each other, and a fast body runs."""
    store = format.store.alone
    if store is None or format.block == "tensor" or format.unit is not None or is_vector(format):
        return None
    format.hold(ideal, W)  # raises where the store is too narrow
    d = torch.ones(W.shape[-1], device=W.device) if weight is None else weight
    scale, shift = ideal.scale.mT, None if ideal.shift is None else ideal.shift.mT
    zero = getattr(format, "form", "") == "integer"
    grid = format.grid(W.device)._replace(store=store)
    best = kernels.search(W.mT, d, scale, shift, level_tensor(format.levels(), W.device), grid, FACTORS, REFITS, zero)
    return None if best is None else Scales(best[0].mT, None if best[1] is None else best[1].mT)


def _least_squares(format: Format, W: Tensor, L: Tensor, d: Tensor, old: Scales) -> Scales:
    """argmin Σ d·(s·L + z − w)² for every block, z only where the format has one; the old values where that is no positive scale."""
    per = lambda x: format.cut(x).sum(-1)  # noqa: E731
    LL, LW = per(d * L * L), per(d * L * W)
    if old.shift is None:
        s, z = LW / LL, None
    else:
        one, Lm, Wm = per(d.expand_as(W)), per(d * L), per(d * W)
        s = (one * LW - Lm * Wm) / (one * LL - Lm * Lm)
        z = (Wm - s * Lm) / one
    good = torch.isfinite(s) & (s > 0)
    return Scales(torch.where(good, s, old.scale), None if z is None or old.shift is None else torch.where(good, z, old.shift))


def levels(format: Format, device: torch.device) -> tuple[Callable[[Tensor], Tensor], float, float]:
    """(a function that gives for every number the level nearest to it, the lowest and the highest level), at scale 1."""
    grid, values = format.grid(device), level_tensor(format.levels(), device)
    low, high = (float(x) for x in values.aminmax())
    if grid.uniform:
        return lambda u: u.round().clamp_(low, high), low, high
    ranked = values[grid.order.long()]
    return lambda u: ranked.take(torch.bucketize(u, grid.mids)), low, high


def improved(format: Format, loss: Float[Tensor, " m"], best: Float[Tensor, " m"]) -> Tensor | slice:
    """The rows whose loss is below the best they had, which is brought up to date; all or none where rows share what they are held under."""
    if rows_share(format):
        less = bool(loss.sum() < best.sum())
        rows: Tensor | slice = slice(None) if less else slice(0)
    else:
        rows = (loss < best).nonzero()[:, 0]
    best[rows] = loss[rows]
    return rows


class Adam:
    """Kingma and Ba, ICLR 2015, arXiv:1412.6980v9, in place, over tensors with a learning rate each; the first use of torch's own takes two
    seconds of imports."""

    def __init__(self, tensors: Sequence[Tensor], rates: Sequence[float], betas: tuple[float, float]) -> None:
        self.tensors, self.rates, self.betas, self.steps = tensors, rates, betas, 0
        self.moments = [(torch.zeros_like(t), torch.zeros_like(t)) for t in tensors]

    def step(self, grads: Sequence[Tensor], share: float = 1.0) -> None:
        """One step at a share of the learning rates."""
        self.steps += 1
        first, second = self.betas
        for p, rate, g, (m, v) in zip(self.tensors, self.rates, grads, self.moments, strict=True):
            m.lerp_(g, 1 - first)
            v.mul_(second).addcmul_(g, g, value=1 - second)
            size = (v / (1 - second**self.steps)).sqrt_().add_(1e-8)
            p.addcdiv_(m, size, value=-share * rate / (1 - first**self.steps))


LARGE = 1 << 20  # numbers in a Gram matrix from which on products are made in bfloat16


def times(H: Float[Tensor, "n n"]) -> Callable[[Tensor], Tensor]:
    """D -> D H for gradients that are followed: where H is large and the device computes in bfloat16, the factors are rounded to it."""
    if H.numel() < LARGE or not _computes_in_bf16(H.device.type):
        return lambda D: D @ H
    rounded = H.bfloat16()
    return lambda D: (D.bfloat16() @ rounded).float()


@functools.cache
def _computes_in_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    able = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return device == "cpu" and any(f is not None and f() for f in able)


def block_of(format: Format, n: int) -> list[int]:
    """The number of every column's block."""
    return [int(b) for b in format.spread(torch.arange(float(format.n_blocks(n)))[None], n)[0]]


def edges(n: int, lazy: int, block: int, atom: int = 1, cut: bool = False) -> list[tuple[int, int]]:
    """Columns cut into batches of about `lazy` whole atoms, so that no batch ends inside a block unless the block is longer than the batch,
    or, with `cut`, so that every block begins a batch."""
    lazy = max(lazy // atom * atom, atom)
    step = lazy // block * block or lazy
    return list(pairwise(sorted({*range(0, n, step), *(range(0, n, block) if cut or block > lazy else ()), n})))


def successive(
    format: Format, w: Float[Tensor, "c m"], U: Float[Tensor, "c c"], scales: Scales, block: list[int]
) -> tuple[list[Tensor], Float[Tensor, "c m"]]:
    """kernels.successive for every format: of atoms of g columns, U's block of g columns takes the place of U_kk.

    w holds columns as rows; `block` is the block of every atom. Gives the codes of every atom, (m, 1) each, and what it lost.
    """
    g = atom(format)
    if not is_vector(format):
        rows = lambda t: t.float().expand(w.shape[1], -1).mT.contiguous()  # noqa: E731
        scale, shift = rows(scales.scale), None if scales.shift is None else rows(scales.shift)
        of, levels = torch.tensor(block, device=w.device), level_tensor(format.levels(), w.device)
        codes, E = kernels.successive(w, U, scale, shift, of, levels, format.grid(w.device))
        return list(codes[:, :, None]), E
    w, lost, codes = w.clone(), [], []
    for k, b in zip(range(0, len(w), g), block, strict=True):
        a, here = slice(k, k + g), block_scales(scales, b)
        codes.append(format.encode(w[a].mT, here))
        lost.append(torch.linalg.solve_triangular(U[a, a].mT, w[a] - format.decode(codes[-1], here).mT, upper=False))
        w[k + g :] -= U[a, k + g :].mT @ lost[-1]
    return codes, torch.cat(lost)


def block_scales(scales: Scales, block: int) -> Scales:
    """The scales of one block of every row."""
    here = slice(block, block + 1)
    return Scales(scales.scale[..., here], None if scales.shift is None else scales.shift[..., here], scales.book)


def damped(R: Float[Tensor, "n n"], damp: float) -> Float[Tensor, "n n"]:
    """R + damp·mean(diag R)·I in float32; a zero matrix counts as the identity, as in linalg.damped_cholesky."""
    mean = float(R.diagonal().mean())
    one = torch.eye(len(R), device=R.device)
    return R.float() + damp * mean * one if mean > 0 else one


def rows_share(format: Format) -> bool:
    """Whether rows share what they are held under, so that a better iterate can only be taken for all of them."""
    return format.block == "tensor" or bool(format.shared)


def output_error(q: QTensor, W: Float[Tensor, "m n"], R: Float[Tensor, "n n"]) -> Float[Tensor, " m"]:
    """tr (Ŵ − W) R (Ŵ − W)ᵀ, row by row."""
    D = q.dequantize(torch.float32) - W.float()
    return (D @ R * D).sum(-1)


def better(ours: QTensor, plain: QTensor, loss: Callable[[QTensor], Float[Tensor, " m"]]) -> QTensor:
    """`ours`, with the rows of `plain` where they lose less. Rows whose shared parts differ are kept or given up together."""
    mine, theirs = loss(ours), loss(plain)
    shared = ours.format.shared & ours.parts.keys()
    if any(not torch.equal(ours.parts[k], plain.parts[k]) for k in shared):
        return plain if theirs.sum() < mine.sum() else ours
    worse = (theirs < mine)[:, None]
    parts = {k: p if k in shared else torch.where(worse, plain.parts[k], p) for k, p in ours.parts.items()}
    return QTensor(parts, ours.format, ours.shape, ours.dtype)


def plain(W: Float[Tensor, "*e m n"], format: Format) -> QTensor:
    """Round to nearest under the format's own scales: in one fused pass where these are plain, else fit, then encode."""
    rounding = format.rounding(W.device)
    if rounding is None:
        parts = format.fit(W)
        codes = format.packed(W, format.scales(parts, W.shape[-1]))
        return QTensor({"codes": codes, **parts}, format, W.shape, dtype_of(W))
    codes, scale, shift = kernels.quantize(W, rounding)
    parts = {"codes": codes, "scale": stored(scale, rounding.store)}
    if shift is not None:
        parts["shift"] = stored(shift, rounding.store)
    return QTensor(parts, format, W.shape, dtype_of(W))


def check_gram(R: Tensor, W: Tensor, who: str) -> None:
    """Raise if R is not the Gram matrix of W's inputs, or holds NaN or Inf."""
    n = W.shape[-1]
    if R.shape != (n, n):
        raise Invalid(f"{who} needs the Gram matrix of {n} inputs and got one of {tuple(R.shape)}: the statistics are another module's")
    check_statistic(R)


def check_training(quantizer: Any, *rates: str) -> None:
    """Raise if steps, lr, damp or one of `rates` of a quantizer that is trained mean nothing."""
    least = ("steps", *rates, "damp")
    if not (quantizer.lr > 0 and all(getattr(quantizer, k) >= 0 for k in least)):
        wanted = ", ".join(f"{k} >= 0" for k in least)
        raise Invalid(f"{type(quantizer).__name__} needs lr > 0, {wanted}; got {quantizer}")


def check_settings(quantizer: Any) -> None:
    """Raise if damp, scales or lazy of a quantizer mean nothing."""
    if not quantizer.damp >= 0:
        raise Invalid(f"damp is {quantizer.damp}; it is a share of the mean diagonal of the Gram matrix, at least 0")
    if quantizer.scales not in ("format", "search"):
        raise Invalid(f"scales is {quantizer.scales!r}; it can be 'format' (the format's own) or 'search'")
    if quantizer.lazy < 1:
        raise Invalid(f"lazy is {quantizer.lazy}; it counts columns, at least 1")
