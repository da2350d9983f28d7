"""Train Small, Infer Large: Memory-Efficient LoRA Training for Large Language Models.  Zhang et al., ICLR 2025.  arXiv:2502.13533v1.
Use it where the model is too large to be trained and not too large to be run: a pruned copy of it is trained, also in 4 bits (QLoRAM).

    W₀ᴾ = W₀[K_out, K_in]                                  pruned once, and aligned by some steps on a general corpus
    y   = x W₀ᴾᵀ + s·x (Bᴾ Aᴾ)ᵀ                             trained, W₀ᴾ frozen
    B★[K_out, :] = Bᴾ,   A★[:, K_in] = Aᴾ,   0 elsewhere       recovered
    y   = x W₀ᵀ + s·x (B★ A★)ᵀ                             used

so that ΔW★[K_out, K_in] = ΔWᴾ, and 0 elsewhere. K are channels of a feed-forward sublayer or heads: outputs of gate, up, q, k and v, inputs of
down and o (finebits.coupled). A block that was taken out has no update.
Semi-structured and unstructured pruning, W₀ᴾ = W₀ ∘ M, changes no shape: the factors are those of the whole model as they are.
Deviations: every block keeps as many channels and heads, where the paper leaves the first and the last whole, so that a stock model can be made
of them; M lies on the weights alone, since a masked update is no LoRA; the mask is by the scores of a pruner, not by SparseGPT.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finebits.build import generator
from finebits.calibrate.blockwise import blocks_of
from finebits.coupled import Group, Kind, coupled
from finebits.errors import Invalid
from finebits.pruners.base import Pruner
from finebits.stats.base import Stats

KINDS: tuple[Kind, ...] = ("channels", "heads")
STEP = 64  # channels, where they are many and a multiple of it: what blocks of codes and products of matrices are cut by


class Cut(NamedTuple):
    """Rows and columns of a matrix that are kept; None: all."""

    rows: Tensor | None = None
    columns: Tensor | None = None

    def of(self, W: Tensor) -> Tensor:
        """The matrix that is left (or the bias).

        >>> Cut(torch.tensor([1]), torch.tensor([0, 2])).of(torch.arange(6).view(2, 3))
        tensor([[3, 5]])
        """
        W = W if self.rows is None else W.index_select(0, self.rows)
        return W if self.columns is None or W.ndim < 2 else W.index_select(1, self.columns)

    def sides(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what is left.

        >>> Cut(torch.tensor([1])).sides((3, 2))
        (1, 2)
        """
        kept = [self.rows, self.columns]
        return tuple(of if i > 1 or (places := kept[i]) is None else len(places) for i, of in enumerate(shape))

    def recovered(
        self, B: Float[Tensor, "p r"], A: Float[Tensor, "r q"], shape: Sequence[int]
    ) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
        """(B★, A★) for a weight of this shape.

        >>> Cut(torch.tensor([1]), None).recovered(torch.tensor([[5.0]]), torch.ones(1, 2), (3, 2))[0].T
        tensor([[0., 5., 0.]])
        """
        m, n = shape
        if self.rows is not None:
            B = B.new_zeros(m, B.shape[1]).index_copy(0, self.rows, B)
        if self.columns is not None:
            A = A.new_zeros(A.shape[0], n).index_copy(1, self.columns, A)
        return B, A


