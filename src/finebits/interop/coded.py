"""Weights that a checkpoint holds as codes, and the plain weights behind them.

A layout is known by the tensors that it leaves beside each other, so that a file without a `quantization_config` is read as well:

    bitsandbytes, 4 bits   X, X.absmax, X.quant_map, X.quant_state.bitsandbytes__nf4 (or fp4), X.nested_absmax, X.nested_quant_map
    bitsandbytes, int8     X (int8), S.SCB                      w = q·SCB/127, a scale a row
    GPTQ                   S.qweight, S.qzeros, S.scales, S.g_idx   w = s·(q − z), bits and checkpoint_format from config.json
    AWQ (gemm)             S.qweight, S.qzeros, S.scales        w = s·(q − z), eight columns a word in the order 0 2 4 6 1 3 5 7
    compressed-tensors     S.weight_packed, S.weight_scale, …   integers in words, or NVFP4 in bytes
    MXFP4                  X_blocks, X_scales                   two codes a byte, a power of two for 32, experts input-first
    finebits               X.codes, X.scale, …                 the parts of a QTensor, formats and shapes from config.json
    scaled                 X (float8 or int8) with X_scale_inv, X_scale, S.scale or S.qscale_weight, and X_zero_point
                           w = s·(q − z), a scale a tensor, row, block of columns or tile

X is the name of the weight, S that name without `.weight`. Everything is float32 here; values are those that the layout's own library
computes before it rounds to the model's dtype. What is none of these is refused; codes are never taken for weights.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finebits.errors import FinebitsError, Invalid, out_of_memory
from finebits.layouts._words import from_words
from finebits.layouts.bnb import from_bnb
from finebits.layouts.compressed_tensors import from_compressed
from finebits.layouts.gptq import from_gptq
from finebits.layouts.packed import METHOD as FINEBITS
from finebits.layouts.packed import held_by
from finebits.qtensor import QTensor
from finebits.tensorfile import Stored

Parts = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> what a file says of the tensor

METHODS = ("bitsandbytes", "gptq", "awq", "fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", FINEBITS)
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4_VALUES = (*E2M1, *(-v for v in E2M1))


class Unreadable(Invalid):
    """A checkpoint that is no model as it lies there: something is missing, or it is held in a way that is not read."""

    code = 2


@dataclass(frozen=True)
class Coded:
    """One weight in codes: which tensors it is made of (role -> name in the files), its shape, and how it is read.

    `exact` gives it as a QTensor with the same codes and scales, or raises ValueError where no format holds them as they are.
    """

    kind: str
    parts: Mapping[str, str]
    shape: tuple[int, ...]
    plain: Callable[[Parts], Tensor]
    exact: Callable[[Parts], QTensor] | None = None
    file: Stored | None = None  # where they are, if not among the model's tensors


def method_of(config: Mapping[str, Any]) -> str | None:
    """What config.json says that its weights are quantized with. Raises Unreadable where that is not read here.

    >>> method_of({}), method_of({"quantization_config": {"load_in_4bit": True}})
    (None, 'bitsandbytes')
    """
    quantization = quantization_of(config)
    if quantization is None:
        return None
    method = quantization.get("quant_method") or (
        "bitsandbytes" if quantization.get("load_in_4bit") or quantization.get("load_in_8bit") else "an unnamed method"
    )
    if method not in METHODS:
        raise Unreadable(
            f"the checkpoint is quantized with {method}, which is not read here (read are {', '.join(METHODS)}): give the unquantized "
            "model, or dequantize it with its own library and save that"
        )
    return method


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The quantization_config of a config.json, at the top or in its text part.

    >>> quantization_of({"text_config": {"quantization_config": {"bits": 4}}})
    {'bits': 4}
    """
    for place in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(place.get(key), Mapping):
                return place[key]
    return None


