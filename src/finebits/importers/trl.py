"""TRL: the YAML that `trl sft --config` reads, whose keys are those of SFTConfig, ModelConfig and ScriptArguments, all flat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finebits.importers.base import ELSEWHERE, SO, Misread, Reading, Rule, Why, dataset, precision, switch

BASE = (
    "use_peft",
    "load_in_4bit",
    "load_in_8bit",
    "use_dora",
    "dataset_name",
    "dataset_config",
    "dataset_train_split",
    "dataset_test_split",
)


def flat(config: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Without sections as it is; what says how the base is held and tuned, and the data set with its splits, are read first."""
    if "model_name_or_path" not in config:
        raise Misread(f"{reading.file} has no model_name_or_path, so it is no config of TRL")
    four, eight, peft = config.get("load_in_4bit"), config.get("load_in_8bit"), config.get("use_peft", False)
    if four and eight:
        raise Misread(f"{reading.file} contradicts itself: load_in_4bit and load_in_8bit are both true")
    if (four or eight) and not peft:
        raise Misread(f"{reading.file} contradicts itself: the base is quantized, and without use_peft its weights would be trained")
    if config.get("warmup_ratio") and config.get("warmup_steps"):
        raise Misread(f"{reading.file} contradicts itself: it has warmup_ratio and warmup_steps")
    reading.put("adapter.paper", ("dora" if config.get("use_dora") else "lora") if peft else "full", "use_peft")
    if "assistant_only_loss" not in config and "completion_only_loss" not in config:
        why = "not set, and TRL learns every turn of messages: here answers alone, but for data.assistant_only_loss=false"
        reading.leave("assistant_only_loss", None, why)
    _data(reading, config)
    rest = {k: v for k, v in config.items() if k not in BASE}
    return rest | {k: True for k, said in (("load_in_4bit", four), ("load_in_8bit", eight)) if said}


def _data(reading: Reading, config: dict[str, Any]) -> None:
    name, split, test = config.get("dataset_name"), config.get("dataset_train_split"), config.get("dataset_test_split")
    about = {"name": config.get("dataset_config")}
    if name:
        dataset(reading, "dataset_name", [{"path": name, "split": split, **about}])
        for key in ("dataset_train_split", "dataset_config"):
            if config.get(key):
                reading.put("data.datasets", reading.settings["data.datasets"][0], key)
        if test and config.get("eval_strategy", "no") != "no":
            held = {"path": name, "split": test, **about}
            dataset(reading, "dataset_test_split", [held], held_out=True)
        elif test:
            reading.leave("dataset_test_split", test, "eval_strategy is no, so it is not read")


def _datasets(reading: Reading, key: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(entry, dict) and "path" in entry for entry in value):
        raise Misread(f"{key} of {reading.file} is no list of data sets, each with a path")
    dataset(reading, key, value)


KEYS: Mapping[str, Rule] = {
    "model_name_or_path": "model_name_or_path",
    "datasets": _datasets,
    "dtype": "dtype",
    "lora_task_type": Why(SO),
    "use_rslora": "use_rslora",
    "lora_modules_to_save": "modules_to_save",
    "completion_only_loss": Why("assistant_only_loss learns answers alone, of completions too"),
    "bf16": precision("bfloat16"),
    "fp16": precision("float16"),
    "eval_packing": Why("held-out rows are scored one by one"),
    "dataset_num_proc": Why(ELSEWHERE),
    "dataset_text_field": Why("the form of the rows is seen by their keys"),
    "use_liger_kernel": Why("the loss is computed in chunks of its own (training.loss_chunk)"),
    "push_to_hub": switch(None),
    "do_train": Why(SO),
    "do_eval": Why(SO),
}
