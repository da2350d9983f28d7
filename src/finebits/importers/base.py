"""What an importer does: every key of another tool's config becomes a key of a recipe, or is listed with the reason why not.

A config is data: YAML, JSON or TOML that is read and never run. Two keys that say different things of one are refused, not chosen between.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

import yaml

from finebits import registry
from finebits.errors import Invalid
from finebits.recipe import Recipe, RecipeError
from finebits.recipe.flags import keys, named
from finebits.recipe.foreign import ANYWAY, modules, translated
from finebits.recipe.mistakes import SYNONYMS
from finebits.recipe.schema import sections
from finebits.recipe.source import Loader
from finebits.recipe.templates import flow

NONE = "finebits has no key for it"
LARGEST = 2**20  # bytes of a config
SECRET = re.compile(r"(^|[_.-])(token|key|secret|password)$", re.I)  # ends of names whose values are written nowhere
SO = "it is so anyway"
ELSEWHERE = "it is no setting of a run"


class Misread(Invalid):
    """A config that is none, of another tool, or in contradiction with itself."""

    code = 2


@dataclass(frozen=True)
class Why:
    """A key that is left out, and why: listed as ever, but expected."""

    reason: str


Rule = str | Why | Callable[["Reading", str, Any], None]


def held_out(reading: Reading, key: str, value: Any) -> None:
    """How much of the rows is not trained on: below 1 a share, from 1 on so many rows."""
    if not value:
        reading.leave(key, value, "finebits measures on rows that it holds out anyway: data.test_split_size says how many")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        reading.put("data.test_split_size", int(value) if value >= 1 and value == int(value) else value, key)
    else:
        reading.leave(key, value, "neither a share nor a number of rows")


def _noise(reading: Reading, key: str, value: Any) -> None:
    reading.put("training.neftune_noise_alpha", value, key) if value else reading.leave(key, value, SO)


def _best_in(reading: Reading, key: str, value: Any) -> None:
    reading.put("training.metric_for_best_model", str(value).removeprefix("eval_"), key)


SHARED: Mapping[str, Rule] = {
    "val_set_size": held_out,
    "val_size": held_out,
    "neftune_noise_alpha": _noise,
    "noisy_embedding_alpha": _noise,
    "metric_for_best_model": _best_in,
    "greater_is_better": Why("it follows from training.metric_for_best_model"),
    "trust_remote_code": Why("finebits runs no code out of a model's folder"),
    "deepspeed": Why("its file goes to accelerate, behind --"),
    "fsdp": Why("it goes to accelerate, behind --: --use_fsdp --fsdp_version 2"),
    "fsdp_config": Why("it goes to accelerate, behind --, of which version 2 cuts weights in codes"),
    "gradient_checkpointing_kwargs": Why(SO),
    "resume_from_checkpoint": Why("finebits train --resume goes on with a run"),
}


class Importer(Protocol):
    """A tool: how its config is recognised as far as can be, and its keys."""

    KEYS: Mapping[str, Rule]

    @staticmethod
    def flat(config: dict[str, Any], reading: Reading) -> dict[str, Any]:
        """The config as keys without sections, those that are no setting handled already. Raises Misread where it is another tool's."""
        ...


@dataclass
class Reading:
    """A config while it is read: what its keys became, and those that became nothing."""

    tool: str
    file: str
    settings: dict[str, tuple[Any, str]] = field(default_factory=dict)  # {whole key: (value, the key that said so)}
    left: dict[str, tuple[Any, str]] = field(default_factory=dict)  # {key: (value, why)}

    def put(self, key: str, value: Any, by: str) -> None:
        """Set a key of the recipe, by its whole name. Raises Misread where another key has said something else.

        >>> reading = Reading("trl", "a.yaml")
        >>> reading.put("adapter.rank", 8, "lora_r")
        >>> reading.put("adapter.rank", 16, "r")
        Traceback (most recent call last):
            ...
        finebits.importers.base.Misread: a.yaml contradicts itself: lora_r says that adapter.rank is 8, and r that it is 16
        """
        if key == "adapter.target_modules":
            value = modules(value)
        if key == "adapter.modules_to_save" and isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        before = self.settings.get(key)
        if before is not None and before[0] != value:
            raise Misread(f"{self.file} contradicts itself: {before[1]} says that {key} is {before[0]}, and {by} that it is {value}")
        said = dict.fromkeys([*before[1].split(", "), by] if before else [by])
        self.settings[key] = (value, ", ".join(said))

    def lay(self, key: str, value: Any, by: str) -> None:
        """The same of a key by its last word, which a recipe may have or not."""
        whole = key if "." in key or key in keys() else next(iter(named().get(key, ())), None)
        if whole is None or (whole not in keys() and whole != "data.datasets"):
            self.leave(by, value)
        else:
            self.put(whole, value, by)

    def leave(self, key: str, value: Any, why: str = NONE) -> None:
        """List a key that becomes nothing."""
        self.left[key] = ("not shown" if SECRET.search(key) else value, why)


