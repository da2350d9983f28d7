"""Quantize, dequantize and the products of packed weights: ours against bitsandbytes, torchao (where installed) and bfloat16.

    python benchmarks/linear.py [--device cuda] [--isa avx2] [--quick] [--out RESULTS.md]

Contenders take turns inside one process, and a time is the least over the turns, so the ratios hold on a noisy machine where the
milliseconds do not. `cold` rotates among as many copies of the weight as it takes to push each out of the last cache, as a model with
many layers does; `hot` reuses one. Weights are NF4, block 64, unless the row says otherwise; x is bfloat16, or float32 for the rows that
name fp32. `--isa` holds this package and torch to an instruction set that the machine has beside better ones.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cuda_timing
import torch
from torch import Tensor, nn

from finebits import kernels
from finebits.kernels import Rounding, Table

NF = {
    2: [-1.0, 0.0, 0.33792, 1.0],
    3: [-1.0, -0.47863, -0.21714, 0.0, 0.16093, 0.33792, 0.56262, 1.0],
    4: [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
        *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    8: [i / 127 for i in range(-128, 128)],
}
BLOCK = 64
ISA = {
    "avx2": {"FINEBITS_CPU": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"FINEBITS_CPU": "avx512", "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "DEFAULT"},
}


def rounding(bits: int, device: torch.device) -> Rounding:
    levels = torch.tensor(NF[bits], device=device)
    order = torch.arange(2**bits, dtype=torch.uint8, device=device)
    return Rounding("absmax", 1.0, "fp32", False, 0, (levels[1:] + levels[:-1]) / 2, order, bits, BLOCK)


def table(W: Tensor, bits: int) -> Table:
    codes, scale, shift = kernels.quantize(W, rounding(bits, W.device))
    return Table(codes, scale, shift, torch.tensor(NF[bits], device=W.device), bits, BLOCK, W.shape[-1])


class Product(torch.autograd.Function):
    """A frozen packed weight in training: the gradient of x takes the transposed product."""

    @staticmethod
    def forward(ctx, x, t):
        ctx.t = t
        return kernels.linear(x, t)

    @staticmethod
    def backward(ctx, grad):
        return kernels.linear(grad, ctx.t, transposed=True), None


class Contender(NamedTuple):
    name: str
    calls: list[Callable[[], object]]  # one a copy of the weight
    nbytes: int  # of one weight, scales included


def copies(nbytes: int, cache: int) -> int:
    return max(2, -(-4 * cache // nbytes))


def turns(contenders: list[Contender], device: str, repeats: int, seconds: float = 0.02) -> dict[str, tuple[float, float]]:
    """Seconds of one call, (hot, cold), by contender: on the CPU the least of all turns."""
    if device == "cuda":
        return {name: (t.hot, t.cold) for name, t in cuda_timing.turns(contenders, repeats).items()}

    def timed(calls: list[Callable[[], object]], rounds: int) -> float:
        start = time.perf_counter()
        for _ in range(rounds):
            for call in calls:
                call()
        return (time.perf_counter() - start) / (rounds * len(calls))

    times = {c.name: ([], []) for c in contenders}
    once = {c.name: timed(c.calls, 1) for c in contenders}
    once = {c.name: min(once[c.name], timed(c.calls, 1)) for c in contenders}
    for _ in range(repeats):
        for c in contenders:
            (hot, cold), count = times[c.name], max(1, round(seconds / once[c.name]))
            timed(c.calls[:1], 1)
            hot.append(timed(c.calls[:1], count))
            cold.append(timed(c.calls, max(1, round(count / len(c.calls)))))
    return {name: (min(hot), min(cold)) for name, (hot, cold) in times.items()}


def bandwidth(device: str) -> float:
    """Bytes a second that a sum reads (CPU), or that a copy reads and writes (CUDA)."""
    if device == "cuda":
        return cuda_timing.bandwidth()
    a = torch.ones(1 << 27)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a.sum()
        best = min(best, time.perf_counter() - start)
    return a.nbytes / best


def peak(call: Callable[[], object], device: str) -> int | None:
    """Bytes that a call needs at most on top of what is there before it, its result included; None where nothing tells."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def status(key: str) -> int:
        return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)).split()[1]) << 10

    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # memory that was given back earlier must not be had for nothing
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = status("VmRSS")
        call()
        return status("VmHWM") - before
    except (OSError, AttributeError):
        return None


def gradient(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, grad_outputs=torch.ones_like(y))[0]


def ours(W: Tensor, x: Tensor, cache: int, bits: int = 4, name: str = "ours") -> Contender:
    t = table(W, bits)
    nbytes = t.codes.nbytes + t.scale.nbytes
    ts = [t, *(table(W, bits) for _ in range(copies(nbytes, cache) - 1))]

    def step(t: Table) -> Tensor:
        if x.requires_grad:
            return gradient(Product.apply(x, t), x)
        return kernels.linear(x, t)

    return Contender(name, [lambda t=t: step(t) for t in ts], nbytes)


