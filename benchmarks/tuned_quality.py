"""After equal steps of fine-tuning: does the better start end lower?

    python examples/stdlib_docstrings.py runs/quickstart/data     writes the data
    python benchmarks/tuned_quality.py                            every piece that is not there yet, then the table
    python benchmarks/tuned_quality.py --only 2 gptq 1e-3           one piece: bits, a method, a learning rate; any of them may be left out
    python benchmarks/tuned_quality.py --table                    the table of the pieces that are there

SmolLM2-135M-Instruct on the quickstart's rows, the starts of start_quality.py, three learning rates each: AdamW, cosine after three steps of
warm-up. A piece is kept as JSON in runs/tuned_quality, the table as table.md. The rate with the lowest held-out loss is the one compared: what
that choice gains, it gains for every start.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from start_quality import METHODS, RANK, Bench
from torch import nn

import finebits as fb
from finebits.build import hosts, needs
from finebits.data.rows import read
from finebits.data.tokens import to_batch, tokenize
from finebits.evaluate.heldout import Scores, backbone, score, table
from finebits.files import write_text
from finebits.interop.hf import fingerprint
from finebits.qtensor import QTensor
from finebits.train import epochs

OUT, DATA = Path("runs/tuned_quality"), Path("runs/quickstart/data")
MODEL = "smollm2"
STARTS = ("zeros", "loftq5", "qera", "gptq", "apiq")
RATES = ("3e-4", "1e-3", "3e-3")
STEPS, WARMUP, PER_BATCH, LENGTH, HELD = 30, 3, 4, 192, 64


class Tuned:
    """The model, its rows, and starts that are made once and kept."""

    def __init__(self) -> None:
        self.bench = Bench(MODEL)
        tokenizer = self.bench.tokenizer
        train = tokenize(read(DATA / "train.jsonl")[: 4 * STEPS * PER_BATCH], tokenizer, LENGTH)
        held = tokenize(read(DATA / "held_out.jsonl")[:HELD], tokenizer, LENGTH)
        self.train = [e for e in train if any(label >= 0 for label in e.labels)]  # a row whose answer was cut off teaches nothing
        held = sorted((e for e in held if any(label >= 0 for label in e.labels)), key=lambda e: -len(e.input_ids))
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.held = [to_batch(held[i : i + 8], self.pad) for i in range(0, len(held), 8)]

    def start(self, bits: int, key: str) -> Any:
        """The built model, its weights dense: the same numbers, and faster products."""
        folder, method, bench = OUT / f"start-{bits}-{key}", METHODS[key], self.bench
        if not folder.exists():
            spec = fb.Spec(method.format(bits), method.quantizer, fb.LoRA(RANK, RANK), method.init)
            levers = fb.Levers(dtype=str(bench.dtype).removeprefix("torch."))
            plan = fb.Plan(dict.fromkeys(bench.shapes, spec), str(bench.folder), fingerprint(bench.folder), levers=levers)
            model = bench.model()
            if method.swept:
                run = lambda model, batch: backbone(model)(batch)  # noqa: E731
                fb.sweep(model, plan, bench.calibration, run, refine=method.refine, head=model.get_output_embeddings(), dense=True)
            else:
                fb.build(model, plan, bench.stats() if needs(plan) else None)
            fb.save(model, folder)
        model, _ = fb.load(folder)
        for _, host in hosts(model):
            if isinstance(host.weight, QTensor):
                host.weight = nn.Parameter(host.weight.detach().dequantize(), requires_grad=False)
        return model

    def piece(self, bits: int, key: str, rate: str) -> dict[str, Any]:
        """One run: its losses, and the held-out scores at its start and its end."""
        began, model = time.time(), self.start(bits, key)
        before = score(model, self.held)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=float(rate), weight_decay=0.0)
        ramp = lambda i: min((i + 1) / WARMUP, (1 + math.cos(math.pi * max(0, i - WARMUP) / (STEPS - WARMUP))) / 2)  # noqa: E731
        rows = epochs([len(e.input_ids) for e in self.train], PER_BATCH, 42)
        steps = ([to_batch([self.train[i] for i in next(rows)], self.pad)] for _ in range(STEPS))
        losses = fb.train(model, steps, optimizer, total=STEPS, scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, ramp), clip=1.0)
        after = score(model, self.held)
        print(f"{bits} {key} {rate}: {before.loss:.3f} -> {after.loss:.3f}, {time.time() - began:.0f} s", flush=True)
        kept = lambda s: {"nll": s.nll.tolist(), "tokens": s.tokens.tolist()}  # noqa: E731
        return {"before": kept(before), "after": kept(after), "losses": losses, "seconds": time.time() - began}


def file_of(bits: int, key: str, rate: str) -> Path:
    return OUT / f"{bits}-{key}-{rate}.json"


def markdown() -> str:
    """The table of all pieces that are there."""
    lines = [
        f"| bits | start | untuned | {' | '.join(f'lr {r}' for r in RATES)} | best [95 %] | best − LoftQ's best, paired [95 %] |",
        "|" + "---|" * (5 + len(RATES)),
    ]
    scores_of = lambda d: Scores(np.array(d["nll"]), np.array(d["tokens"]))  # noqa: E731
    for bits in (4, 3, 2):
        best, before, rates = {}, {}, {}
        for key in STARTS:
            found = {r: json.loads(file_of(bits, key, r).read_text()) for r in RATES if file_of(bits, key, r).exists()}
            if found:
                rates[key] = {r: scores_of(p["after"]) for r, p in found.items()}
                before[key] = scores_of(next(iter(found.values()))["before"]).loss
                best[key] = min(rates[key].values(), key=lambda s: s.loss)
        if not best:
            continue
        names, against = {k: METHODS[k].name for k in best}, {k: "loftq5" for k in best if k != "loftq5" and "loftq5" in best}
        for e in table(best, names, dict.fromkeys(best, "start"), against)["entries"]:
            key, (low, high), pair = e["key"], e["intervals"]["loss"], e["paired"]["loss"] if e["paired"] else None
            each = " | ".join(f"{rates[key][r].loss:.3f}" if r in rates[key] else "–" for r in RATES)
            lines.append(
                f"| {bits} | {e['name']} | {before[key]:.3f} | {each} | {e['loss']:.3f} [{low:.3f}, {high:.3f}] | "
                + (f"{pair[0]:+.3f} [{pair[1]:+.3f}, {pair[2]:+.3f}] |" if pair else "– |")
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=[], help="bits, methods and learning rates to do")
    parser.add_argument("--table", action="store_true", help="do nothing, show the table")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    wanted = set(given.only)
    if unknown := wanted - {"4", "3", "2", *STARTS, *RATES}:
        parser.error(f"{', '.join(sorted(unknown))}: bits are 2, 3, 4, methods {', '.join(STARTS)}, rates {', '.join(RATES)}")
    pick = lambda known: [k for k in known if str(k) in wanted] or list(known)  # noqa: E731
    tuned = None
    for bits in pick((4, 3, 2)) if not given.table else ():
        for key in pick(STARTS):
            for rate in pick(RATES):
                if not file_of(bits, key, rate).exists():
                    tuned = tuned or Tuned()
                    write_text(file_of(bits, key, rate), json.dumps(tuned.piece(bits, key, rate)))
    write_text(OUT / "table.md", markdown())
    print(markdown())


if __name__ == "__main__":
    main()
