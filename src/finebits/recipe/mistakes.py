"""What is said of a mistake: what was wanted, what came, and what may have been meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from finebits.recipe.keys.data import Dataset, HeldOut
from finebits.recipe.keys.results import Requantize
from finebits.recipe.schema import Keys, leaves, sections, spellings
from finebits.recipe.source import Keypath, Problem, Tree, came, dotted

# What other tools call these things.
SYNONYMS = {
    "base_model": "model.model_name_or_path",
    "checkpoint_dir": "model.model_name_or_path",
    "model": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "revision": "model.model_revision",
    "torch_dtype": "model.dtype",
    "vram": "budget.memory",
    "gpu_budget": "budget.memory",
    "dataset_name": "data.datasets",
    "dataset": "data.datasets",
    "hf_dataset": "data.datasets",
    "train_file": "data.datasets",
    "val_set_size": "data.test_split_size",
    "val_size": "data.test_split_size",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "block_size": "data.max_length",
    "sample_packing": "data.packing",
    "neat_packing": "data.packing",
    "completion_only_loss": "data.assistant_only_loss",
    "train_on_inputs": "data.assistant_only_loss",
    "train_on_completions": "data.assistant_only_loss",
    "mask_prompt": "data.assistant_only_loss",
    "load_in_4bit": "quantization.candidates",
    "load_in_8bit": "quantization.candidates",
    "bnb_4bit_quant_type": "quantization.candidates",
    "bnb_4bit_use_double_quant": "quantization.candidates",
    "quantization_bit": "quantization.candidates",
    "quantize": "quantization.candidates",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_model_dir": "adapter.folder",
    "use_dora": "adapter.paper",
    "lora_target": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "num_epochs": "training.num_train_epochs",
    "epochs": "training.num_train_epochs",
    "iters": "training.max_steps",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "warmup_ratio": "training.warmup_steps",
    "micro_batch_size": "training.per_device_train_batch_size",
    "batch_size": "training.per_device_train_batch_size",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
    "activation_checkpointing": "training.gradient_checkpointing",
    "enable_activation_checkpointing": "training.gradient_checkpointing",
    "optimizer": "training.optim",
    "save_interval": "training.save_steps",
    "out_dir": "output_dir",
    "lora": "adapter",
    "peft": "adapter",
    "eval": "evaluation",
    "train": "training",
    "trainer": "training",
}
NOTES = {
    "warmup_ratio": "a number below 1 there is a share of all steps",
    "train_on_inputs": "it says the opposite",
    "train_on_completions": "it says the same",
    "use_dora": "dora is the value there",
}
ORDER = "rows of like length share a batch in every run, and training.seed shuffles the batches: leave it out"
INSTEAD = {  # names that people know and that are no keys, and what does it here
    "resume_from_checkpoint": "finebits train --resume goes on with the run in output_dir",
    "padding_free": "data.packing trains on packs without padding, in which no row sees another",
    "activation_offloading": "training.gradient_checkpointing keeps the input of a block alone, and budget.levers says what else may give way",
    "trust_remote_code": "finebits runs no code that comes with a model: it tunes models that transformers has a class for",
    "auto_find_batch_size": "training.per_device_train_batch_size: auto finds it before the first step",
    "group_by_length": ORDER,
    "train_sampling_strategy": ORDER,
}
METHODS = {  # of adapters, names that people know and that are more than one key here
    "qlora": "is LoRA over weights of 4 bits: write paper: lora, and candidates: [nf4] in the section quantization",
}

TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a mapping",
    "model": "a section of keys",
    "dataclass": "a section of keys",
    "finite_number": "a finite number",
}
BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "of at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "of at most"),
}


def explain(errors: ValidationError, tree: Tree) -> list[Problem]:
    """Pydantic's errors as problems: one a place, deepest first, union branches joined."""
    by_path: dict[Keypath, list[Any]] = {}
    problems: list[tuple[Keypath, Problem]] = []
    for error in errors.errors():
        path: Keypath = ()
        for part in error["loc"]:  # union branches leave their names in between
            path = (*path, part) if (*path, part) in tree.values else path
        if error["type"] == "missing":
            at = tree.keys.get(path) or tree.at(path)
            message = f"{dotted(error['loc'])} is missing" if at else f"{tree.name} has no {dotted(error['loc'])}"
            problems.append((path, Problem(message, at, f"add {error['loc'][-1]}: …")))
        elif error["type"] == "extra_forbidden":
            problems.append((path, Problem(f"{dotted(path)} is not a known key", tree.keys.get(path), suggest(path))))
        else:
            by_path.setdefault(path, []).append(error)
    for path, several in by_path.items():
        if any(other != path and other[: len(path)] == path for other in by_path):
            continue  # a branch of a union that another branch got further than
        own = [e for e in several if e["type"] == "value_error"]
        value = several[0]["input"]
        if own:
            message, note = ": ".join(filter(None, (dotted(path), str(own[0]["ctx"]["error"])))), ""
        else:
            kinds = list(dict.fromkeys(wanted(e) for e in several))
            message = f"{dotted(path)} wants {' or '.join(kinds)}, and {came(value)} came"
            choices = [c for e in several if e["type"] == "literal_error" for c in re.findall(r"'([^']+)'", e["ctx"]["expected"])]
            meant = nearest(value, choices) if isinstance(value, str) else ""
            if kinds[0] == "true or false" and str(value).lower() in ("yes", "on", "no", "off"):
                meant = "true" if str(value).lower() in ("yes", "on") else "false"
            quotes = kinds[0] == "text" and value is not None and not isinstance(value, (list, dict))
            note = f"did you mean {meant}?" if meant else "put it in quotes" if quotes else ""
        problems.append((path, Problem(message, tree.at(path), note)))
    order = {id(p): (p.place.line if p.place and p.place.source.numbered else 1 << 30) for _, p in problems}
    return [p for _, p in sorted(problems, key=lambda item: order[id(item[1])])]


