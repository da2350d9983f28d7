"""Embeddings held in codes: rows are decoded when they are looked up, and a head that is tied to them multiplies by the same codes.

An nn.Embedding becomes a `Lookup`, the same module with its class replaced: whatever else that class does to its rows (some scale them) it goes
on doing. An nn.Linear whose weight is the same tensor becomes a `Tied`, which owns nothing: in state dicts there is one table, under the
embedding's name, as its plain parts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.qtensor import QTensor
from finebits.quantizers.base import check_finite

if TYPE_CHECKING:
    from finebits.plan.base import Spec

ROWS = 1024  # of a table that are float32 at a time while it is rounded


class Packed(nn.Module):
    """A module whose weight may be packed: in state dicts it is its plain parts (`weight.codes`, `weight.scale`, …)."""

    weight: Tensor

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if isinstance(self.weight, QTensor):
            del destination[prefix + "weight"]
            for k, part in self.weight.parts.items():
                destination[f"{prefix}weight.{k}"] = part

    def _load_from_state_dict(
        self, state: dict, prefix: str, meta: Any, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        loaded = {}
        if isinstance(self.weight, QTensor):
            for k, part in self.weight.parts.items():
                saved = state.get(f"{prefix}weight.{k}")
                if saved is None:
                    missing.append(f"{prefix}weight.{k}")
                elif saved.shape != part.shape or saved.dtype != part.dtype:
                    errors.append(f"{prefix}weight.{k} is {tuple(saved.shape)} {saved.dtype}, not {tuple(part.shape)} {part.dtype}")
                else:
                    loaded[k] = saved
            for k, saved in loaded.items():
                self.weight.parts[k].copy_(saved)
        super()._load_from_state_dict(state, prefix, meta, strict, missing, unexpected, errors)
        if isinstance(self.weight, QTensor):
            if prefix + "weight" in missing:
                missing.remove(prefix + "weight")
            for k in self.weight.parts:
                if f"{prefix}weight.{k}" in unexpected:
                    unexpected.remove(f"{prefix}weight.{k}")


class Lookup(Packed, nn.Embedding):
    """An embedding with a packed table. Made by `put`, never constructed.

    >>> words = torch.nn.Embedding(10, 64)
    >>> put(torch.nn.Sequential(words), words, fb.quantize(words.weight.detach(), fb.NF(4)))
    >>> words(torch.tensor([[3]])).shape, words.weight.bits_per_weight
    (torch.Size([1, 1, 64]), 4.5)
    """

    def extra_repr(self) -> str:
        base = repr(self.weight.format) if isinstance(self.weight, QTensor) else str(self.weight.dtype)
        return f"{super().extra_repr()}, weight={base}"


class Tied(nn.Linear):
    """A linear layer whose weight is a `Lookup`'s table."""

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict({k: v for k, v in state.items() if k != prefix + "weight"}, prefix, *rest)
        missing = rest[2]
        if prefix + "weight" in missing:
            missing.remove(prefix + "weight")


def is_linear(module: Any) -> bool:
    """Is it one product and nothing more, with a table or a weight of its own?

    >>> is_linear(torch.nn.Linear(2, 2)), is_linear(fb.Adapted.over(torch.nn.Linear(2, 2)))
    (True, False)
    """
    return type(module) in (nn.Linear, Tied)


def put(model: nn.Module, table: nn.Embedding, W: Tensor) -> None:
    """W is from here on the weight of `table`, frozen, and of whatever in `model` is tied to it. Raises Invalid where that is no embedding and
    no linear layer.

    >>> words, head = torch.nn.Embedding(10, 64), torch.nn.Linear(64, 10, bias=False)
    >>> head.weight = words.weight
    >>> put(torch.nn.Sequential(words, head), words, fb.quantize(words.weight.detach(), fb.NF(4)))
    >>> head.weight is words.weight, type(words).__name__, type(head).__name__
    (True, 'Lookup', 'Tied')
    """
    old, new = table.weight, W if isinstance(W, nn.Parameter) else nn.Parameter(W, requires_grad=False)
    together = [m for m in model.modules() if m._parameters.get("weight") is old]
    for m in together:
        if not isinstance(m, nn.Embedding) and not is_linear(m):
            raise Invalid(
                f"a {type(m).__name__} is tied to the embeddings, and that is no lookup and no product: keep the embeddings dense"
            )
        if "forward" in vars(m) or hasattr(m, "_hf_hook"):
            raise Invalid(
                "the forward of the embeddings or the head was already replaced by a hook (accelerate?): build first, dispatch afterwards"
            )
    for m in together:
        m._parameters["weight"] = new
        if isinstance(W, QTensor) and not isinstance(m, Lookup | Tied):
            cast(Any, m).__class__ = looking(type(m)) if isinstance(m, nn.Embedding) else Tied


@functools.cache
def looking(kind: type[nn.Embedding]) -> type[nn.Module]:
    return Lookup if kind is nn.Embedding else type(kind.__name__, (Lookup, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def rounded(W: Tensor, spec: Spec, dtype: torch.dtype) -> Tensor:
    """A table as its spec says, some rows at a time: they are rounded on their own. Codes that are there already stay.

    >>> rounded(torch.ones(10, 64), fb.Spec(fb.NF(4)), torch.bfloat16)
    QTensor(NF(bits=4, block=64, scale='fp32', unit=None), (10, 64), torch.bfloat16, 4.500 bits per weight)
    """
    if isinstance(W, QTensor):
        if W.format != spec.format:
            raise Invalid(f"the weight is quantized already, as {W.format}, and the plan says {spec.format}: plan from the dense weights")
        return W.apply_parts(lambda part: part, dtype)
    W, format = W.detach(), spec.format
    check_finite(W, "the table")
    if format is None:
        return W.to(dtype)
    if spec.adapter is not None:
        raise Invalid("a quantized table of embeddings is not adapted: leave its adapter out of the plan")
    if format.shared:
        return cast(QTensor, spec.quantizer(W.float(), format, {})).apply_parts(lambda part: part, dtype)
    parts: dict[str, Tensor] = {}
    for a in range(0, len(W), ROWS):
        piece = cast(QTensor, spec.quantizer(W[a : a + ROWS].float(), format, {}))
        for k, p in piece.parts.items():
            parts.setdefault(k, p.new_empty(len(W), *p.shape[1:]))[a : a + ROWS] = p
    return QTensor(parts, format, tuple(W.shape), dtype)


def lookups(model: nn.Module) -> Iterator[tuple[str, Lookup]]:
    """Every packed table of a model, by name.

    >>> list(lookups(torch.nn.Sequential(torch.nn.Embedding(2, 2))))  # it is dense
    []
    """
    for name, module in model.named_modules():
        if isinstance(module, Lookup):
            yield name, module


def shared_names(model: nn.Module) -> list[str]:
    """Under which names the weights of packed tables are in a model, heads that are tied to them among them."""
    return [f"{name}.weight" for name, m in model.named_modules() if isinstance(m, Lookup | Tied)]
