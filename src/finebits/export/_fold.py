"""What adapters that rescale a weight leave for other programs: the rescaling in the base, what is left as a product L R.

    W′ = diag(rows) W diag(columns) + L R

Rows of a packed weight are folded into its scales and its minima, and every code stays as it is: they are rounded once, to what the layout
holds scales in. Columns stand across its blocks. They move to the outputs of the layer before, where only products lie between the two (the
inner layer of a gated feed-forward block): tried on numbers, whatever the layers are called.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from finebits.adapters.base import Base, Coupled, Layer, Over, Rescaled
from finebits.api import quantize
from finebits.build import Adapted, hosts
from finebits.carrier import Table, tables
from finebits.errors import Invalid
from finebits.formats._stores import stored
from finebits.kernels.reference import STORES
from finebits.peft_forms.base import form_of
from finebits.plan.base import Plan
from finebits.qtensor import QTensor
from finebits.served import beside, served
from finebits.store import plan_of


class Folded(NamedTuple):
    """What the active adapters of one layer come to, in float32. `bias` is None where it stays what it was."""

    weight: Rescaled
    bias: Tensor | None

    @property
    def rescales(self) -> bool:
        """Is there more than L R?"""
        return self.weight.rows is not None or self.weight.columns is not None


Folds = Mapping[str, Folded]


def into_tables(model: nn.Module) -> dict[str, Table]:
    """The tables of embeddings that take their adapter in: trained rows lie in a base where others did.

    >>> into_tables(torch.nn.Embedding(2, 2))
    {}
    """
    return {name: host for name, host in tables(model).items() if host.active and host.kinds[host.active[0]].over == "table"}


def folded(model: nn.Module, packed: bool = False) -> dict[str, Folded]:
    """By module, of all that have an active adapter, and of layers that took what others could not hold: with `packed` no layer whose
    weight is packed has columns. Raises ValueError that names the module whose adapter is no such thing, or whose weight would round it away."""
    folds = {name: _of(name, host) for name, host in hosts(model) if beside(host)}
    for name, host in hosts(model) if packed else ():
        if name in folds and folds[name].weight.columns is not None and isinstance(served(host), QTensor):
            _move_columns(model, name, folds)
    for name, fold in folds.items() if packed else ():
        W = cast(Tensor, model.get_submodule(name).weight)
        if fold.rescales and not isinstance(W, QTensor) and W.dtype != torch.float32:
            held = str(W.dtype).removeprefix("torch.")
            raise Invalid(
                f"{name} is to take in what an adapter rescales and is not quantized: in {held}, factors near 1 would leave its weight as it "
                "is; quantize it too (adapter.target_modules), or take export target adapter, which holds it in float32"
            )
    return folds


def _of(name: str, host: Adapted) -> Folded:
    bias = host.bias if host.bias is None else host.bias.detach().float()
    layer: Layer = Base(served(host), bias)
    whole = _nothing(host)
    with torch.no_grad():
        for a in beside(host):
            kind: Any = host.kinds[a]
            if kind.form not in ("product", "scaled"):
                way = "targets peft and merged hold" if form_of(kind) else "target merged holds"
                raise Invalid(f"{name}: {type(kind).__name__} is no low-rank update and rescales no weight: export {way} it")
            p = {k: t.detach().float() if t.is_floating_point() else t for k, t in host.tensors(a).items()}
            more = Rescaled(None, None, *kind.lowrank(p)) if kind.form == "product" else kind.scaled(p, layer.weight)
            rows, columns = _product(whole.rows, more.rows), _product(whole.columns, more.columns)
            L = whole.L if more.rows is None else more.rows[:, None] * whole.L
            R = whole.R if more.columns is None else whole.R * more.columns
            whole = Rescaled(rows, columns, torch.cat([L, more.L], 1), torch.cat([R, more.R]))
            layer = Over(kind, p, layer)
    return Folded(whole, None if layer.bias is bias else layer.bias)


def _nothing(layer: nn.Linear) -> Rescaled:
    (m, n), device = layer.weight.shape, layer.weight.device
    return Rescaled(None, None, torch.zeros(m, 0, device=device), torch.zeros(0, n, device=device))


def _product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one * other


def _move_columns(model: nn.Module, name: str, folds: dict[str, Folded]) -> None:
    """W diag(c) x = W (c ∘ x): c goes to the rows of what makes x."""
    (rows, columns, L, R), bias = folds[name]
    before = _before(model, name)
    if columns is None or before is None or (R.shape[0] and not columns.all()):
        raise Invalid(
            f"{name}: its adapter rescales columns, which blocks of codes run across, and no layer before it can take them in its rows: export "
            "targets adapter and merged hold it"
        )
    folds[name] = Folded(Rescaled(rows, None, L, R / columns if R.shape[0] else R), bias)
    layer = cast(nn.Linear, model.get_submodule(before))
    own, shift = folds.get(before, Folded(_nothing(layer), None))
    held = layer.bias
    shift = held.detach().float() if shift is None and held is not None else shift
    moved = own._replace(rows=_product(own.rows, columns), L=columns[:, None] * own.L)
    folds[before] = Folded(moved, None if shift is None else columns * shift)


def _before(model: nn.Module, name: str) -> str | None:
    """The layer beside this one whose outputs are its inputs, times what does not depend on them; None where there is none.

    Its outputs times powers of two and these inputs divided by them leave every bit of what the module around both gives.
    """
    owner = name.rpartition(".")[0]
    around, layer = model.get_submodule(owner), cast(nn.Linear, model.get_submodule(name))
    gen, training = torch.Generator().manual_seed(0), around.training
    factor = 2.0 ** torch.randint(-2, 3, (layer.weight.shape[1],), generator=gen).to(layer.weight.device)
    for leaf, other in around.named_children():
        if other is layer or not isinstance(other, nn.Linear) or other.out_features != len(factor):
            continue
        x = torch.randn(3, other.in_features, generator=gen).to(layer.weight.device, layer.weight.dtype)
        hooks: list[Any] = []

        def enlarge(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
            return y * factor.to(y.dtype)

        def reduce(module: nn.Module, inputs: Any) -> tuple[Tensor]:
            return (inputs[0] / factor.to(inputs[0].dtype),)

        try:
            with torch.no_grad():
                wanted = around.eval()(x)
                hooks = [other.register_forward_hook(enlarge), layer.register_forward_pre_hook(reduce)]
                if torch.equal(around(x), wanted):
                    return f"{owner}.{leaf}".lstrip(".")
        except Exception:  # what takes more than one tensor is no feed-forward block
            return None
        finally:
            for hook in hooks:
                hook.remove()
            around.train(training)
    return None


# Before there are values ---------------------------------------------------------------------------------------------------------------


def foreseen(plan: Plan, model: nn.Module, scales: str | None) -> str | None:
    """Why what the adapters of a plan rescale cannot be folded into its model's weights, in a target of such scales; None where it can. The
    model may be on the meta device: the modules around are tried with random weights."""
    store = held_in(scales, dtype := getattr(torch, plan.levers.dtype))
    if store is None:
        return None
    turned = {name: rescaling(s.adapter) for name, s in plan.modules.items() if s.adapter is not None and s.adapter.form == "scaled"}
    into = {name for name, (rows, _) in turned.items() if rows}
    where = dict[Any, str | None]()
    for name in (name for name, (_, columns) in turned.items() if columns and plan.modules[name].format is not None):
        owner, _, leaf = name.rpartition(".")
        around = model.get_submodule(owner)
        kind = type(around), leaf, tuple((k, tuple(p.shape)) for k, p in around.named_parameters())
        if kind not in where:
            where[kind] = _before(nn.Sequential(_valued(around)), f"0.{leaf}")
        if (before := where[kind]) is None:
            return (
                f"{name}: {type(plan.modules[name].adapter).__name__} rescales columns, which blocks of codes run across, and no layer before "
                "it can take them in its rows"
            )
        into.add(f"{owner}.{before.rpartition('.')[2]}".lstrip("."))
    for name in sorted(into | {name for name, sides in turned.items() if any(sides)}):
        format = plan.modules[name].format if name in plan.modules else None
        if format is None and dtype != torch.float32:
            held = str(dtype).removeprefix("torch.")
            return f"{name} is to take in what an adapter rescales and stays dense: in {held}, factors near 1 would leave it as it is"
        try:
            if format is not None and name in into:
                q = quantize(
                    torch.ones(2, (plan.costs.get(name, {}).get("shape") or cast(Any, model.get_submodule(name)).weight.shape)[-1]), format
                )
                rescaled(q, Folded(Rescaled(torch.ones(2), None, torch.zeros(2, 0), torch.zeros(0, q.shape[-1])), None), store)
        except Invalid as e:
            return f"{name}: {e}"
    return None


@functools.lru_cache(maxsize=64)
def rescaling(adapter: Any) -> tuple[bool, bool]:
    """Does an adapter that rescales do so with rows, with columns?

    >>> rescaling(fb.DoRA()), rescaling(fb.IA3("input")), rescaling(fb.BitFit())
    ((True, False), (False, True), (False, False))
    """
    if isinstance(adapter, Coupled):  # which adds at places that are known with the block alone
        return False, False
    size = max(64, adapter.rank)
    base, gen = Base(torch.ones(size, size), torch.zeros(size)), torch.Generator().manual_seed(0)
    parts = adapter.scaled(adapter.params(base, gen, {}) | adapter.buffers(base, gen), base.weight)
    return parts.rows is not None, parts.columns is not None


def _valued(module: nn.Module) -> nn.Module:
    """A copy with random weights."""
    made = copy.deepcopy(module).to_empty(device="cpu").float()
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=gen) / p.shape[-1] ** 0.5)
    return made


# The base ------------------------------------------------------------------------------------------------------------------------------


def into(t: Tensor, name: str, folds: Folds) -> Tensor:
    """A tensor of the base by its name, a weight as (out, in), with what is folded into it, rounded once more to its dtype.

    >>> twice = Folded(Rescaled(torch.tensor([2.0]), None, torch.zeros(1, 0), torch.zeros(0, 2)), None)
    >>> into(torch.ones(1, 2), "q_proj.weight", {"q_proj": twice})
    tensor([[2., 2.]])
    """
    module, _, leaf = name.rpartition(".")
    fold = folds.get(module)
    if fold is None or leaf not in ("weight", "bias"):
        return t
    if leaf == "bias":
        return t if fold.bias is None else fold.bias.to(t.dtype)
    return fold.weight._replace(L=fold.weight.L[:, :0], R=fold.weight.R[:0]).of(t.float()).to(t.dtype) if fold.rescales else t


def check_written(folds: Folds, names: Collection[str]) -> None:
    """Raise ValueError where a weight that is folded into is not among those that are written under their own name."""
    for name in (name for name, fold in folds.items() if fold.rescales and f"{name}.weight" not in names):
        raise Invalid(f"{name}: its weight is another layer's too, which must not be rescaled with it: export target merged is the way")


def rescaled(q: QTensor, fold: Folded | None, store: str) -> QTensor:
    """The packed weight with rows in its scales, held in `store`: the same codes.

    >>> q = fb.quantize(torch.tensor([[7.0, 1.0]]), fb.Int(4))
    >>> twice = Folded(Rescaled(torch.tensor([2.0]), None, torch.zeros(1, 0), torch.zeros(0, 2)), None)
    >>> rescaled(q, twice, "fp16").dequantize(), rescaled(q, twice, "fp16").parts["codes"] is q.parts["codes"]
    (tensor([[14.,  2.]]), True)
    """
    if fold is None or fold.weight.rows is None:
        return q
    if "scale" in q.format.shared or q.format.table(q.parts, q.shape[-1]) is None:
        raise Invalid(
            f"its adapter rescales rows, and {q.format} has no scale of its own for a row: export targets adapter and merged hold it"
        )
    rows = fold.weight.rows[:, None]
    scales = q.format.scales(q.parts, q.shape[-1])
    parts = {"codes": q.parts["codes"], "scale": stored(rows * scales.scale.float(), store)}
    parts |= {"zero": q.parts["zero"]} if "zero" in q.parts else {}
    parts |= {"shift": stored(rows * q.parts["shift"].float(), store)} if "shift" in q.parts else {}
    return QTensor(parts, cast(Any, replace)(q.format, scale=store), q.sizes, q.dtype)


def held_in(scales: str | None, dtype: torch.dtype) -> str | None:
    """The store of a target's scales (export.base.Target.scales) for a model of a dtype.

    >>> held_in("fp16", torch.float32), held_in("model", torch.bfloat16)
    ('fp16', 'bf16')
    """
    return next(name for name, held in STORES.items() if held == dtype) if scales == "model" else scales


def rounds(model: nn.Module, scales: str | None) -> bool:
    """Is the base of a target with such scales rounded when the model's adapters are folded into it?"""
    dtype, of = getattr(torch, plan_of(model).levers.dtype), dict(hosts(model))
    if into_tables(model) and dtype != torch.float32:
        return True
    if not all(kind.form in ("product", "scaled") for host in of.values() for kind in host.kinds.values()):
        return False
    store = held_in(scales, dtype)
    for name, fold in folded(model, packed=store is not None).items():
        packed = store is not None and name in of and isinstance(of[name].weight, QTensor)
        biased = fold.bias is not None and cast(nn.Linear, model.get_submodule(name)).bias is not None
        # in 16 bits readers decode to these, so that weights are rounded with the factor in them
        if fold.rescales and (dtype != torch.float32 or (packed and store != "fp32")) or biased and dtype != torch.float32:
            return True
    return False
