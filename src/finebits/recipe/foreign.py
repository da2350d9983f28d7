"""Keys of other tools with their values, as a recipe says the same.

`mistakes.SYNONYMS` has the names; here is what their values become: the opposite of train_on_inputs, candidates of one format for load_in_4bit.
Others ask for what is so in every run (`ANYWAY`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finebits.errors import Invalid
from finebits.recipe.mistakes import INSTEAD, SYNONYMS
from finebits.recipe.source import came

FOUR, EIGHT = "nf4", "int8-b128-bf16"
BY_BITS = {2: "nf2-b64-bf16", 3: "nf3-b64-bf16", 4: FOUR, 8: EIGHT}
NESTED = {"paper": "nf", "bits": 4, "block": 64, "scale": "double"}  # scales in 8 bits, as bitsandbytes' double quantization
QUANT_TYPES: dict[str, Any] = {"nf4": FOUR, "fp4": {"paper": "fp4"}}
ANYWAY: dict[str, Any] = {"group_by_length": True, "train_sampling_strategy": "group_by_length"}
ADAPTERS: dict[str, dict[str, Any]] = {"qlora": {"adapter.paper": "lora", "quantization.candidates": [FOUR]}}  # that are more than one key


def translated(key: str, value: Any) -> dict[str, Any]:
    """{key of a recipe: value} of a key that other tools have; empty where it asks for what is so anyway. Raises Invalid where finebits has no
    such value, and KeyError where it does not know the key.

    >>> translated("lora_r", 16), translated("train_on_inputs", False), translated("load_in_4bit", True)
    ({'adapter.rank': 16}, {'data.assistant_only_loss': True}, {'quantization.candidates': ['nf4']})
    """
    if key in ANYWAY:
        if (yes(key, value) if ANYWAY[key] is True else value) != ANYWAY[key]:
            raise Invalid(f"{key} is {value}, and {INSTEAD[key]}")
        return {}
    place = SYNONYMS[key]
    return VALUES[key](key, place, value) if key in VALUES else {place: value}


def yes(key: str, value: Any) -> bool:
    """A value that must be true or false.

    >>> yes("packing", "true"), yes("packing", False)
    (True, False)
    """
    known = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
    said = known.get(str(value).lower())
    if said is None:
        raise Invalid(f"{key} wants true or false, and {came(value)} came")
    return said


def modules(value: Any) -> Any:
    """Target modules: all-linear, a list of endings, or a regular expression.

    >>> modules("all"), modules("q_proj,v_proj"), modules(["q_proj"])
    ('all-linear', ['q_proj', 'v_proj'], ['q_proj'])
    """
    if value in ("all", "all-linear", ["all-linear"], ["all"]):
        return "all-linear"
    if isinstance(value, str) and "," in value and not set(value) & set("()[]|*\\"):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _opposite(key: str, place: str, value: Any) -> dict[str, Any]:
    return {place: not yes(key, value)}


def _rows(key: str, place: str, value: Any) -> dict[str, Any]:
    several = value if isinstance(value, list) else [value]
    return {place: [one if isinstance(one, dict) else {"path": str(one)} for one in several]}


def _in_bits(bits: int) -> Callable[[str, str, Any], dict[str, Any]]:
    return lambda key, place, value: {place: [BY_BITS[bits]]} if yes(key, value) else {}


def _bits(key: str, place: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if str(value) not in map(str, BY_BITS):
        raise Invalid(f"{key} is {value}, and finebits quantizes to 2, 3, 4 or 8 bits: write quantization.candidates")
    return {place: [BY_BITS[int(value)]]}


def _quant_type(key: str, place: str, value: Any) -> dict[str, Any]:
    if value not in QUANT_TYPES:
        raise Invalid(f"{key} wants nf4 or fp4, and {came(value)} came")
    return {place: [QUANT_TYPES[value]]}


def _double(key: str, place: str, value: Any) -> dict[str, Any]:
    return {place: [NESTED]} if yes(key, value) else {}


def _named(key: str, place: str, value: Any) -> dict[str, Any]:
    """torchtune's quantization by name, and mlx' mapping."""
    return _bits(key, place, value.get("bits")) if isinstance(value, dict) else _quant_type(key, place, str(value).removeprefix("bnb."))


def _all(key: str, place: str, value: Any) -> dict[str, Any]:
    return {place: "all-linear"} if yes(key, value) else {}


def _share(key: str, place: str, value: Any) -> dict[str, Any]:
    try:
        share = float(value)
    except (TypeError, ValueError):
        raise Invalid(f"{key} wants a share from 0 to 1, and {came(value)} came") from None
    if not 0 <= share < 1:
        raise Invalid(f"{key} is a share of all steps, below 1, and {value} came: write training.warmup_steps")
    return {place: share}


VALUES: dict[str, Callable[[str, str, Any], dict[str, Any]]] = {
    "train_on_inputs": _opposite,
    "dataset_name": _rows,
    "dataset": _rows,
    "hf_dataset": _rows,
    "train_file": _rows,
    "load_in_4bit": _in_bits(4),
    "load_in_8bit": _in_bits(8),
    "quantization_bit": _bits,
    "bnb_4bit_quant_type": _quant_type,
    "bnb_4bit_use_double_quant": _double,
    "quantize": _named,
    "lora_target": lambda key, place, value: {place: modules(value)},
    "lora_target_modules": lambda key, place, value: {place: modules(value)},
    "lora_target_linear": _all,
    "warmup_ratio": _share,
    "use_dora": lambda key, place, value: {place: "dora"} if yes(key, value) else {},
}
