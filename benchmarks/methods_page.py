"""The page of benchmarks/methods.py: its pieces as tables, and a picture of memory against held-out loss."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from finebits.evaluate.heldout import Scores, table

WIDTHS = (16, 8, 4, 3)  # bits of the base


def best(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Of every method and width, the piece with the lowest held-out loss, or the sentence of a failed one."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for file in sorted(out.glob("*--*-bits--*.json")):
        made = json.loads(file.read_text())
        key = made["run_info"]["experiment_name"].partition("/")[0], made["finebits"]["bits"]
        if key not in found or loss_of(made) < loss_of(found[key]):
            found[key] = made
    return found


def tried(out: Path) -> dict[tuple[str, int], int]:
    """At how many learning rates each method was tried at a width."""
    return Counter(
        (name, int(bits.partition("-")[0])) for name, bits, _ in (file.stem.split("--") for file in out.glob("*--*-bits--*.json"))
    )


def loss_of(made: dict[str, Any]) -> float:
    return sum(made["finebits"]["nll"]) / sum(made["finebits"]["tokens"]) if "nll" in made["finebits"] else float("inf")


def page(out: Path, title: str, beside: Mapping[str, str]) -> str:
    """The tables of all pieces that are there; `beside` says which of ours a peer is compared with."""
    found, rates = best(out), tried(out)
    scores = lambda made: Scores(np.array(made["finebits"]["nll"]), np.array(made["finebits"]["tokens"]))  # noqa: E731
    lines = [
        "# Methods, one beside the other",
        "",
        f"{title}, each method at the best learning rate of those tried at 4 bits (at 16 where a method is for that), over a base that is",
        "rounded to nearest (16 bits: as it came). Written by `benchmarks/methods.py`, whose files have the keys of PEFT's method",
        "comparison. *Forgotten* is the rise of the loss on Python's language reference; memory is that of training above the process; a step",
        "is seconds of the processor, one thread; *of* says how many rates were tried at this width so far.",
        "",
        "![held-out loss against memory](methods.svg)",
    ]
    for bits in WIDTHS:
        some = {name: made for (name, b), made in found.items() if b == bits}
        done = {name: scores(made) for name, made in some.items() if "nll" in made["finebits"]}
        if not done:
            continue
        against = {name: beside.get(name, "lora") for name in done}
        against = {name: other for name, other in against.items() if other in done and other != name}
        entries = {e["key"]: e for e in table(done, {n: n for n in done}, dict.fromkeys(done, "tuned"), against)["entries"]}
        columns = ["method", "held-out loss [95 %]", "minus LoRA's (PEFT: minus ours), paired", "forgotten", "trained"]
        columns += ["memory, mean / most", "s a step", "file", "lr", "of"]
        lines += ["", f"## {bits} bits", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for name in sorted(done, key=lambda n: done[n].loss):
            e, made = entries[name], some[name]
            info, own, span = made["train_info"], made["finebits"], e["intervals"]["loss"]
            loss = f"{e['loss']:.3f}" + (f" [{span[0]:.3f}, {span[1]:.3f}]" if span else "")
            pair = e["paired"]["loss"] if e["paired"] else None
            versus = "–" if pair is None else f"{pair[0]:+.3f}" + ("" if pair[1] is None else f" [{pair[1]:+.3f}, {pair[2]:+.3f}]")
            forgot = "–" if own["forgot"] is None else f"{own['forgot']:+.3f}"
            mean, most = (info[k] / 2**20 for k in ("accelerator_memory_reserved_avg", "accelerator_memory_max"))
            cost = f"{mean:.0f} / {most:.0f} MiB | {own['step_time']:.2f} | {info['file_size'] / 2**20:.2f} MiB"
            trained, rate = f"{info['num_trainable_params']:,}", f"{own['rate']} | {rates[name, bits]}"
            lines.append(f"| {name} | {loss} | {versus} | {forgot} | {trained} | {cost} | {rate} |")
        for name, other in against.items():
            if name in beside:
                a, b = some[other], some[name]
                ratio = lambda of, a=a, b=b: of(a) / of(b)  # noqa: E731
                most = ratio(lambda made: made["train_info"]["accelerator_memory_max"])
                step = ratio(lambda made: made["finebits"]["step_time"])
                lines += ["", f"{other} over {name}: {most:.2f} of its memory, {step:.2f} of its time a step."]
        for name, made in some.items():
            if name not in done:
                lines += ["", f"{name}: {made['run_info']['error_msg']}"]
    return "\n".join(lines) + "\n"


def picture(out: Path, beside: Mapping[str, str]) -> str:
    """Memory against held-out loss, as SVG: every method a dot, those that nothing beats in both with their names."""
    found = {key: made for key, made in best(out).items() if "nll" in made["finebits"]}
    wide, high, left, top = 860, 420, 70, 24
    points = {key: (made["train_info"]["accelerator_memory_max"] / 2**20, loss_of(made)) for key, made in found.items()}
    xs, ys = ([p[i] for p in points.values()] or [0.0] for i in (0, 1))
    across = lambda v: left + (v - min(xs)) / ((max(xs) - min(xs)) or 1) * (wide - left - 130)  # noqa: E731
    down = lambda v: top + (max(ys) - v) / ((max(ys) - min(ys)) or 1) * (high - top - 60)  # noqa: E731
    colours = {16: "#888888", 8: "#9a6700", 4: "#1f6feb", 3: "#0a8754"}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        f'<text x="{left}" y="{high - 8}" fill="#444">most memory in training, MiB: {min(xs):.0f} to {max(xs):.0f} →</text>',
        f'<text x="16" y="{high - 60}" fill="#444" transform="rotate(-90 16 {high - 60})">'
        f"held-out loss: {min(ys):.2f} to {max(ys):.2f} →</text>",
    ]
    for i, (bits, colour) in enumerate(colours.items()):
        parts.append(f'<text x="{wide - 100}" y="{top + 16 * i}" fill="{colour}">● {bits} bits</text>')
    for (name, bits), (x, y) in sorted(points.items(), key=lambda item: item[1]):
        ahead = not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
        ring = ' stroke="#c0392b" stroke-width="2"' if name in beside else ""
        dot = f'<circle cx="{across(x):.0f}" cy="{down(y):.0f}" r="{5 if ahead else 3.5}" fill="{colours[bits]}"{ring}>'
        parts.append(f"{dot}<title>{name}, {bits} bits</title></circle>")
        if ahead:
            parts.append(f'<text x="{across(x) + 8:.0f}" y="{down(y) + 4:.0f}" fill="#222">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
