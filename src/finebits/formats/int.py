"""Uniform integers, symmetric and asymmetric, one scale a block.  Jacob et al., CVPR 2018.  arXiv:1712.05877v1.

With b bits and q the integer code, blocks of `block` columns:

    symmetric    restricted  ŵ = s·q,        s = max|w| / (2^(b−1) − 1),            q ∈ {−(2^(b−1) − 1) … 2^(b−1) − 1}
                 full        ŵ = s·q,        s = max|w| / (2^(b−1) − ½),            q ∈ {−2^(b−1) … 2^(b−1) − 1}
    asymmetric   real        ŵ = s·q + l,    s = (max w − min w) / (2^b − 1),       q ∈ {0 … 2^b − 1},   l = min w
                 integer     ŵ = s·(q − z),  s = (max(w, 0) − min(w, 0)) / (2^b − 1),   z = round(−min(w, 0)/s), a byte

Deviations: the asymmetric default is the real minimum l, held beside the scale, as quantized checkpoints of language models do; the paper
has the integer zero point, which puts zero onto the grid. The unused restricted code 2^b − 1 decodes as its neighbour. z is found with
the stored scale, and s·(q − z) is computed as s·q + (−s·z). The scale of the full range may be negative where another tool chose it so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from finebits.errors import Invalid
from finebits.formats._stores import Parts, Store, width
from finebits.formats.base import STORES, Format, Scales, _constant
from finebits.kernels.table import Rounding


@dataclass(frozen=True)
class Int(Format):
    """Integers of `bits` bits; `block` columns share a scale (and, asymmetric, a minimum or a zero point), held in `scale`.

    `variant` is "full" instead of the restricted range if symmetric, "integer" instead of the real minimum if not. A real minimum is held
    in the dtype of the scale, which is fp32, fp16 or bf16 then.

    >>> W = torch.tensor([[-1.0, 0.2, 0.6, 7.0]])
    >>> fb.quantize(W, fb.Int(4)).dequantize()  # the largest weight is 7: whole numbers
    tensor([[-1., 0., 1., 7.]])
    >>> fb.quantize(W, fb.Int(2, symmetric=False)).dequantize()  # four values from -1 to 7
    tensor([[-1.0000, -1.0000, 1.6667, 7.0000]])
    >>> fb.quantize(W, fb.Int(2, symmetric=False, variant="integer")).dequantize()  # whole multiples of 8/3
    tensor([[0., 0., 0., 8.]])
    """

    bits: int = 4
    block: int | str = 64
    symmetric: bool = True
    scale: str | Store = "fp32"
    variant: str | None = None
    unit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("restricted", "full") if self.symmetric else ("real", "integer")
        if self.variant is not None and self.variant not in known:
            raise Invalid(f"Int(symmetric={self.symmetric}) has the variants {' and '.join(known)}, not {self.variant!r}")
        if self.variant == known[0]:
            object.__setattr__(self, "variant", None)
        if self.form == "real" and self.scale not in STORES:
            raise Invalid(f"a real minimum is held beside a plain scale ({', '.join(STORES)}), not {self.scale}: use variant='integer'")

    @property
    def form(self) -> str:
        """One of "restricted", "full", "real" or "integer".

        >>> fb.Int(4).form, fb.Int(4, symmetric=False).form
        ('restricted', 'real')
        """
        return self.variant or ("restricted" if self.symmetric else "real")

    @property
    def plain(self) -> bool:
        return self.form != "integer"

    @property
    def top(self) -> int:
        """The largest code value at scale 1.

        >>> fb.Int(4).top, fb.Int(4, symmetric=False).top
        (7, 15)
        """
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    @property
    def first(self) -> int:
        """The smallest code value at scale 1.

        >>> fb.Int(4).first, fb.Int(4, variant="full").first, fb.Int(4, symmetric=False).first
        (-7, -8, 0)
        """
        return {"restricted": -self.top, "full": -self.top - 1}.get(self.form, 0)

    @property
    def peak(self) -> float:
        return self.top + 0.5 if self.form == "full" else float(self.top)

    def levels(self) -> tuple[float, ...]:
        first, top = self.first, self.top
        return tuple(float(min(first + i, top)) for i in range(2**self.bits))

    def grid(self, device: torch.device) -> Rounding:
        order = _constant(tuple(range(2**self.bits)), torch.uint8, str(device))
        mids = _constant((), torch.float32, str(device))
        store, bits, block = self._kernel()
        return Rounding("absmax" if self.symmetric else "minmax", self.peak, store, True, self.first, mids, order, bits, block)

    def ideal(self, W: Float[Tensor, "*r n"]) -> Scales:
        if self.symmetric:
            return super().ideal(W)
        low, high = self.cut(W.float(), fill=torch.inf).amin(-1), self.cut(W.float(), fill=-torch.inf).amax(-1)
        if self.form == "integer":
            low, high = low.clamp(max=0), high.clamp(min=0)
        return Scales((high - low) / self.top, low)

    def spanning(self, W: Float[Tensor, "*r n"]) -> Scales:
        if self.form != "full":
            return self.ideal(W)
        w = self.cut(W.float())
        return Scales(torch.maximum(w.amax(-1).clamp(min=0) / self.top, w.amin(-1).clamp(max=0) / self.first))

    def at(self, scale: Tensor, shift: Tensor | None) -> Scales:
        if self.form != "integer":
            return Scales(scale, shift)
        assert shift is not None
        return self._zeroed(scale, self.zero(scale, shift))

    def zero(self, scale: Float[Tensor, "*r k"], low: Float[Tensor, "*r k"]) -> UInt8[Tensor, "*r k"]:
        """The integer zero point of blocks whose least weight is `low`.

        >>> fb.Int(4, symmetric=False, variant="integer").zero(torch.tensor([[0.5]]), torch.tensor([[-2.0]]))  # −2 is four steps below zero
        tensor([[4]], dtype=torch.uint8)
        """
        s = scale.float()
        return torch.where(s > 0, -low / s, 0.0).round().clamp(0, self.top).to(torch.uint8)

    def _zeroed(self, scale: Tensor, zero: Tensor) -> Scales:
        return Scales(scale, -scale.float() * zero.float())

    def beside(self, scale: Tensor, shift: Tensor | None) -> Parts:
        if self.form != "integer":
            return super().beside(scale, shift)
        assert shift is not None
        return {"zero": self.zero(scale, shift)}

    def scales(self, parts: Parts, n: int | None = None) -> Scales:
        scales = super().scales(parts, n)
        if self.form != "integer":
            return scales
        zero = parts["zero"].reshape(scales.scale.shape) if self.block == "tensor" else parts["zero"]
        return self._zeroed(scales.scale[..., : zero.shape[-1]], zero)

    def encode(self, W: Float[Tensor, "*r n"], scales: Scales) -> UInt8[Tensor, "*r n"]:
        if self.form == "full":
            W = W * torch.where(self.spread(scales.scale, W.shape[-1]) < 0, -1.0, 1.0)
            scales = Scales(scales.scale.abs())
        return super().encode(W, scales)

    def scale_bits(self, n: int) -> int:
        beside = {"real": width(str(self.scale)) if self.form == "real" else 0, "integer": 8}.get(self.form, 0)
        return super().scale_bits(n) + beside * self.n_blocks(n)
