"""Plan and model -> adapted model: the only place that edits a module tree, and the host that carries adapters.

`Adapted` is the same nn.Linear with its class replaced: `isinstance(m, nn.Linear)` holds, base keys stay `weight` and `bias`, and an
adapter adds `p.<name>.<param>`. In state dicts a quantized weight appears as its plain parts (`weight.codes`, `weight.scale`, …).
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits.adapters._frozen import Frozen
from finebits.adapters.base import Adapter, Base, Coupled, Over, Params
from finebits.adapters.lora import LoRA
from finebits.carrier import Carrier, carriers, lay
from finebits.errors import Invalid, WrongType
from finebits.init.base import BoundQuantizer, begin, check_start
from finebits.linalg import top_svd
from finebits.linears import multiplies
from finebits.lookup import Lookup, Packed, lookups, put, rounded, shared_names
from finebits.plan.base import Plan, Spec, begun
from finebits.qtensor import QTensor, dense
from finebits.quantizers.base import check_finite
from finebits.stats.base import Statistic, Stats

MOVED = "moved"  # the adapter that holds what an initialiser took out of a base that was quantized already
Progress = Callable[[int, int, str], None]


class Adapted(Packed, nn.Linear):
    """A frozen linear layer, perhaps quantized, under any number of named adapters. Made by `Adapted.over`, never constructed.

    >>> linear = torch.nn.Linear(4, 3)
    >>> host = fb.Adapted.over(linear)
    >>> host is linear, isinstance(linear, torch.nn.Linear), linear.weight.requires_grad
    (True, True, False)
    """

    p: nn.ModuleDict
    kinds: dict[str, Adapter]
    active: list[str]
    dropout: float

    @classmethod
    def over(cls, linear: nn.Linear) -> Adapted:
        """The same module, now a host. Raises where another library's hook would be bypassed.

        >>> linear = torch.nn.Linear(4, 3)
        >>> linear.forward = lambda x: x
        >>> fb.Adapted.over(linear)
        Traceback (most recent call last):
            ...
        finebits.errors.Invalid: the forward of this module was already replaced by a hook (accelerate?): build first, dispatch afterwards
        """
        if isinstance(linear, cls):
            return linear
        _check_host(linear)
        linear.__class__ = cls
        host = cast(Adapted, linear)
        host.p, host.kinds, host.active, host.dropout = nn.ModuleDict(), {}, [], 0.0
        host.weight.requires_grad_(False)
        if host.bias is not None:
            host.bias.requires_grad_(False)
        return host

    def add(
        self,
        name: str,
        adapter: Adapter,
        gen: torch.Generator,
        start: Params | None = None,
        common: Mapping[str, nn.Parameter] = types.MappingProxyType({}),
    ) -> None:
        """Lay an adapter over what is there; `start` is completed by the adapter. Parameters are float32 on the weight's device. `common` are
        those that other hosts hold as well (`Adapter.shared`): taken as they are.

        >>> host = fb.Adapted.over(torch.nn.Linear(4, 3))
        >>> host.add("default", fb.LoRA(rank=2), torch.Generator().manual_seed(0))
        >>> {name: tuple(p.shape) for name, p in host.named_parameters() if p.requires_grad}
        {'p.default.A': (2, 4), 'p.default.B': (3, 2)}
        """
        if name in self.kinds:
            raise Invalid(f"an adapter named {name!r} is already there")
        alone = any(self.kinds[a].form == "beside" for a in self.active)  # what lies there is no weight
        base = Base(self.weight, self.bias) if alone else self.stack()
        tensors = nn.ParameterDict()
        still = adapter.frozen  # stored with the trained ones, but left alone
        buffers = adapter.buffers(base, gen)
        given = {k: common[k] for k in common if k not in buffers} | (start or {})
        for k, v in adapter.params(base, gen, given).items():
            v = v.float() if v.is_floating_point() else v
            tensors[k] = nn.Parameter(v.to(self.weight.device).contiguous(), requires_grad=k not in still)
        for k, v in buffers.items():
            tensors[k] = nn.Parameter(v.to(self.weight.device), requires_grad=False)
        for k in common:
            tensors[k] = common[k]
        self.p[name] = tensors
        self.kinds[name] = adapter
        self.active.append(name)

    def remove(self, name: str) -> None:
        """Take an adapter off.

        >>> host = fb.Adapted.over(torch.nn.Linear(4, 3))
        >>> host.add("default", fb.LoRA(rank=2), torch.Generator())
        >>> host.remove("default")
        >>> host.active, list(host.p)
        ([], [])
        """
        del self.p[name], self.kinds[name]
        self.active = [a for a in self.active if a != name]

    def tensors(self, name: str, dtype: torch.dtype | None = None) -> Params:
        """One adapter's tensors by name, cast to `dtype` if given (gradients flow through the cast).

        >>> host = fb.Adapted.over(torch.nn.Linear(4, 3))
        >>> host.add("default", fb.LoRA(rank=2), torch.Generator())
        >>> {k: (tuple(t.shape), t.dtype) for k, t in host.tensors("default", torch.bfloat16).items()}
        {'A': ((2, 4), torch.bfloat16), 'B': ((3, 2), torch.bfloat16)}
        """
        params = cast(nn.ParameterDict, self.p[name])
        kept = self.kinds[name].kept
        return {k: v if dtype is None or k in kept or not v.is_floating_point() else v.to(dtype) for k, v in params.items()}

    def stack(self, dtype: torch.dtype | None = None) -> Base | Over:
        """The base with the active adapters over it.

        >>> host, start = fb.Adapted.over(torch.nn.Linear(2, 2, bias=False)), {"A": torch.ones(1, 2), "B": torch.ones(2, 1)}
        >>> host.add("default", fb.LoRA(rank=1, alpha=3), torch.Generator(), start)
        >>> (host.stack().weight - host.weight).detach()  # s·B A = 3 everywhere
        tensor([[3., 3.], [3., 3.]])
        """
        layer: Base | Over = Base(self.weight, self.bias, self._drop)
        for name in self.active:
            layer = Over(self.kinds[name], self.tensors(name, dtype), layer, self._drop)
        return layer

    def _drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def forward(self, input: Tensor) -> Tensor:
        dtype = input.dtype
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
        return self.stack(dtype)(input)

    def extra_repr(self) -> str:
        base = repr(self.weight.format) if isinstance(self.weight, QTensor) else str(self.weight.dtype)
        return f"{super().extra_repr()}, weight={base}, adapters={self.kinds}"


def _check_host(module: nn.Module, name: str = "this module") -> None:
    if not (isinstance(module, Adapted) or multiplies(module)):
        raise WrongType(f"adapters go over nn.Linear; {name} is a {type(module).__name__}: leave it out of the plan")
    if hasattr(module, "_hf_hook") or "forward" in vars(module):
        raise Invalid(f"the forward of {name} was already replaced by a hook (accelerate?): build first, dispatch afterwards")


@dataclass(frozen=True)
class Built:
    """What a built model carries: the plan that it was built from, what of it had one dimension by then (see `vectors`), what initialisers that
    choose among others chose, and the mean losses of refinements over their first and last epoch, by block ("" for the model).

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(fb.NF(4))}))
    >>> left = built(model)
    >>> left.plan.modules["0"].format, list(left.vectors), left.choices, left.refined
    (NF(bits=4, block=64, scale='fp32', unit=None), ['0.bias'], {}, {})
    """

    plan: Plan
    vectors: Mapping[str, Tensor]
    choices: Mapping[str, Any]
    refined: Mapping[str, tuple[float, float]]


def built(model: nn.Module) -> Built | None:
    """What `build` left on a model; None where it was not built here.

    >>> built(torch.nn.Linear(2, 2)) is None
    True
    """
    return getattr(model, "finebits", None)


def hosts(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """Every host of a model, by name.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.Linear(8, 2))
    >>> [name for name, host in fb.hosts(fb.build(model, fb.Plan({"0": fb.Spec(fb.NF(4))})))]
    ['0']
    """
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield name, module


def all_hosts(model: nn.Module) -> Iterator[tuple[str, Adapted | Carrier]]:
    """Those, and what carries adapters over modules that are no matrices.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    >>> [name for name, host in all_hosts(fb.build(model, fb.Plan({"0": fb.Spec(fb.NF(4))})))]
    ['0']
    """
    yield from hosts(model)
    yield from carriers(model)


def weighted(model: nn.Module) -> dict[str, Adapted | Lookup]:
    """Every module whose weight a plan has made: the hosts, and packed tables.

    >>> list(weighted(fb.build(torch.nn.Sequential(torch.nn.Embedding(8, 64)), fb.Plan({"0": fb.Spec(fb.NF(4))}))))
    ['0']
    """
    return {**dict(lookups(model)), **dict(hosts(model))}


def generator(seed: int, name: str) -> torch.Generator:
    """Randomness of one module: from (seed, name) alone, so that results do not depend on the order of modules.

    >>> torch.equal(torch.rand(2, generator=generator(42, "q_proj")), torch.rand(2, generator=generator(42, "q_proj")))
    True
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def common(
    model: nn.Module, key: str, adapter: Adapter, host: Adapted, seed: int, start: Mapping[str, Tensor] = types.MappingProxyType({})
) -> dict[str, nn.Parameter]:
    """The tensors that hosts of one shape hold together under equal adapters: those of a host that has them already, else `start`'s, else
    drawn from the seed and the shape.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> common(model, "default", fb.LoRA(rank=2), fb.Adapted.over(model[0]), 0)  # LoRA has none
    {}
    """
    if not adapter.shared:
        return {}
    shape = tuple(host.weight.shape)
    for _, other in hosts(model):
        if other is not host and other.kinds.get(key) == adapter and tuple(other.weight.shape) == shape:
            return {k: cast(nn.Parameter, other.tensors(key)[k]) for k in sorted(adapter.shared)}
    base, name = Base(host.weight, host.bias), "x".join(map(str, shape))
    stored = adapter.params(base, generator(seed, name), {})
    drawn = stored | adapter.buffers(base, generator(seed, name)) | {k: v for k, v in start.items() if k in adapter.shared}
    trained = stored.keys() - adapter.frozen
    return {k: nn.Parameter(drawn[k].float().to(host.weight.device), requires_grad=k in trained) for k in sorted(adapter.shared)}


