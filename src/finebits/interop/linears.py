"""Layers that are a product with a matrix and are not called nn.Linear: made one, so that all that is done to linears is done to them.

- Subclasses of nn.Linear whose forward is the same product in another spelling (Falcon's).
- GPT-2's Conv1D, y = x V + b with V (in, out): the linear of W = Vᵀ.
- Experts that are held in one tensor: one linear each (`finebits.experts`).
- A convolution, in one or two dimensions, whose channels are in one group: the linear of W (out, channels · k · k) over its windows.

All but the first remember how their files have the weight (`finebits.linears`): whoever reads a tensor by name gets W, and whoever writes a
model for others writes what its own modules have.

Windows that overlap hold a number of the input as often as it is in one, k · k times at stride 1. They are there while it computes: what a layer
keeps of them for its backward pass is the input, out of which they are made again.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from finebits.experts import apart
from finebits.linears import multiplies


def linearized(model: Any) -> Any:
    """The model with such layers made nn.Linear, in place.

    >>> from transformers.pytorch_utils import Conv1D
    >>> model = linearized(torch.nn.Sequential(Conv1D(nf=2, nx=3), torch.nn.Conv2d(3, 8, 4, stride=4)))
    >>> model[0], tuple(model[0].weight.shape)
    (Linear(in_features=3, out_features=2, bias=True), (2, 3))
    >>> model[1], tuple(model[1](torch.zeros(5, 3, 16, 16)).shape)
    (Linear(in_features=48, out_features=8, bias=True), (5, 8, 4, 4))
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            if type(module) is not nn.Linear and multiplies(module):
                module.own_class = type(module).__name__  # pyright: ignore[reportArgumentType]
                module.__class__ = nn.Linear
        elif is_conv1d(module) or cuts(module):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _linear(module))
        else:
            apart(module)
    return model


def is_conv1d(module: nn.Module) -> bool:
    """Is a module GPT-2's Conv1D?

    >>> is_conv1d(torch.nn.Conv1d(3, 2, 1))  # which is another
    False
    """
    from transformers.pytorch_utils import Conv1D

    return type(module) is Conv1D


def cuts(module: nn.Module) -> bool:
    """Is a module a convolution that is a product with the windows of its input?

    >>> cuts(torch.nn.Conv2d(3, 8, 3, padding=1)), cuts(torch.nn.Conv2d(4, 4, 3, groups=4))
    (True, False)
    """
    return type(module) in (nn.Conv1d, nn.Conv2d) and cast(Any, module).groups == 1


def _linear(module: Any) -> nn.Linear:
    W = module.weight.detach()
    W = W.T.contiguous() if is_conv1d(module) else W.flatten(1)
    linear: Any = nn.Linear(W.shape[1], W.shape[0], bias=module.bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(W, requires_grad=module.weight.requires_grad), module.bias
    linear.train(module.training)
    if is_conv1d(module):
        linear.inputs_first = True
    else:
        linear.window = tuple(module.weight.shape[1:])
        for k in SETTINGS:
            setattr(linear, k, getattr(module, k))
        linear.edges = list(module._reversed_padding_repeated_twice)  # before and after every side, the last side first
        linear.register_forward_pre_hook(_cut)
        linear.register_forward_hook(_done, always_call=True)
    return linear


SETTINGS = "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"  # models read them


def _cut(linear: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The windows in place of the input, and as long as the layer computes, the input in place of the windows in all that is kept. Where others
    see to what is kept (checkpointing, offloading), it is left to them."""
    windows = _windows(linear, inputs[0])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and windows.is_contiguous() and not _seen_to():
        where, size, x = windows.untyped_storage()._cdata, windows.numel(), inputs[0]

        def keep(t: Tensor) -> Tensor | _Kept:
            same = t.untyped_storage()._cdata == where and t.numel() == size and t.is_contiguous()
            return _Kept(linear, x, t.shape) if same else t

        linear.keeping = torch.autograd.graph.saved_tensors_hooks(keep, _again)
        linear.keeping.__enter__()
    return (windows,)


def _seen_to() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # pyright: ignore[reportAttributeAccessIssue]


def _done(linear: Any, inputs: tuple[Tensor, ...], y: Tensor | None) -> Tensor | None:
    if (keeping := vars(linear).pop("keeping", None)) is not None:
        keeping.__exit__(None, None, None)
    return None if y is None else y.movedim(-1, y.ndim - 1 - len(linear.window[1:]))


class _Kept(NamedTuple):
    """Windows, in the shape that they had where they were kept."""

    linear: Any
    x: Tensor
    shape: torch.Size


def _again(kept: Tensor | _Kept) -> Tensor:
    return kept if isinstance(kept, Tensor) else _windows(kept.linear, kept.x).reshape(kept.shape)


def _windows(linear: Any, x: Float[Tensor, "*b c *sides"]) -> Float[Tensor, "*b *places n"]:
    """(…, c, *sides) -> (…, *places, c · window)."""
    sides = len(linear.window[1:])
    if any(linear.edges):
        x = F.pad(x, linear.edges, "constant" if linear.padding_mode == "zeros" else linear.padding_mode)
    first = x.ndim - sides
    for d, (k, step, wide) in enumerate(zip(linear.kernel_size, linear.stride, linear.dilation, strict=True)):
        x = x.unfold(first + d, wide * (k - 1) + 1, step)[..., ::wide]
    x = x.movedim(first - 1, first - 1 + sides)  # the channels behind the places
    return x.flatten(first - 1 + sides)
