"""All that only a GPU can show, in one command: the kernels' tests, their speed, training at the size of an 8B model, and the whole job.

    python benchmarks/gpu.py --out gpu.json [--parts tests,command,train,linear,adapters,more,tune] [--minutes 7]
    python benchmarks/gpu.py --render gpu.json          the same results as a section of RESULTS.md
    python benchmarks/gpu.py --device cpu --out x.json  the same code on tiny sizes, for trying the script itself

Every part is a process of its own with a time limit. What it finds is written as it comes, so that a part that fails or runs out of time
loses nothing but itself. Needs torch, triton, transformers, accelerate and peft; bitsandbytes and torchao where installed, and what
`finebits train` needs (pydantic, trl, datasets) for the part `command`. Nothing is downloaded; all weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "src", ROOT / "benchmarks"):
    sys.path.insert(0, str(folder))

from gpu_found import Out, caught, installed  # noqa: E402
from gpu_train import CONTENDERS, MORE, train  # noqa: E402

GROUPS = {"train": [f"train: {name}" for name in CONTENDERS], "more": [f"train: {name}" for name in MORE]}
# Seconds a part may take.
LIMITS = {
    "tests": 100,
    "command": 100,
    "linear": 90,
    "adapters": 60,
    "tune": 60,
    **{name: 65 for group in GROUPS.values() for name in group},
}


def streamed(command: list[str], folder: Path, env: dict[str, str]) -> tuple[int, str]:
    """Exit code and output of a command, each line after the seconds it came at, printed as it comes: it is there even if it is ended."""
    running = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert running.stdout is not None
    lines, start = [], time.perf_counter()
    for line in running.stdout:
        line = f"{time.perf_counter() - start:6.1f} {line}"
        print(line, end="", flush=True)
        lines.append(line)
    return running.wait(), "".join(lines)


# The parts ----------------------------------------------------------------------------------------------------------------------------


def tests(out: Out, device: str) -> None:
    """The kernels' and the quantized tensor's tests, on the device."""
    files = ["tests/kernels/test_cuda.py", "tests/kernels/test_on_device.py"]
    files = files if device == "cuda" else files[1:]
    several = ["-n", "12"] if installed("xdist") and device == "cuda" else []
    report = out.path.with_suffix(".xml")
    # cuBLAS asks for a workspace of fixed size where algorithms must be deterministic, as the tests want them.
    env = {
        **os.environ,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONPATH": os.pathsep.join(sys.path[:2] + [os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", f"--junitxml={report}", *several, *files]
    code, printed = streamed(command, ROOT, env)
    out.set(exit=code, summary=(printed.strip().splitlines() or [""])[-1])
    if report.exists():
        from xml.etree import ElementTree

        for case in ElementTree.parse(report).iter("testcase"):
            for failed in [*case.findall("failure"), *case.findall("error")]:
                out.add(
                    "failed", {"test": case.get("name"), "why": (failed.get("message") or "")[:400], "trace": (failed.text or "")[-1500:]}
                )


def command(out: Out, device: str) -> None:
    """`finebits doctor` and `finebits train` on a tiny model with its rows, on the device."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]), "HF_HUB_OFFLINE": "1"}
    from finebits.runfolder import EXPORTED, MEMORY

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        env["FINEBITS_HOME"] = str(folder / "home")
        recipe = _tiny_job(folder, device)
        for verb in (["doctor"], ["train", str(recipe)]):
            start = time.perf_counter()
            code, printed = streamed([sys.executable, "-m", "finebits", "--traceback", *verb], folder, env)
            out.add("verbs", {"verb": verb[0], "exit": code, "seconds": round(time.perf_counter() - start, 1), "tail": printed[-5000:]})
        for file in sorted((folder / "run").rglob("*.json")):
            if file.name in (MEMORY, EXPORTED):
                out.add("files", {"file": str(file.relative_to(folder)), "holds": json.loads(file.read_text())})


