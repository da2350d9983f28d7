"""What a form of PEFT is: how one of its methods says in adapter_config.json and adapter_model.safetensors what an adapter here says, and back.

Adapters know nothing of PEFT, and nothing here imports it: a form turns hyper-parameters into settings, tensors into tensors by PEFT's names,
and both the other way. What is no part of one adapter (which modules, the task, the base) is the business of who writes or reads the folder.

A setting that a form does not read and that is not off might change what an adapter computes: it is refused, so that no folder is read as
something else.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from finebits import registry
from finebits.adapters.base import Params
from finebits.build import Adapted, all_hosts
from finebits.carrier import Following, Table, tables, tied
from finebits.errors import Invalid
from finebits.linears import unlike_factors, window
from finebits.quantizers.base import check_finite

PREFIX = "base_model.model."  # of every module, in PEFT's names of tensors
# Settings that say where an adapter lies, how it began, or how it is trained, and nothing of what it computes.
IDLE = frozenset(
    "task_type peft_type auto_mapping peft_version base_model_name_or_path revision inference_mode target_modules exclude_modules "
    "layers_to_transform layers_pattern fan_in_fan_out".split()
)
# By whoever reads the folder, whatever the method; the last two are what peft makes of the one before.
READ = frozenset("bias modules_to_save trainable_token_indices ensure_weight_tying target_modules_to_tie modules_to_tie".split())
TOKENS = "token_adapter.trainable_tokens_delta"  # trained rows of a table beside a method of its own


# What a tensor is over a convolution of window (c, *sides): (k, n) is (k, c, *sides), (m, k) is (m, k, 1, …), (m,) is (1, m, 1, …).
Axes = Literal["windows", "places", "outputs"]


class Held(NamedTuple):
    """An adapter of one module with its tensors, and the shape of the weight where it is to be written."""

    adapter: Any
    p: Params
    shape: tuple[int, ...] = ()


class Written(NamedTuple):
    """Settings, tensors of every module by what follows its name, and tensors that belong to no module."""

    settings: dict[str, Any]
    tensors: dict[str, Params]
    common: Params


class Form(ABC):
    """A method of PEFT, and the adapter that is the same. Abstract."""

    peft: ClassVar[str]  # what PEFT calls the method
    adapter: ClassVar[type]  # what it is here
    parts: ClassVar[tuple[str, ...]]  # what a module's tensors are called behind its name
    reads: ClassVar[frozenset[str]]  # settings
    dropout: ClassVar[str]  # the setting of the inputs' dropout; empty where there is none
    marks: ClassVar[Mapping[str, Any]] = {}  # settings which tell it from other methods of that name
    maybe: ClassVar[tuple[str, ...]] = ()  # further tensors that some have
    common: ClassVar[tuple[str, ...]] = ()  # tensors that belong to no module, by their whole names
    idle: ClassVar[frozenset[str]] = frozenset()  # settings that it need not read, beside IDLE
    looked: ClassVar[
        Mapping[str, str]
    ] = {}  # parts, and what their transposes are called over a table of embeddings; none: it lies over none
    axes: ClassVar[Mapping[str, Axes]] = {}  # parts, and what they are over a convolution; none: it lies over none
    tokens: ClassVar[bool] = False  # has it a place for trained rows of a table beside it?
    starts: ClassVar[tuple[str, tuple[Any, ...]]] = (
        "init_weights",
        (True, False, None),
    )  # how it began; values that leave the base as it was

    @abstractmethod
    def write(self, held: Mapping[str, Held]) -> Written:
        """Raises ValueError where one PEFT adapter cannot say all of them."""

    @abstractmethod
    def read(self, settings: Mapping[str, Any], found: Mapping[str, Params], common: Params, shapes: Mapping[str, Any]) -> dict[str, Held]:
        """Adapters and tensors by module, out of settings, of tensors by what follows a module's name, and of the shapes of the weights."""


def forms() -> list[Form]:
    """All of them.

    >>> sorted({form.peft for form in forms()})[:2]
    ['ADALORA', 'GRALORA']
    """
    return [registry.load("peft_forms", name)() for name in registry.names("peft_forms")]


def form_of(adapter: Any) -> Form | None:
    """That of an adapter; None where PEFT has no method that is the same.

    >>> form_of(fb.LoRA()).peft, form_of(fb.LoRAXS())
    ('LORA', None)
    """
    return next((form for form in forms() if type(adapter) is form.adapter), None)


