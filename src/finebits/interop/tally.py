"""Operations on tensors without storage, counted: what each allocates, and when it is gone.

What an operation gives is asked of torch once for each set of shapes. Attention is computed as torch does on a device that keeps no scores.
What a kernel allocates inside is not seen, but for the few that are named below.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
FUSED = 1  # what torch calls attention that keeps no scores


class Tally(TorchDispatchMode):
    """Bytes of the tensors that are there now, and the most that there were; operations that ran."""

    looks_on = True

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = self.ran = 0
        self.there: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran += 1
        known = ANSWERS.get(func)
        out = _made(func, args, kwargs or {}) if known is None else known(*args)
        if func is aten._safe_softmax.default:  # inside, a plain softmax, and whether a score is minus infinity
            self.most = max(self.most, self.now + out.nbytes + out.numel())
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self._note(t)
        return out

    def _note(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.there:
            return

        def gone(_: Any) -> None:
            del self.there[key]
            self.now -= size

        self.there[key] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)

    def known(self, *tensors: Tensor) -> None:
        """These are counted elsewhere."""
        for t in tensors:
            storage = t.untyped_storage()
            if isinstance(self.there.get(storage._cdata), weakref.ref):
                self.now -= storage.nbytes()
            self.there[storage._cdata] = storage


def _made(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives on the meta device. Most ask torch's Python for the shapes of what they make, at ten times the time of all else
    here, so that those which make all that they give are asked once for tensors of these shapes."""
    keys: list[Any] = [func]
    if not _told(keys, (*args, *kwargs.items())):
        return func(*args, **kwargs)
    key = tuple(keys)
    known = _shapes.get(key)
    if known is None:
        out = func(*args, **kwargs)
        _shapes[key] = _fresh(out, (*args, *kwargs.values()))
        return out
    if known is AS_IT_RUNS:
        return func(*args, **kwargs)
    if known is ITSELF:
        return args[0]
    tensors = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in known]
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


AS_IT_RUNS, ITSELF = (), ((),)  # of an operation that makes views or what is no tensor; of one that writes into its first argument
_shapes: dict[Any, tuple[Any, ...]] = {}


def _told(into: list[Any], arguments: Iterable[Any]) -> bool:
    """Whether these say what comes out of an operation: no tensor has values. What they say goes into a list."""
    for a in arguments:
        if isinstance(a, Tensor):
            if a.device.type != "meta":
                return False
            into += (a.shape, a.stride(), a.dtype)
        elif isinstance(a, list | tuple):
            into.append(len(a))
            if not _told(into, a):
                return False
        else:
            into += (type(a), a)  # 1, 1.0 and True are equal
    return True


def _fresh(out: Any, arguments: Iterable[Any]) -> tuple[Any, ...]:
    """Sizes, strides and types of what was made, where all of it was."""
    given = [a for a in tree_leaves(arguments) if isinstance(a, Tensor)]
    if given and out is given[0]:
        return ITSELF
    made = out if isinstance(out, tuple) else (out,)
    if not all(isinstance(t, Tensor) and t.device.type == "meta" for t in made):
        return AS_IT_RUNS
    storages = {t.untyped_storage()._cdata for t in (*made, *given)}
    whole = all(t.untyped_storage().nbytes() == t.nbytes and not t.storage_offset() for t in made)
    if not whole or len(storages) < len(made) + len({t.untyped_storage()._cdata for t in given}):
        return AS_IT_RUNS
    return tuple((t.shape, t.stride(), t.dtype) for t in made)


def _each(mask: Tensor) -> Tensor:
    """All places of a mask, where only its values would tell which."""
    return torch.empty(mask.numel(), mask.ndim, dtype=torch.int64, device="meta")


ANSWERS: dict[Any, Callable[..., Any]] = {  # of operations that ask for values
    aten._local_scalar_dense.default: lambda t: False if t.dtype == torch.bool else 0,
    aten.nonzero.default: _each,
}


class Attending(TorchFunctionMode):
    """Attention on meta tensors as torch computes it on a device: without scores wherever it can."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_attended if func is F.scaled_dot_product_attention else func)(*args, **kwargs or {})


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    like = lambda t: torch.empty(t.shape[-1], dtype=t.dtype).expand(t.shape).requires_grad_(t.requires_grad)  # noqa: E731
    mask = None if attn_mask is None else like(attn_mask)
    arguments = (like(query), like(key), like(value), mask, dropout_p, is_causal)
    fits = torch._fused_sdp_choice  # pyright: ignore[reportPrivateImportUsage]  # what torch itself asks, and has no public name for
    if fits(*arguments, scale=scale, enable_gqa=enable_gqa) != FUSED:
        rest = (attn_mask, dropout_p, is_causal)
        return F.scaled_dot_product_attention(query, key, value, *rest, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    fused = aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


class New(torch.autograd.Function):
    """A tensor like another that depends on `leaf`, and keeps nothing."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, like: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return grads[0].new_empty(1), None