def _tiny_job(folder: Path, device: str) -> Path:
    """A model of a few megabytes with a byte tokenizer, rows about sums, and the recipe that tunes it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    marks = ["<pad>", "<s>", "<end>"]
    words = {w: i for i, w in enumerate([*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    inner = Tokenizer(models.BPE(words, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(words), **sizes, initializer_range=0.08, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, rows in (("train", range(0, 96)), ("held", range(96, 128))):
        lines = [[{"role": "user", "content": f"{i} and {i}"}, {"role": "assistant", "content": f"make {2 * i}"}] for i in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in lines))
    recipe = {
        "model": {"model_name_or_path": str(folder / "model"), "dtype": "bfloat16"},
        "budget": {"memory": "1000MiB" if device == "cuda" else "200MiB", "device": device},
        "data": {
            "datasets": [{"path": str(folder / "train.jsonl")}],
            "held_out": {"path": str(folder / "held.jsonl")},
            "max_length": 64,
        },
        "quantization": {"candidates": ["nf3-b64-bf16", "nf4-b64-bf16"], "objective": "output", "calibration_rows": 16},
        "adapter": {"rank": 8, "init": "loftq"},
        "training": {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1.0e-3},
        "evaluation": {"samples": 1},
        "export": {"to": ["adapter", "merged"], "verify": True},
        "output_dir": str(folder / "run"),
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(recipe))  # YAML reads JSON
    return path


def linear(out: Out, device: str) -> None:
    """Products of packed weights, forward and with their backward, beside bf16 and other libraries; quantize and dequantize."""
    import linear as contenders
    import torch

    real = device == "cuda"
    cache, speed = contenders.last_cache(device) if real else 1, contenders.bandwidth(device)
    out.set(bandwidth=speed)
    shapes = ["4096x4096", "4096x11008", "4096x14336"] if real else ["128x192"]

    def turns(found: list[Any], **told: Any) -> None:
        if real:
            times = {k: v._asdict() for k, v in contenders.cuda_timing.turns(found, 7).items()}
        else:
            times = {k: {"hot": h, "cold": c, "call": c} for k, ([h], [c]) in contenders.paired.turns(found, 1, 1e-4).items()}
        for c in found:
            out.add("rows", {**told, "contender": c.name, "bytes": c.nbytes, **times[c.name]})

    def products(W: Any, tokens: int, backward: bool) -> list[Any]:
        found = contenders.products(W, tokens, backward, cache)
        have = {c.name for c in found}
        x = torch.randn(tokens, W.shape[1], dtype=torch.bfloat16, device=device, requires_grad=backward)
        return found + [contenders.ours(W, x, cache, b, f"ours, {b} bits") for b in (3, 2) if f"ours, {b} bits" not in have]

    for tokens, backward in ((1, False), (16, False), (512, True), (512, False), (2048, True), (2048, False), (1, True), (16, True)):
        for shape in shapes:
            n, m = map(int, shape.split("x"))
            W = (torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * 0.02).to(device)
            with caught(out, f"{shape}, {tokens} tokens{', backward' if backward else ''}"):
                turns(products(W, tokens, backward), shape=shape, tokens=tokens, backward=backward)
    for job in ("quantize fp32", "quantize bf16", "dequantize to bf16, new output"):
        with caught(out, job):
            turns(contenders.conversions(W, job, cache), shape=shapes[-1], job=job)


def adapters(out: Out, device: str) -> None:
    """Rows of different adapters through one layer, as a server has them: ours beside torch's products, an adapter at a time."""
    import grouped as contenders
    import linear
    import torch

    real = device == "cuda"
    side, dtype = (4096, torch.bfloat16) if real else (64, torch.float32)
    counts = contenders.COUNTS if real else (1, 4)
    own, laid = contenders.laid_out(side, max(counts), device, dtype)
    for batch, count in ((b, a) for b in counts for a in counts if a <= b):
        with caught(out, f"{batch} rows of {count} adapters"):
            found = contenders.case(batch, side, own[:count], laid[:count])
            some = [c for c in found.contenders if c.name != "by row"]
            if real:
                times = {k: v._asdict() for k, v in linear.cuda_timing.turns(some, 7).items()}
            else:
                times = {k: {"hot": h, "cold": c, "call": c} for k, ([h], [c]) in linear.paired.turns(some, 1, 1e-4).items()}
            nbytes = sum(f.A.nbytes + f.B.nbytes for f in own[:count])
            out.add("rows", {"side": side, "batch": batch, "adapters": count, "far": found.far, "bytes": nbytes, "times": times})


def tune(out: Out, device: str) -> None:
    """One-token products under other launches than the library's: what to choose on this device."""
    import linear as contenders
    import torch

    if device != "cuda":
        return out.set(note="launches are tried on a GPU only")
    from finebits.kernels.cuda.fragments import by_fragments, by_fragments_transposed

    cache, speed = contenders.last_cache(device), contenders.bandwidth(device)
    m, n = 14336, 4096
    W = (torch.randn(m, n, generator=torch.Generator().manual_seed(0)) * 0.02).to(device)
    forward = [{"rows": r, "slices": s} for s in (8, 4) for r in (16, 32)]
    backward = [{"slices": s, "split": p} for s in (4, 2) for p in (None, 8)]
    for bits in (4, 3, 2):
        t = contenders.table(W, bits)
        nbytes = t.codes.nbytes + t.scale.nbytes
        copies = [contenders.table(W, bits) for _ in range(contenders.copies(nbytes, cache))]
        short, long = (torch.randn(1, size, dtype=torch.bfloat16, device=device) for size in (n, m))
        for body, launches, x, y in (
            (by_fragments, forward, short, long),
            (by_fragments_transposed, backward, long.clone(), short.clone()),
        ):
            for launch in launches:
                with caught(out, f"{body.__name__} {launch}"):
                    calls = [lambda t=t: body(y, x, t.codes, t.scale, None, t.levels, t, 1, m, 1, **launch) for t in copies]
                    times = contenders.cuda_timing.turns([contenders.Contender("it", calls, nbytes)], 5)["it"]
                    share = nbytes / times.cold / speed
                    out.add("rows", {"bits": bits, "body": body.__name__, **launch, "cold": times.cold, "share": round(share, 3)})


