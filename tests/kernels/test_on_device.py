"""A quantized weight on the device that is there, a GPU before the CPU: made, read, multiplied, differentiated, saved and compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import finebits as fb
from finebits.kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BITS = (2, 3, 4, 8)
# Relative to the norm: operands are rounded to x's dtype, sums are at least float32.
ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def weight(bits: int, m: int = 96, n: int = 320, scale: str = "bf16", dtype: torch.dtype = torch.float32) -> fb.QTensor:
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(bits)).to(DEVICE, dtype)
    return fb.quantize(W, fb.NF(bits, block=64, scale=scale))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_values_are_the_references(bits, dtype):
    W = torch.randn(48, 320, generator=torch.Generator().manual_seed(bits)).to(dtype)
    here, there = fb.quantize(W.to(DEVICE), fb.NF(bits, block=64)), fb.quantize(W, fb.NF(bits, block=64))
    assert all(torch.equal(here.parts[k].cpu(), there.parts[k]) for k in there.parts)
    want = reference.dequantize(there.format.table(there.parts, 320), dtype)
    assert torch.equal(here.dequantize(dtype).cpu(), want)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tokens", [0, 1, 16, 32, 512, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_forward_and_backward_are_the_dense_products(bits, tokens, dtype):
    q = weight(bits)
    W = q.dequantize(torch.float64)
    x = torch.randn(tokens, 320, dtype=dtype, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()
    y = F.linear(x, q)
    g = torch.randn(y.shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (dx,) = torch.autograd.grad(y, x, g)
    assert y.dtype == dx.dtype == dtype and y.shape == (tokens, 96) and dx.shape == x.shape
    if tokens:
        assert error(y, x.double() @ W.mT) < ERROR[dtype]
        assert error(dx, g.double() @ W) < ERROR[dtype]


@pytest.mark.parametrize("tokens", [1, 40])
def test_strided_inputs_and_gradients(tokens):
    q = weight(4)
    wide = torch.randn(320, tokens, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    x = wide.permute(2, 1, 0)[1:]  # neither contiguous nor at the start of its storage
    y = F.linear(x, q)
    assert y.shape == (1, tokens, 96) and error(y, F.linear(x.contiguous(), q)) < ERROR[torch.bfloat16]
    odd = torch.randn(1 + 320, generator=torch.Generator().manual_seed(1)).to(DEVICE, torch.bfloat16)[1:]  # off a whole word
    assert error(F.linear(odd, q), q.dequantize(torch.float64) @ odd.double()) < ERROR[torch.bfloat16]


@pytest.mark.skipif(DEVICE != "cuda", reason="streams are a GPU's")
def test_a_product_waits_for_its_own_stream_only():
    q, side = weight(4, 4096, 4096), torch.cuda.Stream()
    x = torch.randn(1, 4096, device=DEVICE, dtype=torch.bfloat16)
    want = F.linear(x, q)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = x.clone()
        got = F.linear(late, q)
    side.synchronize()
    assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are a GPU's")
def test_a_product_can_be_captured():
    q = weight(3, 256, 320)
    x = torch.randn(1, 320, device=DEVICE, dtype=torch.bfloat16)
    F.linear(x, q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.linear(x, q)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, F.linear(x, q))


@pytest.mark.parametrize("bits", BITS)
def test_saved_parts_come_back(bits, tmp_path):
    q = weight(bits)
    save_file(q.parts, tmp_path / "q.safetensors")
    back = fb.QTensor(load_file(tmp_path / "q.safetensors", device=DEVICE), q.format, q.shape, q.dtype)
    assert back.device.type == DEVICE and torch.equal(back.dequantize(), q.dequantize())
    assert torch.equal(q.cpu().dequantize(), q.dequantize().cpu())


COMPILED = """
import torch
import torch.nn.functional as F
import finebits as fb
device = "cuda" if torch.cuda.is_available() else "cpu"
q = fb.quantize(torch.randn(96, 320, device=device), fb.NF(3, block=64))
layer = torch.nn.Linear(320, 96, bias=False, device=device)
layer.weight = torch.nn.Parameter(q, requires_grad=False)
both = torch.compile(lambda x: F.silu(layer(x)), fullgraph=True, backend="{backend}")
for tokens in (1, 40):
    x = torch.randn(tokens, 320, device=device, requires_grad=True)
    y = both(x)
    want = F.silu(layer(x))
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    a, b = (torch.autograd.grad(v.sum(), x)[0] for v in (y, want))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
"""


def test_compiled_layers_give_the_same():
    """In a plain process: checked signatures do not compile. Without a GPU the graph is made and run, but no code is generated."""
    code = COMPILED.format(backend="inductor" if DEVICE == "cuda" else "aot_eager")
    path = [str(Path(fb.__file__).parents[1]), *sys.path]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{code}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
