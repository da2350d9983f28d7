"""torchtune: components with their settings, `tokenizer: {_component_: torchtune.models.llama3.llama3_tokenizer, …}`. No component is imported:
its name is what is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from finebits.importers.base import ELSEWHERE, NONE, SO, Misread, Reading, Rule, Why, dataset, flattened, form

LINEARS = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
MLP = ["gate_proj", "up_proj", "down_proj"]
ROWS = {"alpaca": "yahma/alpaca-cleaned", "slimorca": "Open-Orca/SlimOrca-Dedup", "samsum": "Samsung/samsum"}
OPTIMIZERS = {"AdamW": "adamw_torch", "AdamW8bit": "adamw_bnb_8bit", "PagedAdamW8bit": "paged_adamw_8bit", "SGD": "sgd"}
OWN = ("model", "dataset", "optimizer", "lr_scheduler", "checkpointer", "tokenizer", "loss", "metric_logger", "profiler", "quantizer")
VARIABLE = re.compile(r"\$\{([\w.]+)\}")


def flat(config: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Settings of components by what they are, and all others as they are; ${output_dir} and the like are written out."""
    config = _written_out(config, dict(flattened(config)), reading)
    model, data = config.get("model"), config.get("dataset")
    if not isinstance(model, dict) or "_component_" not in model:
        raise Misread(f"{reading.file} has no model with a _component_, so it is no config of torchtune")
    component = _last(model)
    if not component.startswith(("lora_", "qlora_")):
        if any(key.startswith("lora_") for key in model):
            raise Misread(f"{reading.file} contradicts itself: its model is {component}, and has settings of LoRA")
        reading.put("adapter.paper", "full", "model._component_")
    else:
        reading.put("adapter.paper", "dora" if model.get("use_dora") else "lora", "model._component_")
    if component.startswith("qlora_") or model.get("quantize_base"):
        if model.get("quantize_base") is False:
            raise Misread(f"{reading.file} contradicts itself: its model is {component}, and quantize_base is false")
        reading.put("quantization.candidates", ["nf4"], "model._component_")
    _model(reading, model)
    _checkpoint(reading, config)
    if isinstance(data, dict):
        _data(reading, data)
    elif data is not None:
        reading.leave("dataset", data, "it is no component")
    for part, rules in (
        ("optimizer", {"lr": "learning_rate", "weight_decay": "weight_decay"}),
        ("lr_scheduler", {"num_warmup_steps": "warmup_steps"}),
    ):
        for key, value in (config.get(part) or {}).items():
            _part(reading, part, key, value, rules)
    rest = {k: v for k, v in config.items() if k not in OWN}
    if rest.get("max_steps_per_epoch") is not None:
        reading.put("training.max_steps", rest.pop("max_steps_per_epoch") * rest.get("epochs", 1), "max_steps_per_epoch")
    for key in ("metric_logger", "profiler", "quantizer", "loss", "tokenizer"):
        given = config.get(key)
        rest |= dict(flattened({key: given})) if isinstance(given, dict) else {}
    return dict(flattened(rest))


def _last(component: Mapping[str, Any]) -> str:
    return str(component.get("_component_", "")).rpartition(".")[2]


def _written_out(config: Any, known: Mapping[str, Any], reading: Reading, depth: int = 0) -> Any:
    """References to other keys as their values."""
    if isinstance(config, dict):
        return {k: _written_out(v, known, reading, depth) for k, v in config.items()}
    if isinstance(config, list):
        return [_written_out(v, known, reading, depth) for v in config]
    if isinstance(config, str) and (found := VARIABLE.search(config)):
        if found[1] not in known or depth > 8:
            raise Misread(f"{reading.file} refers to {found[0]}, which it does not hold")
        return _written_out(config.replace(found[0], str(known[found[1]])), known, reading, depth + 1)
    return config


def _model(reading: Reading, model: dict[str, Any]) -> None:
    targets = [LINEARS.get(name, name) for name in model.get("lora_attn_modules", [])]
    targets += MLP if model.get("apply_lora_to_mlp") else []
    if targets:
        reading.put(
            "adapter.target_modules", "all-linear" if {*targets} == {*LINEARS.values(), *MLP} else targets, "model.lora_attn_modules"
        )
    for key in ("apply_lora_to_mlp", "apply_lora_to_output", "use_dora", "quantize_base"):
        if key in model:
            why = "add lm_head to adapter.target_modules" if key == "apply_lora_to_output" and model[key] else "it is in what is set above"
            reading.leave(f"model.{key}", model[key], why)
    names = {"lora_rank": "adapter.rank", "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout"}
    done = ("_component_", "lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output", "use_dora", "quantize_base")
    for key, value in model.items():
        if key in names:
            reading.put(names[key], value, f"model.{key}")
        elif key not in done:
            reading.leave(f"model.{key}", value)


