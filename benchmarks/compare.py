"""Fine-tuned in about three bits against QLoRA in four: equal rows, steps and batches, each run at the better of two learning rates.

    python examples/stdlib_docstrings.py runs/quickstart/data     writes the data
    python benchmarks/compare.py                                  every run that is not there yet, then the table and its picture
    python benchmarks/compare.py --table                          the table of the runs that are there

The runs are those of recipes/quickstart.yaml: our start, LoftQ and zeros at the same bits, ours at 2.75 bits, 16-bit LoRA, and QLoRA of PEFT and
bitsandbytes (NF4 in blocks of 64, double quantization) in a stock SFTTrainer. Folders are kept in runs/compare; a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from finebits.evaluate.heldout import Scores, table
from finebits.files import write_json, write_text
from finebits.run.scores import read
from finebits.runfolder import CHECKPOINTS, EVALUATION, FULL, MODEL, PLANS, RECORD, RUNS, SCORES, RunFolder

OUT, RECIPE = Path("runs/compare"), Path("recipes/quickstart.yaml")
RATES = ("2e-3", "3e-3")
OWN = "qera"  # the recipe's own run, by its start
FEWER = "2.75 bits"
STEPS, ROWS, HELD = 20, 64, 64  # of training, of calibration, held out: more than the quickstart has time for
REFINE = "[{paper: apiq, epochs: 1, scales: 2.0e-3}, {paper: lrec, epochs: 1}]"
# 8-bit scales of 32 weights cost what 16-bit scales of 64 do, and follow the weights closer; a start takes longer.
FINER, WIDER = (
    "[" + ", ".join(f"{{paper: nf, bits: {bits}, block: {block}, scale: {{paper: e4m3, over: block}}}}" for bits in (2, 3, 4)) + "]"
    for block in (32, 128)
)
# Below three bits, scales that are searched for lose little in wide blocks, and what these save buys more matrices their third bit.
MIXED = (
    f"budget.memory={FEWER}",
    f"quantization.candidates={WIDER}",
    "quantization.planner=lagrange",  # 2 to 4 bits a matrix, by what they do to its outputs
    "quantization.objective=output",
    "quantization.pricing=mse",
)
COMPARED = {"qlora": "QLoRA (PEFT, bitsandbytes)", "lora16": "16-bit LoRA", "loftq": "finebits, LoftQ", "zeros": "finebits, zeros"}
ORDER = ("lora16", "qlora", OWN, "loftq", "zeros", "fewer")


def jobs(rate: str) -> dict[Path, list[str]]:
    """Output folder -> what the recipe has otherwise there."""
    plain = [
        f"training.learning_rate={rate}",
        f"training.max_steps={STEPS}",
        "evaluation.samples=0",
        f"evaluation.limit={HELD}",
        "export.to=[]",
        f"quantization.candidates={FINER}",
        f"quantization.calibration_rows={ROWS}",
        f"adapter.refine={REFINE}",
    ]
    return {
        OUT / f"own-{rate}": [*plain, f"evaluation.compare=[{', '.join(COMPARED)}]"],
        OUT / f"fewer-{rate}": [*plain, "evaluation.compare=[]", *MIXED],
    }


def branch(begun: Path, folder: Path, rate: str) -> None:
    """The starts of one rate's job as the beginning of another's: how a run starts does not depend on its learning rate."""
    record = RunFolder(begun).record()
    if folder.exists() or not record:
        return
    shutil.copytree(begun, folder, ignore=shutil.ignore_patterns(CHECKPOINTS, MODEL, PLANS))
    for tuned in folder.glob(f"{RUNS}/*/{SCORES}"):
        if tuned.parent.name != FULL:
            tuned.unlink()
    record["settings"]["training"]["learning_rate"], record["finished"] = float(rate), False
    write_json(folder / RECORD, record)


def run(folder: Path, changes: list[str]) -> None:
    """One job, or the rest of it."""
    begun = RunFolder(folder).record()
    if begun and begun["finished"]:
        return
    words = ["train", str(RECIPE), f"output_dir={folder}", *changes, *(["--resume"] if begun else [])]
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", "finebits", *words], check=True)
    print(f"{folder}: {time.monotonic() - start:.0f} s", flush=True)


def bits(folder: Path, key: str) -> float | None:
    """Bits of a linear weight, as the job has said them."""
    file = folder / EVALUATION
    told = json.loads(file.read_text())["entries"] if file.exists() else []
    return next((e["bits"] for e in told if e["key"] == key), None)


def found() -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The table's entries of the better rate each, with bits and rate, and the losses of all rates."""
    best: dict[str, Scores] = {}
    told: dict[str, dict[str, Any]] = {}
    every: dict[str, dict[str, float]] = {}
    for rate in RATES:
        own, fewer = OUT / f"own-{rate}", OUT / f"fewer-{rate}"
        places = {k: (own, k) for k in (OWN, *COMPARED)} | {"fewer": (fewer, OWN), FULL: (own, FULL)}
        for key, (folder, name) in places.items():
            made = read(RunFolder(folder).run(name) / SCORES)
            if made is None:
                continue
            every.setdefault(key, {})[rate] = made.loss
            if key not in best or made.loss < best[key].loss:
                best[key], told[key] = made, {"rate": rate, "bits": told.get(key, {}).get("bits") or bits(folder, name)}
    if "qlora" not in best or "full" not in best:
        raise SystemExit("the runs of QLoRA and of the full-precision model are not there yet: run benchmarks/compare.py without --table")
    names = COMPARED | {OWN: "finebits", "fewer": f"finebits at {FEWER}", "full": "untuned"}
    stages = {k: "start" if k == "full" else "tuned" for k in best}
    made = table(best, names, stages, {k: "qlora" for k in best if k not in ("qlora", "full")})
    return {e["key"]: e | told[e["key"]] for e in made["entries"]}, every


