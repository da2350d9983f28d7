"""What is nn.Linear under another name, and which way its weight lies in files."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multiplies(module: nn.Module) -> bool:
    """Is a module nn.Linear, in its own spelling or another? A subclass is where it brings no state of its own and its forward, tried on small
    numbers, gives what F.linear gives.

    >>> class Spelled(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias
    >>> class Doubled(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return 2 * super().forward(x)
    >>> multiplies(Spelled(3, 2)), multiplies(Doubled(3, 2))
    (True, False)
    """
    kind = type(module)
    if kind is nn.Linear:
        return True
    if not isinstance(module, nn.Linear) or kind.__init__ is not nn.Linear.__init__:
        return False
    own = {k for k in vars(module) if not k.startswith("_")} - {"in_features", "out_features", "training"}
    bare = set(module._parameters) == {"weight", "bias"} and not module._buffers and not module._modules
    return bare and not own and _is_product(kind)


@functools.cache
def _is_product(kind: type[nn.Linear]) -> bool:
    W, b, x = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 5), (3,), (2, 4, 5)))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for bias in (b, None):
            with torch.device("meta"):
                module = kind(5, 3, bias=bias is not None)
            module.weight, module.bias = nn.Parameter(W), cast(Any, None if bias is None else nn.Parameter(bias))
            for training in (True, False):
                try:
                    y = module.train(training)(x)
                except Exception:  # what it does with these shapes is its own affair: it is no product of them
                    return False
                if not isinstance(y, Tensor) or y.shape != (2, 4, 3) or not torch.allclose(y, F.linear(x, W, bias), rtol=1e-5, atol=1e-6):
                    return False
    return True


def inputs_first(module: nn.Module) -> bool:
    """Do the files of the model hold this layer's weight as (in, out)? Here it is (out, in), as all are.

    >>> inputs_first(torch.nn.Linear(3, 2))
    False
    """
    return getattr(module, "inputs_first", False)


def window(module: nn.Module) -> tuple[int, ...] | None:
    """What a row of this layer's weight is in the files of the model, where it is the window of a convolution: (channels, *sides).

    >>> window(torch.nn.Linear(3, 2)) is None
    True
    """
    return getattr(module, "window", None)


def unlike_factors(module: nn.Module) -> str | None:
    """What of this layer's windows the first factor of an adapter has not to PEFT, which is a convolution of kernel, stride and padding alone.

    >>> unlike_factors(torch.nn.Linear(3, 2)) is None
    True
    """
    if window(module) is None:
        return None
    conv = cast(Any, module)
    if any(d != 1 for d in conv.dilation):
        return f"dilation {tuple(conv.dilation)}"
    return None if conv.padding_mode == "zeros" else f"padding_mode {conv.padding_mode}"


def expert(module: nn.Module) -> tuple[int, int] | None:
    """Which of how many experts this layer is a matrix of, where files hold those of all in one tensor.

    >>> expert(torch.nn.Linear(3, 2)) is None
    True
    """
    return getattr(module, "expert", None)


def files_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of the tensor that holds this layer's weight in the files of the model, where it is another than (out, in).

    >>> layer = torch.nn.Linear(12, 2)
    >>> layer.expert = (5, 8)
    >>> files_shape(layer)
    (8, 2, 12)
    """
    if not stored_otherwise(module) and expert(module) is None:
        return None
    own, of = tuple(as_stored(module, torch.empty(cast(Any, module).weight.shape, device="meta")).shape), expert(module)
    return own if of is None else (of[1], *own)


def as_stored(module: nn.Module, W: Tensor) -> Tensor:
    """A weight of this layer, or another tensor of its shape, as the files of the model have it; an expert's as its part of their tensor.

    >>> layer = torch.nn.Linear(12, 2)
    >>> layer.window = (3, 2, 2)
    >>> as_stored(layer, layer.weight).shape
    torch.Size([2, 3, 2, 2])
    """
    if inputs_first(module):
        return W.T.contiguous()
    sides = window(module)
    return W if sides is None else W.unflatten(1, sides)


def own_class(module: nn.Module) -> str:
    """The name of the class that this linear layer is of in its model.

    >>> own_class(torch.nn.Linear(3, 2))
    'Linear'
    """
    return getattr(module, "own_class", "Linear")


def stored_otherwise(module: nn.Module) -> bool:
    """Have the files another shape than (out, in)?

    >>> stored_otherwise(torch.nn.Linear(3, 2))
    False
    """
    return inputs_first(module) or window(module) is not None
