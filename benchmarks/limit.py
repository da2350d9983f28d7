"""Parts of the job on a random Llama whose 16-bit size is far above the memory they may take, which the system enforces.

    python benchmarks/limit.py /tmp/limit                      a model of 1B in shards, made in the folder once, and 1.25 GiB
    python benchmarks/limit.py /tmp/limit --sizes 512 1408 8 4096 --budget 64MiB --tokens 32
    python benchmarks/limit.py --job recipes/quickstart.yaml output_dir=/tmp/limited     every process of a job, under its plan's budget

Every part is a process of its own, forked when all is imported. RLIMIT_DATA is set to what it has by then and the budget: every private
page that it may write counts, touched or not, which is more than what is resident; files that are only read do not. A part that asks for more is
told that there is no memory. `whole`, which loads the model as transformers does, shows that the limit is one.

The processes of a job are each put into a memory cgroup of their own (v1 or v2, which takes root) when their baseline is taken: what they
take from then on is charged to it, file pages too, and the system kills what passes the limit. The peer's runs follow no plan and are free.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from killed import forked

from finebits.sizes import parse, show

PARTS = ("full", "gradients", "start", "whole")
SIZES = (2048, 8192, 16, 32000)  # hidden, intermediate, layers, vocabulary: 1.07B
ROWS, TOKENS = 4, 256


def make(folder: Path, hidden: int, wide: int, layers: int, words: int) -> None:
    """A checkpoint in shards of one block, with one block in memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from finebits.tensorfile import Entry, write

    heads = max(hidden // 64, 1)
    sizes = dict(hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers, vocab_size=words)
    config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1), tie_word_embeddings=True, **sizes)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    groups: dict[str, dict[str, Entry]] = {}
    gen = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        shard = name.split(".")[2] if ".layers." in name else "apart"
        shape = tuple(p.shape)
        made = lambda shape=shape: (  # noqa: E731
            torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=gen) / shape[-1] ** 0.5
        ).bfloat16()
        groups.setdefault(f"model-{shard}.safetensors", {})[name] = Entry(torch.bfloat16, shape, made)
    folder.mkdir(parents=True, exist_ok=True)
    for file, entries in groups.items():
        write(folder / file, entries, {"format": "pt"})
    where = {name: file for file, entries in groups.items() for name in entries}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(folder)


def run(part: str, folder: Path, budget: int, tokens: int) -> None:
    """One part under its limit, on rows of so many tokens; prints what it reached."""
    import finebits as fb
    from finebits.calibrate.blockwise import Shelf, gradients
    from finebits.evaluate.heldout import head_of, own, teacher
    from finebits.interop.hf import Tensors, fill, skeleton
    from finebits.interop.selecting import targets
    from finebits.interop.streaming import Streamed
    from finebits.meter import Meter
    from finebits.run.part import warm
    from finebits.stats.grad import Grad
    from finebits.sweep import sweep
    from finebits.tasks.causal_lm import CausalLM, head, states

    warm()
    dtype, vocabulary = torch.bfloat16, json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = torch.randint(3, vocabulary, (ROWS, 1, tokens), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i.clone()} for i in ids]
    keep: Any = lambda i: batches[i]["attention_mask"].bool()  # noqa: E731
    meter = Meter()
    data = next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (data * 1024 + budget, data * 1024 + budget))
    with meter.phase(part):
        if part == "full":
            streamed = Streamed(folder, dtype)
            made = teacher(streamed.model, batches, streamed.hidden(batches), head_of(head(streamed.model)))
            print(f"loss {own(made, batches, chunk=64).loss:.4f}")
        elif part == "gradients":
            streamed, shelf = Streamed(folder, dtype), Shelf()
            wanted = dict.fromkeys(targets(streamed.model, "all-linear"), frozenset({Grad}))
            loss = lambda model, batch: CausalLM().loss(model, batch, 64)  # noqa: E731
            for found in gradients(streamed.flow(batches, loss), wanted, keep, streamed.read):
                shelf.add(found)
            print(f"{len(shelf)} matrices")
        elif part == "start":
            model, tensors = skeleton(folder, dtype), Tensors(folder)
            spec = fb.Spec(fb.NF(2, block=64, scale="bf16"), fb.RTN(), fb.LoRA(rank=8), fb.QERA())
            plan = fb.Plan(dict.fromkeys(targets(model, "all-linear"), spec), levers=fb.Levers(dtype="bfloat16"))
            fill(model, tensors, dtype, leave=frozenset(f"{name}.weight" for name in plan.modules))
            sweep(model, plan, batches, states, read=lambda name: tensors[f"{name}.weight"], refine=(fb.ApiQ(epochs=1),))
            print(f"{len(plan.modules)} matrices")
        else:
            fill(skeleton(folder, dtype), Tensors(folder), dtype)
    print(f"resident {show(meter.peaks[part] or 0)} above the process")


