"""What a matrix costs and loses under every candidate.

W is the weight, Ŵ what a candidate makes of it, D = W − Ŵ. The losses:

    weight        ‖D‖² / ‖W‖²
    output        Σ d_j D_ij² / Σ d_j W_ij²,  d = mean of x² over calibration tokens: errors weighed by the inputs that meet them
    fisher, kl    ½ c Σ F_ij D_ij²,           F = diagonal of the Fisher information, g = ∂L/∂y for labels that the model itself draws

The last is a second-order estimate of KL(W ‖ Ŵ) in nats a labelled token (c is the number of tokens seen for each labelled one), so that
matrices that matter more to the model weigh more, whereas the first two count every matrix alike. `kl` is the same sum with a curve to the KL
that is really measured (`plan.kl_curve`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from finebits.adapters.base import Adapter, Base, Codes, Merges
from finebits.errors import Invalid
from finebits.formats.base import Format
from finebits.init.base import BoundQuantizer, begin
from finebits.plan.base import Option, Spec, served
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.fisher_diag import FisherDiag
from finebits.stats.gram import Gram
from finebits.stats.mean_square import MeanSquare

OBJECTIVES: dict[str, frozenset[type[Statistic]]] = {
    "weight": frozenset(),
    "output": frozenset({MeanSquare}),
    "fisher": frozenset({FisherDiag}),
    "kl": frozenset({FisherDiag}),
}
SERVED = 4  # bytes that a number of an adapter takes as it is saved

Error = Callable[[Tensor], float]


@dataclass(frozen=True)
class Cell:
    """One candidate for one matrix: exact bytes of the weight, those of them that are no codes, the adapter's numbers (trained, and stored
    beside those), the loss, and what is served in bytes where that is codes which the adapter makes.

    >>> W, spec = torch.ones(8, 128), fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=8))
    >>> row(W, [spec], {}, error("weight", W, {}), dense_width=2)  # what is all ones loses nothing
    [Cell(bytes=576, overhead=64, trained=1088, frozen=0, loss=0.0, served=None)]
    """

    bytes: int
    overhead: int
    trained: int
    frozen: int
    loss: float
    served: int | None = None


NUMBERS: dict[type[Statistic], Callable[[int, int], int]] = {Gram: lambda m, n: n * n, MeanSquare: lambda m, n: n}


def statistics_bytes(statistics: Iterable[type[Statistic]], m: int, n: int) -> int:
    """Bytes of the statistics of an (m, n) matrix.

    >>> statistics_bytes({fb.Gram, fb.MeanSquare}, 8, 128)  # four bytes of 128² and of 128 numbers
    66048
    """
    return sum(4 * NUMBERS.get(S, lambda m, n: m * n)(m, n) for S in statistics)


@functools.cache
def scales(format: Format, m: int, n: int) -> int:
    """How many scales, and shifts, an (m, n) weight of a format has.

    >>> scales(fb.NF(4, block=64), 8, 128), scales(fb.Int(4, block=64, symmetric=False), 8, 128)  # with a minimum each
    (16, 32)
    """
    row = format.ideal(torch.ones(1, n))
    return (1 if format.block == "tensor" else m) * sum(t.numel() for t in row[:2] if t is not None)


@functools.cache
def numbers(adapter: Adapter | None, m: int, n: int) -> tuple[int, int]:
    """What an adapter over an (m, n) weight holds: (numbers trained, numbers stored beside them).

    >>> numbers(fb.LoRA(rank=8), 8, 128), numbers(fb.LoRAXS(rank=8), 8, 128)  # r(m + n) are trained, or frozen around the r² that are
    ((1088, 0), (64, 1088))
    """
    return (0, 0) if adapter is None else (adapter.size(m, n), adapter.stored(m, n))


def together(adapters: Iterable[tuple[Adapter | None, tuple[int, ...]]]) -> tuple[int, int]:
    """The same of adapters over weights of these shapes, what is shared counted once.

    >>> together([(fb.LoRA(rank=8), (8, 128)), (None, (8, 128)), (fb.LoRA(rank=8), (8, 128))])
    (2176, 0)
    """
    trained = frozen = 0
    for (adapter, (*_, m, n)), count in Counter(adapters).items():
        if adapter is not None:
            (own, still), (ours, theirs) = numbers(adapter, m, n), adapter.common(m, n)
            trained, frozen = trained + count * own - (count - 1) * ours, frozen + count * still - (count - 1) * theirs
    return trained, frozen


def again(adapters: Iterable[tuple[Adapter | None, tuple[int, ...]]]) -> int:
    """How many numbers these adapters hold together that another one of them holds already.

    >>> again(2 * [(fb.LoRA(rank=8), (8, 128))]), again(2 * [(fb.VeRA(rank=8), (8, 128))])  # A and B of the second
    (0, 1088)
    """
    each = list(adapters)
    return sum(sum(numbers(adapter, *shape[-2:])) for adapter, shape in each) - sum(together(each))


def error(objective: str, W: Float[Tensor, "m n"], stats: Stats, tokens: float = 1.0) -> Error:
    """D -> the loss of `objective`. `tokens` is c, how many tokens the statistics saw for each labelled one. 0 for a zero matrix.

    Raises ValueError for an unknown objective or a missing statistic.

    >>> lost = error("weight", torch.tensor([[3.0, 4.0]]), {})
    >>> lost(torch.tensor([[3.0, 0.0]]))  # 9 of 25
    0.36
    """
    if objective not in OBJECTIVES:
        raise Invalid(f"the objective is {objective!r}; it can be {', '.join(OBJECTIVES)}")
    if objective == "weight":
        norm = float(W.square().sum(dtype=torch.float64))
        return lambda D: float(D.square().sum(dtype=torch.float64)) / norm if norm > 0 else 0.0
    if objective in ("fisher", "kl"):
        F = need(stats, FisherDiag, f"the objective {objective}")
        return lambda D: 0.5 * tokens * float((F * D.square()).sum(dtype=torch.float64))
    d = need(stats, MeanSquare, "the objective output")
    energy = float((W.square() @ d).sum(dtype=torch.float64))
    return lambda D: float((D.square() @ d).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0


def row(W: Float[Tensor, "m n"], specs: Sequence[Spec], stats: Stats, loss: Error, dense_width: int, starts: bool = False) -> list[Cell]:
    """Every candidate for one matrix. One without a format keeps it dense, at `dense_width` bytes a number.

    With `starts` the adapter is started as the candidate says and what it adds counts as part of Ŵ; without, Ŵ is the quantized weight.

    >>> W = torch.randn(8, 128)
    >>> [cell.bytes for cell in row(W, [fb.Spec(None), fb.Spec(fb.NF(4))], {}, error("weight", W, {}), dense_width=2)]
    [2048, 576]
    """
    W, (m, n) = W.float(), W.shape
    cells, rounded = [], {}
    for spec in specs:
        adapter_size = numbers(spec.adapter, m, n)
        if spec.format is None:
            lost = 0.0
            if (codes := served_bytes(spec, m, n)) is not None:
                adapter = cast(Codes, spec.adapter)
                lost = loss(W - adapter.merged(adapter.params(Base(W), torch.Generator().manual_seed(0), {}), W))
            cells.append(Cell(W.numel() * dense_width, 0, *adapter_size, lost, codes))
            continue
        size = spec.format.storage_bits(m, n) // 8
        if starts and spec.adapter is not None:
            quantize, gen = BoundQuantizer(spec.quantizer, spec.format, stats), torch.Generator().manual_seed(0)
            base, start = begin(spec.init, W, spec.adapter, quantize, stats, gen)
            W_hat = dense(base, torch.float32)
            if start:
                params = spec.adapter.params(Base(W_hat), torch.Generator().manual_seed(0), start)
                W_hat = cast(Merges, spec.adapter).merged(params, W_hat)
            lost = loss(W - W_hat)
        else:
            key = spec.format, spec.quantizer
            if key not in rounded:
                q = spec.quantizer(W, spec.format, stats)
                assert q.nbytes == size, (spec.format, q.nbytes, size)
                rounded[key] = loss(W - dense(q, torch.float32))
            lost = rounded[key]
        cells.append(Cell(size, overhead(spec.format, m, n), *adapter_size, lost, served_bytes(spec, m, n)))
    return cells


def served_bytes(spec: Spec, m: int, n: int) -> int | None:
    """Bytes of the codes that an adapter makes of an (m, n) weight; None where it makes none.

    >>> served_bytes(fb.Spec(adapter=fb.L4Q(bits=2)), 8, 128), served_bytes(fb.Spec(adapter=fb.LoRA()), 8, 128)
    (272, None)
    """
    if spec.adapter is None or spec.adapter.form != "codes":
        return None
    format = served(spec)
    assert format is not None
    return format.storage_bits(m, n) // 8


def overhead(format: Format, m: int, n: int) -> int:
    """Bytes of an (m, n) weight that are no codes: scales, shifts, books.

    >>> overhead(fb.NF(4, block=64), 8, 128)  # sixteen float32 scales
    64
    """
    bits = format.scale_bits(n) if format.block == "tensor" else m * format.scale_bits(n) + format.tensor_bits(n)
    return bits // 8


def kurtosis(W: Float[Tensor, "m n"]) -> float:
    """Excess kurtosis: 0 for normal weights, more for heavier tails.

    >>> kurtosis(torch.tensor([[1.0, -1.0]]))  # two values, no tails: as low as it gets
    -2.0
    """
    z = W.double() - W.double().mean()
    variance = float(z.square().mean())
    return float(z.pow(4).mean()) / variance**2 - 3 if variance > 0 else 0.0


def options(cells: Sequence[Cell], specs: Sequence[Spec]) -> list[Option]:
    """The menu of one matrix: an option's bytes are those of the weight; what its adapter holds is beside them, in `more`.

    >>> cell = Cell(bytes=576, overhead=64, trained=1088, frozen=0, loss=0.01)
    >>> options([cell], [fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=8))])[0].more["serve"]  # the adapter is saved in float32
    4928
    """
    menu: list[Option] = []
    for cell, spec in zip(cells, specs, strict=True):
        more: dict[str, float] = {"weight": cell.bytes, "overhead": cell.overhead, "trained": cell.trained, "frozen": cell.frozen}
        saved = cell.bytes + SERVED * (cell.trained + cell.frozen) if cell.served is None else cell.served
        menu.append(Option(spec, cell.bytes, cell.loss, more | {"serve": saved}))
    return menu
