"""What an export target is: a folder of a tuned model that other programs load without finebits.

A target says which weight files it writes and how long they are before it writes one, what lies beside them, and how a library other than
this one reads them; what is read is compared with the trained model elsewhere (finebits.interop.peft). It holds a weight as it is or refuses it:
`check` says so of a format and a shape, before there is a model.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from finebits import artefacts, files, registry
from finebits.adapters.base import Adapter
from finebits.api import quantize
from finebits.data.turns import template_sha
from finebits.errors import Failed, Invalid
from finebits.export._fold import foreseen, rescaling
from finebits.formats.base import Format
from finebits.peft_forms._experts import check as over_experts
from finebits.peft_forms.base import form_of
from finebits.plan.base import Plan, at_end, served
from finebits.qtensor import QTensor
from finebits.requantize import Requantize, plan_after
from finebits.sizes import show
from finebits.store import plan_of

WEIGHTS = (".safetensors", ".gguf")
REQUANTIZED = "requantized.json"
USUAL = ("adapter", "peft", "packed", "merged")
SHAPE = 32, 4096  # of a matrix that no layout minds


class CannotHold(Invalid):
    """A target was asked for that cannot hold a weight of the plan as it is.

    >>> check({"up_proj": (fb.NF(3), (256, 128))}, ["bitsandbytes"])
    Traceback (most recent call last):
        ...
    finebits.export.base.CannotHold: export target bitsandbytes cannot hold this as it is: up_proj: bitsandbytes holds NF(4) and
    FP4(variant='bnb'); this weight is NF(bits=3, block=64, scale='fp32', unit=None); targets that can: adapter, merged, packed,
    peft
    """

    code = 2


class VerificationFailed(Failed):
    """The exported artefact is not the trained model. `result` holds the figures.

    >>> error = VerificationFailed("a logit differs by 0.3", {"difference": 0.3})
    >>> error.code, error.result
    (6, {'difference': 0.3})
    """

    code = 6
    hint = "the folder was left in place to be looked at; do not publish it"

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


class File(NamedTuple):
    """A weight file that is not there yet: its bytes, and what writes it, a tensor at a time."""

    size: int
    write: Callable[[Path], Any]


class Extras(NamedTuple):
    """What goes into a folder beside weights: a tokenizer, the name that the adapter gives its base, and what the cards tell (data.json's
    content, the recipe's text, memory.json's content, how the model was rounded once more and what is kept). What is None is left out.
    """

    tokenizer: Any = None
    base_name: str | None = None
    data: Mapping[str, Any] | None = None
    recipe: str | None = None
    memory: Mapping[str, Any] | None = None
    requantized: Mapping[str, Any] | None = None
    importance: Mapping[str, Tensor] | None = None  # of a module's inputs (n,): mean squares


class Read(NamedTuple):
    """How the weights of a folder are read by others: whose code it is (`by`), where the base lies, and what gives a weight that is held
    as codes (its name, its parts by role -> the plain weight) or, where the files are no safetensors, every tensor by its name in the model.
    `load` gives the whole base in a dtype as its users load it; None is from_pretrained.
    """

    by: str
    base: Path
    decode: Callable[[str, Mapping[str, Tensor]], Tensor] | None = None
    tensors: Mapping[str, Tensor] | None = None
    load: Callable[[torch.dtype], Any] | None = None


Weights = Mapping[str, tuple[Format | None, tuple[int, ...]]]  # of a plan, by module: format (None where dense) and shape


# All, dense; those that are (out, in) in files, in codes; or only those of nn.Linear itself, since its readers look for that class.
Layers = Literal["all", "linears", "Linear"]


class Target(Protocol):
    @property
    def rounds(self) -> float:
        """0, or where weights are rounded when they are written, and logits may differ from those that were trained: the KL in nats a token
        above which it is another model."""
        ...

    scales: ClassVar[str | None]  # what scales are held in that an adapter is folded into ("model": its dtype); None: all is written dense
    layers: ClassVar[Layers]  # whose quantized weights it holds

    def check(self, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> None:
        """Raise ValueError that says why where one of these weights, of a model in `dtype`, cannot be held as it is, or where a model of this
        config.json, if it is known, cannot be written."""
        ...

    def files(self, model: nn.Module, extras: Extras) -> dict[str, File]:
        """The weight files by their paths in the folder. Raises ValueError that names the module which cannot be written."""
        ...

    def describe(self, model: nn.Module, folder: Path, place: Path, extras: Extras) -> None:
        """Write into `folder`, which will lie at `place`, what is there beside weights: configs, tokenizer, cards."""
        ...

    def read(self, folder: Path) -> Read:
        """How others read it. Raises ValueError where the folder is none of this target."""
        ...


def target(name: str) -> Target:
    """A target by its name. Raises ValueError where there is none.

    >>> type(target("gguf")).__name__, target("gguf:q6_k")  # merged, of a type
    ('GGUF', MergedGGUF(mix='q6_k'))
    """
    name, _, mix = name.partition(":")
    found: Any = registry.load("export", name)
    if mix and not hasattr(found, "of"):
        raise Invalid(f"export target {name} has no types, and {name}:{mix} was asked for: write {name}")
    return found.of(mix) if mix else found()


def said(name: str, model: nn.Module) -> str | None:
    """What a target has to say of a model that it was written of: which tensors of a merged GGUF file are of another type than its mix."""
    kind: Any = target(name)
    return kind.note(model) if hasattr(kind, "note") else None


def names() -> tuple[str, ...]:
    """The targets there are.

    >>> names()
    ('adapter', 'bitsandbytes', 'compressed_tensors', 'gguf', 'gptq', 'merged', 'packed', 'peft')
    """
    return registry.names("export")


def write(
    name: str,
    model: Any,
    folder: Path,
    extras: Extras,
    overwrite: bool = False,
    about: Callable[[Path], Mapping[str, Any]] = lambda folder: {},
) -> int:
    """Write a target's folder; the bytes of its weight files, each of which is of the size that was said before. `about` is what else its
    record is to say of it.

    Raises ValueError where the target cannot hold the model, where the disk has no room for it, and where the folder holds files of others under
    names that would be written; other files there stay.
    """
    kind, plan = target(name), plan_of(model)
    weight_files = kind.files(model, extras)
    needed = sum(file.size for file in weight_files.values())
    _room(folder, needed)
    with artefacts.folder(folder, schema(name), overwrite) as new:
        for path, file in weight_files.items():
            (new / path).parent.mkdir(parents=True, exist_ok=True)
            file.write(new / path)
            check_size(new / path, file.size)
        kind.describe(model, new, folder, extras)
        if extras.requantized is not None:
            files.write_json(new / REQUANTIZED, extras.requantized)
        artefacts.record(
            new, schema(name), plan=plan.hash, model_hash=plan.model_hash, template_sha=template_sha(extras.tokenizer), **about(new)
        )
    return sum(file.size for path, file in weight_files.items() if path.endswith(WEIGHTS))


def schema(name: str) -> str:
    """What the record of a target's folder calls it.

    >>> schema("merged")
    'finebits.merged/1'
    """
    return f"finebits.{name}/1"


def _room(folder: Path, needed: int) -> None:
    place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise files.CannotWrite(
            f"{folder} would take {show(needed)} and the disk has {show(free)} free: free some of it, or name another place"
        )


def check_size(path: Path, predicted: int) -> None:
    """Raise RuntimeError if a written file has not the bytes that were predicted.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     check_size(Path(file.name), 0)
    """
    actual = path.stat().st_size
    if actual != predicted:
        raise Failed(f"{path} has {actual} bytes and {predicted} were predicted: the disk may be full, free some and export again")


# What a target can hold ----------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def sample(format: Format, shape: tuple[int, ...], dtype: torch.dtype) -> QTensor:
    """A small matrix of a format that is cut as one of this shape is: what a layout refuses of it, it refuses of the other.

    >>> sample(fb.NF(4), (4096, 128), torch.float32).shape
    torch.Size([32, 128])
    """
    m, n = shape[-2:]
    W = torch.randn(min(m, 32 + m % 32), n, generator=torch.Generator().manual_seed(0))
    return quantize(W.to(dtype), format)


def try_each(weights: Weights, dtype: torch.dtype, code: Callable[[QTensor], Any]) -> None:
    """Raise ValueError that names the first weight which `code` refuses.

    >>> from finebits.layouts.gptq import to_gptq
    >>> try_each({"up_proj": (fb.Int(4, 128, scale="fp16"), (256, 128)), "head": (None, (256, 128))}, torch.float32, to_gptq)
    """
    seen = set[Any]()
    for module, (format, shape) in weights.items():
        if format is not None and (format, shape) not in seen:
            seen.add((format, shape))
            try:
                code(sample(format, shape, dtype))
            except Invalid as e:
                raise Invalid(f"{module}: {e}") from None


def check(
    weights: Weights,
    wanted: Iterable[str],
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    among: Iterable[str] | None = None,
) -> None:
    """Raise CannotHold where a wanted target cannot hold all of these as they are, naming the first that it cannot, and the targets that can
    (`among` these, if given).

    >>> check({"up_proj": (fb.Int(4, 32, scale="fp16"), (256, 128))}, ["gptq", "gguf"])  # both hold that as it is
    """
    for name in wanted:
        if (lost := _refused(name, weights, dtype, config)) is not None:
            able = [t for t in among or names() if _refused(t, weights, dtype, config) is None]
            raise CannotHold(f"export target {name} cannot hold this as it is: {lost}; targets that can: {', '.join(able)}")


def check_adapters(adapters: Mapping[str, Adapter | None], tables: Collection[str], wanted: Sequence[str]) -> None:
    """Raise CannotHold where a wanted target has no way to write an adapter, over a table of embeddings or whatever else it lies over.

    >>> check_adapters({"up_proj": fb.HiRA()}, (), ["merged", "peft"])
    """
    for name, adapter in adapters.items():
        table = name in tables
        if adapter is not None and (to := next((to for to in wanted if not _carries(to, adapter, table)), None)):
            why = (
                "it is the weight that is served, and nothing lies beside that"
                if adapter.form == "codes"
                else "PEFT has no such method"
                if to == "peft" and not table
                else "the format has none over a table of embeddings"
                if table
                else "it depends on its input, and no weight does what it does"
                if adapter.form == "beside"
                else "it is no low-rank update and rescales no weight"
            )
            able = ", ".join(target for target in names() if _carries(target, adapter, table))
            way = f"targets that can: {able}" if able else "export.to=[] exports nothing"
            raise CannotHold(
                f"export target {to} cannot hold {type(adapter).__name__} over {name or 'the model'}: {why}; {way} (what is trained is saved, "
                "and finebits.load runs it)"
            )


def usual(adapters: Iterable[Adapter]) -> list[str]:
    """What is exported where nobody has said: the first of USUAL that has a way to write all of these adapters; none where none has.

    >>> usual([fb.LoRA()]), usual([fb.PrefixTuning()]), usual([fb.MixLoRA()])
    (['adapter'], ['peft'], [])
    """
    adapters = list(adapters)
    return [name for name in USUAL if all(_carries(name, adapter, adapter.over == "table") for adapter in adapters)][:1]


def check_plan(plan: Plan, wanted: Iterable[str], config: Mapping[str, Any] | None = None) -> None:
    """The same of all matrices of a plan, and of its model's config.json where that is known.

    >>> check_plan(fb.Plan({"up_proj": fb.Spec(fb.NF(4, 64))}), ["bitsandbytes"])  # of a shape that no layout minds, where none is known
    """
    wanted = list(wanted)
    check_adapters(*adapters_of(plan), wanted)
    if "peft" in wanted:
        _check_peft(plan)
    adapted = {name: cost for name, cost in plan.costs.items() if name in plan.modules and plan.modules[name].adapter is not None}
    has = next((f"{cost['windows']}, as {name} has" for name, cost in adapted.items() if "windows" in cost), None)
    if has is not None and (lost := next((name for name in wanted if name != "merged" and ":" not in name), None)):
        raise CannotHold(f"export target {lost} writes PEFT's factors, which over a convolution have no {has}: targets that can: merged")
    shapes = {name: tuple(cost["shape"]) for name, cost in plan.costs.items()}
    tables = {name for name, cost in plan.costs.items() if at_end(cost) == "embeddings"}  # which any target writes dense, if not otherwise
    weights = {name: (served(spec), shapes.get(name, SHAPE)) for name, spec in plan.modules.items() if name not in tables}
    codes = next((s.adapter for s in plan.modules.values() if s.adapter is not None and s.adapter.form == "codes"), None)
    among = None if codes is None else [name for name in names() if _carries(name, codes)]
    check(weights, wanted, getattr(torch, plan.levers.dtype), config, among)
    layers = {name: target(name).layers for name in {*names(), *wanted}}
    for key, what, able in (
        ("stored", "holds codes along the rows of (out, in) weights, and files of this model have {} as {}", {"all"}),
        ("class", "is read by libraries that look for nn.Linear, and {} is a {}", {"all", "linears"}),
    ):
        odd = [n for n, s in plan.modules.items() if served(s) is not None and key in plan.costs.get(n, {})]
        lost = [name for name in wanted if layers[name] not in able]
        if odd and lost:
            first = plan.costs[odd[0]][key]
            said = what.format(odd[0], tuple(first) if isinstance(first, list) else first)
            raise CannotHold(f"export target {lost[0]} {said}: targets that can: {', '.join(n for n in names() if layers[n] in able)}")


def rounded_anew(wanted: Iterable[str], how: Requantize | None) -> list[str]:
    """Those of the wanted targets that get the model that is rounded once more, which are the ones that hold codes. Raises CannotHold where that
    is asked for and none does.

    >>> rounded_anew(["adapter", "gptq"], fb.Requantize(fb.Int(4, 32, scale="fp16"))), rounded_anew(["gptq"], None)
    (['gptq'], [])
    """
    if how is None:
        return []
    wanted = list(wanted)
    if not (coded := [name for name in wanted if target(name).scales is not None]):
        able = ", ".join(name for name in names() if target(name).scales is not None)
        raise CannotHold(
            f"targets that hold codes ({able}) get the model that is rounded once more, and export.to is {', '.join(wanted) or 'empty'}: name "
            "one of them"
        )
    return coded


def check_all(plan: Plan, wanted: Sequence[str], how: Requantize | None, config: Mapping[str, Any] | None = None) -> None:
    """`check_plan` of the targets that hold what was trained, and `check_rounded_anew` of the others.

    >>> check_all(fb.Plan({"up_proj": fb.Spec(fb.NF(3))}), ["merged", "gptq"], fb.Requantize(fb.Int(4, 32, scale="fp16")))
    """
    anew = rounded_anew(wanted, how)
    check_plan(plan, [to for to in wanted if to not in anew], config)
    if how is not None:
        check_rounded_anew(plan, anew, how, config)


def check_rounded_anew(plan: Plan, wanted: Iterable[str], how: Requantize, config: Mapping[str, Any] | None = None) -> None:
    """Raise CannotHold where the plan's adapters are in no weight, or where a target cannot hold the new format.

    >>> check_rounded_anew(fb.Plan({"up_proj": fb.Spec(fb.NF(4), adapter=fb.LoRA())}), ["gptq"], fb.Requantize(fb.Int(4, 32, scale="fp16")))
    """
    for name, adapter in adapters_of(plan)[0].items():
        if adapter is not None and adapter.form == "beside":
            raise CannotHold(
                f"export.requantize cannot round {type(adapter).__name__} over {name or 'the model'} into a weight: it depends on its input; "
                "leave requantize out"
            )
    check_plan(plan_after(plan, how), wanted, config)


def adapters_of(plan: Plan) -> tuple[dict[str, Adapter | None], set[str]]:
    """(all adapters of a plan by what they lie over, those of these that are tables of embeddings).

    >>> adapters_of(fb.Plan({"up_proj": fb.Spec()}, over={"embed_tokens": fb.TrainableTokens((1,))}))
    ({'up_proj': None, 'embed_tokens': TrainableTokens(indices=(1,))}, {'embed_tokens'})
    """
    adapters: dict[str, Adapter | None] = {n: spec.adapter for n, spec in plan.modules.items()}
    return adapters | plan.over, {n for n, a in plan.over.items() if a.over in ("matrix", "table")}


def _check_peft(plan: Plan) -> None:
    """The same of what only PEFT's methods cannot hold together."""
    layers = {name.rpartition(".")[0]: cost["experts"] for name, cost in plan.costs.items() if "experts" in cost}
    try:
        over_experts({n: s.adapter for n, s in plan.modules.items()}, layers, plan.levers.dropout)
    except Invalid as e:
        raise CannotHold(f"export target peft cannot hold this as it is: {e}; targets that can: adapter, merged") from None
    kinds = {type(s.adapter).__name__: form_of(s.adapter) for s in plan.modules.values() if s.adapter is not None}
    for name, spec in plan.modules.items():
        cost = plan.costs.get(name, {})
        if len(cost.get("stored", ())) > 2 and "experts" not in cost and (form := form_of(spec.adapter)) is not None and not form.axes:
            raise CannotHold(
                f"export target peft cannot hold this as it is: {name} is a convolution, and PEFT's {form.peft} lies over none; targets "
                "that can: adapter, merged"
            )
    odd = next((who for who, form in kinds.items() if form is not None and not form.tokens), None)
    if odd is not None and any(a.over == "table" for a in plan.over.values()):
        raise CannotHold(
            f"export target peft cannot hold trained tokens beside {odd}: PEFT's method has no place for them; targets adapter and merged do"
        )


