"""S²FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity.  Yang et al., NeurIPS 2024.  arXiv:2412.06289v3.
Use it when activations are what does not fit, or many tuned models share one base: a few heads and channels of each block are trained, at their
full rank, and of an input s numbers a token are kept.

Of a feed-forward sublayer channels I are chosen, of attention heads; what the block's other matrices have of them goes with them:

    down, o (columns):       y = x Wᵀ + x[:, I] Vᵀ             ∂V = gᵀ x[:, I]       V ∈ ℝ^{m×s}
    up, gate, q, k, v (rows): y = x Wᵀ,  y[:, I] += x Uᵀ        ∂U = g[:, I]ᵀ x       U ∈ ℝ^{s×n}

Columns and rows are one-hot products: a LoRA of rank s without error. The choice is random, or takes the largest of down's or o's column j by
‖W_j‖ ("weight"), E x_j² ("activation"), both multiplied ("product"), ‖∂L/∂W_j‖ ("gradient"), summed over a head.
Deviations:
- what is trained is added to a weight that stays as it is, of codes too, and nothing is permuted: the authors leave the model permuted;
- every block has the same share, where the authors' code draws over the model, so that blocks have more or less;
- where q, k or v are trained, heads are chosen by the keys' and values' heads that they share, which the authors' code does not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from finebits.adapters._family import Usual
from finebits.adapters._picked import columns, moved, product, rows
from finebits.adapters.base import Form, Layer, Params, Rescaled, complete
from finebits.errors import Invalid
from finebits.qtensor import dense
from finebits.stats.base import Statistic, Stats, need
from finebits.stats.grad import Grad
from finebits.stats.mean_square import MeanSquare

NAMES = {
    "o": ("o_proj", "out_proj", "dense", "c_proj", "wo"),
    "q": ("q_proj", "wq"),
    "k": ("k_proj", "wk"),
    "v": ("v_proj", "wv"),
    "down": ("down_proj", "w2", "fc2", "dense_4h_to_h", "fc_out", "c_proj"),
    "up": ("up_proj", "w3", "fc1", "dense_h_to_4h", "fc_in", "c_fc"),
    "gate": ("gate_proj", "w1"),
}
HEADS = "o", "q", "k", "v"
LEADS = "o", "down"  # whose columns are chosen, for themselves and for the rows that lead there
CHOICES: dict[str, frozenset[type[Statistic]]] = {
    "random": frozenset(), "weight": frozenset(), "activation": frozenset({MeanSquare}), "product": frozenset({MeanSquare}),
    "gradient": frozenset({Grad}),
}  # fmt: skip


@dataclass(frozen=True)
class S2FT(Usual):
    """A share of the heads and channels of every block, of the matrices `trains` (of o, q, k, v, down, up, gate); others have no adapter.

    A recipe's is made one of a module by `at`, which says its `part`, and the `units` that are chosen among: heads, or 0 for channels. `heads`
    are those of the queries and of the keys; planning fills them in.

    >>> fb.S2FT(share=0.5, heads=(8, 2), trains=("o", "v")).at("model.layers.0.self_attn.v_proj")
    S2FT(share=0.5, by='random', trains=('o', 'v'), heads=(8, 2), part='rows', units=2)
    >>> p = {"V": torch.tensor([[1.0], [2.0]]), "index": torch.tensor([2])}
    >>> fb.S2FT().merged(p, torch.zeros(2, 3))
    tensor([[0., 0., 1.],
            [0., 0., 2.]])
    """

    share: float = 0.03
    by: str = "random"
    trains: tuple[str, ...] = LEADS
    heads: tuple[int, int] = (0, 0)
    part: Literal["columns", "rows"] = "columns"
    units: int = 0
    rank: ClassVar[int] = 0
    form: ClassVar[Form] = "scaled"
    frozen: ClassVar[frozenset[str]] = frozenset({"index"})

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise Invalid(f"share is {self.share}; it must be above 0 and at most 1")
        if self.by not in CHOICES:
            raise Invalid(f"by is {self.by!r}; it can be {', '.join(CHOICES)}")
        if not self.trains or not set(self.trains) <= NAMES.keys():
            raise Invalid(f"trains is {list(self.trains)}; it can name {', '.join(NAMES)}")
        for lead, others in (("o", HEADS), ("down", ("up", "gate"))):
            if self.by != "random" and set(self.trains) & set(others) and lead not in self.trains:
                raise Invalid(f"by {self.by!r} goes by the columns of {lead}, which trains leaves out: name it there, or take random")

    @property
    def needs(self) -> frozenset[type[Statistic]]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the module whose columns are chosen."""
        return CHOICES[self.by] if self.part == "columns" else frozenset()

    def at(self, module: str) -> S2FT | None:
        role = role_of(module)
        if role is None or role not in self.trains:
            return None
        if role in HEADS and 0 in self.heads:
            raise Invalid(f"S2FT chooses heads, and how many {module} has is not said: heads=(of queries, of keys)")
        grouped = bool({"q", "k", "v"} & set(self.trains))
        part = "columns" if role in LEADS else "rows"
        return replace(self, part=part, units=(self.heads[grouped] if role in HEADS else 0))

    def leader(self, module: str, beside: Iterable[str]) -> str:
        """The module, of those beside it, whose columns are chosen for this one as well: itself, where no other is known.

        >>> own = fb.S2FT(trains=("down", "up")).at("layers.0.mlp.up_proj")
        >>> own.leader("layers.0.mlp.up_proj", ["gate_proj", "up_proj", "down_proj"])
        'layers.0.mlp.down_proj'
        """
        parent = module.rpartition(".")[0]
        wanted = "o" if role_of(module) in HEADS else "down"
        found = [f"{parent}.{name}".removeprefix(".") for name in beside if role_of(f"{parent}.{name}") == wanted]
        return found[0] if found and self.part == "rows" else module

    def side(self, m: int, n: int) -> int:
        return n if self.part == "columns" else m

    def chosen(self, W: Float[Tensor, "m n"] | None, stats: Stats, gen: Generator, size: int) -> Tensor:
        """The rows, or columns, of a weight that has `size` of them: by the columns of the leader's W and by its statistics."""
        units = self.units or size
        wide = size // units
        many = self._many(size) // wide
        if self.by == "random":
            picked = torch.randperm(units, generator=gen)[:many]
        else:
            assert W is not None
            picked = self._scores(W, stats).view(units, -1).sum(1).argsort(descending=True, stable=True)[:many]
        return (picked.sort().values[:, None] * wide + torch.arange(wide)).flatten().int()

    def _scores(self, W: Float[Tensor, "m n"], stats: Stats) -> Float[Tensor, " n"]:
        if self.by == "gradient":
            return need(stats, Grad, "S2FT").float().square().sum(0).cpu()
        x = torch.ones(W.shape[1]) if self.by == "weight" else need(stats, MeanSquare, "S2FT").float().cpu()
        return x if self.by == "activation" else x * dense(W, torch.float32).detach().square().sum(0).cpu()

    def params(self, base: Layer, gen: Generator, start: Params) -> Params:
        m, n = base.weight.shape
        if "index" not in start and self.by != "random":
            raise Invalid(f"S2FT chooses by {self.by} for the modules of a block together: build the model from a plan")
        index = {} if "index" in start else {"index": self.chosen(None, {}, gen, self.side(m, n))}
        zeros = {k: torch.zeros(shape, dtype=torch.int32 if k == "index" else None) for k, shape in self.shapes(m, n).items()}
        return complete(zeros | index, start, "S2FT")

    def forward(self, p: Params, x: Float[Tensor, "*t n"], base: Layer) -> Float[Tensor, "*t m"]:
        at = p["index"].long()
        return columns(x, p["V"], at, base) if self.part == "columns" else rows(x, p["U"], at, base)

    def merged(self, p: Params, W: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        return moved(dense(W), p["V"] if self.part == "columns" else p["U"], p["index"].long(), self.part)

    def scaled(self, p: Params, W: Float[Tensor, "m n"]) -> Rescaled:
        """One-hot on the side that is chosen, nothing rescaled."""
        return product(p["V"] if self.part == "columns" else p["U"], p["index"].long(), W, self.part)

    def shapes(self, m: int, n: int) -> dict[str, tuple[int, ...]]:
        s = self._many(self.side(m, n))
        return {"V": (m, s), "index": (s,)} if self.part == "columns" else {"U": (s, n), "index": (s,)}

    def _many(self, size: int) -> int:
        units = self.units or size
        if size % units:
            raise Invalid(
                f"S2FT chooses among {units} heads, and {size} rows or columns are not so many times the same: leave the module out"
            )
        return max(1, round(self.share * units)) * (size // units)


def role_of(module: str) -> str | None:
    """What a matrix of a block is, by its name; None where that does not say.

    >>> role_of("model.layers.0.self_attn.o_proj"), role_of("h.0.mlp.c_proj"), role_of("h.0.attn.c_proj"), role_of("lm_head")
    ('o', 'down', 'o', None)
    """
    parent, _, leaf = module.rpartition(".")
    attends = "att" in parent.rpartition(".")[2].lower()
    return next((role for role, names in NAMES.items() if leaf in names and (role in HEADS) == attends), None)
