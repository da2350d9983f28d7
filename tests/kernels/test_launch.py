"""A compiled kernel that is launched directly gets what Triton itself would have given it: seen by a driver that only writes down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_direct_launches_pass_what_triton_passes(tmp_path):
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def main() -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget

    import finebits as fb
    from finebits.kernels import cuda

    seen: list[tuple] = []

    class Recorded:
        """A driver whose launches are only noted."""

        class utils:
            load_binary = staticmethod(lambda *about: (1, 2, 3, 0, 1024))
            get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})

        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 7)
        get_active_torch_device = staticmethod(lambda: torch.device("cpu"))
        launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: seen.append(arguments))

    triton.runtime.driver.set_active(Recorded())
    torch.Tensor.get_device = lambda self: 0
    torch._C._cuda_getCurrentRawStream = lambda device: 7
    t = fb.quantize(torch.randn(32, 256), fb.NF(4, block=64, scale="bf16")).table()
    x, g = torch.zeros(1, 256, dtype=torch.bfloat16), torch.zeros(1, 32, dtype=torch.bfloat16)
    hooks = {6, 7, 8}  # what lets profilers look on
    for job in (lambda: cuda.dequantize(t, torch.bfloat16), lambda: cuda.linear(x, t, False), lambda: cuda.linear(g, t, True)):
        seen.clear()
        job()
        first = len(seen)
        job()
        assert len(seen) == 2 * first > 0
        for triton_gave, we_gave in zip(seen[:first], seen[first:], strict=True):
            assert len(triton_gave) == len(we_gave)
            for i, (wanted, got) in enumerate(zip(triton_gave, we_gave, strict=True)):
                if isinstance(wanted, torch.Tensor):  # results are new tensors each time
                    same = got % 16 == 0 and (got == wanted.data_ptr() or i in (9, 10))
                else:
                    same = i in hooks or got == wanted
                assert same, (i, wanted, got)
    seen.clear()
    cuda.linear(torch.zeros(257, dtype=torch.bfloat16)[1:].view(1, 256), t, False)  # off the multiples of 16: Triton looks itself
    assert all(any(isinstance(a, torch.Tensor) for a in launch) for launch in seen)


if __name__ == "__main__":
    main()
