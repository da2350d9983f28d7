"""How kernels are launched: on the device of their tensors, and without Triton's look at every argument where that is known.

A step of training makes a thousand short launches, so what a launch costs the host counts: a kernel that is compiled already is called
directly.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_HERE = contextlib.nullcontext()
_compiled: dict[tuple, Any] = {}


def on(device: torch.device):
    """Triton launches on the current device, so tensors of another one must make theirs current."""
    if device.type != "cuda" or device.index == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device(device)


def launch(kernel: Any, grid: tuple[int, int, int], tensors: tuple, numbers: tuple[int, ...], constants: tuple, **options: Any) -> None:
    """kernel[grid](*tensors, *numbers, *constants, **options), where the options follow from the constants.

    What Triton compiles for depends on the device, types, numbers, and which pointers are multiples of 16. A kernel is kept for the case
    that all of them are, and then run as Triton itself would after its look at the arguments.
    """
    device, places, kinds, pointers = tensors[0].get_device(), 0, [], []
    for t in tensors:
        if t is None:
            kinds.append(None)
            pointers.append(None)
        else:
            at = t.data_ptr()
            places |= at
            kinds.append(t.dtype)
            pointers.append(at)
    if device < 0 or places % 16:
        kernel[grid](*tensors, *numbers, *constants, **options)
        return
    key = (id(kernel), device, *kinds, numbers, constants)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*tensors, *numbers, *constants, **options)
    else:
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *pointers, *numbers, *constants)


def power(n: int) -> int:
    """The next power of two."""
    return 1 << (n - 1).bit_length() if n > 0 else 1
