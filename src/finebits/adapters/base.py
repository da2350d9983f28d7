"""What an adapter is: a value. It holds hyper-parameters and no tensors; its parameters are a dict that travels beside it.

`merged` is the paper's equation for the effective weight, `forward` computes the same map cheaply, and one law ties them together:
forward(p, x, Base(W, b)) = F.linear(x, merged(p, W), bias(p, b)). An adapter laid over a base is a base again, so adapters nest. One that is no
weight, because it depends on the input in other ways, has no `merged`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor
from torch.nn import Parameter

from finebits.errors import Invalid
from finebits.formats.base import Format
from finebits.qtensor import QTensor
from finebits.stats.base import Statistic, Stats

Params = dict[str, Tensor]
# What an adapter is once it is trained: W + L R ("product": `lowrank` gives it), diag(rows) W diag(columns) + L R ("scaled": `scaled` gives
# it), a weight in codes ("codes": `coded` gives it), some other weight ("weight"), or none ("beside").
Form = Literal["product", "scaled", "codes", "weight", "beside"]

# What an adapter lies over, and the two numbers that it is sized by: a matrix of (outputs, inputs); a table of embeddings of (words, width); a
# feed-forward sublayer of (units inside, width of the states); all attention of a model, of (numbers of a token's keys in all layers, width); a
# model of (words, width). What gives rows (`Looks`) lies over a table too, whose rows are its outputs.
Place = Literal["matrix", "table", "feed_forward", "attention", "model"]

# What a matrix does in a block. One that makes several of queries, keys and values has several roles.
Role = Literal["queries", "keys", "values", "attention_output", "feed_forward_output"]


def identity(x: Tensor) -> Tensor:
    return x


class Base(NamedTuple):
    """A frozen linear map y = x Wᵀ + b; W may be quantized. `drop` is the adapter's dropout, which the host sets while training.

    >>> Base(torch.tensor([[1.0, 2.0]]), torch.tensor([0.5]))(torch.tensor([[1.0, 1.0]]))  # x Wᵀ + b
    tensor([[3.5000]])
    """

    weight: Tensor
    bias: Tensor | None = None
    drop: Callable[[Tensor], Tensor] = identity

    def __call__(self, x: Float[Tensor, "*t n"]) -> Float[Tensor, "*t m"]:
        W, b = self.weight, None if self.bias is None else self.bias.to(x.dtype)
        packed = type(W) not in (Tensor, Parameter)  # takes inputs of any dtype
        return F.linear(x, W if packed or W.dtype == x.dtype else W.to(x.dtype), b)

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def frozen(self) -> bool:
        return not self.weight.requires_grad and (self.bias is None or not self.bias.requires_grad)


class Over(NamedTuple):
    """An adapter and its tensors, laid over a base: again a base.

    >>> p = {"B": torch.tensor([[1.0], [0.0]]), "A": torch.tensor([[0.0, 3.0]])}
    >>> over = Over(fb.LoRA(rank=1, alpha=2), p, Base(torch.eye(2)))
    >>> over(torch.tensor([[1.0, 1.0]])), over.weight  # again a base, of the weight W + s·B A
    (tensor([[7., 1.]]), tensor([[1., 6.], [0., 1.]]))
    """

    adapter: Adapter
    p: Params
    base: Any  # a Layer
    drop: Callable[[Tensor], Tensor] = identity

    def __call__(self, x: Float[Tensor, "*t n"]) -> Float[Tensor, "*t m"]:
        return self.adapter.forward(self.p, x, self.base)

    @property
    def weight(self) -> Tensor:
        if self.adapter.form == "beside":
            raise Invalid(f"{type(self.adapter).__name__} depends on its input, so that there is no weight of what it lies over")
        return cast(Merges, self.adapter).merged(self.p, self.base.weight)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def bias(self) -> Tensor | None:
        return self.adapter.bias(self.p, self.base.bias)


class Rescaled(NamedTuple):
    """diag(rows) W diag(columns) + L R: what exporters fold into a base. None stands for ones; L and R may have no columns and rows.

    >>> parts = Rescaled(torch.tensor([2.0]), None, torch.ones(1, 1), torch.ones(1, 2))
    >>> parts.of(torch.tensor([[1.0, 3.0]]))
    tensor([[3., 7.]])
    """

    rows: Tensor | None
    columns: Tensor | None
    L: Tensor
    R: Tensor

    def of(self, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        left = W if self.rows is None else self.rows[:, None] * W
        return (left if self.columns is None else left * self.columns) + self.L @ self.R


Layer = Base | Over  # what an adapter may lie over


class FeedForward(NamedTuple):
    """A frozen feed-forward sublayer y = down(act(g) ∘ u), or down(act(u)) where nothing gates it. `both(x)` gives its products (g, u) with x, g
    None where there is none; `note` takes what a rule may ask for of this forward pass.

    >>> both, halve = lambda x: (None, 2 * x), lambda h: h / 2
    >>> FeedForward(lambda x: halve(torch.relu(2 * x)), both, torch.relu, halve, (4, 4))(torch.tensor([1.0, -1.0]))
    tensor([1., 0.])
    """

    whole: Callable[[Tensor], Tensor]
    both: Callable[[Tensor], tuple[Tensor | None, Tensor]]
    act: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    shape: tuple[int, int]
    drop: Callable[[Tensor], Tensor] = identity
    note: Callable[[Any], None] = lambda noted: None

    def __call__(self, x: Float[Tensor, "*t n"]) -> Float[Tensor, "*t n"]:
        return self.whole(x)

    def inner(self, g: Tensor | None, u: Tensor) -> Tensor:
        """What `down` multiplies."""
        return self.act(u) if g is None else self.act(g) * u


@runtime_checkable
class Network(Protocol):
    """A frozen model of states, which is called with named inputs (`input_ids`, `attention_mask`, …)."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def rows(self, ids: Tensor) -> Tensor:
        """The embeddings of these words, float32."""
        ...

    def remembered(self, ids: Tensor) -> Tensor:
        """The keys and values that these words leave in all layers: a prefix."""
        ...

    def prompted(self, inputs: dict[str, Any], prompt: Float[Tensor, "v n"]) -> Any:
        """What the model makes of the inputs with these embeddings before every row; their own places are left out of what it gives."""
        ...

    def prefixed(self, inputs: dict[str, Any], prefix: Float[Tensor, "v w"]) -> Any:
        """What it makes of them with a key and a value of every layer before every row: (k₁, v₁, k₂, v₂, …) one after the other."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """A frozen dataclass of hyper-parameters with these methods. W is (m, n) = (out, in) everywhere."""

    @property
    def rank(self) -> int:
        """0 where it has none to choose."""
        ...

    @property
    def own(self) -> str:
        """The initialiser that a recipe without one takes."""
        ...

    @property
    def admits(self) -> frozenset[str] | None:
        """All initialisers that leave the adapter what its paper says; None where any may start its tensors."""
        ...

    @property
    def frozen(self) -> frozenset[str]:
        """Those of `params` that are stored and not trained, and all `buffers`."""
        ...

    @property
    def shared(self) -> frozenset[str]:
        """Those of `params` and `buffers` that all hosts of one shape hold together: drawn once, whatever the weight."""
        ...

    @property
    def form(self) -> Form:
        """What it is once it is trained."""
        ...

    @property
    def over(self) -> Place:
        """What it lies over. Over a sublayer, attention or a model `base` is a `FeedForward` or a `Network`, and its form is "beside"."""
        ...

    @property
    def roles(self) -> frozenset[Role] | None:
        """The matrices of a block that it lies over where nobody names any, by what they do; None: all."""
        ...

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """What its module is to be measured for, so that `build` can choose places by it (`Coupled`)."""
        ...

    @property
    def drops(self) -> bool:
        """Has dropout of its inputs a meaning for it?"""
        ...

    @property
    def itself(self) -> bool:
        """Is the weight trained that it lies over? It has no tensors then."""
        ...

    @property
    def kept(self) -> frozenset[str]:
        """Those of `params` that stay float32 whatever is computed in."""
        ...

    def packed(self, p: Params) -> Params:
        """What a file holds of these tensors once training is over: `unpacked` gives tensors that compute the same, to the bit."""
        ...

    def unpacked(self, p: Params, m: int, n: int) -> Params:
        """Tensors over an (m, n) weight out of what a file holds, packed or not."""
        ...

    def in_role(self, roles: frozenset[Role]) -> Adapter:
        """The adapter of a matrix that it lies over because of what that does."""
        ...

    def at(self, module: str) -> Adapter | None:
        """The adapter of a module of this name; None where it leaves the module alone."""
        ...

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        """Stored tensors at birth, float32, or int32 where they are places; completes what an initialiser started. Raises if `start` names a
        tensor it has not."""
        ...

    def buffers(self, base: Layer, gen: Generator) -> Params:
        """Frozen tensors: re-made from a seed, never trained."""
        ...

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        """How it is computed."""
        ...

    def bias(self, p: Params, b: Tensor | None) -> Tensor | None:
        """The bias that stands beside `merged`."""
        ...

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        """Of all `params` and `buffers` over an (m, n) weight."""
        ...

    def size(self, m: int, n: int) -> int:
        """How many trained numbers it has over an (m, n) weight, shared ones included."""
        ...

    def stored(self, m: int, n: int) -> int:
        """How many numbers it holds beside those, frozen factors and buffers, shared ones included."""
        ...

    def common(self, m: int, n: int) -> tuple[int, int]:
        """How many of both are shared."""
        ...


@runtime_checkable
class Coupled(Protocol):
    """An adapter whose places are chosen for several modules of a block together, by one of them."""

    @property
    def by(self) -> str: ...

    def leader(self, module: str, beside: Iterable[str]) -> str:
        """The module that goes before this one, out of it and those beside it."""
        ...

    def side(self, m: int, n: int) -> int:
        """How many rows, or columns, it chooses out of in an (m, n) weight."""
        ...

    def chosen(self, W: Float[Tensor, "m n"] | None, stats: Stats, gen: Generator, size: int) -> Tensor:
        """ "index", out of the leader's weight and statistics, of the `size` rows or columns of this module."""
        ...