def coded(shapes: Shapes, config: Mapping[str, Any], read: Callable[[str], Tensor]) -> dict[str, Coded]:
    """The weights that are held as codes, by the name that the plain weight would have. Raises Unreadable where one is not understood.

    `shapes` is what the files say of their tensors, `read` gives one: of weights whose shape is kept in a small tensor of its own, that one.
    """
    method, quantization = method_of(config), quantization_of(config) or {}
    weights: dict[str, Coded] = {}
    for name in shapes:
        with fitting(name):
            weights |= _coded(name, shapes, method, quantization, read)
    if method is not None and not weights:
        raise Unreadable(
            f"config.json says that the weights are quantized with {method}, and the files hold none in its layout: take quantization_config "
            "out of config.json if they are plain, or fetch the checkpoint again"
        )
    return weights


def _coded(
    name: str, shapes: Shapes, method: str | None, quantization: Mapping[str, Any], read: Callable[[str], Tensor]
) -> dict[str, Coded]:
    """The weight in codes that a tensor tells of; empty where it tells of none, or another tensor of the weight does."""
    (dtype, shape), (stem, _, leaf), found = shapes[name], name.rpartition("."), dict[str, Coded]()
    state = STATE.fullmatch(name)
    if state:
        found[state[1]] = _bnb4(state[1], shapes, read(name))
    elif leaf == "SCB":
        found[f"{stem}.weight"] = _bnb8(stem, shapes)
    elif leaf == "qweight":
        found[f"{stem}.weight"] = _qweight(stem, shapes, method, _excepted(quantization, stem))
    elif leaf == "codes" and method == FINEBITS:
        found[stem] = _own(stem, shapes, quantization)
    elif leaf == "weight_packed":
        found[f"{stem}.weight"] = _packed(stem, shapes, read)
    elif name.endswith("_blocks") and dtype == torch.uint8 and f"{name.removesuffix('_blocks')}_scales" in shapes:
        plain = name.removesuffix("_blocks")
        *lead, out, groups, half = shape
        parts = {"blocks": name, "scales": f"{plain}_scales"}
        found[plain] = Coded("MXFP4", parts, (*lead, groups * half * 2, out), _mxfp4)
    elif dtype in CODES and f"{stem}.SCB" not in shapes:
        scaled = _scaled(name, shapes, method, quantization.get("weight_block_size"))
        if scaled is not None:
            found[name] = scaled
    return found


@contextlib.contextmanager
def fitting(name: str) -> Iterator[None]:
    """What fails while the parts of a weight are put together becomes one sentence: a file may say of them what is not so."""
    try:
        yield
    except (FinebitsError, MemoryError):
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, ArithmeticError, re.error) as e:
        if out_of_memory(e):
            raise
        reason = " ".join(str(e).split())[:200]
        raise Unreadable(
            f"the codes and scales of {name} do not fit together ({type(e).__name__}: {reason}): fetch the checkpoint again"
        ) from e


def _need(shapes: Shapes, weight: str, parts: dict[str, str]) -> dict[str, str]:
    lost = [name for name in parts.values() if name not in shapes]
    if lost:
        raise Unreadable(f"{weight} is held as codes, and the files have no {lost[0]}: fetch the checkpoint again")
    return parts


def _optional(shapes: Shapes, stem: str, roles: Mapping[str, str]) -> dict[str, str]:
    return {role: f"{stem}{end}" for role, end in roles.items() if f"{stem}{end}" in shapes}


# bitsandbytes --------------------------------------------------------------------------------------------------------------------------


def _bnb4(weight: str, shapes: Shapes, state: Tensor) -> Coded:
    parts = {
        name.removeprefix(f"{weight}.") if name != weight else "weight": name for name in shapes if (name + ".").startswith(f"{weight}.")
    }
    _need(shapes, weight, {"weight": weight, "absmax": f"{weight}.absmax", "quant_map": f"{weight}.quant_map"})
    named = {f"weight.{role}" if role != "weight" else role: name for role, name in parts.items()}
    quant_state = json.loads(bytes(state.tolist()))
    return Coded("bitsandbytes 4-bit", named, tuple(quant_state["shape"]), lambda t: _flat4(t, quant_state), from_bnb)


