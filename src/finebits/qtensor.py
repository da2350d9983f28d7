"""The quantized weight: one wrapper subclass of torch.Tensor, generic in its format.

Row rule: blocks run along the last dimension and every part leads with the weight's leading dimensions (rows, or experts × rows), so that
cutting, moving and copying a QTensor is the same operation on each of its parts. What all rows of a matrix share (a codebook, the scale of
a tensor: the format names such parts) leads with the experts only, and is left as it is when rows are cut. It is frozen. Its product with
activations saves nothing for backward but the packed parts: an autograd function where nothing but autograd looks on, else the custom op
`finebits::linear`, which compilers and transforms see as one.

An operation that is not listed here raises: a dense copy is made by `.dequantize()` only, never behind the caller's back.
FSDP2 needs row counts that the world size divides, and does not take `reshard_after_forward=<int>`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from finebits import kernels, registry
from finebits.blocks import pack, unpack
from finebits.dispatch import plain
from finebits.errors import Invalid, Unsupported
from finebits.formats.base import Format, Parts
from finebits.kernels.table import Table

aten = torch.ops.aten
LAYOUT = 1  # raised when packing or dispatch changes: part of what compiled artefacts are cached under


class QTensor(torch.Tensor):
    """A frozen weight (*e, m, n) held as packed codes and scales.

    `parts["codes"]` is uint8 (*e, m, bytes); the other parts are the format's. `dtype` is what `dequantize` and products return by default.

    >>> q = fb.quantize(torch.eye(2, 64), fb.NF(4))  # 64 codes of half a byte and one float32 scale a row
    >>> q.shape, q.nbytes, sorted(q.parts)
    (torch.Size([2, 64]), 72, ['codes', 'scale'])
    >>> torch.nn.functional.linear(torch.ones(1, 64), q)  # x Wᵀ, never dense
    tensor([[1., 1.]])
    """

    format: Format
    parts: Parts

    @staticmethod
    def __new__(cls, parts: Parts, format: Format, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> QTensor:
        return torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=parts["codes"].device)

    def __init__(self, parts: Parts, format: Format, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        self.parts, self.format = parts, format
        self.sizes = tuple(shape)  # asking for the shape of a subclass takes as long as a short product

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Parts, format: Format, dtype: torch.dtype = torch.float32) -> QTensor:
        """Codes one a byte (*e, m, n), scales as stored -> the packed weight.

        >>> codes = torch.tensor([[8, 9, 14]], dtype=torch.uint8)  # of Int(4): code 7 is zero
        >>> QTensor.from_codes(codes, {"scale": torch.tensor([[0.5]])}, fb.Int(4)).dequantize()
        tensor([[0.5000, 1.0000, 3.5000]])
        """
        shape = (*codes.shape[:-1], format.columns(codes.shape[-1]))
        return cls({"codes": pack(codes, format.bits), **scales}, format, shape, dtype)

    @classmethod
    def from_parts(cls, parts: Parts, format: Format, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> QTensor:
        """Parts out of a file -> the packed weight (m, n). Raises ValueError where they are not those of such a matrix.

        >>> q = fb.quantize(torch.eye(2, 64), fb.NF(4))
        >>> QTensor.from_parts({"codes": q.parts["codes"]}, q.format, (2, 64))
        Traceback (most recent call last):
            ...
        finebits.errors.Invalid: the parts (codes) are not those of a NF(bits=4, block=64, scale='fp32', unit=None) of shape (2, 64)
        """
        shape = tuple(shape)
        q = cls(parts, format, shape, dtype) if "codes" in parts else None
        led = lambda k, p: p.shape[: len(shape) - 2] == shape[:-2] if k in format.shared else p.shape[:-1] == shape[:-1]  # noqa: E731
        if q is None or not all(led(k, p) for k, p in parts.items()) or 8 * q.nbytes != format.storage_bits(*shape[-2:]):
            raise Invalid(f"the parts ({', '.join(parts)}) are not those of a {format} of shape {shape}")
        return q

    def codes(self) -> Tensor:
        """Codes, one a byte, (*e, m, n), or as many a row as the format has.

        >>> fb.quantize(torch.tensor([[7.0, -1.0, 0.0]]), fb.Int(4)).codes()  # −7 is code 0
        tensor([[14, 6, 7]], dtype=torch.uint8)
        """
        return unpack(self.parts["codes"], self.format.bits, self.format.row_codes(self.shape[-1]))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The dense weight (*e, m, n), in its own dtype unless another is asked for.

        >>> q = fb.quantize(torch.tensor([[7.0, 1.2]]), fb.Int(4))
        >>> q.dequantize(), q.dequantize(torch.bfloat16).dtype
        (tensor([[7., 1.]]), torch.bfloat16)
        """
        return _dense(self.parts, self.format, self.shape[-1], dtype or self.dtype)

    def table(self) -> Table | None:
        """What the kernels see of it, kept while its parts are what they were; None where the format has no such form.

        >>> table = fb.quantize(torch.ones(2, 100), fb.Int(3)).table()
        >>> table.bits, table.block, table.n, tuple(table.scale.shape)
        (3, 64, 100, (2, 2))
        """
        cached, parts = self.__dict__.get("_table"), self.parts
        if cached is not None and cached.codes is parts["codes"] and cached.scale is parts["scale"] and cached.shift is parts.get("shift"):
            return cached
        table = self.format.table(parts, self.shape[-1])
        if table is not None and table.scale is parts.get("scale") and table.shift is parts.get("shift"):
            self._table = table  # scales that had to be decoded are not: they would stay in memory
        return table

    @property
    def nbytes(self) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Bytes really held: the sum over the parts.

        >>> fb.quantize(torch.ones(8, 128), fb.NF(4)).nbytes  # 8 · 128 / 2 of codes, 8 · 2 scales of 4
        576
        """
        return sum(p.nbytes for p in self.parts.values())

    @property
    def bits_per_weight(self) -> float:
        """Bits held for each weight, scales and padding included.

        >>> fb.quantize(torch.ones(8, 128), fb.NF(4)).bits_per_weight  # 4 and 32 / 64
        4.5
        """
        return 8 * self.nbytes / max(self.numel(), 1)

    def apply_parts(self, f: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None, dim: int | None = None) -> QTensor:
        """The same map over every part, or over those that have dimension `dim`; the shape follows the codes' leading dimensions.

        >>> q = fb.quantize(torch.eye(4, 64), fb.NF(4))
        >>> q.apply_parts(lambda part: part[:2]).shape  # rows can be cut, since every part leads with them
        torch.Size([2, 64])
        """
        parts = {k: p if dim is not None and self.lacks(k, dim) else f(p) for k, p in self.parts.items()}
        return QTensor(parts, self.format, (*parts["codes"].shape[:-1], self.shape[-1]), dtype or self.dtype)

    def lacks(self, part: str, dim: int) -> bool:
        """Whether a part is shared by all that lies along dimension `dim`.

        >>> q = fb.quantize(torch.eye(4, 64), fb.Int(4, block="tensor"))
        >>> q.lacks("scale", 0), q.lacks("codes", 0)
        (True, False)
        """
        return part in self.format.shared and dim % self.ndim >= self.ndim - 2

    def share_memory_(self) -> QTensor:
        for p in self.parts.values():
            p.share_memory_()
        return self

    def is_shared(self) -> bool:
        return all(p.is_shared() for p in self.parts.values())

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"QTensor({self.format}, {tuple(self.shape)}, {self.dtype}, {self.bits_per_weight:.3f} bits per weight)"

    def __deepcopy__(self, memo: dict) -> QTensor:
        out = self.apply_parts(lambda p: p.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            out = cast(QTensor, torch.nn.Parameter(out, requires_grad=False))
        memo[id(self)] = out
        return out

    def __reduce_ex__(self, protocol: Any):
        return _rebuild, (self.parts, key(self.format), tuple(self.shape), self.dtype, isinstance(self, torch.nn.Parameter))

    def __tensor_flatten__(self):
        names = sorted(self.parts)
        for name in names:  # torch reads the parts as attributes
            setattr(self, f"part_{name}", self.parts[name])
        return [f"part_{name}" for name in names], (self.format, self.dtype)

    @classmethod
    def __tensor_unflatten__(cls, inner: Parts, context: Any, size: Sequence[int], stride: Any) -> QTensor:
        format, dtype = context
        return cls({k.removeprefix("part_"): p for k, p in inner.items()}, format, size, dtype)

    def _stable_hash_for_caching(self) -> str:
        """All that a compiled graph depends on: torch's on-disk cache compares nothing else of a QTensor."""
        parts = [(k, tuple(p.shape), p.stride(), p.dtype, p.device) for k, p in sorted(self.parts.items())]
        return f"finebits.QTensor/{LAYOUT} {self.format} {tuple(self.shape)} {self.dtype} {self.requires_grad} {parts}"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        if func is F.embedding:
            return _embedding(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = RULES.get(func) or COLLECTIVES.get(str(func))
        if rule is None:
            raise Unsupported(f"QTensor has no {func}; call .dequantize() if a dense copy is really meant")
        return rule(func, *args, **(kwargs or {}))

    def fsdp_pre_all_gather(self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, policy: Any):
        names = sorted(k for k in self.parts if not self.lacks(k, 0))
        shared = {k: p for k, p in self.parts.items() if self.lacks(k, 0)}
        return tuple(self.parts[k] for k in names), (names, shared, self.format, self.shape[-1], self.dtype)

    def fsdp_post_all_gather(self, gathered: Any, meta: Any, param_dtype: torch.dtype, *, out: Any = None):
        if out is not None:
            return None
        names, shared, format, n, dtype = meta
        parts = dict(zip(names, gathered, strict=True)) | shared
        return QTensor(parts, format, (*parts["codes"].shape[:-1], n), dtype), gathered


def dense(W: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The dense tensor behind W, whichever kind it is.

    >>> dense(fb.quantize(torch.tensor([[7.0, 1.2]]), fb.Int(4))), dense(torch.ones(1))
    (tensor([[7., 1.]]), tensor([1.]))
    """
    if isinstance(W, QTensor):
        return W.dequantize(dtype)
    return W if dtype is None else W.to(dtype)


def nbytes(W: Tensor) -> int:
    """Bytes that W holds, packed or dense.

    >>> nbytes(torch.ones(8, 128)), nbytes(fb.quantize(torch.ones(8, 128), fb.NF(4)))
    (4096, 576)
    """
    return W.nbytes if isinstance(W, QTensor) else W.numel() * W.element_size()


def parts_of(name: str, W: Tensor) -> dict[str, Tensor]:
    """The plain tensors of a weight: its parts under `name.part`, or itself.

    >>> list(parts_of("weight", fb.quantize(torch.ones(1, 64), fb.NF(4)))), list(parts_of("weight", torch.ones(1)))
    (['weight.codes', 'weight.scale'], ['weight'])
    """
    return {f"{name}.{k}": part for k, part in W.parts.items()} if isinstance(W, QTensor) else {name: W}


@functools.lru_cache(maxsize=1024)
def key(format: Format) -> str:
    """A format as one line of JSON: how custom ops and files name it.

    >>> key(fb.NF(3))
    '{"bits": 3, "block": 64, "paper": "nf", "scale": "fp32"}'
    """
    return json.dumps(registry.to_json(format), sort_keys=True)


@functools.lru_cache(maxsize=1024)
def format_of(line: str) -> Format:
    """The inverse of `key`.

    >>> format_of(key(fb.NF(3))) == fb.NF(3)
    True
    """
    return registry.from_json("formats", json.loads(line))


def _rebuild(parts: Parts, line: str, shape: Sequence[int], dtype: torch.dtype, parameter: bool) -> Tensor:
    q = QTensor(parts, format_of(line), shape, dtype)
    return torch.nn.Parameter(q, requires_grad=False) if parameter else q


torch.serialization.add_safe_globals([_rebuild])  # what torch.load(weights_only=True) needs: data and one function, no classes


def _dense(parts: Parts, format: Format, n: int, dtype: torch.dtype) -> Tensor:
    table = format.table(parts, n)
    return format.dense(parts, n).to(dtype) if table is None else kernels.dequantize(table, dtype)


# The product --------------------------------------------------------------------------------------------------------------------------


SCHEMA = "(Tensor x, Tensor[] parts, str names, str format, SymInt m, SymInt n, bool transposed) -> Tensor"


def _multiplied(x: Tensor, parts: Parts, format: Format, n: int, transposed: bool) -> Tensor:
    table = format.table(parts, n)
    if table is not None:
        return kernels.linear(x, table, transposed)
    W = _dense(parts, format, n, x.dtype)
    return x @ (W if transposed else W.mT)


@torch.library.custom_op("finebits::linear", mutates_args=(), schema=SCHEMA)
def _op(x: Tensor, parts: Sequence[Tensor], names: str, format: str, m: int, n: int, transposed: bool) -> Tensor:
    return _multiplied(x, dict(zip(names.split(), parts, strict=True)), format_of(format), n, transposed)


@_op.register_fake
def _(x: Tensor, parts: Sequence[Tensor], names: str, format: str, m: int, n: int, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], n if transposed else m)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, parts, *ctx.rest = inputs
    ctx.save_for_backward(*parts)


def _backward(ctx: Any, g: Tensor):
    names, format, m, n, transposed = ctx.rest
    parts = list(ctx.saved_tensors)
    return _op(g, parts, names, format, m, n, not transposed), [None] * len(parts), None, None, None, None, None


_op.register_autograd(_backward, setup_context=_setup)


@_op.register_vmap
def _(info: Any, dims: Any, x: Tensor, parts: Sequence[Tensor], names: str, format: str, m: int, n: int, transposed: bool):
    if any(d is not None for d in (dims[1] if isinstance(dims[1], (list, tuple)) else (dims[1],))):
        raise Unsupported("vmap over a quantized weight: index its experts with select instead")
    return _op(x.movedim(dims[0], 0), parts, names, format, m, n, transposed), 0


def times(x: Tensor, W: Tensor, transposed: bool = False) -> Tensor:
    """x Wᵀ, or x W, in x.dtype, for a plain x (see `finebits.dispatch.plain`) and a frozen W.

    >>> q = fb.quantize(torch.tensor([[7.0, 0.0], [0.0, 7.0], [7.0, 7.0]]), fb.Int(4))
    >>> times(torch.tensor([[1.0, 2.0]]), q), times(torch.tensor([[1.0, 2.0, 3.0]]), q, transposed=True)
    (tensor([[ 7., 14., 21.]]), tensor([[28., 35.]]))
    """
    if not isinstance(W, QTensor):
        W = W.to(x.dtype)
        return x @ (W if transposed else W.mT)
    if (x.requires_grad or W.requires_grad) and torch.is_grad_enabled():
        return _Product.apply(x, W, transposed)
    table = W.table()
    if table is not None:
        return kernels.linear(x, table, transposed)
    V = W.dequantize(x.dtype)
    return x @ (V if transposed else V.mT)


class _Product(torch.autograd.Function):
    """x Wᵀ, or x W. W lives as long as its module, so nothing is saved but which it is, and x where W is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: QTensor, transposed: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.rest = W, transposed
        if W.requires_grad:
            ctx.save_for_backward(x)
        return times(x, W, transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        (g,), (W, transposed) = grads, ctx.rest
        gx = times(g, W, not transposed) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return gx, None, None
        (x,) = ctx.saved_tensors
        left, right = (t.reshape(-1, t.shape[-1]) for t in ((x, g) if transposed else (g, x)))
        return gx, (left.mT @ right).to(W.dtype), None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, QTensor):
        raise Unsupported("QTensor can be the weight of a linear map, not its input or bias")
    shape = weight.sizes
    if len(shape) != 2:
        raise Invalid(f"F.linear needs a weight (m, n); this QTensor is {shape}: select one expert first")
    if input.shape[-1] != shape[-1]:
        raise Invalid(f"F.linear: the input has {input.shape[-1]} features, the quantized weight takes {shape[-1]}")
    device = input.device.type
    if torch.is_autocast_enabled(device):
        input = input.to(torch.get_autocast_dtype(device))
    if plain(input):
        y = times(input, weight)
    elif weight.requires_grad:
        raise Unsupported("a quantized weight that is trained is seen by autograd alone: neither compiled nor transformed")
    else:
        names = sorted(weight.parts)
        y = _op(input, [weight.parts[k] for k in names], " ".join(names), key(weight.format), shape[0], shape[1], False)
    return y if bias is None else y + bias.to(y.dtype)


# The lookup ---------------------------------------------------------------------------------------------------------------------------


def _rows_at(ids: Tensor, parts: Sequence[Tensor], names: str, format: str, n: int, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (*b) of a packed table, dense (*b, n): nothing else of it is read."""
    own, at = format_of(format), ids.flatten()
    rows = {k: p if k in own.shared else p.index_select(0, at) for k, p in zip(names.split(), parts, strict=True)}
    return _dense(rows, own, n, dtype).view(*ids.shape, n)


LOOKUP = "(Tensor ids, Tensor[] parts, str names, str format, SymInt n, ScalarType dtype) -> Tensor"
_lookup = torch.library.custom_op("finebits::lookup", _rows_at, mutates_args=(), schema=LOOKUP)
_lookup.register_fake(lambda ids, parts, names, format, n, dtype: parts[0].new_empty(*ids.shape, n, dtype=dtype))


def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None, *_: Any, **__: Any) -> Tensor:
    """Which row is padding, and how gradients are made, is no matter of a frozen table."""
    if not isinstance(weight, QTensor) or max_norm is not None:
        raise Unsupported("QTensor can be the table of F.embedding, not what is looked up, and it is frozen: max_norm would write into it")
    names, run = sorted(weight.parts), _rows_at if plain(input) else _lookup
    return run(input, [weight.parts[k] for k in names], " ".join(names), key(weight.format), weight.sizes[-1], weight.dtype)


# What else a frozen weight must answer: all of it is "the same on every part" -----------------------------------------------------------

RULES: dict[Any, Callable] = {}


def rule(*functions: Any) -> Callable:
    def register(f: Callable) -> Callable:
        RULES.update(dict.fromkeys(functions, f))
        return f

    return register


def _rows(q: QTensor, dim: int) -> None:
    if dim % q.ndim == q.ndim - 1:
        raise Unsupported("a QTensor is cut along rows or experts, never along columns: blocks run there")


@rule(aten.detach.default, aten.clone.default, aten.alias.default)
def _(func: Any, q: QTensor, **kw: Any) -> QTensor:
    return q.apply_parts(lambda p: func(p, **kw))


@rule(aten._to_copy.default)
def _(func: Any, q: QTensor, *, dtype: torch.dtype | None = None, device: Any = None, non_blocking: bool = False, **kw: Any) -> QTensor:
    return q.apply_parts(lambda p: func(p, device=device, non_blocking=non_blocking), dtype)


@rule(aten.split.Tensor)
def _(func: Any, q: QTensor, size: int, dim: int = 0) -> list[QTensor]:
    _rows(q, dim)
    count = -(-q.shape[dim] // size)
    pieces = {k: [p] * count if q.lacks(k, dim) else func(p, size, dim % q.ndim) for k, p in q.parts.items()}
    part = [dict(zip(pieces, piece, strict=True)) for piece in zip(*pieces.values(), strict=True)]
    return [QTensor(p, q.format, (*p["codes"].shape[:-1], q.shape[-1]), q.dtype) for p in part]


@rule(aten.slice.Tensor, aten.select.int)
def _(func: Any, q: QTensor, dim: int = 0, *args: Any) -> QTensor:
    if func is aten.slice.Tensor and dim % q.ndim == q.ndim - 1 and (args or (None,))[0] in (None, 0) and len(args) < 3:
        if len(args) < 2 or args[1] is None or args[1] >= q.shape[-1]:
            return q.apply_parts(lambda p: p)  # q[i:j, :] asks for all columns
    _rows(q, dim)
    if func is aten.select.int and q.ndim > 2 and any(q.lacks(k, dim) for k in q.parts):
        raise Unsupported(f"one row of every expert of {q!r}: its experts share parts among rows; select an expert first")
    return q.apply_parts(lambda p: func(p, dim % q.ndim, *args), dim=dim)


@rule(aten.new_zeros.default, aten.empty_like.default, aten.zeros_like.default)
def _(func: Any, q: QTensor, size: Sequence[int] | None = None, **kw: Any) -> QTensor:
    if size is not None and (len(size) < 2 or size[-1] != q.shape[-1]):
        raise Unsupported(f"a QTensor with {q.shape[-1]} columns gives new ones of (rows, {q.shape[-1]}) only, not {tuple(size)}")
    rows = tuple(size[:-1]) if size is not None else tuple(q.shape[:-1])

    def new(k: str, p: Tensor) -> Tensor:
        lead = (rows[:-1], q.ndim - 2) if k in q.format.shared else (rows, q.ndim - 1)
        return torch.zeros(*lead[0], *p.shape[lead[1] :], dtype=p.dtype, device=kw.get("device") or p.device)

    parts = {k: new(k, p) for k, p in q.parts.items()}
    return QTensor(parts, q.format, (*rows, q.shape[-1]), kw.get("dtype") or q.dtype)


@rule(aten.copy_.default)
def _(func: Any, q: QTensor, source: Tensor, *args: Any) -> QTensor:
    if not isinstance(source, QTensor) or source.format != q.format or source.shape != q.shape:
        raise Unsupported(f"{q!r} takes copies of its own format and shape only; quantize the source first")
    for k, p in q.parts.items():
        p.copy_(source.parts[k], *args)
    return q


@rule(aten.view.default, aten.as_strided.default)
def _(func: Any, q: QTensor, size: Sequence[int], *args: Any) -> QTensor:
    rows = tuple(q.parts["codes"].shape[:-1])
    matrix = (*rows, q.numel() // max(math.prod(rows), 1))
    flat = (q.numel(),)  # FSDP2 keeps a flat alias of every shard
    if tuple(size) not in ((-1,), flat, matrix):
        raise Unsupported(f"a QTensor of shape {tuple(q.shape)} cannot be viewed as {tuple(size)}")
    return QTensor(q.parts, q.format, matrix if tuple(size) == matrix else flat, q.dtype)


def _gathered(func: Any, q: QTensor, *args: Any) -> QTensor:
    """FSDP2's full state dict, collective by collective."""
    return q.apply_parts(lambda p: func(p.contiguous(), *args))


def _waited(func: Any, q: QTensor, *args: Any) -> QTensor:
    return q.apply_parts(torch.ops._c10d_functional.wait_tensor)


COLLECTIVES = {  # by name: torch registers some of them late, or never where it is built without distributed
    "_c10d_functional.all_gather_into_tensor.default": _gathered,
    "_c10d_functional.wait_tensor.default": _waited,
    "_c10d_functional._wrap_tensor_autograd.default": _waited,
}


@rule(aten.is_pinned.default)
def _(func: Any, q: QTensor, *args: Any) -> bool:
    return all(p.is_pinned() for p in q.parts.values())