def needs(plan: Plan) -> dict[str, frozenset[type[Statistic]]]:
    """The statistics that each module of the plan asks for; modules that ask for none are left out.

    >>> fb.needs(fb.Plan({"0": fb.Spec(fb.NF(4), init=fb.QERA()), "1": fb.Spec(fb.NF(4))}))
    {'0': frozenset({<class 'finebits.stats.gram.Gram'>})}
    """
    own = lambda a: frozenset() if a is None else a.needs  # noqa: E731
    wanted = {name: spec.quantizer.needs | spec.init.needs | own(spec.adapter) for name, spec in plan.modules.items()}
    return {name: s for name, s in wanted.items() if s}


def build(
    model: nn.Module,
    plan: Plan,
    stats: Mapping[str, Stats] | None = None,
    *,
    read: Callable[[str], Tensor] | None = None,
    progress: Progress = lambda done, total, name: None,
) -> nn.Module:
    """Edit `model` in place as the plan says: quantize, start and attach, one matrix at a time. Everything but adapters is frozen.

    `read(name)` gives the weight of a module whose own is still on the meta device. Raises ValueError that names the module where a weight
    holds NaN or Inf, where a statistic is missing, or where a part of the spec does not fit the module.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8))
    >>> model = fb.build(model, fb.Plan({"0": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=2))}))
    >>> model[0].weight.nbytes, [name for name, p in model.named_parameters() if p.requires_grad]  # 8 · 64 / 2 and 8 scales of 4
    (288, ['0.p.default.A', '0.p.default.B'])
    """
    dtype = getattr(torch, plan.levers.dtype)
    linears: dict[str, nn.Module] = {}
    for name in plan.modules:  # all of them before any is touched: a refused plan leaves the model as it was
        try:
            linears[name] = model.get_submodule(name)
        except AttributeError:
            raise Invalid(f"the plan names {name}, and the model has no such module: the plan was made for another model") from None
        if not isinstance(linears[name], nn.Embedding):
            _check_host(linears[name], name)
    for adapter, init in dict.fromkeys((s.adapter, s.init) for s in plan.modules.values() if s.adapter is not None):
        check_start(adapter, init)
        _check_dropout(adapter, plan)
        if adapter.over != "matrix":
            raise Invalid(f"{type(adapter).__name__} lies over no matrix: name its modules in the plan's `over`")
    adapters = {p for _, host in all_hosts(model) for p in host.p.parameters()}  # of modules that were built before
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and p in adapters)
    chosen: dict[str, Any] = {}
    places = coupled(model, plan, stats or {}, read)  # by weights as they are, before any is rounded
    for i, (name, spec) in enumerate(plan.modules.items()):
        linear = linears[name]
        W = read(name) if read is not None else cast(Tensor, linear.weight)
        if isinstance(linear, nn.Embedding):
            try:
                put(model, linear, rounded(W, spec, dtype))
            except ValueError as e:
                raise Invalid(f"{name}: {e}") from e
            progress(i + 1, len(plan.modules), name)
            continue
        host = Adapted.over(cast(nn.Linear, linear))
        start, choice = _replace(host, W, spec, (stats or {}).get(name, {}), name, dtype, generator(plan.seed, name))
        if choice is not None:
            chosen[name] = choice
        if spec.adapter is not None and not spec.adapter.itself:
            start = {**start, **places.get(name, {})}
            host.add("default", spec.adapter, generator(plan.seed, name), start, common(model, "default", spec.adapter, host, plan.seed))
            host.dropout = plan.levers.dropout
        progress(i + 1, len(plan.modules), name)
    release(model, plan)
    return sign(lay_over(model, plan), plan, chosen)


