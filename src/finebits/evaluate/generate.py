"""Greedy samples, from dense copies of the weights where these have room: without compiled kernels, unpacking a quantized weight for every token
costs more than multiplying with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finebits.build import Adapted, hosts
from finebits.evaluate.heldout import evaluating
from finebits.qtensor import dense


@contextlib.contextmanager
def dense_weights(model: nn.Module, dtype: torch.dtype | None = None, room: int | None = None) -> Iterator[nn.Module]:
    """Inside, every host multiplies with one dense merged weight, in `dtype` or its own; outside, nothing has changed. `room` is how many bytes
    these weights may take together: hosts that have none left stay as they are.

    Only the hosts' `forward` is swapped, so that packed parts, adapters and state dicts stay as they are. Peak memory above the model: the
    dense weights (m·n·itemsize each) and, while one is made, three float32 matrices of its size. For evaluation: adapters get no gradient.
    A host whose adapter depends on its input, and so has no dense form, stays as it is.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(fb.NF(4), adapter=fb.LoRA())}))
    >>> before = model(torch.ones(1, 64))
    >>> with dense_weights(model):
    ...     print(torch.allclose(model(torch.ones(1, 64)), before, atol=1e-4))
    True
    """
    swapped: list[Adapted] = []
    try:
        for _, host in hosts(model):
            if any(host.kinds[a].form == "beside" for a in host.active):
                continue
            *_, m, n = host.weight.shape
            size = m * n * (dtype or host.weight.dtype).itemsize
            if room is not None and (room := room - size) < 0:
                break
            with torch.no_grad():
                W = dense(host.stack(torch.float32).weight).to(dtype or host.weight.dtype)
            host.forward = _dense(W, host.stack(torch.float32).bias)
            swapped.append(host)
        yield model
    finally:
        for host in swapped:
            del host.__dict__["forward"]


def _dense(W: Tensor, bias: Tensor | None):
    def forward(input: Tensor) -> Tensor:
        return F.linear(input, W.to(input.dtype), None if bias is None else bias.to(input.dtype))

    return forward


@contextlib.contextmanager
def settings(model: Any, **wanted: Any) -> Iterator[None]:
    """Inside, the model generates with these settings alone: what its folder says of sampling is no matter, and nothing to warn of."""
    before = model.generation_config
    stop = wanted.get("eos_token_id") or [0]
    try:
        model.generation_config = type(before)(**{"pad_token_id": stop[0]} | {k: v for k, v in wanted.items() if v != []})
        yield
    finally:
        model.generation_config = before


def greedy(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, stop: Sequence[int], room: int | None = None) -> list[list[int]]:
    """Token ids that follow each prompt (token ids), at most `new_tokens`, up to the first of `stop` (left out). One prompt at a time, so
    that no padding enters; `model` is a transformers model, and its hosts are dense while it generates, as far
    as `room` bytes go."""
    device = next(p.device for p in model.parameters())
    out = []
    wanted = settings(model, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[*stop])
    with dense_weights(model, room=room), evaluating(model), wanted:
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=device)
            tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist()
            ends = [i for i, t in enumerate(tokens) if t in stop]
            out.append(tokens[: ends[0]] if ends else tokens)
    return out
