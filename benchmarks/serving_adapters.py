"""The adapters that benchmarks of serving ask for: random, of ranks 4, 8, 16, 32, 64 in turn, over q_proj and v_proj, in folders of PEFT."""

from __future__ import annotations

from pathlib import Path

import torch

from finebits.interop.adapter_folders import LoraFolder, write_folder
from finebits.interop.serving import Reader, Served
from finebits.merging.base import Factors
from finebits.serve.engine import Engine, Limits
from finebits.serve.grouped import pages_of

OUT = Path("runs/serving")
RANKS, TARGETS = (4, 8, 16, 32, 64), ("q_proj", "v_proj")


def folder(i: int, place: Path = OUT / "adapters") -> Path:
    return place / f"a{i:04d}"


def made(count: int, it: Served, place: Path = OUT / "adapters", size: float = 0.3) -> None:
    """The folders of adapters that are not there yet, large enough to change what the model says."""
    shapes = {n: tuple(m.weight.shape) for n, m in it.base.linears.items() if n.rpartition(".")[2] in TARGETS}
    for i in range(count):
        if not folder(i, place).exists():
            gen, r = torch.Generator().manual_seed(i), RANKS[i % len(RANKS)]
            draw = lambda *shape: (size * torch.randn(*shape, generator=gen) / shape[1] ** 0.5).half()  # noqa: E731
            updates = {n: Factors(draw(m, r), draw(r, k), 1.0) for n, (m, k) in shapes.items()}
            settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "target_modules": list(TARGETS)}
            write_folder(LoraFolder(settings, updates), folder(i, place))


def room(it: Served, holds: int, batch: int, tokens: int, place: Path = OUT / "adapters") -> int:
    """Bytes of a pool for a full batch of requests of so many tokens, and so many adapters of the mean size."""
    probe = Engine(it.base, Limits(256 << 20))
    mean = sum(pages_of(Reader(it, 64)(folder(i, place)), probe.pool.elements) for i in range(len(RANKS))) / len(RANKS)
    probe.stop()
    return int((mean * holds + batch * probe.cache.pages(tokens)) * probe.pool.page_bytes)
