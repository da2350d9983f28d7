"""Bottleneck: Parameter-Efficient Transfer Learning for NLP.  Houlsby et al., ICML 2019.  arXiv:1902.00751v2.
With the place of AdapterFusion: Pfeiffer et al., EACL 2021, arXiv:2005.00247v3; the parallel one of Towards a Unified View of
Parameter-Efficient Transfer Learning: He et al., ICLR 2022, arXiv:2110.04366v3; the scales of Adapters Strike Back: Steitz and Roth, CVPR 2024,
arXiv:2406.06820v1.
Use it where an update must bend: it is no weight, never merges, and costs a little in every forward pass.

    a(h) = s·(W_up φ(W_down h + b_d) + b_u),    W_down ∈ ℝ^{b×d},  W_up ∈ ℝ^{d×b},    b = ⌊d / reduction⌋

    serial         y ← y + a(y)         y what a linear gives: over the last one of a sublayer, this adapts the sublayer
    parallel       y ← y + a(x)         x what the linear is given
    feed_forward   y ← y + a(x)         beside a whole feed-forward sublayer, x its input

Where a recipe names no modules, a serial one lies over the last linears of both sublayers (Houlsby) or, with `after` feed_forward, over that of
the feed-forward alone (Pfeiffer, with φ = relu); a parallel one over all linears. He et al.: feed_forward, φ = relu, reduction 2, s = 4, start
zero_up. AdapterPlus: serial after feed_forward, φ = gelu, reduction 96, a trained s a channel. Starts: truncated (Houlsby, both factors
N(0, .01²) cut at two deviations: near the identity), normal (N(0, .02²)), zero_up (W_down uniform in ±1/√d, W_up = 0: the identity); biases
are 0.
Deviations: norms are not trained beside it. Houlsby's and Pfeiffer's blocks normalise after the residual; in blocks that normalise before, as
those of today, the adapter lies in the branch, between the sublayer and the residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from finebits.adapters._family import Usual
from finebits.adapters.base import FeedForward, Form, Layer, Params, Place, Role, complete
from finebits.errors import Invalid

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "relu": F.relu, "gelu": F.gelu, "identity": lambda h: h}


@dataclass(frozen=True)
class Bottleneck(Usual):
    """A residual layer of d / `reduction` units; `scaling` is "fixed" (s = `scale`) or "channels" (an s a channel, trained from there).

    >>> adapter = fb.Bottleneck(reduction=16)
    >>> adapter.size(768, 3072)  # over a down_proj of BERT-base: 2·768·48 + 48 + 768
    74544
    >>> from finebits.adapters.base import Base
    >>> base, gen = Base(torch.eye(4)), torch.Generator().manual_seed(0)
    >>> at_birth = fb.Bottleneck(reduction=2, start="zero_up")
    >>> at_birth.forward(at_birth.params(base, gen, {}), torch.ones(1, 4), base)
    tensor([[1., 1., 1., 1.]])
    """

    position: Literal["serial", "parallel", "feed_forward"] = "serial"
    activation: Literal["swish", "relu", "gelu", "identity"] = "swish"
    reduction: int = 16
    scale: float = 1.0
    scaling: Literal["fixed", "channels"] = "fixed"
    start: Literal["truncated", "normal", "zero_up"] = "truncated"
    after: Literal["both", "feed_forward"] = "both"
    rank: ClassVar[int] = 0
    form: ClassVar[Form] = "beside"

    def __post_init__(self) -> None:
        for key, known in (
            ("position", ("serial", "parallel", "feed_forward")),
            ("activation", tuple(ACTIVATIONS)),
            ("scaling", ("fixed", "channels")),
            ("start", ("truncated", "normal", "zero_up")),
            ("after", ("both", "feed_forward")),
        ):
            if getattr(self, key) not in known:
                raise Invalid(f"{key} of bottleneck is {getattr(self, key)!r}; it can be {', '.join(known)}")
        if self.reduction < 1 or not self.scale > 0:
            raise Invalid(f"bottleneck needs reduction >= 1 and scale > 0; got reduction {self.reduction} and scale {self.scale}")

    @property
    def identity_at_birth(self) -> bool:
        """Does it change nothing before it is trained?

        >>> fb.Bottleneck(start="zero_up").identity_at_birth, fb.Bottleneck().identity_at_birth
        (True, False)
        """
        return self.start == "zero_up"

    @property
    def over(self) -> Place:  # pyright: ignore[reportIncompatibleVariableOverride]  # a position is a place
        """A whole sublayer, or a matrix.

        >>> fb.Bottleneck(position="feed_forward").over, fb.Bottleneck().over
        ('feed_forward', 'matrix')
        """
        return "feed_forward" if self.position == "feed_forward" else "matrix"

    @property
    def roles(self) -> frozenset[Role] | None:  # pyright: ignore[reportIncompatibleVariableOverride]  # as with `over`
        """Those of the matrices that leave a sublayer.

        >>> sorted(fb.Bottleneck().roles), fb.Bottleneck(after="feed_forward").roles, fb.Bottleneck(position="parallel").roles
        (['attention_output', 'feed_forward_output'], frozenset({'feed_forward_output'}), None)
        """
        if self.position != "serial":
            return None
        return (
            frozenset({"feed_forward_output"}) if self.after == "feed_forward" else frozenset({"attention_output", "feed_forward_output"})
        )

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        inner, outer = (m if self.position == "serial" else n), (n if self.position == "feed_forward" else m)
        b = inner // self.reduction
        if not b:
            raise Invalid(f"a bottleneck of reduction {self.reduction} has no unit for {inner} inputs: take a reduction of {inner} or less")
        shapes = {"down": (b, inner), "down_bias": (b,), "up": (outer, b), "up_bias": (outer,)}
        return shapes | ({"scale": (outer,)} if self.scaling == "channels" else {})

    def params(self, base: Layer | FeedForward, gen: Generator, start: Params) -> Params:
        shapes = self.shapes(*base.shape)
        p = {k: torch.zeros(shape) for k, shape in shapes.items()}
        if self.start == "zero_up":
            p["down"] = (torch.rand(shapes["down"], generator=gen) * 2 - 1) / math.sqrt(shapes["down"][1])
        else:
            for k in ("down", "up"):
                d = 0.01 if self.start == "truncated" else 0.02
                cut = 2 * d if self.start == "truncated" else math.inf
                nn.init.trunc_normal_(p[k], 0.0, d, -cut, cut, generator=gen)
        return complete(p | ({"scale": torch.full(shapes["scale"], self.scale)} if "scale" in p else {}), start, "Bottleneck")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer | FeedForward) -> Float[Tensor, "*t m"]:
        y = base(x)
        h = base.drop(y if self.position == "serial" else x)
        h = ACTIVATIONS[self.activation](F.linear(h, p["down"], p["down_bias"]))
        return y + F.linear(h, p["up"], p["up_bias"]) * p.get("scale", self.scale)
