"""What of a model a plan covers: its matrices, those whose format is given, and its head."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finebits.adapters.trainable_tokens import TrainableTokens
from finebits.anatomy import found as places
from finebits.anatomy import size_of
from finebits.carrier import followers, looks, tied
from finebits.errors import Invalid
from finebits.formats.base import Format
from finebits.interop.checkpoint import config_of
from finebits.interop.configs import class_of, understood
from finebits.interop.hf import attention_of
from finebits.interop.linears import linearized
from finebits.linears import window
from finebits.lookup import is_linear
from finebits.tasks import base as tasks
from finebits.tasks._head import Head

if TYPE_CHECKING:
    from finebits.recipe.settings import Settings

Shape = tuple[int, ...]


class Mistake(Invalid):
    """Something that was asked for and that this model does not have, or two things that cannot be combined."""

    code = 2


def meta(folder: Path, attention: str = "auto") -> Any:
    """The model of a folder, wholly on the meta device: shapes only. Its attention is what transformers picks by itself where it is "auto"."""
    config = config_of(folder)
    with torch.device("meta"), understood(str(folder / "config.json")):
        try:
            model = class_of(config).from_config(config, attn_implementation=attention_of(config, attention))
        except (ValueError, ImportError) as e:
            if attention == "auto" or "attention" not in str(e):
                raise
            raise Mistake(
                f"model.attn_implementation is {attention}, and transformers has none such for {config.model_type}: take auto"
            ) from e
    model.tie_weights()
    return linearized(model).requires_grad_(False)


def known_head(model: Any) -> Head:
    """What follows the final states of this model. Raises Mistake where that is not known."""
    try:
        return tasks.of(model).head(model)
    except ValueError as e:
        raise Mistake(str(e)) from e


def attention(model: Any) -> str:
    """The attention that the text part of a model computes."""
    return model.config.get_text_config()._attn_implementation or "eager"


def ends(model: Any) -> tuple[int, int]:
    """How many parameters the embeddings have, and an output head that is no embedding itself."""
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding)}
    return sum(tables.values()), sum(p.numel() for p in known_head(model).module.parameters() if id(p) not in tables)


def targets(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, Shape]:
    """The matrices that a plan covers: name -> (m, n), or (e, m, n) where one parameter holds the matrices of all experts and they cannot be
    taken apart (finebits.experts).

    "all-linear" is every nn.Linear but the output head and what cuts pictures into patches, and every such parameter; a list names endings, a
    string is a regular expression over whole names. Raises ValueError if an ending or expression matches nothing.

    >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 8), "norm": torch.nn.LayerNorm(4)})
    >>> targets(model, "all-linear"), targets(model, ["q_proj"])
    ({'q_proj': (8, 4)}, {'q_proj': (8, 4)})
    """
    last = tasks.of(model).head(model).module if hasattr(model, "config") else None
    shapes: dict[str, Shape] = {}
    for k, m in model.named_modules():
        if type(m) is nn.Linear and m is not last:
            shapes[k] = (m.out_features, m.in_features)
        shapes |= {f"{k}.{own}": tuple(p.shape) for own, p in m.named_parameters(recurse=False) if p.ndim == 3 and k.endswith("experts")}
    if wanted == "all-linear":
        covered = {k: s for k, s in shapes.items() if len(s) == 3 or window(model.get_submodule(k)) is None}
    elif isinstance(wanted, str):
        covered = {k: s for k, s in shapes.items() if re.fullmatch(wanted, k)}
    else:
        for ending in wanted:
            tables = [k for k, m in model.named_modules() if isinstance(m, nn.Embedding)]
            grouped = [k for k, m in model.named_modules() if getattr(m, "groups", 1) > 1 and _named(k, [ending])]
            if grouped or not any(_named(k, [ending]) for k in (*shapes, *tables)):
                of = f"{grouped[0]} is none" if grouped else "no linear of the model ends so"
                head = last is not None and any(m is last and _named(k, [ending]) for k, m in model.named_modules())
                of = "that is the output head, over which no adapter lies: modules_to_save trains it whole" if head else of
                raise Mistake(f"target_modules names {ending}, and {of}{'' if head else _instead(model, ending) or _endings(shapes)}")
        covered = {k: s for k, s in shapes.items() if _named(k, wanted)}
    if not covered:
        own = {type(m).__name__ for m in model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2 and m is not last}
        other = sorted(own - {"Linear", "Embedding"})
        if words := [k for k, m in model.named_modules() if isinstance(m, nn.Embedding) and _named(k, wanted)]:
            raise Mistake(f"target_modules names {', '.join(words)} and no linear of the model, whose bits are planned: name some")
        why = f"; its matrices are in {', '.join(other)}, which finebits does not adapt" if other and not shapes else ""
        raise Mistake(f"target_modules {wanted!r} matches no linear of the model{why or _endings(shapes)}")
    return covered


def _endings(shapes: Iterable[str]) -> str:
    """What there is to name.

    >>> _endings(["h.0.attn.c_attn", "h.1.attn.c_attn", "h.0.mlp.c_fc"])
    ': they end in c_attn, c_fc'
    """
    ends = dict.fromkeys(name.rpartition(".")[2] for name in shapes)
    return f": they end in {', '.join([*ends][:12])}" + (", …" if len(ends) > 12 else "") if ends else ""


def _instead(model: nn.Module, ending: str) -> str:
    """What it is that ends so, and what can be done with it."""
    kinds = (nn.modules.conv._ConvNd, nn.LayerNorm)
    found: Any = next((m for k, m in model.named_modules() if _named(k, [ending]) and isinstance(m, kinds)), None)
    if found is None:
        return ""
    why = f", whose channels are in {found.groups} groups" if getattr(found, "groups", 1) > 1 else ""
    return f": its class is {type(found).__name__}{why}, and no adapter lies over that; modules_to_save trains it whole"


def chosen(model: nn.Module, settings: Settings) -> dict[str, Shape]:
    """Of the targets those that nothing excludes: not by name, not by the number of their block, and not by what is trained itself."""
    covered = targets(model, settings.target_modules or "all-linear")
    for key, left in (
        ("exclude_modules", {k for k in covered if not _named(k, settings.exclude_modules or [])}),
        ("layers_to_transform", {k for k in covered if _in_layers(k, settings.layers_to_transform, settings.layers_pattern)}),
        ("modules_to_save", {k for k in covered if not any(k == s or k.startswith(f"{s}.") for s in saved(model, settings))}),
    ):
        if not left:
            raise Mistake(f"adapter.{key} leaves none of the modules that target_modules names: take less away")
        if key == "exclude_modules" and settings.exclude_modules and left == covered.keys():
            raise Mistake(f"adapter.exclude_modules is {settings.exclude_modules!r}, and target_modules names no such module: leave it out")
        covered = {k: s for k, s in covered.items() if k in left}
    asked = settings.layers_to_transform
    numbers = [] if asked is None else [asked] if isinstance(asked, int) else asked
    every = [f"{k}." for k, _ in model.named_modules()]
    if odd := [n for n in numbers if not any(_in_layers(k, n, settings.layers_pattern) for k in every)]:
        raise Mistake(f"adapter.layers_to_transform names the block {odd[0]}, and the model has none of that number: leave it out")
    return covered


def laid(model: nn.Module, settings: Settings) -> dict[str, Any]:
    """The adapters over tables of embeddings: those that target_modules names, and trained tokens. Raises Mistake where one cannot lie there."""
    tables = {k: m for k, m in model.named_modules() if isinstance(m, nn.Embedding)}
    wanted = settings.target_modules
    named = [] if wanted is None or wanted == "all-linear" else [k for k in tables if _named(k, wanted)]
    named = [k for k in named if not _named(k, settings.exclude_modules or [])]
    named = [k for k in named if _in_layers(k, settings.layers_to_transform, settings.layers_pattern)]
    found: dict[str, Any] = {}
    whole = places(model, "table") if settings.trainable_token_indices or settings.adapter.over == "table" else {}
    if named:
        if settings.adapter.over != "matrix":
            who = type(settings.adapter).__name__
            raise Mistake(
                f"target_modules names {named[0]}, a table of embeddings, and {who} lies over no such thing by name: leave it out"
            )
        if settings.ranks or settings.ranking is not None:
            raise Mistake(
                f"adapter.ranks gives linear layers their ranks, and {named[0]} is a table of embeddings: leave one of the two out"
            )
        changed = patterned(settings, [*chosen(model, settings), *named])
        found = {k: a.at(k) or a for k in named if (a := changed.get(k, settings.adapter))}
    if settings.trainable_token_indices:
        (table,), asked = whole, settings.trainable_token_indices
        asked = asked if isinstance(asked, Mapping) else {table: asked}
        if odd := next((k for k in asked if not _named(table, [k])), None):
            raise Mistake(f"adapter.trainable_token_indices names {odd}, and the table of input embeddings is {table}")
        if table in found or settings.adapter.over == "table":
            both = "the adapter trains tokens itself" if settings.adapter.over == "table" else f"target_modules names {table}"
            raise Mistake(f"adapter.trainable_token_indices trains words of {table}, and {both}: leave one of the two out")
        found[table] = TrainableTokens(tuple(i for indices in asked.values() for i in indices))
    each: dict[str, Any] = {**dict.fromkeys(whole, settings.adapter), **found}
    for name, adapter in each.items():
        if any(name == s or name.startswith(f"{s}.") for s in saved(model, settings)):
            raise Mistake(f"{name} is to be trained itself (adapter.modules_to_save) and under an adapter: leave one of the two out")
        try:
            looks(adapter)
            if not adapter.size(*size_of(tables[name], "table")):
                raise Mistake("trainable_tokens trains the words that indices names, and it names none")
            if settings.ensure_weight_tying or adapter.over == "table":
                followers(tied(model, tables[name]))
        except ValueError as e:
            raise Mistake(str(e)) from None
    return found


def _named(name: str, wanted: str | Sequence[str]) -> bool:
    """Does a regular expression give the whole name, or a list an end of it, or of the name that all experts have?"""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(k == e or k.endswith(f".{e}") for e in wanted for k in (name, _without_number(name)))


def _without_number(name: str) -> str:
    """The name of the list that a module is in.

    >>> _without_number("experts.up_proj.3"), _without_number("q_proj")
    ('experts.up_proj', 'q_proj')
    """
    return re.sub(r"\.\d+$", "", name)


def _in_layers(name: str, layers: int | Sequence[int] | None, patterns: str | Sequence[str] | None) -> bool:
    """Is the block of a module one of these? By the first number of its name, or the one that follows a pattern."""
    if layers is None or layers == []:
        return True
    befores = [patterns] if isinstance(patterns, str) else list(patterns or [r"[^.]*"])
    found = next((m for p in befores if (m := re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def saved(model: nn.Module, settings: Settings) -> list[str]:
    """The modules that are trained themselves. Raises Mistake where a name is no module's end, or the module has no parameters."""
    names: list[str] = []
    for ending in settings.modules_to_save or []:
        found = [k for k, m in model.named_modules() if _named(k, [ending]) and any(True for _ in m.parameters())]
        if not found:
            raise Mistake(f"adapter.modules_to_save names {ending}, and no module of the model that has parameters ends so")
        names += [k for k in found if k not in names]
    return names


