"""Whether operations on a tensor run at once, or something steps in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def plain(x: Tensor) -> bool:
    """Whether operations on x run at once and are seen by autograd alone: then the dispatcher, which takes longer than a short product,
    has nothing to do. Under a compiler, a transform (vmap, jvp), a mode that steps in (fake tensors; not one that says `looks_on`), or for other
    kinds of tensors it has.

    >>> plain(torch.ones(1)), plain(fb.quantize(torch.ones(1, 64), fb.NF(4)))
    (True, False)
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, torch.nn.Parameter)
        and (torch._C._len_torch_dispatch_stack() == 0 or all(hasattr(m, "looks_on") for m in _get_current_dispatch_mode_stack()))
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and torch._C._get_tracing_state() is None
    )