@functools.cache
def tools() -> tuple[str, ...]:
    """The tools whose configs are read.

    >>> "axolotl" in tools(), "base" in tools()
    (True, False)
    """
    return registry.names("importers")


def imported(tool: str, path: Path, more: list[str] | None = None) -> tuple[str, dict[str, str]]:
    """(the text of a recipe, {key that is not in it: why}) of another tool's config; `more` are overrides that are laid over it. Raises Misread
    where the file cannot be read, is of another tool, or contradicts itself."""
    if tool not in tools():
        raise Misread(f"finebits reads configs of {', '.join(tools())}, and {tool} came")
    importer = cast(Importer, importlib.import_module(f"finebits.importers.{tool}"))
    config = read(path)
    reading = Reading(tool, str(path))
    for key, value in importer.flat(config, reading).items():
        if value is not None:  # an empty key is an absent one in all of them
            _take(reading, importer.KEYS, str(key), value)
    kept = _that_load(reading, more or [])
    return text(reading, _overlaid(kept, more or [])), {key: why for key, (_, why) in reading.left.items()}


def read(path: Path) -> dict[str, Any]:
    """A config as plain data. Raises Misread.

    >>> read(Path("/nowhere.yaml"))
    Traceback (most recent call last):
        ...
    finebits.importers.base.Misread: there is no config at /nowhere.yaml
    """
    try:
        if path.stat().st_size > LARGEST:
            raise Misread(f"{path} is larger than {LARGEST >> 20} MiB, so it is no config")
        written = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".toml":
            config = tomllib.loads(written)
        else:
            config = json.loads(written) if path.suffix == ".json" else yaml.load(written, Loader)  # its own safe loader  # noqa: S506
    except (FileNotFoundError, NotADirectoryError):
        raise Misread(f"there is no config at {path}") from None
    except OSError as e:
        raise Misread(f"{path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise Misread(f"{path} is not text in UTF-8, so it is no config") from None
    except (yaml.YAMLError, tomllib.TOMLDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise Misread(f"{path} cannot be read: {' '.join(str(e).split())[:200]}") from None
    if not isinstance(config, dict) or not config:
        raise Misread(f"{path} holds no keys, so it is no config")
    return config


def flattened(config: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Nested keys with dots between them; empty mappings stay.

    >>> dict(flattened({"model": {"name": "m"}, "seed": 3}))
    {'model.name': 'm', 'seed': 3}
    """
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value


def _take(reading: Reading, rules: Mapping[str, Rule], key: str, value: Any) -> None:
    rule = rules.get(key, SHARED.get(key))
    if isinstance(rule, Why):
        reading.leave(key, value, rule.reason)
    elif isinstance(rule, str):
        reading.lay(rule, value, key)
    elif rule is not None:
        rule(reading, key, value)
    elif key in ANYWAY or (key in SYNONYMS and SYNONYMS[key] not in sections()):
        try:
            said = translated(key, value)
        except ValueError as e:
            reading.leave(key, value, str(e))
            return
        for whole, one in said.items():
            reading.put(whole, one, key)
        if not said:
            reading.leave(key, value, SO)
    else:
        reading.lay(key, value, key)


def _that_load(reading: Reading, more: list[str]) -> dict[str, tuple[Any, str]]:
    """The settings that make a recipe; one whose value finebits does not take is left out with the reason."""
    if "model.model_name_or_path" not in reading.settings and not any("model_name_or_path" in change for change in more):
        raise Misread(f"{reading.file} names no model, as {reading.tool} would have it: add --model NAME")
    reading.settings.setdefault("budget.device", ("auto", "a GPU where there is one"))
    if _loads(reading.settings, more):
        return reading.settings
    kept, wait = {}, dict(reading.settings)
    model = wait.pop("model.model_name_or_path", None)
    kept |= {"model.model_name_or_path": model} if model else {}
    for _ in range(2):  # what needs another key may find it the second time
        for key in list(wait):
            if _loads({**kept, key: wait[key]}, more):
                kept[key] = wait.pop(key)
    optim, cuda = wait.get("training.optim"), ("cuda", "as its optimizer wants")
    if optim is not None and kept["budget.device"][0] == "auto" and _loads({**kept, "training.optim": optim, "budget.device": cuda}, more):
        kept |= {"training.optim": wait.pop("training.optim"), "budget.device": cuda}
    for key, (value, by) in wait.items():
        try:
            _parsed({**kept, key: (value, by)}, more)
        except RecipeError as e:
            reading.leave(by, value, e.problems[0].message if e.problems else str(e))
    return kept


def _overlaid(kept: dict[str, tuple[Any, str]], more: list[str]) -> dict[str, tuple[Any, str]]:
    """The settings with overrides laid over them."""
    model = {k: v for k, v in kept.items() if k == "model.model_name_or_path"}
    given = _parsed(model, more).model_dump(exclude_unset=True)
    said = {f"{s}.{k}" if s in sections() else s: v for s, of in given.items() for k, v in (of.items() if s in sections() else [(s, of)])}
    said = {
        key: (value, "the command line") for key, value in said.items() if key != "recipe" and (key not in model or model[key][0] != value)
    }
    return {k: v for k, v in kept.items() if ".".join(k.split(".")[:2]) not in said} | said


def _loads(settings: Mapping[str, tuple[Any, str]], more: list[str]) -> bool:
    try:
        _parsed(settings, more)
    except RecipeError:
        return False
    return True


def _parsed(settings: Mapping[str, tuple[Any, str]], more: list[str]) -> Recipe:
    changes = [f"{key}={json.dumps(value)}" for key, (value, _) in settings.items()]
    return Recipe.parse("recipe: 1", "the config", [*changes, *more])


def text(reading: Reading, kept: Mapping[str, tuple[Any, str]]) -> str:
    """The recipe, each line with the key that it came from, and below it what is not in it."""
    lines = [
        f"# Made of {Path(reading.file).name}, a config of {reading.tool}. Behind a line is its key there, where that has another name.",
        "# What it leaves to the defaults of its tool has those of finebits here: finebits recipe show names them.",
        "recipe: 1",
    ]
    tree: dict[str, dict[str, Any]] = {}
    by: dict[tuple[str, str], list[str]] = {}
    for whole, (value, said) in kept.items():
        section, name, *rest = whole.split(".") if "." in whole else ("", whole)
        by.setdefault((section, name), []).append(said)
        inside = tree.setdefault(section, {})
        if rest:
            inside.setdefault(name, {})[".".join(rest)] = value
        else:
            inside[name] = value
    for section in ("", *sections()):
        lines += [f"{section}:"] if section and section in tree else []
        for name, value in tree.get(section, {}).items():
            said = ", ".join(dict.fromkeys(by[section, name]))
            shown = f"{'  ' if section else ''}{name}: {flow(value)}"
            lines.append(f"{shown:<58}  # {said}" if said != name else shown)
    if "budget.memory" not in kept:
        lines += ["# budget: {memory: 8GiB}    # what the job may take; finebits chooses the bits of every matrix for it"]
    if reading.left:
        lines += ["", f"# Not in this recipe, of {len(reading.left)} keys of {Path(reading.file).name}:"]
        lines += [f"#   {f'{key}: {flow(value)}'[:100]}    ({why})" for key, (value, why) in reading.left.items()]
    return "\n".join(lines) + "\n"


# What several tools have ---------------------------------------------------------------------------------------------------------------


def dataset(reading: Reading, by: str, entries: list[dict[str, Any]], held_out: bool = False) -> None:
    """Data sets as {path, and what else a recipe says of one}; keys that a recipe does not have there are listed."""
    from finebits.recipe.keys.data import Dataset, HeldOut

    model = HeldOut if held_out else Dataset
    kept = []
    for i, entry in enumerate(entries):
        for key, value in entry.items():
            if key not in model.model_fields and value is not None and key != "format":
                reading.leave(f"{by}.{i}.{key}" if len(entries) > 1 or by == "datasets" else f"{by}.{key}", value)
        kept.append({key: value for key, value in entry.items() if key in model.model_fields and value is not None})
    if held_out:
        for key, value in (kept[0] if kept else {}).items():
            reading.put(f"data.held_out.{key}", value, by)
        for entry in kept[1:]:
            reading.leave(by, entry, "finebits holds out the rows of one place")
    elif kept:
        reading.put("data.datasets", kept, by)


def objective(reading: Reading, name: str, settings: Mapping[str, str], config: Mapping[str, Any], by: str) -> None:
    """A loss of whole answers with those of its settings ({their key: ours}) that the config has."""
    said = {key: ours for key, ours in settings.items() if config.get(key) is not None}
    given = {ours: config[key] for key, ours in said.items()}
    reading.put("training.loss", {"paper": name, **given} if given else name, ", ".join([by, *said]))


def form(*wanted: str) -> dict[str, str]:
    """The first of these forms of rows that finebits has, as a key of a data set; none leaves it to be seen."""
    known = registry.names("data.forms")
    found = next((name for name in wanted if name in known), None)
    return {"format": found} if found else {}


def switch(on: str | None, value: Any = True, off: str = SO) -> Rule:
    """A key that is true or false: true lays `value` at `on`, false is listed as so anyway."""

    def rule(reading: Reading, key: str, said: Any) -> None:
        if said in (True, "true", "True") and on is not None:
            reading.lay(on, value, key)
        else:
            reading.leave(key, said, NONE if said else off)

    return rule


def precision(dtype: str) -> Rule:
    """bf16, fp16 and their like: true asks for one, auto for what finebits takes by itself."""

    def rule(reading: Reading, key: str, said: Any) -> None:
        if said is True or said in ("true", "full"):
            if dtype == "float16":
                reading.leave(key, said, "finebits computes in bfloat16 or float32")
            else:
                reading.put("model.dtype", dtype, key)
        else:
            reading.leave(key, said, SO)

    return rule
