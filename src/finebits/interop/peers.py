"""QLoRA as most people run it, for comparison: transformers, bitsandbytes and PEFT in TRL's stock SFTTrainer, on the very batches of a run.

    NF4 in blocks of 64 with double quantization (QLoRA, Dettmers et al., arXiv:2305.14314v1, section 3), LoRA on the same linears, of the
    same rank and alpha, started at zero

Nothing of finebits is in the model or in the trainer: rows come tokenized, in the order in which our own run takes them, and the stock
trainer reads them one after the other. The model is scored in a process that trains no more, because bitsandbytes repacks its weights on a
CPU once they are evaluated, and has no gradient through them afterwards.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from finebits.errors import Invalid
from finebits.interop.linears import is_conv1d
from finebits.tasks.base import Task

MISSING = "QLoRA's peer run needs bitsandbytes, which is not installed: pip install bitsandbytes, or leave qlora out of evaluation.compare"


def check(task: Task) -> None:
    """Raise ValueError where the peer's libraries are not there, or do not train this task so."""
    if task.peft is None:
        raise Invalid(
            f"QLoRA's peer run writes text in TRL's SFTTrainer, and this model is for {task.pipeline}: leave qlora out of evaluation.compare"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Invalid(MISSING)


def qlora(folder: Path, names: Iterable[str], dtype: torch.dtype, device: str = "cpu") -> Any:
    """The stock model of a folder with the linears `names` in NF4, double quantized, computing in `dtype`; other linears stay as they are."""
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    quantized = set(names)
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    kept = [n for n, m in shell.named_modules() if (isinstance(m, nn.Linear) or is_conv1d(m)) and n not in quantized]
    odd = next((m for n, m in shell.named_modules() if n in quantized and type(m) is not nn.Linear and not is_conv1d(m)), None)
    if odd is not None:
        raise Invalid(f"QLoRA's peer run would leave a {type(odd).__name__} in 16 bits: leave qlora out of evaluation.compare")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept or None,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype, device_map=device)


def bits(model: nn.Module) -> float:
    """Bits a quantized weight really takes: codes, and both levels of scales with their tables."""
    size, count = 0, 0
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None:
            continue
        parts = [module.weight, state.absmax]
        if state.nested:
            parts += [state.state2.absmax, state.offset]  # code books are shared by all layers
        size += sum(p.numel() * p.element_size() for p in parts)
        count += state.shape.numel()
    return 8 * size / count if count else 0.0


def versions() -> dict[str, str]:
    """Of the libraries that a peer run is made of."""
    return {name: importlib.metadata.version(name) for name in ("transformers", "bitsandbytes", "peft", "trl")}


def adapted(model: Any, names: Sequence[str], rank: int, alpha: float, dropout: float = 0.0) -> Any:
    """PEFT's LoRA on the linears `names`, started at zero."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=cast(Any, alpha), lora_dropout=dropout, target_modules=list(names), task_type="CAUSAL_LM")
    )


def train(
    model: Any,
    tokenizer: Any,
    examples: Any,
    batches: Sequence[Sequence[int]],
    output_dir: Path,
    training: Mapping[str, Any],
    watch: Callable[[dict[str, Any]], None] = lambda event: None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> None:
    """Stock SFTTrainer over `examples` (input_ids, labels), one after the other as `batches` name them. `training` holds SFTConfig names;
    `collate` makes a
    batch of packs, which TRL would not keep apart without flash attention."""
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    class Steps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if logs and "loss" in logs:
                watch(
                    {
                        "event": "step",
                        "step": state.global_step,
                        "total": state.max_steps,
                        "loss": logs["loss"],
                        "lr": logs["learning_rate"],
                    }
                )

    device = next(model.parameters()).device.type
    settings = {
        "report_to": "none",
        "use_cpu": device == "cpu",
        "bf16": False,
        "fp16": False,
        "packing": False,
        "max_length": None,
        "disable_tqdm": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "eval_on_start": False,
        "load_best_model_at_end": False,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": collate is None,
    }
    args = SFTConfig(output_dir=str(output_dir), **(dict(training) | settings))
    engine = SFTTrainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=examples.select([i for batch in batches for i in batch]),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    engine.remove_callback(PrinterCallback)
    engine.train()
