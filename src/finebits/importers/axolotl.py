"""Axolotl: one flat YAML, of which `datasets` is a list (docs.axolotl.ai, config reference)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finebits.importers.base import ELSEWHERE, SO, Misread, Reading, Rule, Why, dataset, form, objective, precision, switch

FORMS = {"alpaca": ("alpaca", "instruction"), "chat_template": ("messages",), "sharegpt": ("sharegpt",), "completion": ("text",)}
ANSWERS = "evaluation.samples says how many held-out prompts are answered"
TRACKERS = "name the tracker in training.report_to, and its settings in its own environment variables"


def flat(config: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Without sections as it is; what says how the base is held and tuned is read first."""
    if "base_model" not in config:
        raise Misread(f"{reading.file} has no base_model, so it is no config of Axolotl")
    kind, four, eight = config.get("adapter"), config.get("load_in_4bit"), config.get("load_in_8bit")
    if four and eight:
        raise Misread(f"{reading.file} contradicts itself: load_in_4bit and load_in_8bit are both true")
    if kind == "qlora" and (four is False or eight):
        raise Misread(f"{reading.file} contradicts itself: adapter is qlora, and the base is not loaded in 4 bits (load_in_4bit)")
    if kind == "lora" and four:
        raise Misread(f"{reading.file} contradicts itself: adapter is lora, and load_in_4bit is true, which is qlora")
    if config.get("warmup_ratio") is not None and config.get("warmup_steps") is not None:
        raise Misread(f"{reading.file} contradicts itself: it has warmup_ratio and warmup_steps")
    if kind not in (None, "lora", "qlora"):
        raise Misread(f"{reading.file} has adapter: {kind}, and finebits reads lora, qlora, or none, which trains the weights")
    if kind == "qlora" and four is None:
        config = config | {"load_in_4bit": True}
    if kind is None:
        reading.put("adapter.paper", "full", "adapter")
    _often(reading, config)
    config = _preferring(reading, config)
    if config.get("cosine_min_lr_ratio") and config.get("lr_scheduler", "cosine") == "cosine":
        reading.put("training.lr_scheduler_type", "cosine_with_min_lr", "lr_scheduler")
        reading.put("training.lr_scheduler_kwargs", {"min_lr_rate": config["cosine_min_lr_ratio"]}, "cosine_min_lr_ratio")
        config = {k: v for k, v in config.items() if k not in ("lr_scheduler", "cosine_min_lr_ratio")}
    return {k: v for k, v in config.items() if k not in OFTEN}


LOSSES = {  # settings of each by Axolotl's names; of ORPO alpha weighs the odds ratio
    "dpo": {"rl_beta": "beta", "dpo_label_smoothing": "label_smoothing"},
    "orpo": {"orpo_alpha": "lam"},
    "kto": {"rl_beta": "beta", "kto_desirable_weight": "desirable", "kto_undesirable_weight": "undesirable"},
}


def _preferring(reading: Reading, config: dict[str, Any]) -> dict[str, Any]:
    """The rest of a config, its objective taken over where finebits has it."""
    name = config.get("rl")
    if name is None:
        return config
    if name not in LOSSES:
        reading.leave("rl", name, f"finebits has no loss {name}")
        return {k: v for k, v in config.items() if k != "rl"}
    objective(reading, name, LOSSES[name], config, "rl")
    return {k: v for k, v in config.items() if k not in ("rl", *LOSSES[name])}


OFTEN = ("evals_per_epoch", "saves_per_epoch", "eval_steps", "eval_strategy", "evaluation_strategy")


def _often(reading: Reading, config: dict[str, Any]) -> None:
    """How often it evaluates, before the first step too, and saves: so many times an epoch is a share of all steps."""
    epochs, given = float(config.get("num_epochs") or 1), {k: config.get(k) for k in OFTEN}
    evaluates = bool(config.get("val_set_size") or config.get("test_datasets"))
    for what, key in (("eval", "evals_per_epoch"), ("save", "saves_per_epoch")):
        if not (many := given.pop(key)):
            reading.leave(key, many, SO) if many is not None else None
        elif what == "eval" and not evaluates:
            reading.leave(key, many, "nothing is held out there, so it is not read")
        elif many == 1 and not config.get("max_steps"):
            reading.put(f"training.{what}_strategy", "epoch", key)
        else:
            reading.put(f"training.{what}_strategy", "steps", key)
            reading.put(f"training.{what}_steps", 1 / (many * epochs), key)
    for key, value in given.items():
        if value is None:
            continue
        if not evaluates:
            reading.leave(key, value, "nothing is held out there, so it is not read")
        elif key == "eval_steps":
            reading.put("training.eval_strategy", "steps", key)
            reading.put("training.eval_steps", value, key)
        else:
            reading.put("training.eval_strategy", value, key)
    if (by := reading.settings.get("training.eval_strategy")) and by[0] != "no":
        reading.put("training.eval_on_start", True, by[1])


