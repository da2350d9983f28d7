"""Extreme Compression of Large Language Models via Additive Quantization.  Egiazarian et al., ICML 2024.  arXiv:2401.06118v4.

Atoms of g neighbouring columns of a row are sums of M codewords, one from each of M codebooks with K entries, times the row's scale:

    ŵ_atom = s·Σ_m C_m[q_m],    s = max|w| over the row,    storage: n/g·M·log2 K bits a row, M·K·g·16 bits a matrix

Here the books are found one after the other by K means on what the earlier books left (residual quantization), and codes by a beam search.

Deviations: no calibration data and no beam over several rounds: this is the format and its plain fit, what AQLM and PV-Tuning start from.
Codeword 0 of every book is zero, so that a block of zeros stays zero. K is at most 256. The atoms of K means are a subset drawn at even
distances where a matrix has more than 32768 of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from finebits.blocks import unpack
from finebits.errors import Invalid, WrongType
from finebits.formats._stores import Parts
from finebits.formats.base import Format, Scales

SAMPLE = 32768  # atoms that K means looks at
CHUNK = 1 << 22  # distances held at once


@dataclass(frozen=True)
class VQ(Format):
    """M additive books of K codewords of g columns; one float16 scale a row.

    >>> W = torch.tensor([[1.0, 2.0, 1.0, 2.0, -1.0, 0.0, 1.0, 2.0]])
    >>> q = fb.quantize(W, fb.VQ(M=1, K=4, g=2))  # pairs of columns; there are two kinds of them
    >>> q.dequantize()
    tensor([[1., 2., 1., 2., -1., 0., 1., 2.]])
    >>> q.nbytes  # 4 indices of 2 bits, a scale of 2 bytes, a book of 4 · 2 numbers of 2 bytes
    19
    """

    M: int = 2
    K: int = 256
    g: int = 8
    steps: ClassVar[int] = 20
    beam: ClassVar[int] = 4
    block: ClassVar[str] = "row"  # pyright: ignore[reportIncompatibleVariableOverride]
    scale: ClassVar[str] = "fp16"  # pyright: ignore[reportIncompatibleVariableOverride]
    widths: ClassVar = (1, 2, 3, 4, 5, 6, 7, 8)
    plain: ClassVar = False
    still: ClassVar = False

    def __post_init__(self) -> None:
        if self.K not in {2**b for b in self.widths}:
            raise Invalid(f"VQ has books of K = 2, 4, 8 … 256 codewords, not {self.K}")
        if self.M < 1 or self.g < 1:
            raise Invalid(f"VQ needs at least one book and one column an atom, not M = {self.M}, g = {self.g}")

    @property
    def bits(self) -> int:
        """Bits of one index.

        >>> fb.VQ().bits, 2 ** fb.VQ().bits == fb.VQ().K
        (8, True)
        """
        return self.K.bit_length() - 1

    @property
    def shared(self) -> frozenset[str]:
        return frozenset({"book"})

    def levels(self) -> tuple[float, ...]:
        raise WrongType("VQ has codebooks that belong to a weight, and no table of levels: decode with its scales")

    def row_codes(self, n: int) -> int:
        if n % self.g:
            raise Invalid(f"VQ(g={self.g}) needs a row length that {self.g} divides, not {n}: choose another format for this module")
        return n // self.g * self.M

    def columns(self, row_codes: int) -> int:
        return row_codes // self.M * self.g

    def ideal(self, W: Float[Tensor, "*r n"]) -> Scales:
        return Scales(W.float().abs().amax(-1, keepdim=True))

    def hold(self, scales: Scales, W: Float[Tensor, "*e m n"]) -> Parts:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = super().hold(scales, W)
        atoms = self._atoms(W, parts["scale"])
        books = torch.stack([self._books(one) for one in atoms.flatten(-3, -2).reshape(-1, atoms.shape[-3] * atoms.shape[-2], self.g)])
        return parts | {"book": books.to(torch.float16).reshape(*W.shape[:-2], self.M, self.K, self.g)}

    def scales(self, parts: Parts, n: int | None = None) -> Scales:
        return Scales(parts["scale"], None, parts["book"])

    def tensor_bits(self, n: int) -> int:
        return 16 * self.M * self.K * self.g

    def _atoms(self, W: Tensor, scale: Tensor) -> Float[Tensor, "*e m atoms g"]:
        self.row_codes(W.shape[-1])
        s = scale.float()
        return (W.float() * torch.where(s > 0, 1 / s, 0.0)).unflatten(-1, (-1, self.g))

    def _books(self, atoms: Float[Tensor, "a g"]) -> Float[Tensor, "M K g"]:
        x = atoms[:: -(-len(atoms) // SAMPLE)]
        books = []
        for _ in range(self.M):
            book = self._means(x).to(torch.float16).float()
            x = x - book[_nearest(x, book)]
            books.append(book)
        return torch.stack(books)

    def _means(self, x: Float[Tensor, "a g"]) -> Float[Tensor, "K g"]:
        by_size = x.square().sum(-1).argsort(stable=True)  # starts spread over all magnitudes, the same on every machine
        at = (torch.arange(self.K - 1, device=x.device) + 0.5) * (len(x) / (self.K - 1))
        book = torch.cat([torch.zeros_like(x[:1]), x[by_size[at.long()]]])
        for _ in range(self.steps):
            near = _nearest(x, book)
            total = torch.zeros_like(book).index_add_(0, near, x)
            count = torch.bincount(near, minlength=self.K)[:, None]
            unused = (count[1:, 0] == 0).nonzero()[: len(x), 0] + 1
            worst = (x - book[near]).square().sum(-1).topk(len(unused)).indices  # what no atom is near moves to where it is missed most
            book = (total / count.clamp(min=1)).index_copy(0, unused, x[worst])
            book[0] = 0
        return book

    def encode(self, W: Float[Tensor, "*e m n"], scales: Scales) -> UInt8[Tensor, "*e m codes"]:
        atoms = self._atoms(W, scales.scale)
        book = scales.book
        assert book is not None
        lead = book.shape[:-3]
        x = atoms.reshape(*(lead.numel(),), -1, self.g)
        q = torch.stack([self.search(one, b) for one, b in zip(x, book.float().reshape(-1, self.M, self.K, self.g), strict=True)])
        return q.reshape(*atoms.shape[:-1], self.M).flatten(-2)

    def search(self, x: Float[Tensor, "a g"], book: Float[Tensor, "M K g"]) -> UInt8[Tensor, "a M"]:
        """The codes whose words add up nearest to every atom, among those that a beam meets.

        >>> fb.VQ(M=1, K=2, g=2).search(torch.tensor([[1.0, 0.9]]), torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]))
        tensor([[1]], dtype=torch.uint8)
        """
        out = []
        for part in x.split(max(1, CHUNK // (self.K * self.beam))):
            left, codes = part[:, None], part.new_zeros(len(part), 1, 0, dtype=torch.long)  # (a, paths, g), (a, paths, m)
            for C in book:
                d = left.square().sum(-1)[..., None] - 2 * left @ C.mT + C.square().sum(-1)  # (a, paths, K)
                best = d.flatten(1).topk(min(self.beam, d[0].numel()), largest=False, sorted=True).indices
                path, code = best // self.K, best % self.K
                codes = torch.cat([codes.take_along_dim(path[..., None], 1), code[..., None]], -1)
                left = left.take_along_dim(path[..., None], 1) - C[code]
            at = left.square().sum(-1).argmin(-1)
            out.append(codes[torch.arange(len(part), device=x.device), at].to(torch.uint8))
        return torch.cat(out)

    def decode(self, codes: UInt8[Tensor, "*r codes"], scales: Scales) -> Float[Tensor, "*r n"]:
        book = scales.book
        assert book is not None
        q = codes.long().unflatten(-1, (-1, self.M))  # (*e, m, atoms, M)
        flat = q.reshape(book.shape[:-3].numel(), -1, self.M)
        each: list[Any] = [
            sum(b[i][c[:, i]] for i in range(self.M)) for c, b in zip(flat, book.float().reshape(-1, self.M, self.K, self.g), strict=True)
        ]
        w = torch.stack(each).reshape(*q.shape[:-1], self.g).flatten(-2)
        return w * scales.scale.float()

    def table(self, parts: Parts, n: int) -> None:
        return None

    def dense(self, parts: Parts, n: int) -> Float[Tensor, "*r n"]:
        return self.decode(unpack(parts["codes"], self.bits, self.row_codes(n)), self.scales(parts, n))


def _nearest(x: Float[Tensor, "a g"], book: Float[Tensor, "K g"]) -> Tensor:
    """The nearest codeword of every atom."""
    return torch.cat([(book.square().sum(-1) - 2 * part @ book.mT).argmin(-1) for part in x.split(max(1, CHUNK // len(book)))])
