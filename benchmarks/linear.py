"""Quantize, dequantize and the products of packed weights: ours against dense layers and, where installed, bitsandbytes, torchao and ggml.

    python benchmarks/linear.py [--device cuda] [--isa avx2] [--shapes 576x192 4096x4096] [--quick] [--out RESULTS.md]

Contenders are layers that are called from Python, as in a model, and take turns inside one process. A ratio is the median over the turns
of the ratios within each, so that it holds on a noisy machine where the milliseconds, the least of all turns, do not. `cold` rotates among
as many copies of the weight as it takes to push each out of the last cache, as a model with many layers does; `hot` reuses one. Weights
are NF4, block 64, unless the row says otherwise; x is bfloat16, or float32 for the rows that name fp32. The second table holds what is
wanted of this package beside what was found. `--isa` holds this package, torch and oneDNN to an instruction set that the machine has beside
better ones; bitsandbytes and ggml cannot be held: how the latter was built, its package decided.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cuda_timing
import ggml
import paired
import torch
from torch import Tensor, nn

import finebits as fb
from finebits import kernels
from finebits.kernels import Table

BLOCK = 64
PACKAGES = ("torch", "bitsandbytes", "torchao", "triton", *ggml.PACKAGES)
PEERS = ("bf16", "fp32", "bitsandbytes", "torchao", "ggml")
ISA = {
    "avx2": {"FINEBITS_CPU": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"FINEBITS_CPU": "avx512", "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "DEFAULT"},
}


def layer(W: Tensor, bits: int = 4, whole: bool = False) -> nn.Linear:
    """A linear layer that holds W as NF, or as whole numbers, with float32 scales, as the other contenders do."""
    made = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
    packed = fb.quantize(W, (fb.Int if whole else fb.NF)(bits, block=BLOCK, scale="fp32")).apply_parts(kernels.placed, torch.bfloat16)
    made.weight = nn.Parameter(packed, requires_grad=False)
    return made


def table(W: Tensor, bits: int) -> Table:
    return layer(W, bits).weight.table()


class Contender(NamedTuple):
    name: str
    calls: list[Callable[[], object]]  # one a copy of the weight
    nbytes: int  # of one weight, scales included


def copies(nbytes: int, cache: int) -> int:
    return max(2, -(-2 * cache // nbytes))


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


def table_bytes(W: Tensor, bits: int) -> int:
    return W.numel() * bits // 8 + 4 * W.numel() // BLOCK


def ours(W: Tensor, x: Tensor, cache: int, bits: int = 4, name: str = "ours", whole: bool = False) -> Contender:
    return module(name, lambda: layer(W, bits, whole), x, table_bytes(W, bits), cache)


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


def products(W: Tensor, tokens: int, backward: bool, cache: int, peers: tuple[str, ...] = PEERS) -> list[Contender]:
    x = torch.randn(tokens, W.shape[1], dtype=torch.bfloat16, device=W.device, requires_grad=backward)
    wide = x.detach().float().requires_grad_(backward)
    found = [ours(W, x, cache), ours(W, wide, cache, name="ours, fp32")]
    if tokens == 1 and not backward:
        found += [ours(W, x, cache, bits, f"ours, {bits} bits") for bits in (2, 3, 8)]
        found.append(ours(W, x, cache, 8, "ours, whole 8 bits", True))
    packed = table_bytes(W, 4)
    others = {
        "bf16": (lambda: dense(W), x, 2 * W.numel()),
        "fp32": (lambda: dense(W, torch.float32), wide, 4 * W.numel()),
        "bitsandbytes, train": (lambda: bitsandbytes(W, True), x, packed),
    }
    if not backward:
        others["bitsandbytes, eval"] = lambda: bitsandbytes(W, False), x, packed
    if "torchao" in installed():
        others["torchao int4"] = lambda: torchao(W), x, packed
    if not backward and W.device.type == "cpu" and set(ggml.PACKAGES) & set(installed()):
        others["ggml Q4_0"] = lambda: ggml.Q4(W, tokens), wide, W.numel() * 18 // 32
    for name, (make, input, nbytes) in others.items():
        if not name.startswith(peers):
            continue
        try:
            contender = module(name, make, input, nbytes, cache)
            contender.calls[0]()
            found.append(contender)
        except Exception as error:  # a peer that cannot run here is a line of the output, not the end of it
            print(f"{name} not measured: {type(error).__name__}: {error}")
    return found


def conversions(W: Tensor, job: str, cache: int, peers: tuple[str, ...] = PEERS) -> list[Contender]:
    theirs = None
    if "bitsandbytes" in installed() and "bitsandbytes" in peers:
        import bitsandbytes.functional as theirs
    if job.startswith("quantize"):
        dtype = torch.bfloat16 if "bf16" in job else torch.float32
        Ws = [W.to(dtype, copy=True) for _ in range(copies(W.numel() * dtype.itemsize, cache))]
        r, size = fb.NF(4, block=BLOCK, scale="fp32").rounding(W.device), Ws[0].nbytes
        found = [Contender("ours", [lambda W=W: kernels.quantize(W, r) for W in Ws], size)]
        if theirs:
            calls = [lambda W=W: theirs.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4") for W in Ws]
            found.append(Contender("bitsandbytes", calls, size))
        return found
    t = table(W, 4)
    out = torch.empty(W.shape, dtype=torch.bfloat16, device=W.device)
    ts = [t._replace(codes=t.codes.clone(), scale=t.scale.clone()) for _ in range(copies(t.codes.nbytes, cache))]
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


class Want(NamedTuple):
    """A ratio of times that should be at most `limit`."""

    what: str
    over: str
    peers: tuple[str, ...]
    limit: float


def wanted(W: Tensor, job: str) -> Iterator[Want]:
    dense = ("bf16", "fp32")
    if job in ("1 tokens", "4 tokens", "16 tokens"):
        yield from (Want(job, name, dense, 1.0) for name in ("ours", "ours, fp32"))
    if job.startswith("512"):
        yield from (Want(job, name, dense, 1.15 if "backward" in job else 1.1) for name in ("ours", "ours, fp32"))
    if "reused" in job:
        yield Want(job, "ours", ("bitsandbytes",), 1.0)
    if job == "1 tokens" and W.numel() >= 1 << 24:
        yield Want(job, "ours", ("ggml Q4_0",), 1.0)
        yield Want(job, "ours", ("bf16",), 0.4)
        yield from (Want(job, f"ours, {bits} bits", ("ours",), 1.0) for bits in (2, 3))
    if job == "1 tokens":
        yield Want(job, "ours, whole 8 bits", dense, 1.0)


def installed() -> dict[str, str]:
    return {d.name: d.version for d in importlib.metadata.distributions() if d.name in PACKAGES}


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
    parser.add_argument("--isa", choices=ISA, help="hold this package, torch and oneDNN to this instruction set")
    parser.add_argument("--shapes", nargs="*", default=["4096x4096", "4096x11008"], help="in x out features")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, first shape only")
    parser.add_argument("--only", nargs="*", default=[""], help="run the jobs whose name begins with one of these")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS)
    parser.add_argument("--out", type=Path, help="write the tables as markdown")
    args = parser.parse_args()
    if args.isa and any(os.environ.get(name) != value for name, value in ISA[args.isa].items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ISA[args.isa]})  # torch reads them when it is loaded
    if args.quick:
        args.repeats, args.shapes = 5, args.shapes[:1]
    only, peers = tuple(args.only), tuple(args.peers)

    cache, speed = last_cache(args.device), bandwidth(args.device)
    head = machine(args.device, speed)
    lines = ["| in x out | job | contender | hot ms | cold ms | time / ours, hot | cold | of the bandwidth, cold |", "|" + "---|" * 8]
    verdicts = ["| in x out | job | time of | over | hot | cold | wanted |", "|" + "---|" * 7]
    memory = ["| in x out | memory of quantizing one fp32 matrix | beside the matrix, result included, MiB |", "|" + "---|" * 3]
    print("\n".join([*head, *lines]), flush=True)
    for shape in args.shapes:
        n, m = map(int, shape.split("x"))
        W = (torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * 0.02).to(args.device)
        jobs: dict[str, Callable[[], list[Contender]]] = {
            job: lambda job=job: conversions(W, job, cache, peers)
            for job in ("quantize fp32", "quantize bf16", "dequantize to bf16, reused output", "dequantize to bf16, new output")
        }
        for tokens in (1, 4, 16, 64, 512):
            jobs[f"{tokens} tokens"] = lambda tokens=tokens: products(W, tokens, False, cache, peers)
        jobs["512 tokens, forward + backward"] = lambda: products(W, 512, True, cache, peers)
        for job, make in jobs.items():
            if not job.startswith(only):
                continue
            contenders = make()
            repeats = max(5, args.repeats // 3) if "512" in job or job[0] == "q" else args.repeats
            times = (cuda_timing if args.device == "cuda" else paired).turns(contenders, repeats)
            found = {c.name: [t if isinstance(t, list) else [t] for t in times[c.name][:2]] for c in contenders}
            for c in contenders:
                hot, cold = found[c.name]
                ratios = (
                    " | ".join(f"{paired.ratio(t, base):.2f}" for t, base in zip((hot, cold), found["ours"])) if c.name != "ours" else "|"
                )
                share = f"{c.nbytes / min(cold) / speed:.0%}" if job == "1 tokens" else ""
                lines.append(f"| {shape} | {job} | {c.name} | {min(hot) * 1e3:.3f} | {min(cold) * 1e3:.3f} | {ratios} | {share} |")
                print(lines[-1], flush=True)
            for want in wanted(W, job):
                over = [name for name in want.peers if name in found]
                if over and want.over in found:
                    hot, cold = (paired.ratio(found[want.over][i], *(found[name][i] for name in over)) for i in (0, 1))
                    peer = f"the faster of {' and '.join(over)}" if len(over) > 1 else over[0]
                    verdicts.append(f"| {shape} | {job} | {want.over} | {peer} | {hot:.2f} | {cold:.2f} | {want.limit} |")
            del contenders
            gc.collect()
        if "quantize fp32".startswith(only):
            for c in conversions(W, "quantize fp32", 1, peers):
                used = peak(c.calls[0], args.device)
                memory.append(f"| {shape} | {c.name} | {'not known here' if used is None else f'{used / 2**20:.1f}'} |")
        if args.out:  # after every shape: what is cut off is not lost
            command = " ".join(["python", *sys.argv])
            tables = [line for table in (lines, verdicts, memory) if len(table) > 2 for line in (*table, "")]
            args.out.write_text("\n".join([f"# Linear kernels on {args.device}", "", f"`{command}`", "", *head, "", *tables]))
    for table in (verdicts, memory):
        if len(table) > 2:
            print("\n".join(["", *table]))


if __name__ == "__main__":
    main()
