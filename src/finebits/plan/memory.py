"""What a run holds, term by term, from shapes alone.

Bytes of the worst batch: b rows of t tokens (b·t = T), L blocks of hidden size H and intermediate size I, vocabulary V, c bytes a number in
the compute dtype. Terms are shown separately because only then a wrong one can be found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Geometry:
    """What the memory model needs of a decoder: sizes, and the parameters outside the planned linears (embeddings, head, norms, biases)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    embeddings: int  # parameters of the input embeddings, and of the head where it is the same tensor
    head: int  # parameters of an output head of its own; 0 where it is tied
    other: int  # norms, biases and linears that are left alone
    largest: int  # elements of the largest planned matrix


def geometry(config: Any, others: Mapping[str, int], planned: Mapping[str, tuple[int, int]]) -> Geometry:
    """Sizes from a transformers config (text part), parameter counts outside the plan by name, and shapes inside it."""
    get = lambda name, default=None: getattr(config, name, default)  # noqa: E731
    heads = get("num_attention_heads")
    head_dim = get("head_dim") or config.hidden_size // heads
    emb = sum(n for k, n in others.items() if "embed" in k)
    head = sum(n for k, n in others.items() if k.startswith("lm_head"))
    return Geometry(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=get("intermediate_size") or 4 * config.hidden_size,
        heads=heads,
        kv_heads=get("num_key_value_heads") or heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        embeddings=emb,
        head=head,
        other=sum(others.values()) - emb - head,
        largest=max((m * n for m, n in planned.values()), default=0),
    )


def saved_bytes(g: Geometry, width: int, rank: int) -> int:
    """Bytes a token that one decoder block keeps for its backward pass: the float32 copies of its two norms, what attention keeps (q, k, v
    spread over the heads, its output and that output laid out for the projection), the MLP's gate, activation, up and product, the inputs of
    the adapters, and their inner values. Frozen products keep nothing."""
    q = g.heads * g.head_dim
    return 2 * 4 * g.hidden + 2 * g.hidden * width + 5 * q * width + 4 * g.intermediate * width + 7 * rank * width


def passing_bytes(g: Geometry, width: int) -> int:
    """Bytes a token that come and go while a block is computed backwards: gradients of the MLP's three inner values, of the residual, and the
    float32 work of a norm."""
    return 3 * g.intermediate * width + 2 * g.hidden * width + 2 * 4 * g.hidden


def batch_tokens(levers: Mapping[str, Any]) -> int:
    """Tokens of the worst batch, padding included."""
    step = ROUND[levers["device"]]
    return levers["per_device_train_batch_size"] * -(-levers["max_length"] // step) * step


def terms(g: Geometry, linears: int, adapter: int, rank: int, levers: Mapping[str, Any]) -> dict[str, int]:
    """What is held at the peak of a training step, term by term, in bytes.

    A step has two moments that can be the peak: the loss, when a chunk of logits exists, and the first block's backward pass, when a block's
    activations and the adapters' gradients do. The terms of the larger moment are given (`moments` has both).

    `linears` are the bytes of the planned weights, `adapter` the number of trained numbers, `rank` the largest rank. Levers: dtype,
    per_device_train_batch_size, gradient_accumulation_steps, max_length, gradient_checkpointing, loss_chunk, device.
    """
    held, loss, backward = _moments(g, linears, adapter, rank, levers)
    return held | (loss if sum(loss.values()) >= sum(backward.values()) else backward)


def moments(g: Geometry, linears: int, adapter: int, rank: int, levers: Mapping[str, Any]) -> dict[str, int]:
    """Bytes held at the loss and in the backward pass."""
    held, loss, backward = _moments(g, linears, adapter, rank, levers)
    return {name: sum(held.values()) + sum(extra.values()) for name, extra in (("loss", loss), ("backward", backward))}


def _moments(
    g: Geometry, linears: int, adapter: int, rank: int, levers: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    width = WIDTHS[levers["dtype"]]
    tokens = batch_tokens(levers)
    saved = tokens * saved_bytes(g, width, rank)
    checkpointed = levers["gradient_checkpointing"]
    states = tokens * g.hidden * width
    held = {
        "linear weights": linears,
        "embeddings and head": (g.embeddings + g.head) * width,
        "norms and other": g.other * width,
        "adapters": 4 * adapter,
        "optimizer": 8 * adapter,
        "block inputs": (g.layers + 1) * states if checkpointed else 0,
        "activations": 0 if checkpointed else g.layers * saved,
        "dense scratch": g.largest * width,
        "runtime": RUNTIME[levers["device"]],
    }
    gradients = {"gradients": 4 * adapter}
    loss = {"loss chunk": min(levers["loss_chunk"], tokens) * g.vocabulary * (4 + width) + 2 * states}
    backward = {"one block": (saved if checkpointed else 0) + tokens * passing_bytes(g, width) + 2 * states} | gradients
    return held, loss | (gradients if levers["gradient_accumulation_steps"] > 1 else {}), backward


ROUND = {"cpu": 64, "cuda": 1}  # batches are padded to a multiple of this: the CPU's matrix library keeps code for every shape it has met
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}

# What the process holds beside tensors of the run. CPU: thread stacks, primitive caches and packing buffers of the matrix library, the data
# loader, what the trainer imports late; measured, see docs/decisions/0003-memory-model.md. CUDA: context and allocator slack.
RUNTIME = {"cpu": 72 * 2**20, "cuda": 870 * 2**20}


def rows(g: Geometry, linears: int, dense: int, adapter: int, levers: Mapping[str, Any]) -> dict[str, int]:
    """Peaks of the phases around training, in bytes above the same baseline."""
    width = WIDTHS[levers["dtype"]]
    held = linears + (g.embeddings + g.head + g.other) * width + 4 * adapter
    tokens = batch_tokens(levers)
    chunk = min(levers["loss_chunk"], tokens) * g.vocabulary * 3 * 4  # two float32 log-probabilities and one product
    return {
        "load": held + 8 * g.largest * 4 + RUNTIME["cpu"],
        "eval": held + tokens * passing_bytes(g, width) + chunk + g.largest * width + RUNTIME["cpu"],
        "save": held + 16 * adapter + g.embeddings * width + RUNTIME["cpu"],
        "export": held + dense // max(g.layers, 1) + 2 * (g.embeddings + g.head) * width + RUNTIME["cpu"],
    }