def patterned(settings: Settings, names: Iterable[str]) -> dict[str, Any]:
    """The adapters of modules that rank_pattern and alpha_pattern give another rank or alpha."""
    adapter, names, changed = settings.adapter, list(names), dict[str, dict[str, Any]]()
    for key, field, patterns in (("rank_pattern", "rank", settings.rank_pattern), ("alpha_pattern", "alpha", settings.alpha_pattern)):
        if patterns and not any(f.name == field for f in dataclasses.fields(adapter)):
            raise Mistake(f"adapter.{key} gives modules another {field}, and {type(adapter).__name__} has none: leave it out")
        fits = lambda p, name: any(re.match(rf"(.*\.)?({p})$", k) for k in (name, _without_number(name)))  # noqa: E731
        hits = {name: next((p for p in patterns if fits(p, name)), None) for name in names}
        for p in patterns:
            if not any(fits(p, name) for name in names):
                raise Mistake(
                    f"adapter.{key} has {p!r}, which matches no end of a planned module's name: they are {', '.join(names[:3])}, …"
                )
        for name, p in hits.items():
            if p is not None:
                changed.setdefault(name, {})[field] = patterns[p]
    if changed and settings.ranks:
        raise Mistake("adapter.ranks lets the planner choose ranks, and rank_pattern or alpha_pattern fixes some: leave one of the two out")
    if changed and settings.ranking is not None:
        raise Mistake(f"{type(settings.ranking).__name__} gives every module its rank: leave rank_pattern and alpha_pattern out")
    return {name: dataclasses.replace(adapter, **fields) for name, fields in changed.items()}


