"""A recipe out of a call in Python: keyword arguments by its keys, and the objects of transformers, TRL and PEFT that people have already.

Of such an object every field that a recipe has a key for is taken over, whatever its value: it is what that object would do. What finebits has
no key for must be as the object's class leaves it. Nothing of those libraries is imported here.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from finebits import registry
from finebits.errors import Invalid
from finebits.recipe.foreign import ANYWAY
from finebits.recipe.keys.adapter import Adapter
from finebits.recipe.keys.data import Data
from finebits.recipe.keys.results import Evaluation
from finebits.recipe.keys.training import Training
from finebits.recipe.loading import Recipe
from finebits.recipe.schema import sections, spelled

# Looked at here, under no key of their name; and two of PEFT that say what is so anyway: which way a weight lies, and that ties stay.
OWN = ("output_dir", "use_cpu", "activation_checkpointing", "fan_in_fan_out", "do_eval")  # do_eval follows eval_strategy


class Unhonoured(Invalid):
    """An object of another library asks for what finebits does not do.

    >>> recipe("m", None, {"max_length": 256, "model": "n"})
    Traceback (most recent call last):
        ...
    finebits.recipe.call.Unhonoured: model is the model, which the call names already: leave it out
    """

    code = 2


def recipe(
    model: str | Path,
    budget: str | int | float | None,
    keywords: Mapping[str, Any],
    training_args: Any = None,
    peft_config: Any = None,
) -> Recipe:
    """The recipe of a call. A keyword is a key of any section (`max_length=256`, `candidates=["nf4", fb.Int(4)]`) or a whole section
    (`adapter=fb.LoRA(rank=8)`). Raises RecipeError with every mistake, and Unhonoured where an object asks for more than finebits does.

    >>> recipe("m", "1GiB", {"rank": 8, "init": fb.Zeros()}).adapter.init
    {'paper': 'zeros'}
    """
    from_objects = _of_training(training_args) | _of_peft(peft_config)
    for keyword in keywords:
        leaf = keyword.rpartition(".")[2]
        name = next((name for s in sections().values() for name, known in spelled(s).items() if leaf in known), leaf)
        twice = next((key for key in from_objects if name in key.split(".")), None)
        if twice is not None and plain(keyword, keywords[keyword]) != from_objects[twice]:
            raise Unhonoured(f"{keyword}={keywords[keyword]!r} is given, and {from_objects[twice]!r} by an object beside it: say it once")
        if name in ("model_name_or_path", "memory", "model"):
            other = "the budget" if name == "memory" else "the model"
            raise Unhonoured(f"{keyword} is {other}, which the call names already: leave it out")
    ordered = sorted(keywords, key=lambda keyword: keyword not in sections())  # a whole section first, then its keys
    values = {"model.model_name_or_path": str(model), "budget.memory": str(budget) if isinstance(budget, float) else budget}
    values |= from_objects | {keyword: keywords[keyword] for keyword in ordered}
    changes = [f"{key}={json.dumps(plain(key, value), ensure_ascii=False)}" for key, value in values.items()]
    return Recipe.parse("recipe: 1", "the call", changes, where="the call")


def plain(key: str, value: Any) -> Any:
    """The value of a word as a recipe writes it: methods by their names, enumerations and dtypes as text.

    >>> plain("adapter", fb.LoRA(rank=8)), plain("output_dir", Path("runs/a"))
    ({'paper': 'lora', 'rank': 8, 'alpha': 16.0, 'scaling': 'lora'}, 'runs/a')
    """
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(key, v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(key, v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted(plain(key, v) for v in value)
    if isinstance(value, Path):
        return str(value)
    if type(value).__module__ == "torch":
        return str(value).removeprefix("torch.")
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("finebits."):
        return registry.to_json(value)
    raise Unhonoured(f"{key} wants a value that a recipe could hold, or a method of finebits, and a {type(value).__name__} came")


def _of_training(args: Any) -> dict[str, Any]:
    """What a TrainingArguments or SFTConfig says, by the keys of a recipe."""
    if args is None:
        return {}
    if not dataclasses.is_dataclass(type(args)) or not hasattr(args, "use_cpu"):
        raise Unhonoured(
            f"training_args is a {type(args).__name__}, and a TrainingArguments or SFTConfig is what is read: give keys as keywords"
        )
    values = dict(_values(args, {"training": Training, "data": Data, "evaluation": Evaluation}))
    values["budget.device"] = "cpu" if args.use_cpu else "auto"
    if getattr(args, "activation_checkpointing", False):
        values["training.gradient_checkpointing"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those that the caller has had for its own
        fresh = type(args)(output_dir=args.output_dir, use_cpu=args.use_cpu)
    _honoured(args, fresh, values)
    return values


def _of_peft(config: Any) -> dict[str, Any]:
    """What a LoraConfig says."""
    if config is None:
        return {}
    kind = type(config).__name__
    if kind != "LoraConfig":
        raise Unhonoured(
            f"peft_config is a {kind}, and a LoraConfig is what finebits reads: name other adapters by adapter=fb.LoRAXS(rank=8)"
        )
    if config.target_modules is None:
        raise Unhonoured("LoraConfig.target_modules is None, by which PEFT picks modules itself: name them, or say all-linear")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise Unhonoured(
            f"LoraConfig.task_type is {plain('task_type', config.task_type)}, and adapters alone are tuned: CAUSAL_LM, or none to classify"
        )
    values = dict(_values(config, {"adapter": Adapter}))
    _honoured(config, type(config)(task_type=config.task_type), values)
    return values


def _values(source: Any, keys: Mapping[str, type[Any]]) -> Iterator[tuple[str, Any]]:
    names = {f.name for f in dataclasses.fields(source)}
    for section, model in keys.items():
        for name, known in spelled(model).items():
            for theirs in (t for t in known if t in names):
                value = plain(theirs, getattr(source, theirs))
                if value is None and model.model_fields[name].default is not None:
                    continue  # theirs is not set, and here there is no such value
                yield f"{section}.{name}", int(value) if isinstance(value, float) and value.is_integer() else value


def _honoured(source: Any, fresh: Any, values: Mapping[str, Any]) -> None:
    """Raise Unhonoured where a field that was not taken over is not as in a `fresh` object, with what its class fills in by itself."""
    handled = {known for key in values for section, name in [key.split(".")] for known in spelled(sections()[section])[name]}
    other = [
        f.name
        for f in dataclasses.fields(source)
        if f.init
        and f.name not in (*handled, *OWN)
        and getattr(source, f.name) not in (getattr(fresh, f.name, None), *([ANYWAY[f.name]] if f.name in ANYWAY else []))
    ]
    if other:
        kind, what = type(source).__name__, ", ".join(f"{n}={getattr(source, n)!r}" for n in other)
        leave = ", ".join(f"{n}={getattr(fresh, n, None)!r}" for n in other)
        raise Unhonoured(f"{kind} asks for {what}, which finebits does not do: leave it at {leave}")