# Running, printing --------------------------------------------------------------------------------------------------------------------


PARTS: dict[str, Callable[[Out, str], None]] = {"tests": tests, "command": command, "linear": linear, "adapters": adapters, "tune": tune}


def one(name: str, out: Path, device: str) -> int:
    """A part, in this process."""
    found = Out(out)
    try:
        if name.startswith("train: "):
            train(found, device, name.removeprefix("train: "))
        else:
            PARTS[name](found, device)
        return 0
    except BaseException as error:
        traceback.print_exc()
        found.set(crashed=f"{type(error).__name__}: {error}"[:1000], trace=traceback.format_exc()[-4000:])
        return 1


def started(name: str, place: Path, device: str, seconds: float) -> Callable[[], dict[str, Any]]:
    """Begins a part in a process group of its own; the answer waits for it, and ends it where it takes too long."""
    file, begun = place / f"{''.join(c if c.isalnum() else '_' for c in name)}.json", time.perf_counter()
    line = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--out", str(file), "--device", device]
    log = file.with_suffix(".log").open("wb")
    env = {"TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONUNBUFFERED": "1"}
    running = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=env, cwd=ROOT)

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)

    def wait() -> dict[str, Any]:
        try:
            running.wait(max(5.0, seconds - (time.perf_counter() - begun)))
            over = False
        except subprocess.TimeoutExpired:
            over = True
        end()  # children that outlive their part, too
        running.wait()
        log.close()
        printed = file.with_suffix(".log").read_text(errors="replace")
        print(f"== {name}: exit {running.returncode}{', out of time' if over else ''}\n{printed[-2500:]}", flush=True)
        took = {"seconds": round(time.perf_counter() - begun, 1), "exit": running.returncode, "out of time": over}
        found = json.loads(file.read_text()) if file.exists() else {}
        return {"run": took, **found, "log": printed[-20000:]}

    timer = threading.Timer(seconds, end)  # also while another part is waited for
    timer.daemon = True
    timer.start()
    return wait


def machine(device: str) -> dict[str, Any]:
    import importlib.metadata

    import torch

    names = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao", "trl", "datasets")
    versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in names}
    told: dict[str, Any] = {"python": platform.python_version(), "versions": versions, "device": device}
    if device == "cuda":
        p = torch.cuda.get_device_properties(0)
        told |= {"gpu": p.name, "memory": p.total_memory, "capability": f"{p.major}.{p.minor}", "last cache": p.L2_cache_size}
    return told


def everything(out: Path, device: str, parts: list[str], minutes: float) -> dict[str, Any]:
    begun = time.perf_counter()
    left = lambda: minutes * 60 - (time.perf_counter() - begun)  # noqa: E731
    # In a process of its own too: this one must not hold the device while others are measured.
    asked = subprocess.run([sys.executable, __file__, "--part", "machine", "--device", device], capture_output=True, text=True, timeout=120)
    found: dict[str, Any] = {"machine": json.loads(asked.stdout) if asked.returncode == 0 else asked.stderr[-2000:], "parts": {}}
    names = [n for p in parts for n in GROUPS.get(p, [p])]

    def limit(name: str) -> float:
        return LIMITS[name] * (1 if device == "cuda" else 4)

    def keep(name: str, wait: Callable[[], dict[str, Any]]) -> None:
        try:
            found["parts"][name] = wait()
        except Exception:
            found["parts"][name] = {"crashed": traceback.format_exc()[-2000:]}
        found["seconds"] = round(time.perf_counter() - begun, 1)
        new = out.with_suffix(".new")
        new.write_text(json.dumps(found, indent=1))
        new.replace(out)

    with tempfile.TemporaryDirectory() as place:
        for name in names:
            if left() < 10:
                found["parts"][name] = {"note": "no time was left"}
            else:
                keep(name, started(name, Path(place), device, min(limit(name), left())))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--parts", default="tests,command,train,linear,adapters,more,tune", help="in the order in which they run")
    parser.add_argument("--minutes", type=float, default=7.0, help="for all of them together")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--render", type=Path, help="print this file as Markdown and do nothing else")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.render:
        from gpu_report import rendered

        print(rendered(json.loads(args.render.read_text())))
        return 0
    if args.part == "machine":
        print(json.dumps(machine(args.device)))
        return 0
    if args.part:
        return one(args.part, args.out, args.device)
    parts = args.parts.split(",")
    if unknown := sorted(set(parts) - {*PARTS, *GROUPS}):
        parser.error(f"--parts takes some of {', '.join([*PARTS, *GROUPS])}, and {', '.join(unknown)} came")
    found = everything(args.out, args.device, parts, args.minutes)
    from gpu_report import rendered

    print(rendered(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