def form_for(settings: Mapping[str, Any]) -> Form:
    """That of an adapter_config.json. Raises ValueError that names the setting in the way.

    >>> type(form_for({"peft_type": "LORA", "r": 8})).__name__
    'Lora'
    >>> form_for({"peft_type": "LORA", "r": 8, "layer_replication": [[0, 4], [2, 6]]})
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: layer_replication is [[0, 4], [2, 6]] in adapter_config.json, and finebits cannot compute such a LORA adapter:
    merge it with peft and give the merged model
    """
    name = str(settings.get("peft_type"))
    fitting = [f for f in forms() if f.peft == name and all(settings.get(k) == v for k, v in f.marks.items())]
    if not fitting:
        known = ", ".join(sorted({f.peft for f in forms()}))
        raise Invalid(f"peft_type is {name} in adapter_config.json, and the methods of PEFT that finebits computes are {known}")
    form = max(fitting, key=lambda f: len(f.marks))
    start, plain = form.starts
    if start and settings.get(start) not in plain:
        raise Invalid(
            f"{start} is {settings[start]!r} in adapter_config.json: such a start changes the base weights, which the folder does not hold; "
            "save it from peft with path_initial_model_for_weight_conversion, which makes it a plain adapter"
        )
    known = IDLE | READ | form.reads | form.idle | form.marks.keys() | {start, form.dropout}
    for key, value in settings.items():
        if key not in known and value not in (None, False, 0, "none") and value != {} and value != []:
            raise Invalid(
                f"{key} is {value!r} in adapter_config.json, and finebits cannot compute such a {name} adapter: merge it with peft and give "
                "the merged model"
            )
    return form


def held(model: nn.Module) -> tuple[Form, dict[str, Held]]:
    """The form of a model's active adapters, and what it has to write, tensors in float32. Raises ValueError that names the module where
    PEFT has no such adapter, has it in another form than those before, or would need two."""
    found: dict[str, Held] = {}
    form, first = None, ""
    beside = tokens_of(model)
    for name, host in all_hosts(model):
        if not host.active or name in beside:
            continue
        own = None
        if len(host.active) == 1:
            kind: Any = host.kinds[host.active[0]]
            own = form_of(kind)
        if own is None:
            kinds = " over ".join(type(host.kinds[a]).__name__ for a in reversed(host.active))
            of = {h.kinds[a].form for _, h in all_hosts(model) for a in h.active}
            way = (
                "export target adapter writes it as a plain LoRA"
                if of <= {"product", "scaled"}
                else "export target merged writes its weights"
            )
            way = "finebits.save keeps it" if "beside" in of else way
            raise Invalid(f"{name}: {kinds} has no form of its own in PEFT: {way}")
        if form is not None and own != form:
            raise Invalid(
                f"{name} has a {own.adapter.__name__} adapter and {first} a {form.adapter.__name__}, and a PEFT folder holds one method: export "
                "target merged writes the weights, or adapter where all of them are low-rank"
            )
        if isinstance(host, Table) and not own.looked and own.adapter.over != "table":
            raise Invalid(
                f"PEFT's {own.peft} lies over no table of embeddings, and {name} is one: export target adapter writes a plain LoRA"
            )
        form, first = own, first or name
        p = {k: t.detach().float() if t.is_floating_point() else t.detach() for k, t in host.tensors(host.active[0]).items()}
        found[name] = Held(kind, p, tuple(host.weight.shape) if isinstance(host, Adapted) else host.size)
    if form is None:
        raise Invalid("the model has no active adapter to export: export target merged writes its weights")
    if beside and not form.tokens:
        raise Invalid(
            f"{next(iter(beside))} has trained tokens, and PEFT's {form.peft} has no place for them beside it: export target adapter holds "
            "them in the base"
        )
    return form, found


def tokens_of(model: nn.Module) -> dict[str, Table]:
    """The tables whose adapter trains tokens, where there are other adapters: to PEFT these are the method.

    >>> tokens_of(torch.nn.Embedding(2, 2))
    {}
    """
    found = {n: host for n, host in tables(model).items() if host.active and host.kinds[host.active[0]].over == "table"}
    return found if any(host.active for name, host in all_hosts(model) if name not in found) else {}


