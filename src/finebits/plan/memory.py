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


def block_bytes(g: Geometry, tokens: int, width: int, rank: int) -> int:
    """Activations that one decoder block holds at the moment of its backward pass."""
    q, kv = g.heads * g.head_dim, g.kv_heads * g.head_dim
    norms = 2 * (4 + 4 + width) * g.hidden  # each RMS norm: float32 copy, float32 product, result
    attention = (2 * q + 2 * kv) * width + (q + kv) * width + 2 * q * width  # q k v, their rotations, output, its projection input
    mlp = 4 * g.intermediate * width  # gate, its activation, up, their product
    residual = 2 * g.hidden * width
    adapters = 7 * rank * width
    gradients = max(3 * g.intermediate * width, (3 * q + 2 * kv) * width) + 2 * g.hidden * width
    return tokens * (norms + attention + mlp + residual + adapters + gradients)


def terms(g: Geometry, linears: int, adapter: int, rank: int, levers: Mapping[str, Any]) -> dict[str, int]:
    """The training peak, term by term, in bytes.

    `linears` are the bytes of the planned weights, `adapter` the number of trained numbers, `rank` the largest rank. Levers: dtype,
    per_device_train_batch_size, max_length, gradient_checkpointing, loss_chunk, device.
    """
    width = {"bfloat16": 2, "float16": 2, "float32": 4}[levers["dtype"]]
    tokens = levers["per_device_train_batch_size"] * levers["max_length"]
    block = block_bytes(g, tokens, width, rank)
    kept = g.layers * tokens * g.hidden * width
    chunk = min(levers["loss_chunk"], tokens)
    on_gpu = levers["device"] == "cuda"
    return {
        "linear weights": linears,
        "embeddings and head": (g.embeddings + g.head) * width,
        "norms and other": g.other * width,
        "adapters": 4 * adapter,
        "gradients": 4 * adapter,
        "optimizer": 8 * adapter,
        "block inputs": kept if levers["gradient_checkpointing"] else 0,
        "block activations": block if levers["gradient_checkpointing"] else block * g.layers,
        "loss chunk": chunk * g.vocabulary * (4 + width) + 3 * tokens * g.hidden * width,
        "dense scratch": g.largest * width,
        "runtime": levers.get("runtime_bytes", RUNTIME["cuda" if on_gpu else "cpu"]),
    }


# What the process holds beside tensors of the run. CPU: thread stacks, primitive caches and packing buffers of the matrix library, the data
# loader, what the trainer imports late; measured, see docs/decisions/0003-memory-model.md. CUDA: context and allocator slack.
RUNTIME = {"cpu": 48 * 2**20, "cuda": 870 * 2**20}


def rows(g: Geometry, linears: int, dense: int, adapter: int, levers: Mapping[str, Any]) -> dict[str, int]:
    """Peaks of the phases around training, in bytes above the same baseline."""
    width = {"bfloat16": 2, "float16": 2, "float32": 4}[levers["dtype"]]
    held = linears + (g.embeddings + g.head + g.other) * width + 4 * adapter
    tokens = levers["per_device_train_batch_size"] * levers["max_length"]
    chunk = min(levers["loss_chunk"], tokens) * g.vocabulary * 3 * 4
    return {
        "load": held + 8 * g.largest * 4 + RUNTIME["cpu"],
        "eval": held + block_bytes(g, tokens, width, 0) // 2 + chunk + g.largest * width + RUNTIME["cpu"],
        "save": held + 16 * adapter + g.embeddings * width + RUNTIME["cpu"],
        "export": held + dense // max(g.layers, 1) + 2 * (g.embeddings + g.head) * width + RUNTIME["cpu"],
    }