def module(name: str, make: Callable[[], nn.Module], x: Tensor, nbytes: int, cache: int) -> Contender:
    def step(layer: nn.Module) -> Tensor:
        if x.requires_grad:
            return gradient(layer(x), x)
        with torch.no_grad():
            return layer(x)

    layers = [make() for _ in range(copies(nbytes, cache))]
    return Contender(name, [lambda layer=layer: step(layer) for layer in layers], nbytes)


def dense(W: Tensor, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=dtype, device=W.device)
    layer.weight.requires_grad_(False).copy_(W)
    return layer


def bitsandbytes(W: Tensor, train: bool) -> nn.Module:
    import bitsandbytes as bnb

    m, n = W.shape
    layer = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(W, requires_grad=False, quant_type="nf4", blocksize=BLOCK, compress_statistics=False, module=layer)
    return layer.to(W.device).train(train)


def torchao(W: Tensor) -> nn.Module:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    layer = nn.Sequential(dense(W))
    quantize_(layer, Int4WeightOnlyConfig(group_size=BLOCK))
    return layer


def products(W: Tensor, tokens: int, backward: bool, cache: int) -> list[Contender]:
    x = torch.randn(tokens, W.shape[1], dtype=torch.bfloat16, device=W.device, requires_grad=backward)
    packed = W.numel() // 2 + 4 * W.numel() // BLOCK
    peers = {"bf16": (lambda: dense(W), 2 * W.numel()), "bitsandbytes, train": (lambda: bitsandbytes(W, True), packed)}
    if not backward:
        peers["bitsandbytes, eval"] = lambda: bitsandbytes(W, False), packed
    if "torchao" in installed():
        peers["torchao int4"] = lambda: torchao(W), packed
    wide = x.detach().float().requires_grad_(backward)
    found = [ours(W, x, cache), ours(W, wide, cache, name="ours, fp32")]
    peers["fp32"] = lambda: dense(W, torch.float32), 4 * W.numel()
    for name, (make, nbytes) in peers.items():
        try:
            contender = module(name, make, wide if name == "fp32" else x, nbytes, cache)
            contender.calls[0]()
            found.append(contender)
        except Exception as error:  # a peer that cannot run here is a line of the output, not the end of it
            print(f"{name} not measured: {type(error).__name__}: {error}")
    if tokens == 1 and not backward:
        found += [ours(W, x, cache, bits, f"ours, {bits} bits") for bits in (2, 3, 8)]
    return found