def wanted(error: Mapping[str, Any]) -> str:
    """What pydantic wanted, in words.

    >>> wanted({"type": "greater_than_equal", "ctx": {"ge": 1}}), wanted({"type": "bool_parsing"})
    ('a number of at least 1', 'true or false')
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind in BOUNDS:
        key, word = BOUNDS[kind]
        return f"a number {word} {context[key]:g}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        several = [c for c in choices if ":" in c]  # of one name: the first and the last are enough
        choices = [c for c in choices if c not in several] + ([f"{several[0]} … {several[-1]}"] if several else [])
        return f"{', '.join(choices[:-1])} or {choices[-1]}" if len(choices) > 1 else re.sub("'", "", context["expected"])
    if kind in ("string_too_short", "too_short"):
        return "something" if kind == "string_too_short" else "at least one entry"
    return TYPES.get(kind) or TYPES.get(kind.split("_")[0]) or error["msg"]


def suggest(path: Keypath, more: Iterable[str] = ()) -> str:
    """What may have been meant by the unknown key at `path`.

    >>> suggest(("training", "lr")), suggest(("lora_r",)), suggest(("training", "rank"))
    ('did you mean learning_rate?', 'finebits calls this adapter.rank', 'it belongs into the section adapter')
    """
    *outer, key = path
    key = str(key).replace("-", "_")
    here: type[BaseModel] | None = Keys
    if outer:
        here = (
            Dataset
            if outer[:2] == ["data", "datasets"]
            else HeldOut
            if outer[:2] == ["data", "held_out"]
            else Requantize
            if outer[:2] == ["export", "requantize"]
            else sections().get(str(outer[0]))
        )
    known = [*(spellings(here) if here else ()), *more]
    place = SYNONYMS.get(key)
    if key in INSTEAD:
        return INSTEAD[key]
    if key in known:
        return f"did you mean {key}?"
    if place and not (outer and place.startswith(f"{outer[0]}.")):
        return f"finebits calls this {place}" + (f"; {NOTES[key]}" if key in NOTES else "")
    if place:
        return f"did you mean {place.split('.', 1)[1]}?" + (f" ({NOTES[key]})" if key in NOTES else "")
    if key in leaves():
        return f"it belongs into the section {' or '.join(leaves()[key])}"
    if meant := nearest(key, known):
        return f"did you mean {meant}?"
    if meant := nearest(key, leaves()):
        return f"did you mean {leaves()[meant][0]}.{meant}?"
    return f"known here: {', '.join(known)}"


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that is written most like this one; nothing where none is.

    >>> nearest("learnig_rate", ["learning_rate", "seed"]), nearest("momentum", ["learning_rate", "seed"])
    ('learning_rate', '')
    """
    return next(iter(difflib.get_close_matches(word.lower(), list(known), 1, 0.7)), "")
