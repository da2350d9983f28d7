"""LLaMA-Factory: one flat YAML; names of data sets are entries of its dataset_info.json, which is read where it lies beside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finebits.importers.base import ELSEWHERE, NONE, SO, Misread, Reading, Rule, Why, dataset, form, objective, precision, switch

FORMS = {"alpaca": ("alpaca", "instruction"), "sharegpt": ("sharegpt", "messages")}


def flat(config: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """Without sections as it is; the stage and what is tuned are read first, and data sets with the folder that they are looked for in."""
    if "model_name_or_path" not in config or not {"stage", "finetuning_type", "template", "dataset"} & config.keys():
        raise Misread(f"{reading.file} has no stage, finetuning_type, template or dataset, so it is no config of LLaMA-Factory")
    kind, stage = config.get("finetuning_type", "lora"), config.get("stage", "sft")
    if config.get("do_train") is False:
        raise Misread(f"{reading.file} trains nothing (do_train is false)")
    if kind == "full" and (config.get("lora_rank") or config.get("quantization_bit")):
        raise Misread(f"{reading.file} contradicts itself: finetuning_type is full, and it has lora_rank or quantization_bit")
    if kind not in ("lora", "full"):
        raise Misread(f"{reading.file} has finetuning_type: {kind}, and finebits reads lora and full")
    if stage not in ("sft", "pt", "dpo", "kto"):
        raise Misread(f"{reading.file} has stage: {stage}, and finebits reads sft, pt, dpo and kto")
    if config.get("warmup_ratio") and config.get("warmup_steps"):
        raise Misread(f"{reading.file} contradicts itself: it has warmup_ratio and warmup_steps")
    reading.put("adapter.paper", "full" if kind == "full" else "dora" if config.get("use_dora") else "lora", "finetuning_type")
    for key in ("do_train", "use_dora"):
        if key in config:
            reading.leave(key, config[key], SO if key == "do_train" else "it is adapter.paper")
    if stage == "sft" and "stage" in config:
        reading.leave("stage", stage, SO)
    elif stage == "pt":
        reading.put("data.assistant_only_loss", False, "stage")
    elif stage != "sft":
        _loss(reading, config, stage)
    _data(reading, config)
    done = ["stage", "finetuning_type", "use_dora", "dataset", "eval_dataset", "dataset_dir", "do_train"]
    done += ["pref_loss", "pref_beta", "dpo_label_smoothing"] if stage in ("dpo", "kto") else []
    return {k: v for k, v in config.items() if k not in done}


def _loss(reading: Reading, config: dict[str, Any], stage: str) -> None:
    """The objective with its settings; pref_beta weighs the odds ratio of ORPO."""
    asked = config.get("pref_loss", "sigmoid") if stage == "dpo" else "kto"
    name = {"sigmoid": "dpo", "orpo": "orpo", "kto": "kto"}.get(asked)
    settings = {"pref_beta": "lam" if name == "orpo" else "beta"} | ({"dpo_label_smoothing": "label_smoothing"} if name == "dpo" else {})
    for key in ("pref_loss", "pref_beta", "dpo_label_smoothing"):
        if key in config and (name is None or key not in ("pref_loss", *settings) or (key == "pref_loss" and stage == "kto")):
            reading.leave(key, config[key], f"the loss of stage {stage} does not read it" if name else NONE)
    if name is None:
        reading.leave("stage", stage, f"finebits has no loss {asked}")
        return
    by = "stage, pref_loss" if stage == "dpo" and "pref_loss" in config else "stage"
    objective(reading, name, settings, config, by)


def _data(reading: Reading, config: dict[str, Any]) -> None:
    place = Path(config.get("dataset_dir", "data"))
    known = next((p for p in (place / "dataset_info.json", Path(reading.file).parent / place / "dataset_info.json") if p.is_file()), None)
    try:
        info = json.loads(known.read_text(encoding="utf-8")) if known else {}
    except ValueError:
        raise Misread(f"{known} is not JSON") from None
    for key in ("dataset", "eval_dataset"):
        names = config.get(key) or []
        names = [n.strip() for n in names.split(",") if n.strip()] if isinstance(names, str) else names
        entries = []
        for name in names:
            told = info.get(name, {}) if isinstance(info, dict) else {}
            if "file_name" in told:
                entries.append({"path": str((known.parent if known else place) / told["file_name"])})
            elif "hf_hub_url" in told:
                entries.append({"path": told["hf_hub_url"], "split": told.get("split"), "name": told.get("subset")})
            else:
                entries.append({"path": str(place / f"{name}.json")})
                reading.leave(
                    f"{key}: {name}", name, f"no dataset_info.json names its file: {place}/{name}.json is a guess, write its path"
                )
            entries[-1] |= form(*FORMS.get(told.get("formatting", "alpaca"), ())) if told else {}
        if entries:
            dataset(reading, key, entries, held_out=key == "eval_dataset")
    if config.get("dataset_dir"):
        reading.leave("dataset_dir", config["dataset_dir"], "it is part of the paths")


def _template(reading: Reading, key: str, value: Any) -> None:
    reading.leave(key, value, "the tokenizer's own template is used")


KEYS: Mapping[str, Rule] = {
    "model_name_or_path": "model_name_or_path",
    "model_revision": "model_revision",
    "adapter_name_or_path": "adapter.folder",
    "template": _template,
    "additional_target": "modules_to_save",
    "packing": "packing",
    "train_on_prompt": lambda reading, key, value: reading.put("data.assistant_only_loss", not value, key),
    "neat_packing": "packing",
    "bf16": precision("bfloat16"),
    "pure_bf16": precision("bfloat16"),
    "fp16": precision("float16"),
    "quantization_method": Why("finebits quantizes by itself, and says how in quantization"),
    "double_quantization": Why("with quantization_bit: a scale of the format, as {paper: nf, bits: 4, scale: double}"),
    "flash_attn": Why("finebits leaves attention to transformers (model.attn_implementation)"),
    "plot_loss": Why("report.html shows the loss"),
    "overwrite_output_dir": Why("finebits train --overwrite"),
    "overwrite_cache": Why(ELSEWHERE),
    "preprocessing_num_workers": Why(ELSEWHERE),
    "dataloader_num_workers": Why(ELSEWHERE),
    "ddp_timeout": Why(ELSEWHERE),
    "save_only_model": switch(None),
    "do_eval": Why(SO),
}
