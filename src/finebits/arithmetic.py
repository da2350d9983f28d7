"""What is held in 16 bits need not be computed in them.

A CPU without bf16 arithmetic multiplies bf16 matrices several times slower than float32 ones, and a model in float32 takes twice the memory. So
there a model is held in bf16 and its blocks compute in float32: states are bf16 between two blocks, which is what checkpointing keeps, and
float32 inside, as is all that a block holds beside its matrices (norms, biases, routers), which is little.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finebits.build import Adapted

CAPS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")  # either keeps torch from instructions that the CPU has
WITH_BF16 = ("avx512_core_bf16", "avx512_core_fp16", "avx512_core_amx", "avx512_core_amx_fp16", "avx10_1_512", "avx10_1_512_amx", "all")


def native_bf16() -> bool:
    """Does torch multiply bf16 matrices by instructions made for that on this CPU?"""
    capability, isa = (os.environ.get(k, "").lower() for k in CAPS)
    if capability in ("default", "avx2") or isa and isa not in WITH_BF16 and isa != "default":
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(_flags())


@functools.cache
def _flags() -> frozenset[str]:
    """What the CPU says that it has."""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.exists() else frozenset()


def multiplied(t: Tensor) -> torch.dtype:
    """The dtype in which matrices like `t` are multiplied fastest where it is.

    >>> multiplied(torch.ones(2)), multiplied(torch.ones(2, dtype=torch.float64))
    (torch.float32, torch.float64)
    """
    wide = t.device.type == "cpu" and t.dtype == torch.bfloat16 and not native_bf16()
    return torch.float32 if wide else t.dtype


def dtypes(wanted: str, device: str) -> tuple[str, str]:
    """(dtype that a model is held in, dtype that its blocks compute in). "auto" is held in bfloat16; on a CPU without arithmetic of it,
    bfloat16 is computed in float32.

    >>> dtypes("float32", "cpu"), dtypes("auto", "cuda")
    (('float32', 'float32'), ('bfloat16', 'bfloat16'))
    """
    stored = "bfloat16" if wanted == "auto" else wanted
    return stored, "float32" if device == "cpu" and stored != "float32" and not native_bf16() else stored


def compute_in(model: nn.Module, blocks: Iterable[str], dtype: torch.dtype) -> nn.Module:
    """From here on the named blocks compute in `dtype`, and hand on states in the dtype in which they came.

    >>> class Block(torch.nn.Linear):
    ...     def forward(self, x):
    ...         self.met = x.dtype
    ...         return super().forward(x)
    >>> model = torch.nn.Sequential(Block(2, 2, dtype=torch.bfloat16))
    >>> compute_in(model, ["0"], torch.float32)(torch.ones(1, 2, dtype=torch.bfloat16)).dtype, model[0].met
    (torch.bfloat16, torch.float32)
    """
    for name in blocks:
        block = model.get_submodule(name)
        if not hasattr(block, "finebits_computes"):
            block.__class__ = _computing(type(block))
        block.finebits_computes = dtype  # pyright: ignore[reportArgumentType]
    return model


@functools.cache
def _computing(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of blocks that is what it was, but for the arithmetic. A class and no hooks: whoever calls the forward alone has it too."""

    def forward(self: Any, *positional: Any, **named: Any) -> Any:
        states, dtype = positional[0] if positional else named["hidden_states"], self.finebits_computes
        _hold(self, dtype)
        out = kind.forward(self, *(_cast(a, dtype) for a in positional), **{k: _cast(v, dtype) for k, v in named.items()})
        return _cast(out, states.dtype)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _hold(block: nn.Module, dtype: torch.dtype) -> None:
    """What is no matrix of the plan in `dtype`: each time, since a block that is streamed has new parameters."""
    for module in block.modules():
        if isinstance(module, nn.ParameterDict):  # of an adapter
            continue
        matrix = module.weight if isinstance(module, Adapted) else None
        for key, p in list(module.named_parameters(recurse=False)):
            if p is not matrix and p.is_floating_point() and p.dtype != dtype:
                setattr(module, key, nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_cast(v, dtype) for v in value)
    return value