def over_tables(form: Form, written: Written, model: nn.Module) -> Written:
    """The tensors of tables by their own names, and those of heads that follow them by those of a matrix."""
    tensors, settings, found = dict(written.tensors), dict(written.settings), tables(model)
    for name in (n for n in found if n in written.tensors) if form.looked else ():
        parts = written.tensors[name]
        tensors[name] = {form.looked[k]: t.mT for k, t in parts.items()}
        heads = [n for n, m in tied(model, found[name]).items() if isinstance(m, Following)]
        tensors |= dict.fromkeys(heads, parts)
        settings |= {"ensure_weight_tying": True} if heads else {}
    if beside := tokens_of(model):
        tensors |= {name: {TOKENS: host.tensors(host.active[0])["tokens"].detach()} for name, host in beside.items()}
        settings["trainable_token_indices"] = {name: list(cast(Any, h.kinds[h.active[0]]).indices) for name, h in beside.items()}
    return Written(settings, tensors, written.common)


def over_windows(form: Form, tensors: Mapping[str, Params], model: nn.Module) -> dict[str, Params]:
    """The tensors of convolutions as PEFT has them. Raises ValueError that names the one which PEFT's method does not lie over."""
    found = {**tensors}
    for name, parts in tensors.items():
        if name and (sides := window(model.get_submodule(name))) is not None:
            check_windows(name, model.get_submodule(name), form)
            found[name] = {k: shaped(t, form.axes[k], sides) for k, t in parts.items()}
    return found


def off_windows(form: Form, tensors: Mapping[str, Params], model: nn.Module) -> dict[str, Params]:
    """The inverse: tensors over the matrices of these convolutions."""
    found, of = {**tensors}, dict(model.named_modules())
    for name, parts in tensors.items():
        if name in of and window(of[name]) is not None:
            check_windows(name, of[name], form)
            found[name] = {k: t.reshape(-1) if form.axes.get(k) == "outputs" else t.flatten(1) for k, t in parts.items()}
    return found


def shaped(t: Tensor, axes: Axes, sides: tuple[int, ...]) -> Tensor:
    """A tensor over a matrix as it is over the convolution of this window.

    >>> [tuple(shaped(torch.ones(s), a, (3, 2, 2)).shape) for s, a in (((4, 12), "windows"), ((5, 4), "places"), ((5,), "outputs"))]
    [(4, 3, 2, 2), (5, 4, 1, 1), (1, 5, 1, 1)]
    """
    ones = (1,) * len(sides[1:])
    return t.unflatten(1, sides) if axes == "windows" else t.reshape(*t.shape, *ones) if axes == "places" else t.reshape(1, -1, *ones)


def check_windows(name: str, module: nn.Module, form: Form) -> None:
    """Raise where a method of PEFT does not lie over this convolution, or not as an adapter here does."""
    if not form.axes:
        raise Invalid(
            f"{name} is a convolution in its model, and PEFT's {form.peft} lies over none: export target adapter writes a plain LoRA"
        )
    if has := unlike_factors(module):
        raise Invalid(f"{name} is a convolution with {has}, which PEFT's factors have not: export target merged writes its weights")


def named(written: Written) -> Params:
    """The tensors by PEFT's names.

    >>> list(named(Written({}, {"q_proj": {"lora_A.weight": torch.ones(1, 2)}}, {})))
    ['base_model.model.q_proj.lora_A.weight']
    """
    of_modules = {f"{PREFIX}{module}.{part}": t.contiguous() for module, parts in written.tensors.items() for part, t in parts.items()}
    return of_modules | {name: t.contiguous() for name, t in written.common.items()}


