"""Attention of requests that go on, over pages where they lie, against copies of the pages and torch's own: `python benchmarks/paged.py`.

A layer of SmolLM2-135M (9 heads, 3 of keys, 64 wide) in float32, pages of 32 tokens anywhere in the pool, texts of half of LENGTH tokens to all.
Seconds are the process's own, the least of a few: other programs may run.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from finebits.kernels.cpu import paged

HEADS, KV, WIDTH, TOKENS, REPEATS = 9, 3, 64, 32, 15


def gathered(q: Tensor, store: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    seen = torch.arange(table.shape[1] * TOKENS) < lengths[:, None]
    kv = store.flatten(0, 1)
    k, v = (kv[2 * table + i].flatten(1, 2).transpose(1, 2) for i in (0, 1))
    return F.scaled_dot_product_attention(q.unflatten(1, (KV, -1)), k, v, seen[:, None, None]).flatten(1, 2)


def least(call: Callable[[], object]) -> float:
    """Milliseconds of the process."""
    found = []
    for _ in range(REPEATS):
        begun = time.process_time()
        for _ in range(3):
            call()
        found.append((time.process_time() - begun) / 3)
    return 1e3 * min(found)


def main() -> None:
    gen = torch.Generator().manual_seed(0)
    print(f"{torch.get_num_threads()} threads\n requests length   ms native  ms gathered   ratio      far")
    for requests, length in ((1, 80), (16, 48), (32, 80), (16, 512), (32, 512)):
        blocks = -(-length // TOKENS)
        store = torch.randn(requests * blocks, 2, TOKENS, KV, WIDTH, generator=gen)
        table = torch.randperm(requests * blocks, generator=gen).view(requests, blocks)
        lengths = torch.randint(length // 2, length + 1, (requests,), generator=gen)
        q = torch.randn(requests, HEADS, WIDTH, generator=gen)
        far = float((paged.attend(q, store, table, lengths, None, None) - gathered(q, store, table, lengths)).abs().max())
        native, copied = (
            least(lambda: paged.attend(q, store, table, lengths, None, None)),
            least(lambda: gathered(q, store, table, lengths)),
        )
        print(f"{requests:9} {length:6} {native:11.3f} {copied:12.3f} {copied / native:7.1f} {far:8.1e}", flush=True)


if __name__ == "__main__":
    main()
