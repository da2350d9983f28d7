"""What an adapter_config.json says, beside what the folder holds and what the model has: whatever is said and does not hold is an error that
names its key.

PEFT passes over most of that: patterns that match nothing, targets without tensors, tensors without targets. What a form of PEFT reads, or
refuses, is its own (finebits.peft_forms).
"""

# pyright: reportArgumentType=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from finebits.errors import Invalid
from finebits.experts import tensors
from finebits.tasks import base as tasks

FILE = "adapter_config.json"
BOOLS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "inference_mode", "ensure_weight_tying", "use_qalora")
TEXTS = ("peft_type", "task_type", "base_model_name_or_path", "revision", "bias", "peft_version")
NUMBERS = ("lora_alpha", "lora_dropout")
PATTERNS = ("rank_pattern", "alpha_pattern")
LONG = 500  # characters of an expression: names of modules are shorter
NESTED = re.compile(r"[+*}]\)+[+*{]")  # what takes an expression longer than there is time


def check_values(settings: Mapping[str, Any]) -> None:
    """Raise ValueError that names the key whose value is not of its kind.

    >>> check_values({"peft_type": "LORA", "r": 0})
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: r is 0 in adapter_config.json, and it is to be a whole number from 1
    """

    def refuse(key: str, value: Any, wanted: str) -> None:
        raise Invalid(f"{key} is {value if _number(value) else str(value)[:80]!r} in {FILE}, and it is to be {wanted}")

    r = settings.get("r", 1)
    if settings.get("peft_type") == "LORA" and not (isinstance(r, int) and not isinstance(r, bool) and 1 <= r < 2**31):
        refuse("r", r, "a whole number from 1")
    if settings.get("lora_alpha", 1) is None:
        refuse("lora_alpha", None, "a number")
    for key, value in settings.items():
        if value is None:
            continue
        if key in BOOLS and not isinstance(value, bool):
            refuse(key, value, "true or false")
        if key in TEXTS and not isinstance(value, str):
            refuse(key, value, "text")
        if key in NUMBERS and not (_number(value) and math.isfinite(value)):
            refuse(key, value, "a number")
        if key == "lora_dropout" and not 0 <= value < 1:
            refuse(key, value, "a number from 0 to 1")
        if key == "bias" and value not in ("none", "all", "lora_only"):
            refuse(key, value, "none, all or lora_only")
        if key in PATTERNS:
            if not isinstance(value, Mapping):
                refuse(key, value, "names of modules with numbers")
            for expression, number in value.items():
                whole = key == "rank_pattern"
                if whole and isinstance(number, list) and all(isinstance(kept, bool) for kept in number):
                    continue  # AdaLoRA's: which ranks are kept
                if not _number(number) or not math.isfinite(number) or whole and not (isinstance(number, int) and number >= 1):
                    refuse(f"{key}[{expression!r}]", number, "a whole number from 1" if whole else "a number")
                compiled(expression, key)
        if key == "modules_to_save" and not _names(value):
            refuse(key, value, "a list of names")
        if key in ("target_modules", "exclude_modules", "layers_pattern") and not isinstance(value, str) and not _names(value):
            refuse(key, value, "a list of names, or an expression")
        for expression in _listed(value) if key == "layers_pattern" else ():
            compiled(expression, key)
        if key == "layers_pattern" and settings.get("layers_to_transform") is None:
            refuse(key, value, "left out where layers_to_transform is")
        if key == "layers_to_transform" and not all(isinstance(i, int) and not isinstance(i, bool) for i in _listed(value)):
            refuse(key, value, "a list of numbers of layers")