def _adapter(reading: Reading, key: str, value: Any) -> None:
    if reading.settings.get("adapter.paper", (None,))[0] != "dora":
        reading.put("adapter.paper", "lora", key)


def _dora(reading: Reading, key: str, value: Any) -> None:
    if value:
        reading.settings.pop("adapter.paper", None)
        reading.put("adapter.paper", "dora", key)
    else:
        reading.leave(key, value, SO)


def _datasets(reading: Reading, key: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(entry, dict) and "path" in entry for entry in value):
        raise Misread(f"{key} of {reading.file} is no list of data sets, each with a path")
    entries = []
    for i, entry in enumerate(value):
        kind = entry.get("type")
        rest = {k: v for k, v in entry.items() if k not in ("type", "ds_type")}
        known = FORMS.get(kind.split(".")[0].split(":")[0]) if isinstance(kind, str) else None
        if kind is not None and known is None:
            reading.leave(f"{key}.{i}.type", kind, "the form of the rows is seen by their keys")
        entries.append({**rest, **(form(*known) if known else {})})
        if "ds_type" in entry:
            reading.leave(f"{key}.{i}.ds_type", entry["ds_type"], "the file says it by its name")
    dataset(reading, key, entries, held_out=key == "test_datasets")


def _all_linear(reading: Reading, key: str, value: Any) -> None:
    if not value:
        reading.leave(key, value, SO)
    elif "adapter.target_modules" in reading.settings:
        reading.leave(key, value, "lora_target_modules names them")
    else:
        reading.put("adapter.target_modules", "all-linear", key)


def _attention(reading: Reading, key: str, value: Any) -> None:
    reading.leave(key, value, "finebits leaves attention to transformers (model.attn_implementation)" if value else SO)


def _tracker(reading: Reading, key: str, value: Any) -> None:
    if value:
        name = {"wandb_project": "wandb", "use_tensorboard": "tensorboard", "mlflow_tracking_uri": "mlflow"}[key]
        reading.put("training.report_to", name, key)
        if key != "use_tensorboard":
            reading.leave(key, value, TRACKERS)


def _type(reading: Reading, key: str, value: Any) -> None:
    reading.leave(key, value, "the folder's config says it")


KEYS: Mapping[str, Rule] = {
    "base_model": "model_name_or_path",
    "revision_of_model": "model_revision",
    "adapter": _adapter,
    "peft_use_dora": _dora,
    "peft_use_rslora": "use_rslora",
    "lora_modules_to_save": "modules_to_save",
    "lora_target_linear": _all_linear,
    "lora_fan_in_fan_out": switch(None),
    "datasets": _datasets,
    "test_datasets": _datasets,
    "sample_packing": "packing",
    "eval_sample_packing": Why("held-out rows are scored one by one"),
    "pad_to_sequence_len": Why("batches are padded to their longest row"),
    "eval_batch_size": "per_device_eval_batch_size",
    "batch_size": "training.effective_batch_size",
    "eval_max_new_tokens": Why(ANSWERS),
    "eval_table_size": Why(ANSWERS),
    "chat_template": lambda reading, key, value: reading.leave(key, value, "the tokenizer's own template is used"),
    "bf16": precision("bfloat16"),
    "bfloat16": precision("bfloat16"),
    "fp16": precision("float16"),
    "float16": precision("float16"),
    "tf32": Why("finebits leaves it to torch"),
    "flash_attention": _attention,
    "xformers_attention": _attention,
    "sdp_attention": _attention,
    "wandb_project": _tracker,
    "use_tensorboard": _tracker,
    "mlflow_tracking_uri": _tracker,
    "wandb_entity": Why(TRACKERS),
    "wandb_watch": Why(TRACKERS),
    "wandb_name": Why(TRACKERS),
    "wandb_log_model": Why(TRACKERS),
    "model_type": _type,
    "tokenizer_type": _type,
    "dataset_prepared_path": Why("rows are kept, tokenized, in output_dir"),
    "strict": Why(SO),
    "local_rank": Why(ELSEWHERE),
    "debug": Why(ELSEWHERE),
}