class Merges(Adapter, Protocol):
    """An adapter that is a weight."""

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """What it is."""
        ...


class Codes(Merges, Protocol):
    """An adapter whose weight is one in codes, which is served as it is: nothing is left beside it."""

    def coded(self, p: Params, W: Float[Tensor, "m n"]) -> QTensor:
        """What it is; `merged` is its dense form. It is multiplied with in training as well."""
        ...

    def served(self, format: Format | None) -> Format:
        """The format of that, over a weight in this one (None: dense). Raises ValueError where it has no such base."""
        ...

    @property
    def candidates(self) -> tuple[Format | None, ...]:
        """The formats of its base that a recipe without any offers."""
        ...


@runtime_checkable
class Looks(Protocol):
    """Of an adapter that may lie over a table of embeddings: rows of its weight are had without the others."""

    def rows(self, p: Params, ids: Int[Tensor, "*t"], E: Float[Tensor, "*t n"]) -> Float[Tensor, "*t n"]:
        """The rows `ids` of `merged(p, W)`, where E are those of W."""
        ...


def of_rank(adapter: Any, rank: int) -> Any:
    """The adapter at another rank with the same scale s (alpha moves along); none at rank 0.

    >>> of_rank(fb.LoRA(rank=16, alpha=32), 8)
    LoRA(rank=8, alpha=16.0, scaling='lora')
    """
    if rank == 0:
        return None
    grown = (rank / adapter.rank) ** (0.5 if getattr(adapter, "scaling", "") == "rslora" else 1.0)
    return replace(adapter, rank=rank, **({"alpha": adapter.alpha * grown} if hasattr(adapter, "alpha") else {}))