def _checkpoint(reading: Reading, config: dict[str, Any]) -> None:
    checkpointer = config.get("checkpointer") or {}
    for key, value in checkpointer.items():
        if key == "checkpoint_dir":
            reading.put("model.model_name_or_path", value, "checkpointer.checkpoint_dir")
        else:
            why = "the folder says what it holds" if key in ("checkpoint_files", "model_type", "_component_") else ELSEWHERE
            reading.leave(f"checkpointer.{key}", value, why)
    if (config.get("tokenizer") or {}).get("max_seq_len") is not None:
        reading.put("data.max_length", config["tokenizer"]["max_seq_len"], "tokenizer.max_seq_len")


def _data(reading: Reading, data: dict[str, Any]) -> None:
    kind = _last(data)
    name = next((rows for start, rows in ROWS.items() if kind.startswith(start)), None)
    files = data.get("data_files") if data.get("source") in ("json", "csv", "parquet", "text") else None
    path = files or data.get("source") or name
    if path is None:
        reading.leave("dataset._component_", kind, "it names no source: write data.datasets")
    else:
        paths = path if isinstance(path, list) else [path]
        found = form("alpaca", "instruction") if "alpaca" in kind else form("text") if "text_completion" in kind else {}
        told = [f"dataset.{key}" for key in ("source", "data_files", "split", "name") if data.get(key)]
        dataset(
            reading,
            ", ".join(["dataset._component_", *told]),
            [{"path": one, "split": data.get("split"), "name": data.get("name"), **found} for one in paths],
        )
    if "train_on_input" in data:
        reading.put("data.assistant_only_loss", not data["train_on_input"], "dataset.train_on_input")
    if "packed" in data:
        reading.lay("packing", data["packed"], "dataset.packed")
    done = ("_component_", "source", "split", "name", "data_files", "train_on_input", "packed")
    for key, value in data.items():
        if key not in done and value is not None:
            reading.leave(
                f"dataset.{key}", value, "the form of the rows is seen by their keys" if "column" in key or "style" in key else NONE
            )


def _part(reading: Reading, part: str, key: str, value: Any, rules: Mapping[str, str]) -> None:
    whole, kind = f"{part}.{key}", str(value).rpartition(".")[2]
    if key == "_component_" and part == "optimizer" and kind in OPTIMIZERS:
        reading.put("training.optim", OPTIMIZERS[kind], whole)
    elif key == "_component_" and part == "lr_scheduler" and kind == "get_cosine_schedule_with_warmup":
        reading.put("training.lr_scheduler_type", "cosine", whole)
    elif key == "fused":
        reading.leave(whole, value, ELSEWHERE)
    elif key in rules and value is not None:
        reading.lay(rules[key], value, whole)
    elif value is not None:
        reading.leave(whole, value)


def _dtype(reading: Reading, key: str, value: Any) -> None:
    names = {"bf16": "bfloat16", "fp32": "float32"}
    if value in names:
        reading.put("model.dtype", names[value], key)
    else:
        reading.leave(key, value, "finebits computes in bfloat16 or float32")


def _device(reading: Reading, key: str, value: Any) -> None:
    reading.put("budget.device", value, key)


def _clip(reading: Reading, key: str, value: Any) -> None:
    reading.put("training.max_grad_norm", value, key)


def _logger(reading: Reading, key: str, value: Any) -> None:
    name = {"WandBLogger": "wandb", "TensorBoardLogger": "tensorboard"}.get(str(value).rpartition(".")[2])
    if name:
        reading.put("training.report_to", name, key)
    else:
        reading.leave(key, value, "events.jsonl holds every line of progress")


KEYS: Mapping[str, Rule] = {
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "clip_grad_norm": _clip,
    "dtype": _dtype,
    "device": _device,
    "metric_logger._component_": _logger,
    "metric_logger.log_dir": Why("events.jsonl lies in output_dir"),
    "tokenizer._component_": Why("the folder's own tokenizer is used"),
    "tokenizer.path": Why("the folder's own tokenizer is used"),
    "tokenizer.merges_file": Why("the folder's own tokenizer is used"),
    "tokenizer.max_seq_len": Why("it is data.max_length"),
    "loss._component_": Why("the loss is computed in chunks of its own (training.loss_chunk)"),
    "log_every_n_steps": "logging_steps",
    "log_peak_memory_stats": Why("memory is measured anyway"),
    "save_adapter_weights_only": Why(SO),
    "compile": Why(ELSEWHERE),
}