def coupled(model: nn.Module, plan: Plan, stats: Mapping[str, Stats], read: Callable[[str], Tensor] | None = None) -> dict[str, Params]:
    """The places of adapters that choose them for several modules of a block together (`Coupled`), by module.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    >>> coupled(model, fb.Plan({"0": fb.Spec(adapter=fb.S2FT(share=1.0))}), {})
    {'0': {'index': tensor([0, 1, 2, 3], dtype=torch.int32)}}
    """
    found: dict[str, Params] = {}
    for name, spec in plan.modules.items():
        adapter = spec.adapter
        if not isinstance(adapter, Coupled):
            continue
        lead = adapter.leader(name, [n for n, _ in model.get_submodule(name.rpartition(".")[0]).named_children()])
        own = read or (lambda name: cast(Tensor, model.get_submodule(name).weight))
        W = None if adapter.by == "random" else own(lead)
        m, n = cast(Tensor, model.get_submodule(name).weight).shape
        try:
            found[name] = {"index": adapter.chosen(W, stats.get(lead, {}), generator(plan.seed, lead), adapter.side(m, n))}
        except ValueError as e:
            raise Invalid(f"{name}: {e}") from e
    return found


def lay_over(model: nn.Module, plan: Plan) -> nn.Module:
    """Attach the plan's adapters over modules that are no matrices, once these are as they will be."""
    of = dict(model.named_modules())
    for name, adapter in plan.over.items():
        table = isinstance(of.get(name), nn.Embedding)  # whose inputs are numbers of words, of which none are dropped
        if not table:
            _check_dropout(adapter, plan)
        if adapter.over == "matrix" and not table:
            raise Invalid(f"{type(adapter).__name__} lies over matrices: name {name} in the plan's `modules`")
        lay(model, name, "default", adapter, generator(plan.seed, name), {}, plan.levers.dropout, plan.tied)
    return model