def check_places(
    settings: Mapping[str, Any], found: Collection[str], model: nn.Module, others: Collection[str], tied: Collection[str] = ()
) -> None:
    """Raise ValueError that names the key whose modules are not those that the folder holds (`found`, heads that are `tied` to a table of these,
    and `others` by the names of tensors).

    >>> model = nn.ModuleDict({"q_proj": nn.Linear(2, 2)})
    >>> check_places({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}}, ["q_proj"], model, [])
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: rank_pattern names 'v_proj' in adapter_config.json, and no module that the folder holds an adapter of has that
    name: it would do nothing, mend or remove it
    """
    for key in PATTERNS:
        for expression in settings.get(key) or {}:
            expression = expression.removesuffix(".lora_E")  # as AdaLoRA names them
            if not any(compiled(rf"(.*\.)?({expression})$", key).match(name) for name in found):
                raise Invalid(
                    f"{key} names {expression!r} in {FILE}, and no module that the folder holds an adapter of has that name: it would do "
                    "nothing, mend or remove it"
                )
    kept = [str(m) for m in settings.get("modules_to_save") or ()]
    for module in kept:
        if not any(name.rpartition(".")[0] == module or name.rpartition(".")[0].endswith(f".{module}") for name in others):
            raise Invalid(f"modules_to_save names {module} in {FILE}, and the folder has no tensor of it: the copy is not complete")
    if settings.get("bias") in ("all", "lora_only"):
        of = {n for n, p in model.named_parameters() if n.endswith(".bias")}
        wanted = of if settings["bias"] == "all" else {n for n in of if n.removesuffix(".bias") in found}
        if lost := sorted(wanted - {name.replace(".base_layer.", ".") for name in others}):
            raise Invalid(f"bias is {settings['bias']} in {FILE}, and the folder has no {lost[0]}: the copy is not complete")
    experts = {layer for layers in tensors(model).values() for layer in layers}  # target_parameters names them
    _check_targets(settings, set(found) - experts, set(tied), model, kept)
    task = tasks.of(model).peft if hasattr(model, "config") else None
    if task is not None and settings.get("task_type") not in (None, task):
        raise Invalid(
            f"task_type is {settings['task_type']} in {FILE}, and the model is for {task}: give the model that it was trained over"
        )
    meant = settings.get("auto_mapping")
    own = meant.get("base_model_class") if isinstance(meant, Mapping) else meant
    if own is not None and own not in {kind.__name__ for kind in type(model).__mro__}:
        raise Invalid(f"auto_mapping says in {FILE} that it was trained over a {str(own)[:60]}, and the model is a {type(model).__name__}")


def _check_targets(settings: Mapping[str, Any], found: set[str], tied: set[str], model: nn.Module, kept: list[str]) -> None:
    targets, excluded, layers = (settings.get(k) for k in ("target_modules", "exclude_modules", "layers_to_transform"))
    if targets is None or targets == [] or not found:
        return
    for entry in [targets] if isinstance(targets, str) else targets:
        if entry != "all-linear" and not any(_named(name, targets if isinstance(targets, str) else [entry]) for name in found | tied):
            raise Invalid(f"target_modules names {entry!r} in {FILE}, and the folder has no tensors for a module of that name")
    listed = [] if layers is None else _listed(layers)
    for name in found:
        if targets != "all-linear" and not _named(name, targets):
            raise Invalid(
                f"the folder has tensors for {name}, and target_modules in {FILE} does not name it: one of the two is of another adapter"
            )
        if excluded and _named(name, excluded):
            raise Invalid(
                f"exclude_modules names {name} in {FILE}, and the folder has tensors for it: one of the two is of another adapter"
            )
        if listed and _layer(name, settings.get("layers_pattern")) not in listed:
            raise Invalid(
                f"layers_to_transform is {layers} in {FILE}, and the folder has tensors for {name}: one of the two is of another adapter"
            )
    if lost := next((i for i in listed if not any(_layer(n, settings.get("layers_pattern")) == i for n in found)), None):
        raise Invalid(f"layers_to_transform names {lost} in {FILE}, and the folder has no tensors for a layer of that number")
    for name, module in model.named_modules() if targets != "all-linear" else ():
        wanted = isinstance(module, nn.Linear | nn.Embedding) and _named(name, targets) and not (excluded and _named(name, excluded))
        wanted = wanted and (not listed or _layer(name, settings.get("layers_pattern")) in listed)
        if wanted and name not in found | tied and not _named(name, kept):
            raise Invalid(f"target_modules names {name} in {FILE}, and the folder has no tensors for it: the copy is not complete")


def _named(name: str, wanted: str | Collection[str]) -> bool:
    if isinstance(wanted, str):
        return compiled(wanted, "target_modules").fullmatch(name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _layer(name: str, patterns: Any) -> int | None:
    """The number of the layer that a module is in, as PEFT sees it."""
    wanted = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    found = next((m for p in wanted if (m := compiled(rf".*\.{p}\.(\d+)\.", "layers_pattern").match(name))), None)
    return None if found is None else int(found[1])


def compiled(expression: Any, key: str) -> re.Pattern[str]:
    """A regular expression of a folder. Raises ValueError where it is none, or one that may never come to an end.

    >>> compiled("(a+)+b", "rank_pattern")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: rank_pattern has '(a+)+b' in adapter_config.json, which is no expression that names of modules are found by
    """
    try:
        if not isinstance(expression, str) or len(expression) > LONG or NESTED.search(expression):
            raise re.error("too long")
        return re.compile(expression)
    except (re.error, OverflowError, RecursionError):
        raise Invalid(f"{key} has {str(expression)[:60]!r} in {FILE}, which is no expression that names of modules are found by") from None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
