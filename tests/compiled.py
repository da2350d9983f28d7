"""torch.compile(fullgraph=True) on quantized weights; prints one line of JSON. Run without shape checks, which no graph can hold."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import finebits as fb
from finebits.plan.base import Plan, Spec

torch.set_num_threads(1)
M, N = 128, 192
FORMATS = {"nf3": fb.NF(3), "int8": fb.Int(8, block=100), "int4 asymmetric": fb.Int(4, symmetric=False, scale="bf16")}
found: dict[str, Any] = {}


def linear(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return F.linear(x, q)  # one function for all formats: artefacts on disk must not be mixed up either


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


for name, format in FORMATS.items():
    torch.manual_seed(0)
    q, x = fb.quantize(torch.randn(M, N) / 10, format), torch.randn(5, N, requires_grad=True)
    results = []
    for run in (linear, torch.compile(linear, fullgraph=True)):
        y = run(x, q)
        (g,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y.detach(), g))
    (y, g), (cy, cg) = results
    found[name] = {"forward": difference(cy, y), "gradient": difference(cg, g)}

q, x = fb.quantize(torch.randn(M, N), fb.NF(3)), torch.randn(2, N, requires_grad=True)
run = torch.compile(lambda x, q: F.gelu(F.linear(x, q)), fullgraph=True)
own = {p.untyped_storage().data_ptr() for p in q.parts.values()}
saved: list[torch.Tensor] = []
with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
    run(x, q)
sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
found["saved"] = {
    "own": sum(s for p, s in sizes.items() if p in own),
    "extra": sum(s for p, s in sizes.items() if p not in own),
    "unpacked": M * N,
}

with torch.autocast("cpu", torch.bfloat16):
    plain = lambda x, q: F.linear(x, q)  # noqa: E731
    whole = torch.compile(plain, fullgraph=True)
    found["autocast"] = [str(f(x, w).dtype) for f in (plain, whole) for w in (q, q.dequantize())]

host = fb.build(nn.Sequential(nn.Linear(N, M)), Plan({"0": Spec(format=fb.NF(4), adapter=fb.LoRA(rank=4))}))
with torch.no_grad():
    host[0].p["default"]["B"].normal_()
torch._dynamo.reset()
counters.clear()
error = 0.0
model = torch.compile(host, fullgraph=True)
for rows in (3, 8, 17):
    x = torch.randn(rows, N)
    for m in (host, model):
        m.zero_grad()
        m(x).square().sum().backward()
        grads = [p.grad.clone() for p in host.parameters() if p.grad is not None]
        if m is host:
            expected = grads
    error = max(error, *(difference(a, b) for a, b in zip(grads, expected, strict=True)))
found["host"] = {"error": error, "graphs": counters["stats"]["unique_graphs"]}

found["adapters"] = {}
for adapter in (fb.DoRA(rank=4), fb.HiRA(rank=4), fb.MiSS(rank=4, bat=True), fb.OneBit(rank=4), fb.Sparse(rank=2)):
    torch._dynamo.reset()
    host, x = fb.build(nn.Sequential(nn.Linear(N, M)), Plan({"0": Spec(format=fb.NF(4), adapter=adapter)})), torch.randn(5, N)
    trained = [p for p in host.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in trained:
            p.add_(0.1 * torch.randn_like(p))
    both = [torch.autograd.grad(m(x).square().sum(), trained) for m in (host, torch.compile(host, fullgraph=True, backend="aot_eager"))]
    found["adapters"][str(adapter)] = max(difference(a, b) for a, b in zip(*both, strict=True))
print(json.dumps(found))