def _flat4(parts: Parts, state: Mapping[str, Any]) -> Tensor:
    shape, block = tuple(state["shape"]), int(state["blocksize"])
    count = torch.Size(shape).numel()
    data = parts["weight"].contiguous().view(torch.uint8).reshape(-1)
    codes = torch.stack([data >> 4, data & 15], -1).reshape(-1)[:count]
    scale = parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        nested = parts["weight.nested_absmax"].float().repeat_interleave(int(state["nested_blocksize"]))[: scale.numel()]
        scale = parts["weight.nested_quant_map"].float()[scale.reshape(-1).int()] * nested + float(state["nested_offset"])
    values = parts["weight.quant_map"].float()[codes.int()] * scale.float().reshape(-1).repeat_interleave(block)[:count]
    return values.reshape(shape)


def _bnb8(stem: str, shapes: Shapes) -> Coded:
    weight = f"{stem}.weight"
    parts = _need(shapes, weight, {"weight": weight, "SCB": f"{stem}.SCB"}) | _optional(shapes, stem, {"format": ".weight_format"})
    return Coded("bitsandbytes int8", parts, shapes[weight][1], _rows8)


def _rows8(parts: Parts) -> Tensor:
    if "format" in parts and int(parts["format"]) != 0:
        raise Unreadable(
            "an int8 weight of bitsandbytes lies in the tiles of one GPU (weight_format is not 0): load and save it with bitsandbytes"
        )
    return parts["weight"].float() * (parts["SCB"].float()[:, None] / 127)


# integers in words ---------------------------------------------------------------------------------------------------------------------