def markdown(entries: dict[str, Any], every: dict[str, dict[str, float]]) -> str:
    """The table."""
    lines = [
        f"| | bits a linear weight | held-out loss [95 %] | minus QLoRA's, paired [95 %] | of the gap to 16-bit LoRA | lr {' / '.join(RATES)} |",
        "|---|---|---|---|---|---|",
    ]
    for key in ("full", *ORDER):
        if key not in entries:
            continue
        e = entries[key]
        low, high = e["intervals"]["loss"]
        pair = e["paired"]["loss"] if e["paired"] else None
        against = f"{pair[0]:+.3f} [{pair[1]:+.3f}, {pair[2]:+.3f}]" if pair else "–"
        share = "–" if e["gap_closed"] is None else f"{100 * e['gap_closed']:.0f} %"
        each = "–" if key == "full" else " / ".join(f"{every[key][r]:.3f}" if r in every[key] else "–" for r in RATES)
        lines.append(f"| {e['name']} | {e['bits']:.3f} | {e['loss']:.3f} [{low:.3f}, {high:.3f}] | {against} | {share} | {each} |")
    return "\n".join(lines) + "\n"


def picture(entries: dict[str, Any]) -> str:
    """Bits against held-out loss, as SVG: every run a dot with its name."""
    shown = [entries[k] for k in ORDER if k in entries]
    wide, high, left, top = 720, 300, 60, 20
    losses = [e["loss"] for e in shown]
    low, most = min(losses) - 0.05, max(losses) + 0.05
    across = lambda b: left + (b - 2.5) / (4.5 - 2.5) * (wide - left - 180)  # noqa: E731
    down = lambda loss: top + (most - loss) / (most - low) * (high - top - 40)  # noqa: E731
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="13">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        f'<text x="{left}" y="{high - 8}" fill="#444">bits a linear weight, scales included →</text>',
        f'<text x="14" y="{high - 60}" fill="#444" transform="rotate(-90 14 {high - 60})">held-out loss after equal steps</text>',
    ]
    for b in (2.5, 3.0, 3.5, 4.0, 4.5):
        parts.append(f'<line x1="{across(b):.0f}" y1="{top}" x2="{across(b):.0f}" y2="{high - 40}" stroke="#ddd"/>')
        parts.append(f'<text x="{across(b):.0f}" y="{high - 24}" text-anchor="middle" fill="#444">{b:g}</text>')
    for e in shown:
        y = down(e["loss"])
        if e["key"] == "lora16":  # far to the right: a line across
            parts.append(f'<line x1="{left}" y1="{y:.0f}" x2="{wide - 180}" y2="{y:.0f}" stroke="#888" stroke-dasharray="5 4"/>')
            parts.append(f'<text x="{wide - 172}" y="{y + 4:.0f}" fill="#444">16-bit LoRA {e["loss"]:.2f}</text>')
            continue
        colour = "#c0392b" if e["key"] == "qlora" else "#1f6feb"
        parts.append(f'<circle cx="{across(e["bits"]):.0f}" cy="{y:.0f}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{across(e["bits"]) + 9:.0f}" y="{y + 4:.0f}" fill="#222">{e["name"]} {e["loss"]:.2f}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--table", action="store_true", help="run nothing, show the table")
    begun = time.monotonic()
    if not parser.parse_args().table:
        for rate in RATES:
            for folder, changes in jobs(rate).items():
                branch(folder.with_name(folder.name.replace(rate, RATES[0])), folder, rate)
                run(folder, changes)
    entries, every = found()
    text = markdown(entries, every)
    write_text(OUT / "table.md", text)
    write_text(OUT / "table.svg", picture(entries))
    print(f"{text}\nafter {time.monotonic() - begun:.0f} s; {OUT / 'table.md'}, {OUT / 'table.svg'}")


if __name__ == "__main__":
    main()