@dataclass(frozen=True)
class Kept:
    """What is left of a model: blocks by their numbers, in each of them channels and heads of keys and values; a kind that is not there was left
    whole.

    >>> Kept.read(Kept((0, 2), {"heads": {0: (1,), 2: (0,)}}).to_json())
    Kept(blocks=(0, 2), units={'heads': {0: (1,), 2: (0,)}})
    """

    blocks: tuple[int, ...]
    units: Mapping[str, Mapping[int, tuple[int, ...]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Kept:
        """The inverse, also out of a file."""
        units = {kind: {int(i): tuple(of) for i, of in blocks.items()} for kind, blocks in data["units"].items()}
        return cls(tuple(data["blocks"]), units)

    def count(self, kind: str) -> int | None:
        """Units that every block keeps; None where all."""
        return None if kind not in self.units else len(self.units[kind][self.blocks[0]])


def share(of: int, keep: float | int, step: int = 1) -> int:
    """How many of so many are kept: a share of at most 1, rounded to `step`s but never to none, or a whole number above 1, just so many. Raises
    Invalid where that cannot be.

    >>> share(1536, 0.6, 64), share(3, 0.6), share(1536, 900)
    (896, 2, 900)
    """
    if not (0 < keep <= 1 or (isinstance(keep, int) and keep <= of)) or keep <= 0:
        raise Invalid(f"{keep} of {of} cannot be kept: give a share above 0 and at most 1, or a whole number of at most {of}")
    return int(keep) if keep > 1 else min(of, max(step, round(keep * of / step) * step))


def choose(
    model: nn.Module,
    config: Any,
    pruner: Pruner,
    read: Callable[[str], Tensor],
    stats: Mapping[str, Stats],
    keep: Mapping[str, float | int],
    blocks: float | int = 1.0,
    drop: Iterable[int] = (),
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Kept:
    """What a pruner keeps of a model (which may be without values) whose weights `read` gives by the names of modules: of every block the units
    that are worth most, and of the blocks, but for those in `drop`, these or so many that are worth most for a number that they hold."""
    names, drop = blocks_of(model), set(drop)
    if not drop <= set(range(len(names))):
        raise Invalid(f"there is no block {max(drop)} to leave out: the model has {len(names)}, from 0 on")
    left = [i for i in range(len(names)) if i not in drop]
    wanted = len(left) if blocks == 1 else min(share(len(names), blocks), len(left))
    if not left:
        raise Invalid("all blocks are left out: keep at least one")
    groups = groups_of(model, config, [k for k, v in keep.items() if v != 1], left)
    counts = {
        k: share(groups[k, left[0]].count, keep[k], _step(groups[k, left[0]].count) if k == "channels" else 1)
        for k in keep
        if (k, left[0]) in groups
    }

    def scores(module: str) -> Tensor:
        return pruner(read(module), stats.get(module, {}), generator(seed, module))

    if wanted < len(left):
        worth = {}
        for i in left:
            of = [scores(m) for m in matrices(model, names[i])]
            worth[i] = float(sum(S.double().sum() for S in of) / sum(S.numel() for S in of))
        left = sorted(sorted(left, key=lambda i: -worth[i])[:wanted])
    units: dict[str, dict[int, tuple[int, ...]]] = {kind: {} for kind in counts}
    for done, i in enumerate(left):
        for kind, count in counts.items():
            group = groups[kind, i]
            looked = [group.back] if pruner.back else group.modules
            total = torch.stack([group.sums(m, scores(m)) for m in looked]).sum(0)
            units[kind][i] = tuple(sorted(total.topk(count).indices.tolist()))
        progress(done + 1, len(left), names[i])
    return Kept(tuple(left), units)


def _step(channels: int) -> int:
    return STEP if channels % STEP == 0 and channels >= 8 * STEP else 1


def matrices(model: nn.Module, block: str) -> list[str]:
    """The linear layers of a block, by name."""
    return [f"{block}.{name}" for name, m in model.get_submodule(block).named_modules() if isinstance(m, nn.Linear)]


def groups_of(model: nn.Module, config: Any, kinds: Collection[str], blocks: Iterable[int]) -> dict[tuple[str, int], Group]:
    """The units of these blocks, by kind and number. Raises Invalid where two blocks have not as many, which no stock model could be made of."""
    names, found = blocks_of(model), dict[tuple[str, int], Group]()
    blocks = list(blocks)
    for kind in KINDS:
        if kind in kinds:
            own = {i: coupled(model, names[i], kind, config) for i in blocks}
            first = next(iter(own))
            if odd := next((i for i, group in own.items() if group.count != own[first].count), None):
                raise Invalid(
                    f"{names[first]} has {own[first].count} {kind} and {names[odd]} {own[odd].count}, and every block has to keep as many: "
                    f"leave them ({kind}=1)"
                )
            found |= {(kind, i): group for i, group in own.items()}
    return found


def cuts(model: nn.Module, config: Any, kept: Kept) -> dict[str, Cut]:
    """The matrices of a whole model that lose rows or columns, by name."""
    found = dict[str, Cut]()
    for (kind, i), group in groups_of(model, config, kept.units, kept.blocks).items():
        for (module, axis), places in group.places(kept.units[kind][i]).items():
            before = found.get(module, Cut())
            found[module] = before._replace(**{"rows" if axis == 0 else "columns": places})
    return found


def moved(model: nn.Module, kept: Kept) -> Callable[[str], str | None]:
    """The name in the pruned model of what has this one in the whole: blocks are counted anew. None where it is no more.

    >>> model = torch.nn.Sequential()
    >>> model.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    >>> [moved(model, Kept((0, 2)))(name) for name in ("layers.1.weight", "layers.2.weight", "norm")]
    [None, 'layers.1.weight', 'norm']
    """
    names = blocks_of(model)
    new = {names[i]: names[at] for at, i in enumerate(kept.blocks)}

    def name_of(name: str) -> str | None:
        block = next((b for b in names if name == b or name.startswith(f"{b}.")), None)
        return name if block is None else None if block not in new else new[block] + name.removeprefix(block)

    return name_of


def pattern(mask: str) -> tuple[float, int | None]:
    """What a mask is written as: "2:4" keeps two of every four entries of a row, "0.5" half of each row. Raises Invalid where it is neither.

    >>> pattern("2:4"), pattern("0.5")
    ((0.5, 4), (0.5, None))
    """
    few, colon, of = str(mask).partition(":")
    try:
        keep, every = (int(few) / int(of), int(of)) if colon else (float(few), None)
    except (ValueError, ZeroDivisionError):
        keep, every = 0.0, None
    if not 0 < keep <= 1:
        raise Invalid(
            f"a mask is written N:M (of every M entries of a row N are kept) or as a share of every row such as 0.5, and {mask!r} came"
        )
    return keep, every


def masked(W: Float[Tensor, "m n"], S: Float[Tensor, "m n"], mask: str) -> Float[Tensor, "m n"]:
    """W ∘ M: the entries that are worth most of every row, or of every so many of it; the last of a row may be fewer, and keep their share.

    >>> masked(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]), "2:4")
    tensor([[1., 2., 0., 0., 5.]])
    """
    keep, every = pattern(mask)
    M = torch.zeros_like(S, dtype=torch.bool)
    for columns in torch.arange(W.shape[1]).split(every or W.shape[1]):
        count = max(1, round(keep * len(columns)))
        best = S[:, columns].topk(count, dim=1).indices
        M[:, columns] = torch.zeros_like(S[:, columns], dtype=torch.bool).scatter_(1, best, True)
    return torch.where(M, W, torch.zeros_like(W))