def _excepted(quantization: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What a GPTQ checkpoint says of one module: its `dynamic` has exceptions by regular expressions, those to "+:" or to no sign at all."""
    for pattern, more in (quantization.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), module):
            return {**quantization, **more}
    return quantization


def _qweight(stem: str, shapes: Shapes, method: str | None, quantization: Mapping[str, Any]) -> Coded:
    weight = f"{stem}.weight"
    parts = _need(shapes, weight, {role: f"{stem}.{role}" for role in ("qweight", "qzeros", "scales")})
    bits = int(quantization.get("bits") or quantization.get("w_bit") or 0)
    (_, packed), (_, (_, m)) = shapes[parts["qweight"]], shapes[parts["scales"]]
    if method == "awq":
        if bits != 4 or quantization.get("version", "gemm") != "gemm" or packed[1] * 8 != m:
            raise Unreadable(f"{weight} is AWQ in a layout that is not read (read is 4 bits, version gemm): give the unquantized model")
        return Coded("AWQ", parts, (m, packed[0]), _awq)
    layout = quantization.get("checkpoint_format") or "gptq"
    if method != "gptq" or bits not in (2, 3, 4, 8) or layout not in ("gptq", "gptq_v2") or packed[1] != m:
        how = f"{method}, {bits} bits, {layout}" if method else "no quantization_config"
        raise Unreadable(
            f"{weight} is packed in words ({how}), and read are GPTQ of 2, 3, 4 and 8 bits in the layouts gptq and gptq_v2, and AWQ: give "
            "the unquantized model"
        )
    parts |= _optional(shapes, stem, {"g_idx": ".g_idx"})
    symmetric = bool(quantization.get("sym", True))
    return Coded(
        f"GPTQ {bits}-bit",
        parts,
        (m, packed[0] * 32 // bits),
        lambda t: _gptq(t, bits, layout),
        lambda t: from_gptq(t, bits, symmetric, layout),
    )


def _own(weight: str, shapes: Shapes, quantization: Mapping[str, Any]) -> Coded:
    format, shape = held_by(quantization.get("groups")).get(weight.removesuffix(".weight"), (None, ()))
    if format is None:
        raise Unreadable(f"the files hold {weight}.codes, and config.json does not say in which format: export or save the model again")
    parts = {name.removeprefix(f"{weight}."): name for name in shapes if name.rpartition(".")[0] == weight}
    exact = lambda t: QTensor.from_parts(dict(t), format, shape)  # noqa: E731
    return Coded(f"finebits {format}", parts, shape, lambda t: exact(t).dequantize(), exact)


def _gptq(parts: Parts, bits: int, layout: str) -> Tensor:
    scale = parts["scales"].float()  # (k, m)
    n, (k, m) = parts["qweight"].shape[0] * 32 // bits, scale.shape
    q = from_words(parts["qweight"].T.contiguous(), bits, n).float()
    zero = from_words(parts["qzeros"], bits, m).float() + (layout == "gptq")
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(n) // -(-n // k)
    return scale.T[:, group] * (q - zero.T[:, group])


def _awq(parts: Parts) -> Tensor:
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where the columns of a word lie: 0 2 4 6 1 3 5 7, undone
    scale = parts["scales"].float()  # (k, m)
    k, m = scale.shape
    q, zero = (from_words(parts[role], 4, m).unflatten(-1, (-1, 8))[..., order].flatten(-2).float() for role in ("qweight", "qzeros"))
    group = q.shape[0] // k
    return (scale.repeat_interleave(group, 0) * (q - zero.repeat_interleave(group, 0))).T.contiguous()


# compressed-tensors --------------------------------------------------------------------------------------------------------------------


def _packed(stem: str, shapes: Shapes, read: Callable[[str], Tensor]) -> Coded:
    weight = f"{stem}.weight"
    parts = _need(shapes, weight, {"weight_packed": f"{stem}.weight_packed", "weight_scale": f"{stem}.weight_scale"})
    parts |= _optional(shapes, stem, {r: f".{r}" for r in ("weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")})
    dtype, (m, packed) = shapes[parts["weight_packed"]]
    if dtype == torch.uint8 and "weight_global_scale" in parts:
        return Coded("NVFP4", parts, (m, 2 * packed), _nvfp4)
    if dtype != torch.int32 or "weight_shape" not in parts:
        raise Unreadable(f"{weight} is packed by compressed-tensors in a way that is not read ({dtype}): give the unquantized model")
    m, n = read(parts["weight_shape"]).tolist()
    fitting = [bits for bits in (2, 3, 4, 8) if -(-n * bits // 32) == packed]
    if len(fitting) != 1:
        raise Unreadable(
            f"{weight} is {m} × {n} in {packed} words a row, packed by compressed-tensors, and read are 2, 3, 4 and 8 bits: give the "
            "unquantized model"
        )
    bits = fitting[0]
    return Coded(f"compressed-tensors {bits}-bit", parts, (m, n), lambda t: _integers(t, bits), lambda t: _compressed_exact(t, bits))


def _integers(parts: Parts, bits: int) -> Tensor:
    m, n = parts["weight_shape"].tolist()
    scale = parts["weight_scale"].float()
    q = from_words(parts["weight_packed"], bits, n).float() - 2 ** (bits - 1)
    zero = torch.zeros_like(scale)
    if "weight_zero_point" in parts:
        zero = from_words(parts["weight_zero_point"].T.contiguous(), bits, m).T.float() - 2 ** (bits - 1)
    g = parts.get("weight_g_idx")
    group = g.long() if g is not None and bool((g >= 0).all()) else torch.arange(n) // -(-n // scale.shape[1])
    return (q - zero[:, group]) * scale[:, group]


def _compressed_exact(parts: Parts, bits: int) -> QTensor:
    n, k = int(parts["weight_shape"][1]), parts["weight_scale"].shape[1]
    strategy = {"strategy": "channel"} if k == 1 else {"strategy": "group", "group_size": n // k}
    scheme = {"num_bits": bits, "type": "int", "symmetric": "weight_zero_point" not in parts, **strategy}
    return from_compressed(parts, scheme)


# four-bit floats -----------------------------------------------------------------------------------------------------------------------


def _pairs(data: Tensor) -> Tensor:
    """Two e2m1 numbers a byte, the first in the low half."""
    u, table = data.contiguous().view(torch.uint8), torch.tensor(FP4_VALUES)
    return torch.stack([table[(u & 15).int()], table[(u >> 4).int()]], -1).flatten(-2)


def _mxfp4(parts: Parts) -> Tensor:
    values = torch.ldexp(_pairs(parts["blocks"]), parts["scales"].int()[..., None] - 127)
    return values.flatten(-2).mT.contiguous()


def _nvfp4(parts: Parts) -> Tensor:
    scale = parts["weight_scale"].float() / parts["weight_global_scale"].float()
    values = _pairs(parts["weight_packed"])
    return values * scale.repeat_interleave(values.shape[-1] // scale.shape[-1], -1)


# a float8 or int8 weight beside its scale ----------------------------------------------------------------------------------------------


def _scaled(name: str, shapes: Shapes, method: str | None, block: Sequence[int] | None) -> Coded | None:
    stem = name.removesuffix(".weight")
    scales = [s for s in (f"{name}_scale_inv", f"{name}_scale", f"{stem}.scale", f"{stem}.qscale_weight") if s in shapes and s != name]
    if not scales:
        return None  # an integer buffer may be meant; where a weight is asked for, it is refused
    parts = {"weight": name, "scale": scales[0]} | _optional(shapes, name, {"zero": "_zero_point"})
    dtype, shape = shapes[name]
    pairs = dtype == torch.int8 and method in ("fp8", "mxfp8")  # experts of four-bit floats beside float8 matrices
    shape = (*shape[:-1], 2 * shape[-1]) if pairs else shape
    sides = _sides(shape, shapes[scales[0]][1], block)
    if sides is None:
        raise Unreadable(
            f"{name} is {shape} and its scale {scales[0]} is {shapes[scales[0]][1]}, which is none of a tensor, its rows, blocks or tiles: "
            "fetch the checkpoint again"
        )
    kind = "FP4 with scales" if pairs else f"{str(dtype).removeprefix('torch.')} with scales"
    return Coded(kind, parts, shape, lambda t: _rescaled(t, shape, sides, pairs))


def _sides(shape: tuple[int, ...], scale: tuple[int, ...], block: Sequence[int] | None) -> tuple[int, ...] | None:
    """The tile that one scale is for. config.json's own where it fits the scales, since the last tile of a row may be short."""
    if torch.Size(scale).numel() == 1:
        return shape
    scale = (*scale, 1) if scale == shape[:-1] else scale
    if len(scale) != len(shape):
        return None
    tile = (*(1 for _ in shape[2:]), *block) if block and len(block) == 2 and len(shape) >= 2 else shape
    if all(-(-d // s) == k for d, s, k in zip(shape, tile, scale, strict=True)):
        return tile
    even = all(k and d % k == 0 for d, k in zip(shape, scale, strict=True))
    return tuple(d // k for d, k in zip(shape, scale, strict=True)) if even else None


def _rescaled(parts: Parts, shape: tuple[int, ...], sides: tuple[int, ...], pairs: bool) -> Tensor:
    def spread(t: Tensor) -> Tensor:
        if t.numel() == 1:
            return t.reshape(())
        t = t[..., None] if t.ndim < len(shape) else t
        for dim, (size, side) in enumerate(zip(shape, sides, strict=True)):
            t = t if t.shape[dim] == size or side >= size else t.repeat_interleave(side, dim).narrow(dim, 0, size)
        return t

    q = _pairs(parts["weight"]) if pairs else parts["weight"].float()
    scale = parts["scale"]
    scale = spread((scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float())  # bytes are exponents alone
    return (q - spread(parts["zero"].float())) * scale if "zero" in parts else q * scale