def _check_dropout(adapter: Adapter, plan: Plan) -> None:
    if plan.levers.dropout and not adapter.drops:
        raise Invalid(f"dropout of the inputs has no meaning for {type(adapter).__name__}: set it to 0")


def release(model: nn.Module, plan: Plan) -> None:
    """Train the modules and weights that the plan trains themselves.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.LayerNorm(8)).requires_grad_(False)
    >>> release(model, fb.Plan({}, trained=("1",)))
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['1.weight', '1.bias']
    """
    for p in themselves(model, plan).values():
        p.requires_grad_(True)


def themselves(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """The parameters of the model's own that a plan trains, by name, whether or not they are trained at the moment.

    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 8), torch.nn.LayerNorm(8))
    >>> list(themselves(model, fb.Plan({"0": fb.Spec(adapter=fb.Full())}, trained=("1",))))
    ['1.weight', '1.bias', '0.weight']
    """
    whole = {f"{name}.{k}": p for name in plan.trained for k, p in model.get_submodule(name).named_parameters()}
    full = [name for name, spec in plan.modules.items() if spec.adapter is not None and spec.adapter.itself]
    return whole | {f"{name}.weight": cast(nn.Parameter, model.get_submodule(name).weight) for name in full}


def choices(model: nn.Module) -> Mapping[str, Any]:
    """What initialisers that choose among others (auto) chose, by module: every candidate with its output error, which won, its share.

    `{"tried": [{"init": {"paper": "zeros"}, "error": 0.52}, …], "won": 2, "share": 0.31}`; empty where nothing chose.

    >>> model, gram = torch.nn.Sequential(torch.nn.Linear(2, 2)), fb.Gram()
    >>> model[0].weight.data = torch.tensor([[1.4, 0.6], [0.6, 1.4]])  # of which two bits hold the diagonal
    >>> gram.add(torch.eye(2))
    >>> plan = fb.Plan({"0": fb.Spec(fb.Int(2), adapter=fb.LoRA(rank=2), init=fb.Auto(("loftq",)))})
    >>> made = fb.choices(fb.build(model, plan, {"0": {fb.Gram: gram}}))
    >>> [tried["init"]["paper"] for tried in made["0"]["tried"]], made["0"]["won"]
    (['zeros', 'loftq'], 1)
    """
    origin = built(model)
    return {} if origin is None else origin.choices


def vectors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Biases, gains of norms, and what else beside the adapters has one dimension, by name.

    >>> list(vectors(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))))
    ['0.bias', '1.weight', '1.bias']
    """
    inside = tuple(f"{name}.p." for name, _ in all_hosts(model))
    return {n: p for n, p in model.named_parameters() if p.ndim == 1 and not n.startswith(inside)}


def tuned(model: nn.Module) -> dict[str, nn.Parameter]:
    """Dense parameters beside the adapters that are not what they were when the model was built: vectors that have moved, and what is trained.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(fb.NF(4))}))
    >>> model[0].bias.data += 1
    >>> list(tuned(model))
    ['0.bias']
    """
    inside = tuple(f"{name}.p." for name, _ in all_hosts(model))
    origin = built(model)
    planned = themselves(model, origin.plan) if origin is not None else {}
    trained = {n: p for n, p in model.named_parameters() if (p.requires_grad or n in planned) and not n.startswith(inside)}
    trained = {n: p for n, p in trained.items() if not isinstance(p, QTensor)}
    before: Mapping[str, Tensor] = {} if origin is None else origin.vectors
    moved = {n: p for n, p in vectors(model).items() if n in before and not torch.equal(p.detach().float().cpu(), before[n].float().cpu())}
    return moved | trained


def sign(
    model: nn.Module, plan: Plan, choices: Mapping[str, Any] | None = None, refined: Mapping[str, tuple[float, float]] | None = None
) -> nn.Module:
    """Leave on a model what it was built from (`Built`), over what an earlier call left of its parts, and what DDP must leave alone.

    >>> model = sign(torch.nn.Linear(2, 2), fb.Plan({}), refined={"": (2.0, 1.0)})
    >>> sign(model, fb.Plan({}), choices={"q": "…"}).finebits.refined  # what an earlier call left stays
    {'': (2.0, 1.0)}
    """
    before = built(model) or Built(plan, {n: p.detach().clone() for n, p in vectors(model).items() if p.device.type != "meta"}, {}, {})
    origin = Built(plan, before.vectors, {**before.choices, **(choices or {})}, {**before.refined, **(refined or {})})
    quantized = [f"{name}.weight" for name, host in hosts(model) if isinstance(host.weight, QTensor)]
    quantized += shared_names(model)
    ignored = list(dict.fromkeys([*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *quantized]))
    model._ddp_params_and_buffers_to_ignore = ignored  # pyright: ignore[reportArgumentType]  # DDP broadcasts dense storage only
    model.finebits = origin  # pyright: ignore[reportArgumentType]
    return model


def _replace(
    host: Adapted, W: Tensor, spec: Spec, stats: Stats, name: str, dtype: torch.dtype, gen: torch.Generator
) -> tuple[Params, dict[str, Any] | None]:
    coded, choice = isinstance(W, QTensor), None  # codes that are there already are never rounded again
    quantize = (lambda V: V) if spec.format is None or coded else BoundQuantizer(spec.quantizer, spec.format, stats)
    try:
        if isinstance(W, QTensor) and spec.format not in (None, W.format):
            raise Invalid(f"the weight is quantized already, as {W.format}, and the plan says {spec.format}: plan from the dense weights")
        V = dense(W.detach(), torch.float32)
        check_finite(V, f"{name}.weight")
        if spec.adapter is None:
            base, start = quantize(V), Params()
        elif spec.init.chooses:
            chosen = cast(Any, spec.init).choose(V, spec.adapter, quantize, stats)
            base, start, choice = chosen.base, chosen.start, chosen.to_json()
        elif (format := None if coded else begun(spec)) is not None:
            base, start = cast(Any, spec.adapter).born(V, cast(QTensor, spec.quantizer(V, format, stats)))
        else:
            base, start = begin(spec.init, V, spec.adapter, quantize, stats, gen)
        if isinstance(W, QTensor):
            moved = V - base
            base = W.detach()
            if moved.any():
                host.weight = nn.Parameter(base, requires_grad=False)
                rank, factors = _factors(moved, cast(Adapter, spec.adapter), start, host, gen)
                host.add(MOVED, Frozen(LoRA(rank, float(rank))), gen, factors)
    except ValueError as e:
        raise Invalid(f"{name}: {e}") from e
    base = base.apply_parts(lambda part: part, dtype) if isinstance(base, QTensor) else base.to(dtype)
    host.weight = nn.Parameter(base, requires_grad=False)
    return start, choice


def _factors(moved: Tensor, adapter: Adapter, start: Params, host: Adapted, gen: torch.Generator) -> tuple[int, Params]:
    """−L R = −moved: the adapter's own start where that is what was taken out, so that the two cancel, else the triples of the move."""
    tensors = adapter.params(Base(host.weight, host.bias), gen, start)
    if adapter.form == "product":
        L, R = cast(Any, adapter).lowrank(tensors)
        if float((moved - L @ R).norm()) <= 1e-4 * float(moved.norm()):
            return R.shape[0], {"B": -L, "A": R}
    rank = min(adapter.rank, *moved.shape)
    U, S, Vh, captured = top_svd(moved, rank)
    if captured < 1 - 1e-6:
        raise Invalid("the initialiser moves a base that is quantized already by more than its rank: start from the dense weights")
    return rank, {"B": -U * S, "A": Vh}
