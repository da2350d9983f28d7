"""A tiny chat model in a folder, its rows and a recipe over them: what tests with strangers' files begin from.

The tokenizer knows the bytes and a few tokens that open and close turns, so that a mask can be written down by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

CHAT = (
    "{% for m in messages %}<|a|>{{ m.role }}\n{{ m.content }}<|b|>\n{% endfor %}{% if add_generation_prompt %}<|a|>assistant\n{% endif %}"
)
TOKENS = ("<pad>", "<s>", "</s>", "<|a|>", "<|b|>")
SIZES = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 4,
}
SRC = Path(__file__).parent.parent / "src"


def tokenizer(chat: str | None = CHAT, eos: str | None = "<|b|>", pad: str | None = "<pad>") -> Any:
    """Bytes, and TOKENS with the ids 0 to 4."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate([*TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    made: Any = Tokenizer(models.BPE(words, []))
    made.decoder, made.pre_tokenizer = decoders.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    given = {k: v for k, v in (("eos_token", eos), ("pad_token", pad)) if v is not None}
    found = PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=["<|a|>", "<|b|>", "</s>"], **given)
    found.chat_template = chat
    return found


def rows(count: int = 8) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {7 * i}"}]} for i in range(count)
    ]


def written(file: Path, records: Sequence[Mapping[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


def model(folder: Path, words: Any = None, **sizes: Any) -> Path:
    """A random Llama of two layers with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**(SIZES | sizes))).save_pretrained(folder)
    (tokenizer() if words is None else words).save_pretrained(folder)
    return folder


def recipe(folder: Path) -> Path:
    """r.yaml beside the model m and the rows d.jsonl, all made here: two steps, no comparison, one export."""
    model(folder / "m")
    written(folder / "d.jsonl", rows())
    sections = {
        "model": {"model_name_or_path": "m", "dtype": "float32"},
        "budget": {"memory": "700MiB"},
        "data": {"datasets": [{"path": "d.jsonl"}], "held_out": {"path": "d.jsonl"}, "max_length": 64},
        "adapter": {"rank": 4, "init": "zeros"},
        "quantization": {"candidates": ["nf4-b32-bf16"], "objective": "weight"},
        "evaluation": {"samples": 0},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 1},
        "export": {"to": ["adapter"]},
        "output_dir": "run",
    }
    (folder / "r.yaml").write_text(json.dumps(sections))
    return folder / "r.yaml"


def environment(cwd: Path) -> dict[str, str]:
    """What the command is run under in a folder: this source, and a home of its own."""
    return os.environ | {"PYTHONPATH": str(SRC), "FINEBITS_HOME": str(cwd / "home"), "FINEBITS_SHAPES": "off"}


def finebits(*words: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """The command, in a process of its own."""
    here = environment(cwd) | env
    command = [sys.executable, "-c", "import sys; from finebits.cli import main; sys.exit(main())", *words]
    return subprocess.run(command, cwd=cwd, env=here, capture_output=True, text=True, timeout=240)