def conversions(W: Tensor, job: str, cache: int) -> list[Contender]:
    theirs = None
    if "bitsandbytes" in installed():
        import bitsandbytes.functional as theirs
    if job.startswith("quantize"):
        dtype = torch.bfloat16 if "bf16" in job else torch.float32
        Ws = [W.to(dtype, copy=True) for _ in range(copies(W.numel() * dtype.itemsize, cache))]
        r, size = rounding(4, W.device), Ws[0].nbytes
        found = [Contender("ours", [lambda W=W: kernels.quantize(W, r) for W in Ws], size)]
        if theirs:
            calls = [lambda W=W: theirs.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4") for W in Ws]
            found.append(Contender("bitsandbytes", calls, size))
        return found
    t = table(W, 4)
    out = torch.empty(W.shape, dtype=torch.bfloat16, device=W.device)
    ts = [t, *(table(W, 4) for _ in range(copies(t.codes.nbytes, cache) - 1))]
    reused = "reused" in job
    body = kernels.chosen("dequantize", W.device, 4)
    if reused and body.name == "cpu":
        found = [Contender("ours", [lambda t=t: body.dequantize(t, torch.bfloat16, out=out) for t in ts], out.nbytes)]
    else:
        found = [Contender("ours", [lambda t=t: kernels.dequantize(t, torch.bfloat16) for t in ts], out.nbytes)]
    if not theirs:
        return found
    packed = [theirs.quantize_4bit(W.to(torch.bfloat16), blocksize=BLOCK, quant_type="nf4") for _ in ts]
    if reused and W.device.type == "cpu":  # its operator takes no output on the CPU; the function underneath does
        from bitsandbytes.cextension import lib

        size = [ctypes.c_longlong(v) for v in (BLOCK, *W.shape)]

        def call(codes, state):
            pointers = (ctypes.c_void_p(v.data_ptr()) for v in (codes, state.absmax, out))
            lib.cdequantize_blockwise_cpu_nf4_bf16(*pointers, *size)

        return [*found, Contender("bitsandbytes", [lambda p=p: call(*p) for p in packed], out.nbytes)]
    return [*found, Contender("bitsandbytes", [lambda p=p: theirs.dequantize_4bit(*p) for p in packed], out.nbytes)]


def installed() -> dict[str, str]:
    return {d.name: d.version for d in importlib.metadata.distributions() if d.name in ("torch", "bitsandbytes", "torchao", "triton")}


def last_cache(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    except OSError:
        return 32 << 20


def processor() -> str:
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        found = {key.strip(): value.strip() for key, _, value in (row.partition(":") for row in rows)}
        return f"{found['model name']}, family {found['cpu family']}, model {found['model']}"
    except (OSError, KeyError):
        return platform.processor()


def machine(device: str, speed: float) -> list[str]:
    if device == "cuda":
        lines = [f"- {torch.cuda.get_device_name()}, copy bandwidth {speed / 1e9:.0f} GB/s"]
    else:
        lines = [f"- {processor()}, {torch.get_num_threads()} threads, read bandwidth {speed / 1e9:.1f} GB/s"]
    lines.append(f"- last cache {last_cache(device) >> 20} MiB; Python {platform.python_version()}")
    lines += [f"- {name} {version}" for name, version in sorted(installed().items())]
    if device == "cpu":
        from finebits.kernels import cpu

        found = "none" if cpu.available() else cpu.LEVELS[cpu.level()]
        lines.append(f"- instruction set: ours {found}, torch {torch.backends.cpu.get_cpu_capability()}")
    return [*lines, "- kernels: " + "; ".join(f"{body.name}: {reason or 'runs'}" for body, reason in kernels.bodies())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--isa", choices=ISA, help="hold this package and torch to this instruction set")
    parser.add_argument("--shapes", nargs="*", default=["4096x4096", "4096x11008"], help="in x out features")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, first shape only")
    parser.add_argument("--only", nargs="*", default=[""], help="run the jobs whose name contains one of these")
    parser.add_argument("--out", type=Path, help="write the table as markdown")
    args = parser.parse_args()
    if args.isa and any(os.environ.get(name) != value for name, value in ISA[args.isa].items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ISA[args.isa]})  # torch reads them when it is loaded
    if args.quick:
        args.repeats, args.shapes = 5, args.shapes[:1]

    cache, speed = last_cache(args.device), bandwidth(args.device)
    head = machine(args.device, speed)
    lines = ["| in x out | job | contender | hot ms | cold ms | time / ours, hot | cold | of the bandwidth, cold |", "|" + "---|" * 8]
    print("\n".join([*head, *lines]), flush=True)
    for shape in args.shapes:
        n, m = map(int, shape.split("x"))
        W = (torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * 0.02).to(args.device)
        jobs: dict[str, Callable[[], list[Contender]]] = {
            job: lambda job=job: conversions(W, job, cache)
            for job in ("quantize fp32", "quantize bf16", "dequantize to bf16, reused output", "dequantize to bf16, new output")
        }
        for tokens in (1, 4, 16, 64, 512):
            jobs[f"{tokens} tokens"] = lambda tokens=tokens: products(W, tokens, False, cache)
        jobs["512 tokens, forward + backward"] = lambda: products(W, 512, True, cache)
        for job, make in jobs.items():
            if not any(part in job for part in args.only):
                continue
            contenders = make()
            times = turns(contenders, args.device, max(5, args.repeats // 3) if "512" in job or job[0] == "q" else args.repeats)
            base = times["ours"]
            for c in contenders:
                (hot, cold), name = times[c.name], c.name
                ratios = "|" if name == "ours" else f"{hot / base[0]:.2f} | {cold / base[1]:.2f}"
                share = f"{c.nbytes / cold / speed:.0%}" if job == "1 tokens" else ""
                lines.append(f"| {shape} | {job} | {name} | {hot * 1e3:.3f} | {cold * 1e3:.3f} | {ratios} | {share} |")
                print(lines[-1], flush=True)
            del contenders
            gc.collect()
    lines += ["", "| in x out | memory of quantizing one fp32 matrix | beside the matrix, result included, MiB |", "|" + "---|" * 3]
    print("\n".join(lines[-3:]))
    for shape in args.shapes:
        n, m = map(int, shape.split("x"))
        W = (torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * 0.02).to(args.device)
        for c in conversions(W, "quantize fp32", 1):
            used = peak(c.calls[0], args.device)
            lines.append(f"| {shape} | {c.name} | {'not known here' if used is None else f'{used / 2**20:.1f}'} |")
            print(lines[-1], flush=True)
    if args.out:
        command = " ".join(["python", *sys.argv])
        args.out.write_text("\n".join([f"# Linear kernels on {args.device}", "", f"`{command}`", "", *head, "", *lines, ""]))


if __name__ == "__main__":
    main()
