"""Attention of a step: every request over its own keys and values, in the pages of the pool.

All tokens of a step stand in one row, (1, tokens); a request that begins brings its whole prompt, one that goes on a single token. Written as a
function of transformers' attention interface, which passes queries and keys that have been turned to their positions already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finebits.errors import Unsupported
from finebits.kernels.cpu import paged
from finebits.kernels.laid import Groups
from finebits.serve.grouped import now
from finebits.serve.pages import Pool

IDLE = frozenset({"position_ids", "use_cache", "output_attentions", "cache_position", "is_causal", "output_hidden_states", "return_dict"})


class Cache:
    """Keys and values in the pages of a pool: `tokens` of them in a page, of layers with these (heads, width)."""

    def __init__(self, pool: Pool, tokens: int, layers: list[tuple[int, int]]) -> None:
        self.pool, self.tokens, self.layers = pool, tokens, layers
        self.views = [
            pool.pages[:, : 2 * tokens * heads * width].view(pool.count, 2, tokens, heads, width) if heads else None
            for heads, width in layers
        ]

    def blocks(self, length: int) -> int:
        """Of so many tokens."""
        return -(-length // self.tokens)

    def pages(self, length: int) -> int:
        return self.blocks(length) * len(self.layers)


class Begun(NamedTuple):
    """Tokens start:stop are what is to be computed of a prompt, after the whole pages `past` (layers, blocks) that are there already."""

    start: int
    stop: int
    past: Tensor


@dataclass
class Step:
    """One forward pass. `pages` (layers, tokens) and `offsets` (tokens) say where each token's keys and values go; `prompts` are the
    requests that begin, `single` the tokens of those that go on, with the pages of all of theirs, `tables` (layers, requests,
    blocks), and their `lengths` in tokens, this one counted."""

    cache: Cache
    pages: Tensor
    offsets: Tensor
    prompts: list[Begun]
    single: Tensor
    tables: Tensor
    lengths: Tensor
    groups: Groups


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """(1, tokens, heads, width) of queries (1, heads, tokens, width), keys and values (1, kv heads, tokens, width)."""
    odd = next((k for k, v in more.items() if k not in IDLE and v is not None), None)
    if odd is not None or key.shape != value.shape or len(query) != 1:
        why = odd or ("values of another shape than keys" if key.shape != value.shape else f"{len(query)} rows")
        raise Unsupported(f"attention with {why} has no paged form here: serve this model with vLLM or llama.cpp")
    step: Step | None = now.step
    if step is None:
        return _causal(query, key, value, scaling, sliding_window).transpose(1, 2), None
    store = step.cache.views[module.layer_idx]
    assert store is not None
    at = step.pages[module.layer_idx]
    store[at, 0, step.offsets], store[at, 1, step.offsets] = key[0].transpose(0, 1), value[0].transpose(0, 1)
    out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for start, stop, past in step.prompts:
        part = slice(start, stop)
        k, v = key[:, :, part], value[:, :, part]
        if past.shape[1]:
            before = store[past[module.layer_idx]]  # (blocks, 2, tokens, heads, width)
            k, v = (torch.cat([before[:, i].flatten(0, 1).transpose(0, 1)[None], new], 2) for i, new in ((0, k), (1, v)))
        out[:, part] = _causal(query[:, :, part], k, v, scaling, sliding_window).transpose(1, 2)
    if len(step.single):
        out[0, step.single] = _one(query[0].transpose(0, 1)[step.single], store, step, module.layer_idx, scaling, sliding_window)
    return out, None


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Queries of the last of the tokens that there are keys of."""
    t, all, mask = q.shape[2], k.shape[2], None
    if window is not None and all > window or 1 < t < all:
        i, j = torch.arange(all - t, all, device=q.device)[:, None], torch.arange(all, device=q.device)
        mask = j <= i
        if window is not None:
            mask &= j > i - window
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None and t > 1, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )


def _one(q: Tensor, store: Tensor, step: Step, layer: int, scaling: float | None, window: int | None) -> Tensor:
    """One query of each request, (requests, heads, width), over its pages."""
    table = step.tables[layer]
    if paged.takes(q, store):
        return paged.attend(q, store, table, step.lengths, window, scaling)
    places = torch.arange(table.shape[1] * step.cache.tokens, device=q.device)
    seen = places < step.lengths[:, None]
    if window is not None:
        seen &= places >= step.lengths[:, None] - window
    kv = store.flatten(0, 1)
    k, v = (kv[2 * table + i].flatten(1, 2).transpose(1, 2) for i in (0, 1))  # (requests, kv heads, places, width)
    each = q.unflatten(1, (k.shape[1], -1))  # the queries of one key stand together
    return F.scaled_dot_product_attention(each, k, v, seen[:, None, None], scale=scaling).flatten(1, 2)


def observing(seen: dict[int, tuple[int, int]]) -> Callable[..., Any]:
    """`attend` that notes the (heads, width) of every layer's keys."""

    def attention(module: Any, query: Tensor, key: Tensor, *args: Any, **more: Any) -> tuple[Tensor, None]:
        seen[module.layer_idx] = key.shape[1], key.shape[3]
        return attend(module, query, key, *args, **more)

    return attention
