"""What each of two processes holds while they train one model that is cut between them (FSDP2, gloo): planned and measured.

    python benchmarks/ranks_memory.py [lora full lora_nf4]

A Llama of random weights (hidden 576, inner 1536, 8 blocks, 4,096 words, float32), full rows of 256 tokens, two a process, checkpointing.
Measured is the high-water mark of each process from the end of the first step on, when the model is cut and the optimizer has its state.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from finebits.meter import MALLOC, Meter

NF4 = {"candidates": ["nf4-b64-bf16"]}
DENSE = {"quantization.locks": {"*": None}}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 64, "init": "zeros", **DENSE},
    "lora_nf4": {"rank": 64, "init": "zeros", **NF4},
    "full": {"paper": "full", **DENSE},
}
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 9, "num_key_value_heads": 3}
TOKENS, ROWS, STEPS, RANKS = 256, 2, 3, 2
WORDS = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", str(RANKS)]


def rank(folder: Path) -> None:
    """One process: writes what it held."""
    import torch
    from transformers import TrainerCallback

    import finebits as fb
    from finebits.interop.trainer import trainer
    from finebits.plan.base import Plan

    torch.set_num_threads(1)
    meter = Meter()
    model, tokenizer = fb.load_planned(Plan.load(folder / "planned.json"))
    ids = torch.randint(3, 4096, (ROWS * RANKS * STEPS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    training = {"max_steps": STEPS, "per_device_train_batch_size": ROWS, "gradient_checkpointing": True, "learning_rate": 1e-4}
    engine = trainer(model, tokenizer, rows, folder / "out", training)
    later = meter.phase("train")

    class Later(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                later.__enter__()

    engine.add_callback(Later())
    engine.train()
    later.__exit__(None, None, None)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(meter.peaks))


def measured(name: str) -> None:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    import finebits as fb
    from finebits.plan.shared_out import part
    from finebits.sizes import show

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        LlamaForCausalLM(LlamaConfig(**SHAPE, vocab_size=4096, tie_word_embeddings=True)).save_pretrained(folder / "model")
        words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder / "model")
        keywords = {"max_length": TOKENS, "per_device_train_batch_size": ROWS, "dtype": "float32", "target_modules": "all-linear"}
        plan = fb.plan_model(folder / "model", None, fast=True, **keywords, **KINDS[name])
        plan.save(folder / "planned.json")
        env = os.environ | MALLOC | {"OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), env.get("PYTHONPATH", "")])
        start = "import sys; from finebits.interop.launching import launch; sys.exit(launch(sys.argv[2:], 'cpu', sys.argv[1:2], 'ranks_memory'))"
        subprocess.run([sys.executable, "-c", start, place, *WORDS], env=env, check=True)
        terms = part(plan.memory, SHAPE["num_hidden_layers"], RANKS)
        planned = sum(terms.values())
        found = [json.loads((folder / f"rank{i}.json").read_text())["train"] for i in range(RANKS)]
    whole = show(sum(plan.memory.values()))
    ratios = ", ".join(f"{n / planned:.3f}" for n in found)
    print(
        f"{name}: one process {whole}, each of {RANKS} {show(planned)} planned, {' and '.join(map(show, found))} measured ({ratios})",
        flush=True,
    )
    print("   ", {k: show(v) for k, v in terms.items() if v}, flush=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        rank(Path(sys.argv[1]))
    else:
        for one in sys.argv[1:] or KINDS:
            measured(one)