def fitted(model: Any, adapter: Any, names: Iterable[str]) -> Any:
    """The adapter with what it must know of the model: S2FT's heads. Raises Mistake where it leaves all of these modules alone."""
    if adapter.over == "matrix" and getattr(adapter, "heads", None) == (0, 0):
        config = model.config.get_text_config()
        queries = getattr(config, "num_attention_heads", None) or 0
        heads = (queries, getattr(config, "num_key_value_heads", None) or queries)
        if not all(isinstance(h, int) for h in heads):
            raise Mistake(
                f"{type(model).__name__} has other heads in every layer ({heads[0]}), which {type(adapter).__name__} cannot choose"
            )
        adapter = dataclasses.replace(adapter, heads=heads)
    if adapter.over == "matrix" and all(adapter.at(name) is None for name in names):
        wanted = ", ".join(getattr(adapter, "trains", ()))
        raise Mistake(f"{type(adapter).__name__} trains {wanted}, and no planned module is known as such by its name: plan other modules")
    return adapter


def own_head(model: Any) -> dict[str, Shape]:
    """The output head that may be quantized: name -> (V, H). None where it is trained itself, or is the embeddings' own tensor."""
    last = known_head(model).module
    if any(p.requires_grad for p in last.parameters()):
        return {}
    if type(last) is not nn.Linear or any(m.weight is last.weight for m in model.modules() if isinstance(m, nn.Embedding)):
        return {}
    return {name: (last.out_features, last.in_features) for name, m in model.named_modules() if m is last}