def sorted_out(form: Form, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Params], Params, Params]:
    """(of modules, common, all others by their names in the model) of a file's tensors, each in float32. Raises ValueError that names a module
    with a part missing.

    >>> found, common, others = sorted_out(form_of(fb.LoRA()), {f"{PREFIX}q.lora_A.weight": torch.ones(1, 2)})
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: the file has no base_model.model.q.lora_B.weight, which a LORA adapter needs: the copy is not complete
    """
    of_modules: dict[str, Params] = {}
    common, others = Params(), Params()
    for key, t in tensors.items():
        if t.dtype in (torch.int8, torch.uint8):
            raise Invalid(
                f"{key} holds codes ({str(t.dtype).removeprefix('torch.')}), whose scales are not there: save it in floating point"
            )
        if t.is_floating_point():
            check_finite(t, key, "gives no number back")
        t, name = t.float() if t.is_floating_point() else t, key.removeprefix(PREFIX)
        part = next((p for p in (*form.parts, *form.maybe) if name.endswith(f".{p}")), None)
        table = next((p for p, turned in form.looked.items() if name.endswith(f".{turned}")), None)
        if key in form.common:
            common[key] = t
        elif table is not None and key.startswith(PREFIX):
            of_modules.setdefault(name.removesuffix(f".{form.looked[table]}"), {})[table] = t.mT
        elif part is not None and key.startswith(PREFIX):
            of_modules.setdefault(name.removesuffix(f".{part}"), {})[part] = t
        else:
            others[name] = t
    for module, parts in of_modules.items():
        if missing := [p for p in form.parts if p not in parts]:
            raise Invalid(f"the file has no {PREFIX}{module}.{missing[0]}, which a {form.peft} adapter needs: the copy is not complete")
    if not tensors:
        raise Invalid(f"the file of a {form.peft} adapter holds no tensor: the copy is not complete")
    return of_modules, common, others


def mostly(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the value that most modules have, {module: value} of the others), as PEFT says it by a setting and its pattern.

    >>> mostly({"q": 8, "k": 8, "v": 4})
    (8, {'v': 4})
    """
    most = Counter(values.values()).most_common(1)[0][0]
    return most, {module: v for module, v in values.items() if v != most}


def patterned(settings: Mapping[str, Any], key: str, pattern: str, module: str) -> Any:
    """A setting of a module: what the first fitting entry of its pattern says, which is the end of a name as a regular expression.

    >>> settings = {"r": 8, "rank_pattern": {"v_proj": 4}}
    >>> patterned(settings, "r", "rank_pattern", "layers.0.v_proj"), patterned(settings, "r", "rank_pattern", "layers.0.q_proj")
    (4, 8)
    """
    for expression, value in (settings.get(pattern) or {}).items():
        if re.match(rf"(.*\.)?({expression})$", module):
            return value
    return settings[key]


def one_of(values: Iterable[Any], what: str, form: str) -> Any:
    """The one value of all modules. Raises ValueError where they differ.

    >>> one_of([2, 3], "rank", "VERA")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: PEFT's VERA has one rank for all modules, and these have 2 and 3: export target merged writes the weights
    """
    found = sorted(set(values))
    if len(found) > 1:
        raise Invalid(
            f"PEFT's {form} has one {what} for all modules, and these have {' and '.join(map(str, found))}: export target merged writes the "
            "weights"
        )
    return found[0]


def check_shape(module: str, part: str, t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the shape that settings and model ask for. Raises ValueError where it has another.

    >>> check_shape("q", "lora_A.weight", torch.ones(1, 2), (1, 2)).shape
    torch.Size([1, 2])
    """
    if tuple(t.shape) != tuple(shape):
        raise Invalid(
            f"{PREFIX}{module}.{part} is {tuple(t.shape)}, and settings and model ask for {tuple(shape)}: the folder was made for another model"
        )
    return t


def spread(corners: list[Tensor]) -> Tensor | None:
    """The tensor of which all of these are corners; None where there is none.

    >>> spread([torch.ones(2, 1), torch.ones(1, 3)])
    tensor([[1., 1., 1.],
            [1., 0., 0.]])
    """
    whole = corners[0].new_zeros([max(sides) for sides in zip(*(c.shape for c in corners), strict=True)])
    for c in corners:
        whole[tuple(slice(0, side) for side in c.shape)] = c
    same = all(torch.equal(whole[tuple(slice(0, side) for side in c.shape)], c) for c in corners)
    return whole if same else None


def projections(form: Form, settings: Mapping[str, Any], common: Params) -> list[Tensor]:
    """The random tensors that belong to no module. Raises ValueError where the folder leaves them to PEFT's random numbers.

    >>> projections(form_of(fb.VeRA()), {"save_projection": False}, {})
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: the folder has no base_model.vera_A (save_projection is False in adapter_config.json), which only the peft that drew
    it draws again: save it with save_projection=True
    """
    for name in form.common:
        if name not in common:
            raise Invalid(
                f"the folder has no {name} (save_projection is {settings.get('save_projection')} in adapter_config.json), which only the peft "
                "that drew it draws again: save it with save_projection=True"
            )
    return [common[name] for name in form.common]