def check_scale(rank: int, alpha: float) -> None:
    """Raise if `rank` or `alpha` leaves nothing to train.

    >>> check_scale(0, 16.0)
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: rank is 0; it must be at least 1
    """
    if rank < 1:
        raise Invalid(f"rank is {rank}; it must be at least 1")
    if not alpha > 0:
        raise Invalid(f"alpha is {alpha}; it must be positive, or the update has no scale")


def complete(own: Params, start: Params, who: str) -> Params:
    """`own` with an initialiser's `start` put over it; a name or shape that does not fit is an error.

    >>> own = {"A": torch.zeros(1, 2), "B": torch.zeros(2, 1)}
    >>> complete(own, {"A": torch.ones(1, 2)}, "LoRA")["A"]
    tensor([[1., 1.]])
    >>> complete(own, {"N": torch.ones(1, 1)}, "LoRA")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: LoRA has no parameter 'N' for the initialiser to start (it has A, B): choose another init
    """
    for k, v in start.items():
        if k not in own:
            raise Invalid(f"{who} has no parameter {k!r} for the initialiser to start (it has {', '.join(own)}): choose another init")
        if own[k].shape != v.shape:
            raise Invalid(f"{who}.{k} is {tuple(own[k].shape)}; the initialiser started it as {tuple(v.shape)}")
    return own | {k: v.float() if own[k].is_floating_point() else v for k, v in start.items()}
