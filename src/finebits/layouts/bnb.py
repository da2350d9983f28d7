"""bitsandbytes' 4-bit weights, to the bit: its codes, absmax and nested state <-> QTensor, by the keys of a Linear4bit state dict.

    weight                                  two codes a byte, the even element in the high nibble, over the flattened matrix
    weight.absmax, weight.quant_map         absmax of every `blocksize` elements of the flattened matrix; the table
    weight.nested_absmax, .nested_quant_map with double quantization: absmax is then bytes, and this its scale a 256 of them
    weight.quant_state.bitsandbytes__nf4    JSON as bytes: blocksize, dtype, shape, nested_offset …  (or __fp4)

bitsandbytes runs blocks over row ends and groups of scales too; here neither leaves a row. Both are the same wherever rows are whole blocks
and groups are whole rows or the other way round; anything else is refused. Nothing is rounded in either direction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finebits.blocks import n_blocks
from finebits.errors import Invalid
from finebits.formats._stores import Double, dyn8
from finebits.formats.base import level_tensor
from finebits.formats.fp4 import FP4
from finebits.formats.nf import NF
from finebits.qtensor import QTensor

GROUP = 256  # absmax values under one nested absmax, in every kernel of bitsandbytes
STATE = "quant_state.bitsandbytes__"
SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def to_bnb(q: QTensor, name: str = "weight", expand: bool = False) -> dict[str, Tensor]:
    """The tensors that bitsandbytes would save for this weight.

    Scales that are held double in bitsandbytes' parameters become its nested state, all others plain float32 absmax; `expand` writes plain
    absmax in any case. Raises ValueError where bitsandbytes has no such weight.

    >>> tensors = to_bnb(fb.quantize(torch.eye(2, 64), fb.NF(4, 64)))
    >>> {name: tuple(t.shape) for name, t in tensors.items() if "quant_state" not in name}  # two codes a byte, two blocks
    {'weight': (64, 1), 'weight.absmax': (2,), 'weight.quant_map': (16,)}
    """
    kind = _kind(q)
    rows, n = q.shape[:-1].numel(), q.shape[-1]
    block = q.format.block
    if block not in SIZES or q.format.unit is not None:
        raise Invalid(f"bitsandbytes has blocks of {', '.join(map(str, SIZES))} elements without units, and this weight is {q.format}")
    if n % block and rows > 1:
        raise Invalid(f"bitsandbytes runs blocks of {block} over the ends of rows of {n}; here they stop there: no block size fits both")
    codes = q.codes().reshape(-1)
    codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": str(q.dtype).removeprefix("torch."), "shape": list(q.shape)}
    out = {name: (codes[::2] << 4 | codes[1::2])[:, None]}
    store = q.format.store
    if isinstance(store, Double) and store.offset == "mean" and not expand:
        absmax, nested, offset = _flat_groups(q, store)
        out |= {
            f"{name}.absmax": absmax,
            f"{name}.nested_absmax": nested,
            f"{name}.nested_quant_map": torch.tensor(dyn8(), device=q.device),
        }
        state |= {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": offset}
    else:
        out[f"{name}.absmax"] = q.format.scales(q.parts, n).scale.float().reshape(-1)
    out[f"{name}.quant_map"] = level_tensor(q.format.levels(), q.device).clone()
    out[f"{name}.{STATE}{kind}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return out


def from_bnb(tensors: Mapping[str, Tensor], name: str = "weight", expand: bool = False) -> QTensor:
    """The weight behind the tensors that bitsandbytes saved under `name`.

    `expand` holds nested absmax as plain float32: the values are the same. Raises ValueError where the layouts do not meet.

    >>> q = fb.quantize(torch.eye(2, 64), fb.NF(4, 64))
    >>> torch.equal(from_bnb(to_bnb(q)).dequantize(), q.dequantize())
    True
    """
    kinds = [k.removeprefix(f"{name}.{STATE}") for k in tensors if k.startswith(f"{name}.{STATE}")]
    if len(kinds) != 1 or kinds[0] not in ("nf4", "fp4"):
        raise Invalid(f"{name} is no 4-bit weight of bitsandbytes: it needs one {name}.{STATE}nf4 or …fp4, and there is {kinds or 'none'}")
    state = json.loads(bytes(tensors[f"{name}.{STATE}{kinds[0]}"].cpu().tolist()))
    shape, block, dtype = tuple(state["shape"]), int(state["blocksize"]), getattr(torch, state["dtype"])
    n, rows = shape[-1], torch.Size(shape[:-1]).numel()
    if n % block and rows > 1:
        raise Invalid(f"{name} has blocks of {block} that run over the ends of its rows of {n}; here they stop there: quantize it again")
    format = NF(4, block) if kinds[0] == "nf4" else FP4(block, "bnb")
    data = tensors[name].contiguous().view(-1).view(torch.uint8)
    _same_table(tensors[f"{name}.quant_map"], format.levels(), f"{name}.quant_map")
    codes = torch.stack([data >> 4, data & 15], -1).reshape(-1)[: rows * n].reshape(shape)
    absmax = tensors[f"{name}.absmax"].reshape(*shape[:-1], -1)
    if f"{name}.nested_absmax" not in tensors:
        return QTensor.from_codes(codes, {"scale": absmax.float()}, format, dtype)
    _same_table(tensors[f"{name}.nested_quant_map"], dyn8(), f"{name}.nested_quant_map")
    group, nested = int(state["nested_blocksize"]), tensors[f"{name}.nested_absmax"].float()
    offset = torch.tensor(float(state["nested_offset"]), device=data.device)
    if expand:
        each = level_tensor(dyn8(), data.device)[absmax.long()].reshape(-1) * nested.repeat_interleave(group)[: absmax.numel()]
        return QTensor.from_codes(codes, {"scale": (each + offset).reshape(absmax.shape)}, format, dtype)
    k = n_blocks(n, block)
    if rows > 1 and k % group and group % k:
        raise Invalid(
            f"{name} has {k} scales a row in nested groups of {group} that run over the ends of rows: read it with expand=True "
            "(float32 scales, the same values)"
        )
    each_row = nested.repeat_interleave(group // k)[:rows, None] if rows > 1 and k < group else nested
    parts = {
        "scale": absmax,
        "scale_group": each_row.reshape(*shape[:-1], -1).clone(),
        "scale_offset": offset.expand(*shape[:-2], 1).clone(),
    }
    kind = NF(4, block, Double(8, group)) if kinds[0] == "nf4" else FP4(block, "bnb", Double(8, group))
    return QTensor.from_codes(codes, parts, kind, dtype)


def _kind(q: QTensor) -> str:
    if isinstance(q.format, NF) and q.format.bits == 4:
        return "nf4"
    if isinstance(q.format, FP4) and q.format.variant == "bnb":
        return "fp4"
    raise Invalid(f"bitsandbytes holds NF(4) and FP4(variant='bnb'); this weight is {q.format}")


def _flat_groups(q: QTensor, store: Double) -> tuple[Tensor, Tensor, float]:
    """absmax bytes, nested absmax and offset in flat groups of 256, where the groups of our rows say the same."""
    reason = "; write it with expand=True (plain float32 absmax, the same values)"
    if store.group != GROUP or store.inner != "fp32":
        raise Invalid(f"bitsandbytes nests {GROUP} float32 scales, and this weight has {store}{reason}")
    codes, offset = q.parts["scale"], q.parts["scale_offset"].unique()
    if offset.numel() > 1:
        raise Invalid(f"bitsandbytes has one offset for all experts, and this weight has {offset.numel()}{reason}")
    k, rows = codes.shape[-1], codes.shape[:-1].numel()
    inner = q.parts["scale_group"].reshape(-1)
    if k % GROUP and rows > 1:
        per = GROUP // k
        nested = inner[::per]
        if GROUP % k or not torch.equal(nested.repeat_interleave(per)[:rows], inner):
            raise Invalid(f"bitsandbytes nests {GROUP} scales over the ends of rows; this weight has {k} a row, nested by row{reason}")
        inner = nested
    return codes.reshape(-1), inner, float(offset)


def _same_table(table: Tensor, wanted: tuple[float, ...], what: str) -> None:
    if not torch.equal(table.float().cpu(), torch.tensor(wanted)):
        raise Invalid(f"{what} is not the table that bitsandbytes ships: this weight cannot be read")
