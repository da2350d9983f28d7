"""LoRA folders of PEFT over the tiny Llama, and what it generates with one of them: what the tests of serving share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import tiny_llama as tiny
from finebits.interop.adapter_folders import LoraFolder, write_folder
from finebits.merging.base import Factors

SHAPES = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96)}


def factors(rank: int, seed: int, size: float = 0.15, modules: Sequence[str] = tuple(SHAPES)) -> dict[str, Factors]:
    gen = torch.Generator().manual_seed(seed)
    draw = lambda *shape: size * torch.randn(*shape, generator=gen)  # noqa: E731
    names = {f"model.layers.{i}.{m}": SHAPES[m] for i in range(2) for m in modules}
    return {name: Factors(draw(m, rank), draw(rank, n), 2.0) for name, (m, n) in names.items()}


def lora(path: Path, rank: int, seed: int, **more: Any) -> Path:
    """A folder of PEFT, as if it had been trained."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    found = factors(rank, seed, **more)
    write_folder(LoraFolder(settings | {"target_modules": sorted({n.rpartition(".")[2] for n in found})}, found), path)
    return path


def merged(adapter: dict[str, Factors] | None, **more: Any) -> Any:
    """The tiny Llama with the adapter in its weights."""
    model = tiny.fresh(**more)
    with torch.no_grad():
        for name, (B, A, s) in (adapter or {}).items():
            model.get_submodule(name).weight += s * B @ A
    return model


def alone(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """What transformers generates for one prompt, greedily, whatever would end it."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return out[0, ids.shape[1] :].tolist()
