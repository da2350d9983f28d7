"""Every Triton kernel as the library launches it, compiled ahead of time for GPUs that need not be there: what the interpreter cannot see."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# What one program may have of shared memory on the smallest cards from capability 8.0 (8.6, 8.9 and 12.0; these three have more).
SHARED = 99 << 10
BITS = (2, 3, 4, 8)
STACK = 16  # bytes a thread: an index or two, where a spill takes many


# 3 and 4 bits take every way there is, with decoders of their own; 2 and 8 take the shortest, where `every` test is run.
@pytest.mark.parametrize(
    ("capability", "bits"), [(90, (3, 4)), *(pytest.param(c, BITS, marks=pytest.mark.every) for c in (80, 90, 100))], ids=str
)
def test_every_launch_compiles_and_fits(capability, bits, tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__, *map(str, (capability, *bits))], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len({name for name, *_ in found}) == 13  # every kernel that is launched
    for name, launch, shared, registers, local in found:
        assert shared <= SHARED, f"{name} takes {shared} bytes of shared memory: {launch}"
        assert local <= STACK, f"{name} spills: {local} bytes a thread beside {registers} registers: {launch}"


def compiled(capability: int, *bits: int) -> list[tuple[str, str, int, int, int]]:
    """(kernel, launch, shared bytes, registers, bytes of local memory a thread) of each distinct kernel."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", capability, 32)

    class Absent:
        """As much of a driver as compiling asks for."""

        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    triton.runtime.driver.set_active(Absent())
    launch, seen = JITFunction.run, {}

    def warm(self, *args, grid, warmup=True, **options):
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        if kernel.hash not in seen:
            seen[kernel.hash] = (self.fn.__name__, str(kernel.src.constants), kernel.metadata.shared, *resources(kernel.asm["cubin"]))
        return kernel

    JITFunction.run = warm
    every_launch(bits)
    return list(seen.values())


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, as the assembler has noted them."""
    import tempfile

    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", said)[1]) for what in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return registers, stack + local


def every_launch(widths: tuple[int, ...]) -> None:
    """Through the library's own dispatch, at sizes that take every way through it; at a real model's where that makes another kernel."""
    import torch

    from finebits.blocks import n_blocks, row_bytes
    from finebits.kernels import cuda
    from finebits.kernels.table import Rounding, Table

    def table(m: int, n: int, block: int, bits: int, store: torch.dtype, shifted: bool) -> Table:
        k = n_blocks(n, block)
        shift = torch.zeros(m, k) if shifted else None
        return Table(
            torch.zeros(m, row_bytes(n, bits), dtype=torch.uint8), torch.zeros(m, k).to(store), shift, torch.zeros(256), bits, block, n
        )

    def rounding(bits: int, block: int, mode: str, uniform: bool) -> Rounding:
        return Rounding(mode, 1.0, "bf16", uniform, 0, torch.zeros(2**bits - 1), torch.zeros(256, dtype=torch.uint8), bits, block)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for bits in widths:
        real, odd = table(32, 4096, 64, bits, bf16, False), table(5, 37, 16, bits, fp32, True)
        grouped = table(32, 512, 32, bits, fp16, True)  # several scales a fragment, and a shift
        products = [(real, 1, bf16)]
        if bits in (3, 4):
            products += [(real, 32, bf16), (grouped, 16, fp16)]
        if bits == 3:
            products += [(real, 4, fp32), (odd, 2, bf16)]
        for t, tokens, dtype in products:
            for transposed in (False, True):
                cuda.linear(torch.zeros(tokens, t.codes.shape[0] if transposed else t.n, dtype=dtype), t, transposed)
        cuda.dequantize(real, bf16)
        cuda.dequantize(odd, fp32)
        cuda.quantize(torch.zeros(32, 4096, dtype=bf16), rounding(bits, 64, "absmax", False))
        cuda.quantize(torch.zeros(5, 37), rounding(bits, 16, "minmax", True))
    adapters()


def adapters() -> None:
    """Rows of adapters, few and many of each."""
    import torch

    from finebits.kernels import cuda
    from finebits.kernels.laid import Group, Groups, Laid, Resident

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        pages = torch.zeros(4, 64 * 4096, dtype=dtype)
        own = Resident([0, 1], {"q": Laid((pages[0].view(64, 4096),), (pages[1].view(64, 4096),), 1.0)})
        for rows in (1, 4, 40):
            cuda.grouped(torch.zeros(rows, 4096, dtype=dtype), torch.zeros(rows, 4096, dtype=dtype), Groups([Group(0, rows, own)]), "q")


if __name__ == "__main__":
    print(json.dumps(compiled(*map(int, sys.argv[1:]))))
