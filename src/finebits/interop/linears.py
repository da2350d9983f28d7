"""Layers that are a product with a matrix and are not called nn.Linear: made one, so that all that is done to linears is done to them.

- Subclasses of nn.Linear whose forward is the same product in another spelling (Falcon's).
- GPT-2's Conv1D, y = x V + b with V (in, out): the linear of W = Vᵀ.
- Experts that are held in one tensor: one linear each (`finebits.experts`).
- A convolution whose windows lie side by side, as what cuts a picture into patches: the linear of W (out, channels · k · k).

All but the first remember how their files have the weight (`finebits.linears`): whoever reads a tensor by name gets W, and whoever writes a
model for others writes what its own modules have.
"""

from __future__ import annotations

from typing import Any

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
    """Is a module a convolution, in one or two dimensions, whose windows lie side by side?

    >>> cuts(torch.nn.Conv2d(3, 8, 4, stride=4)), cuts(torch.nn.Conv2d(3, 8, 3, padding=1))
    (True, False)
    """
    if type(module) not in (nn.Conv1d, nn.Conv2d):
        return False
    conv: Any = module
    still = len(conv.kernel_size)
    return (conv.stride, conv.padding, conv.dilation, conv.groups) == (conv.kernel_size, (0,) * still, (1,) * still, 1)


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
        linear.register_forward_pre_hook(_windows)
        linear.register_forward_hook(_places)
    return linear


def _windows(linear: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """(b, c, *sides) -> (b, *places, c · window)."""
    (x,), sides = inputs, linear.window[1:]
    for d, k in enumerate(sides):
        x = x.unfold(2 + d, k, k)
    last = len(sides)
    x = x.permute(0, *range(2, 2 + last), 1, *range(2 + last, 2 + 2 * last))
    return (x.flatten(1 + last),)


def _places(linear: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return y.movedim(-1, 1)
