"""Unsloth: the YAML of its command (`unsloth train -c`), in sections model, data, training, lora, logging; keys may stand without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finebits.importers.base import ELSEWHERE, SO, Misread, Reading, Rule, Why, dataset, precision, switch

SECTIONS = ("model", "data", "training", "lora", "logging", "export")
TRACKERS = "name the tracker in training.report_to"


def flat(config: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Keys without their sections. Raises Misread where a key stands in two of them."""
    keys: dict[str, Any] = {}
    for name, value in config.items():
        inner = value.items() if name in SECTIONS and isinstance(value, dict) else [(name, value)]
        for key, one in inner:
            if key in keys and keys[key] != one:
                raise Misread(f"{reading.file} contradicts itself: {key} is {keys[key]} in one place and {one} in another")
            keys[key] = one
    if not {"model", "model_name", "base_model"} & keys.keys():
        raise Misread(f"{reading.file} names no model (model, model_name), so it is no config of Unsloth")
    kind, four, eight = keys.pop("training_type", "lora"), keys.get("load_in_4bit"), keys.get("load_in_8bit")
    full = keys.pop("full_finetuning", None) or kind in ("full", "full_finetuning")
    if four and eight:
        raise Misread(f"{reading.file} contradicts itself: load_in_4bit and load_in_8bit are both true")
    if full and (four or keys.get("lora_r") or keys.get("r")):
        raise Misread(f"{reading.file} contradicts itself: all weights are trained, and it quantizes them or has an r")
    if kind not in ("lora", "qlora", "full", "full_finetuning"):
        raise Misread(f"{reading.file} has training_type: {kind}, and finebits reads lora, qlora and full")
    dora = keys.pop("use_dora", None)
    if full and dora:
        raise Misread(f"{reading.file} contradicts itself: all weights are trained, and use_dora is true")
    reading.put("adapter.paper", "full" if full else "dora" if dora else "lora", "use_dora" if dora else "training_type")
    if dora is False:
        reading.leave("use_dora", dora, SO)
    return keys


def _rows(reading: Reading, key: str, value: Any) -> None:
    paths = value if isinstance(value, list) else [value]
    dataset(reading, key, [{"path": str(path)} for path in paths])


def _checkpointing(reading: Reading, key: str, value: Any) -> None:
    reading.put("training.gradient_checkpointing", value not in (False, "none", "false"), key)


def _model(reading: Reading, key: str, value: Any) -> None:
    name = str(value)
    reading.put("model.model_name_or_path", name, key)
    if name.endswith("-bnb-4bit"):
        reading.leave(
            f"{key}'s -bnb-4bit", name, "it is quantized already; name the model that it was made of, and finebits chooses the bits"
        )


def _tracker(reading: Reading, key: str, value: Any) -> None:
    reading.put("training.report_to", "wandb" if "wandb" in key else "tensorboard", key) if value else reading.leave(key, value, SO)


def _answers(reading: Reading, key: str, value: Any) -> None:
    reading.put("data.assistant_only_loss", bool(value), key)


KEYS: Mapping[str, Rule] = {
    "model": _model,
    "model_name": _model,
    "base_model": _model,
    "local_dataset": _rows,
    "dataset": _rows,
    "dataset_name": _rows,
    "train_on_completions": _answers,
    "train_on_responses_only": _answers,
    "use_gradient_checkpointing": _checkpointing,
    "gradient_checkpointing": _checkpointing,
    "random_state": "seed",
    "random_seed": "seed",
    "bias": Why(SO),
    "use_loftq": switch("adapter.init", "loftq"),
    "finetune_vision_layers": switch(None),
    "finetune_language_layers": Why(SO),
    "finetune_attention_modules": Why(SO),
    "finetune_mlp_modules": Why(SO),
    "bf16": precision("bfloat16"),
    "fp16": precision("float16"),
    "enable_wandb": _tracker,
    "enable_tensorboard": _tracker,
    "wandb_token": Why("no secret stands in a recipe: set WANDB_API_KEY"),
    "hf_token": Why("no secret stands in a recipe: set HF_TOKEN"),
    "wandb_project": Why(TRACKERS),
    "tensorboard_dir": Why(TRACKERS),
    "dataset_num_proc": Why(ELSEWHERE),
    "log_frequency": "logging_steps",
    "chat_template": Why("the tokenizer's own template is used"),
    "train_on_inputs": lambda reading, key, value: reading.put("data.assistant_only_loss", not value, key),
}