def rescales(plan: Plan) -> bool:
    """Is there an adapter in the plan whose export changes the base's own weights?

    >>> rescales(fb.Plan({"up_proj": fb.Spec(fb.NF(4), adapter=fb.LoRA())})), rescales(fb.Plan({"up_proj": fb.Spec(adapter=fb.DoRA())}))
    (False, True)
    """
    return any(s.adapter is not None and s.adapter.form == "scaled" and any(rescaling(s.adapter)) for s in plan.modules.values())


def check_folds(plan: Plan, wanted: Sequence[str], model: nn.Module) -> list[str]:
    """Raise CannotHold where what adapters rescale cannot be folded into the codes of a wanted target; the model's weights may be without
    values. Gives what is to be known of targets that are not wanted, and would hold the plan but for that."""
    lost = {name: why for name in names() if (why := foreseen(plan, model, target(name).scales)) is not None}
    able = [name for name in names() if name not in lost and all(_carries(name, s.adapter) for s in plan.modules.values() if s.adapter)]
    if to := next((name for name in wanted if name in lost), None):
        raise CannotHold(f"export target {to} cannot hold this as it is: {lost[to]}; targets that can: {', '.join(able)}")
    weights = {name: (served(s), tuple(plan.costs[name]["shape"])) for name, s in plan.modules.items()}
    near = [name for name in lost if _refused(name, weights, getattr(torch, plan.levers.dtype), None) is None]
    if not near:
        return []
    return [f"no export to {', '.join(near)} ({lost[near[0]]}); targets that can: {', '.join(able)}"]


def check_prefixes(wanted: Sequence[str], model: Any) -> None:
    """Raise CannotHold where trained keys and values of a classifier are to be exported: PEFT hands them to no encoder, and lays a decoder's
    head otherwise."""
    if "peft" in wanted and not model.can_generate():
        raise CannotHold(
            f"export target peft cannot hold this as it is: PEFT puts no keys before those of a {type(model).__name__} as they were trained, "
            "and no other target holds them: write export.to: []"
        )


def _carries(to: str, adapter: Adapter, table: bool = False) -> bool:
    """Has a target a way to write such an adapter, over a table of embeddings or over what else it lies over?"""
    form = form_of(adapter)
    if to == "peft":
        return form is not None and (not table or bool(form.looked) or adapter.over == "table")
    if to == "gguf" and table and adapter.over != "table":
        return False
    if adapter.form == "codes":
        return to == "merged" or ":" in to or target(to).scales is not None
    return adapter.form != "beside" if to == "merged" or ":" in to else adapter.form in ("product", "scaled")


def _refused(name: str, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None) -> str | None:
    try:
        target(name).check(weights, dtype, config)
    except Invalid as e:
        return str(e)
    return None
