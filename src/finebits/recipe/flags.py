"""Options of a command line that are keys of a recipe: `--learning-rate 2e-4` is `training.learning_rate=2e-4`.

Every key has one, in every accepted spelling and by its whole name (--training.learning-rate), and so have the names that other tools give
them (--lora-r, --cutoff-len). Between words - and _ are the same. A key that is true or false needs no value, and --no-KEY is false.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from finebits.recipe.foreign import ADAPTERS, ANYWAY, translated
from finebits.recipe.mistakes import INSTEAD, SYNONYMS, nearest
from finebits.recipe.schema import Keys, sections, spelled
from finebits.recipe.source import Loader, Problem, RecipeError

SHORT = {
    "adapter": "adapter.paper",
    "budget": "budget.memory",
    "data": "data.datasets",
    "datasets": "data.datasets",
    "held_out": "data.held_out.path",
    "model": "model.model_name_or_path",
}


def words(options: Sequence[str], own: Iterable[str] = ()) -> tuple[list[str], int]:
    """The overrides that the first of these options stands for, and how many words it took. `own` are options of the command itself, for
    suggestions. Raises RecipeError in one sentence.

    >>> words(["--learning-rate", "2e-4", "rest"]), words(["--no-gradient_checkpointing"]), words(["--lora_r=8"])
    ((['training.learning_rate=2e-4'], 2), (['training.gradient_checkpointing=false'], 1), (['adapter.rank=8'], 1))
    """
    option, sign, value = options[0].partition("=")
    name = option.lstrip("-").replace("-", "_")
    key, negated = _key(name, option, own)
    switch = _is(kind(key), bool) if key in keys() else name in SWITCHES
    if negated:
        if sign:
            raise _wrong(f"{option} is false by itself, and {value} came: leave the value out")
        return [f"{key}=false"], 1
    taken = 1
    if not sign:
        following = options[1] if len(options) > 1 else None
        if switch:
            value, taken = (following, 2) if following in ("true", "false", "True", "False") else ("true", 1)
        elif following is None or (following.startswith("--") and len(following) > 2):
            raise _wrong(f"{option} wants a value: {option} VALUE")
        else:
            value, taken = following, 2
    if key in SYNONYMS or key in ANYWAY:
        try:
            return _overrides(translated(key, _plain(value))), taken
        except ValueError as e:
            raise _wrong(f"{option}: {e}") from None
    if key == "adapter.paper" and value in ADAPTERS:
        return _overrides(ADAPTERS[value]), taken
    return [f"{key}={_written(key, value)}"], taken


def _overrides(values: Mapping[str, Any]) -> list[str]:
    return [f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in values.items()]


@functools.cache
def keys() -> dict[str, Any]:
    """{whole name of every key that is no section: its type}.

    >>> keys()["training.seed"], "data.held_out.path" in keys(), "output_dir" in keys()
    (<class 'int'>, True, True)
    """
    return dict(_keys(Keys))


def _keys(section: type[BaseModel], head: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        inner = next((t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if inner is not None and list not in _types(field.annotation):
            yield from _keys(inner, f"{head}{name}.")
        if inner is None or type(None) in _types(field.annotation) or list in _types(field.annotation):
            yield f"{head}{name}", field.annotation


def _types(annotation: Any) -> Iterator[Any]:
    """What a value may be: members of a union, the origin of a list, with what the list holds behind it."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _types(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for one in typing.get_args(annotation):
            yield from _types(one)
    elif origin is None:
        yield annotation
    else:
        yield origin
        yield from (t for t in typing.get_args(annotation)[:1] if origin in (list, tuple) and isinstance(t, type))


def kind(key: str) -> list[Any]:
    """What the value of a key may be.

    >>> kind("training.gradient_checkpointing"), kind("output_dir")
    ([<class 'bool'>], [<class 'str'>])
    """
    return list(_types(keys()[key]))