def own_table(model: Any) -> dict[str, Shape]:
    """The input embeddings that may be quantized: name -> (V, H). Raises Mistake where there is no table, or where something goes by it that is
    neither a lookup nor an output head."""
    entrance = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(entrance, nn.Embedding):
        kind = "no input embeddings" if entrance is None else f"a {type(entrance).__name__} at its entrance"
        raise Mistake(f"quantization.embeddings is of a table of words, and {type(model).__name__} has {kind}: leave it out")
    others = [m for m in model.modules() if getattr(m, "weight", None) is entrance.weight and m is not entrance]
    if odd := next((m for m in others if not isinstance(m, nn.Embedding) and not is_linear(m)), None):
        raise Mistake(
            f"the embeddings are the weight of a {type(odd).__name__} as well, which finebits cannot pack: leave quantization.embeddings out"
        )
    return {name: tuple(entrance.weight.shape) for name, m in model.named_modules() if m is entrance}


OUTPUT_SIDE = ("o_proj", "out_proj", "wo", "dense", "attn.c_proj")  # projections whose inputs are heads, one after the other


def head_units(model: Any, names: Iterable[str]) -> dict[str, int | None]:
    """The columns that blocks must not leave, by module: heads lie along the inputs of an output projection, and those of q, k and v (fused or
    grouped alike) along the rows, where no block ever crosses. Heads of fewer than 16 columns are no unit of a format."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return {name: size if _named(name, OUTPUT_SIDE) else None for name in names} if size >= 16 else {}


def overridden(overrides: Mapping[str, Format | None], names: Iterable[str]) -> dict[str, Format | None]:
    """Formats that the user fixed by regular expression; one that matches nothing is an error.

    >>> overridden({".*proj": fb.NF(4), "1.*": None}, ["0.q_proj", "1.q_proj"])  # the last that matches counts
    {'0.q_proj': NF(bits=4, block=64, scale='fp32', unit=None), '1.q_proj': None}
    """
    names, fixed = list(names), {}
    for pattern, format in overrides.items():
        hit = [n for n in names if re.fullmatch(pattern, n)]
        if not hit:
            hint = f"they are {', '.join(names[:3])}, …"
            if any(pattern in n for n in names):
                hint = f"whole names are compared, so write .*{pattern}.* for those that contain it"
            raise Invalid(f"quantization.overrides has {pattern!r}, which matches no planned linear of this model: {hint}")
        fixed.update(dict.fromkeys(hit, format))
    return fixed


def locked(locks: Mapping[str, Format | None], names: Sequence[str]) -> dict[str, Format | None]:
    """Formats that the user locked: a whole name or its end (layers.3.mlp.down_proj, o_proj), or a pattern with * of either (layers.0.*).

    >>> locked({"o_proj": None}, ["layers.0.o_proj", "layers.0.q_proj"])
    {'layers.0.o_proj': None}
    """
    fixed: dict[str, Format | None] = {}
    for wanted, format in locks.items():
        hit = [n for n in names if fnmatch.fnmatchcase(n, wanted) or fnmatch.fnmatchcase(n, f"*.{wanted}")]
        if not hit:
            near = difflib.get_close_matches(wanted, [*names, *{n.rpartition(".")[2] for n in names}], 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(names[:3])}, …"
            raise Mistake(f"--lock names {wanted}, and no planned linear of this model is called or ends so: {hint}")
        fixed.update(dict.fromkeys(hit, format))
    return fixed
