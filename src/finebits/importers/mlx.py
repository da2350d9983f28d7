"""mlx-lm: the YAML that `mlx_lm.lora -c` reads, flat but for lora_parameters, lr_schedule and optimizer_config.

`data` is a folder with train.jsonl and valid.jsonl, or a hub id; scale is alpha / rank, and num_layers counts from the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finebits.importers.base import ELSEWHERE, SO, Misread, Reading, Rule, Why, dataset, flattened

OPTIMIZERS = {"adam": "adamw_torch", "adamw": "adamw_torch", "sgd": "sgd"}
SCHEDULES = {"cosine_decay": "cosine", "linear_schedule": "linear"}


def flat(config: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Keys with dots; what is tuned, the rows and the schedule are read first."""
    if "model" not in config or not {"iters", "lora_parameters", "adapter_path", "num_layers", "lora_layers", "train"} & config.keys():
        raise Misread(f"{reading.file} has no model, or none of iters, lora_parameters and num_layers, so it is no config of mlx-lm")
    kind, lora = config.get("fine_tune_type", "lora"), config.get("lora_parameters") or {}
    if kind not in ("lora", "dora", "full"):
        raise Misread(f"{reading.file} has fine_tune_type: {kind}, and finebits reads lora, dora and full")
    if kind == "full" and lora:
        raise Misread(f"{reading.file} contradicts itself: fine_tune_type is full, and it has lora_parameters")
    if config.get("train") is False:
        raise Misread(f"{reading.file} trains nothing (train is false)")
    if "num_layers" in config and "lora_layers" in config and config["num_layers"] != config["lora_layers"]:
        raise Misread(f"{reading.file} contradicts itself: num_layers is {config['num_layers']}, and lora_layers {config['lora_layers']}")
    reading.put("adapter.paper", kind, "fine_tune_type")
    if "train" in config:
        reading.leave("train", config["train"], SO)
    if "mask_prompt" not in config:
        reading.leave(
            "mask_prompt", None, "not set, and mlx-lm learns the prompts too: here answers alone, but for data.assistant_only_loss=false"
        )
    if kind != "full":
        rank = lora.get("rank", 8)
        reading.put("adapter.rank", rank, "lora_parameters.rank")
        reading.put("adapter.alpha", float(lora.get("scale", 20.0)) * rank, "lora_parameters.scale")
    if lora.get("keys"):
        reading.put("adapter.target_modules", [str(name).rpartition(".")[2] for name in lora["keys"]], "lora_parameters.keys")
    if config.get("data"):
        place = str(config["data"])
        dataset(reading, "data", [{"path": f"{place}/train.jsonl" if _local(place, reading) else place}])
        if _local(place, reading):
            dataset(reading, "data", [{"path": f"{place}/valid.jsonl"}], held_out=True)
    schedule = config.get("lr_schedule") or {}
    if schedule:
        _scheduled(reading, schedule, config)
    rest = {k: v for k, v in config.items() if k not in ("fine_tune_type", "data", "lr_schedule", "lora_parameters", "train")}
    rest["lora_parameters"] = {k: v for k, v in lora.items() if k not in ("rank", "scale", "keys", "alpha")}
    if "alpha" in lora:
        reading.leave("lora_parameters.alpha", lora["alpha"], "mlx-lm scales by scale alone")
    return dict((k, v) for k, v in flattened(rest) if v != {})


def _local(place: str, reading: Reading) -> bool:
    return place.startswith((".", "/", "~")) or "/" not in place or Path(place).is_dir() or (Path(reading.file).parent / place).is_dir()


def _scheduled(reading: Reading, schedule: dict[str, Any], config: dict[str, Any]) -> None:
    name = schedule.get("name")
    if name in SCHEDULES:
        reading.put("training.lr_scheduler_type", SCHEDULES[name], "lr_schedule.name")
    else:
        reading.leave("lr_schedule.name", name)
    for key, value in schedule.items():
        if key == "warmup":
            reading.put("training.warmup_steps", float(value), "lr_schedule.warmup")
        elif key == "arguments":
            if value and value[0] != config.get("learning_rate", value[0]):
                raise Misread(
                    f"{reading.file} contradicts itself: learning_rate is {config['learning_rate']}, and lr_schedule begins at {value[0]}"
                )
            reading.leave("lr_schedule.arguments", value, "the rate falls from learning_rate to the end of the steps")
        elif key not in ("name",):
            reading.leave(f"lr_schedule.{key}", value)


def _layers(reading: Reading, key: str, value: Any) -> None:
    if value == -1:
        reading.leave(key, value, "all layers have an adapter")
    else:
        reading.leave(key, value, "the last ones of the model: name their numbers in adapter.layers_to_transform")


def _evaluates(reading: Reading, key: str, value: Any) -> None:
    for name, one in (("strategy", "steps"), ("steps", value), ("on_start", True)):
        reading.put(f"training.eval_{name}", one, key)


def _optimizer(reading: Reading, key: str, value: Any) -> None:
    if value in OPTIMIZERS:
        reading.put("training.optim", OPTIMIZERS[value], key)
    else:
        reading.leave(key, value)


KEYS: Mapping[str, Rule] = {
    "model": "model_name_or_path",
    "iters": "max_steps",
    "batch_size": "per_device_train_batch_size",
    "grad_checkpoint": "training.gradient_checkpointing",
    "grad_accumulation_steps": "gradient_accumulation_steps",
    "adapter_path": "output_dir",
    "resume_adapter_file": Why("adapter.folder goes on from a folder of PEFT"),
    "num_layers": _layers,
    "lora_layers": _layers,
    "optimizer": _optimizer,
    "lora_parameters.dropout": "adapter.dropout",
    "mask_prompt": "data.assistant_only_loss",
    "steps_per_report": "logging_steps",
    "save_every": "save_steps",
    "steps_per_eval": _evaluates,
    "val_batches": Why("all held-out rows are scored (evaluation.limit)"),
    "test_batches": Why("all held-out rows are scored (evaluation.limit)"),
    "test": Why("held-out rows are scored anyway"),
    "wandb": lambda reading, key, value: reading.put("training.report_to", "wandb", key),
    "config": Why(ELSEWHERE),
}