@functools.cache
def named() -> dict[str, tuple[str, ...]]:
    """{last word of a key, in every accepted spelling: the whole names that end so}.

    >>> named()["r"], named()["max_formats"], named()["path"]
    (('adapter.rank',), ('quantization.constraints.max_formats',), ('data.held_out.path',))
    """
    found: dict[str, list[str]] = {}
    alike = {(section, key): known for section, model in sections().items() for key, known in spelled(model).items()}
    for key in keys():
        section, _, last = key.rpartition(".")
        for spelling in alike.get((section, last), [last]):
            found.setdefault(spelling, []).append(key)
    return {word: tuple(k) for word, k in found.items()}


SWITCHES = ("train_on_inputs", "train_on_completions", "completion_only_loss", "mask_prompt", "load_in_4bit", "load_in_8bit")
SWITCHES += ("bnb_4bit_use_double_quant", "lora_target_linear", "activation_checkpointing", "enable_activation_checkpointing")
SWITCHES += ("use_dora", "sample_packing", "neat_packing", "group_by_length")


def _key(name: str, option: str, own: Iterable[str]) -> tuple[str, bool]:
    """The key that an option names, or the name that another tool has for it; and whether it is its --no-."""
    for word, negated in ((name, False), (name.removeprefix("no_"), True)):
        if negated and word == name:
            break
        whole = (SHORT.get(word, word),) if word in SHORT or "." in word else named().get(word, ())
        if len(whole) > 1:
            raise _wrong(f"{option} is a key of more than one section: write {' or '.join(_option(k) for k in whole)}")
        known = word in ANYWAY and not negated or word in SYNONYMS and SYNONYMS[word] not in sections()
        key = whole[0] if whole else word if known else None
        if key is None:
            continue
        if key == "data.datasets":
            key = "dataset"  # which says how a path becomes one
        if not negated or (key in keys() and _is(kind(key), bool)):
            return key, negated
        raise _wrong(f"{option} is no option: {_option(key.rpartition('.')[2])} is not true or false")
    if name.removeprefix("no_") in INSTEAD:
        raise _wrong(f"{option} is no key of a recipe: {INSTEAD[name.removeprefix('no_')]}")
    known = [*named(), *(k for k, v in SYNONYMS.items() if v not in sections()), *SHORT]
    options = {_option(k): k for k in known} | {o: o for o in own}
    meant = nearest(_option(name), options)
    also = f" ({SYNONYMS[options[meant]]})" if meant and options[meant] in SYNONYMS else ""
    hint = f"did you mean {meant}{also}?" if meant else "finebits recipe show names the keys, and --help the other options"
    raise _wrong(f"{option} is neither an option of this command nor a key of a recipe: {hint}")


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _is(kinds: Sequence[Any], type: type) -> bool:
    return type in kinds and not any(k in (str, int, float) for k in kinds if k is not type)


def _written(key: str, value: str) -> str:
    """A value as YAML: text in quotes where a key takes text alone, a list where it takes one and commas stand between."""
    kinds = kind(key) if key in keys() else []
    plain = _plain(value)
    if list in kinds and isinstance(plain, str) and "," in plain and not set(plain) & set("()[]|*\\{}"):
        return json.dumps([part.strip() for part in plain.split(",") if part.strip()], ensure_ascii=False)
    if list in kinds and str not in kinds[: kinds.index(list)] and isinstance(plain, str | int | float):
        return json.dumps([plain], ensure_ascii=False)
    if str in kinds and not any(k in kinds for k in (int, float, bool, list, dict)) and not (plain is None and type(None) in kinds):
        return json.dumps(value, ensure_ascii=False)
    return value if value in ("", "null") or not isinstance(plain, str) else json.dumps(plain, ensure_ascii=False)


def _plain(value: str) -> Any:
    """The value of a word, as YAML reads it; the word itself where it is no YAML."""
    try:
        node = Loader(value).get_single_node()
        return value if node is None else Loader("").construct_document(node)
    except yaml.YAMLError:
        return value


def _wrong(message: str) -> RecipeError:
    return RecipeError([Problem(message)])