def fenced(budget: int) -> Path:
    """Put this process into a memory cgroup whose limit is the budget; the group's folder. Raises OSError where the system has none to give."""
    two = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    group = Path("/sys/fs/cgroup" if two else "/sys/fs/cgroup/memory") / f"finebits-{os.getpid()}"
    group.mkdir()
    (group / ("memory.max" if two else "memory.limit_in_bytes")).write_text(str(budget))
    (group / "cgroup.procs").write_text(str(os.getpid()))
    return group


def worker(folder: str, text: str) -> int:
    """One process of a job, fenced when its meter stands; prints the most that was charged to it."""
    from finebits.process import interrupt, stoppable, tied
    from finebits.run.__main__ import main as make
    from finebits.run.part import Part
    from finebits.run.stage import QLORA, Stage

    made, groups, name = Part.__init__, list[Path](), Stage.read(text).run

    def init(self: Any, *given: Any, **named: Any) -> None:
        made(self, *given, **named)
        if name != QLORA:
            groups.append(fenced(self.plan.budget))

    Part.__init__ = init  # type: ignore[method-assign]
    with stoppable(interrupt):
        tied()
        code = make(folder, text)
    for group in groups:
        most = next(f for f in (group / "memory.peak", group / "memory.max_usage_in_bytes") if f.exists())
        limit = next(f for f in (group / "memory.max", group / "memory.limit_in_bytes") if f.exists())
        print(f"{name}: charged {show(int(most.read_text()))} at most, of {show(int(limit.read_text()))}", file=sys.stderr, flush=True)
    return code


def job(recipe: str, changes: list[str]) -> int:
    """`finebits train` with fenced processes; its exit code."""
    from finebits import cli, process

    def run(module: str, arguments: Any, environment: Any, keep: Any = ()) -> int:
        path = f"{Path(__file__).parent}{os.pathsep}{environment.get('PYTHONPATH', '')}"
        return free("limit" if module == "finebits.run" else module, ["--worker", *arguments], environment | {"PYTHONPATH": path}, keep)

    free, process.run = process.run, run
    return cli.main(["train", recipe, *changes])


def main() -> int:
    """Exit code: 0 where every part kept within the budget, and the whole model did not; of a job, its own."""
    if sys.argv[1:2] == ["--worker"]:
        return worker(*sys.argv[2:])
    if sys.argv[1:2] == ["--job"]:
        return job(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", type=int, nargs=4, default=SIZES)
    parser.add_argument("--budget", default="1.25GiB")
    parser.add_argument("--parts", nargs="*", default=PARTS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each row")
    given = parser.parse_args()
    from finebits.interop import trainer  # noqa: F401  # all that a job imports is there before the limit

    if not (given.folder / "config.json").exists() and forked(lambda: make(given.folder, *given.sizes), Path(os.devnull)):
        return 1
    size = sum(f.stat().st_size for f in given.folder.glob("*.safetensors"))
    print(f"{show(size)} of weights, {given.budget} above the process")
    kept = True
    for part in given.parts:
        begun = time.monotonic()
        with tempfile.TemporaryDirectory() as place:
            log = Path(place, "log")
            code = forked(lambda part=part: run(part, given.folder, parse(given.budget), given.tokens), log)
            lines = log.read_text().strip().splitlines()
        said = ", ".join(lines if not code else [line[:120] for line in lines[-1:]])
        print(f"{part}: {'kept' if not code else 'refused'} in {time.monotonic() - begun:.0f} s: {said}", flush=True)
        kept &= (code == 0) == (part != "whole")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
