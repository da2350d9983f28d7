"""A recipe over a grid of a few of its keys: the cells, what they share, and the table of what they came to."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finebits.errors import WrongUse
from finebits.recipe import Recipe
from finebits.recipe.settings import Settings
from finebits.report import summary
from finebits.run import scores
from finebits.run.stage import main_run, recorded
from finebits.runfolder import FINISHED, PLAN, SCORES, RunFolder, digest

SCHEMA, RECORD, FOLDER = "finebits.sweep/1", "sweep.json", "sweep"  # of its record; its folder in the recipe's own
LONGEST = 100  # characters of a cell's name, which is that of its folder


@dataclass(frozen=True)
class Cell:
    """One place of a grid: its name, and the values that it lays over the recipe, by their keys."""

    name: str
    values: Mapping[str, str]


def split(text: str) -> list[str]:
    """The values of "1e-4,3e-4": commas in brackets, braces and quotes are part of a value.

    >>> split("1e-4,3e-4"), split("[a, b],[c]"), split('{paper: lora, rank: 8},"x,y"')
    (['1e-4', '3e-4'], ['[a, b]', '[c]'], ['{paper: lora, rank: 8}', '"x,y"'])
    """
    values, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "\"'":
            quote = c
        else:
            depth += (c in "[{") - (c in "]}")
        if c == "," and not depth and not quote:
            values.append("")
        else:
            values[-1] += c
    return [value.strip() for value in values]


def cells(words: Sequence[str]) -> tuple[list[Cell], list[str]]:
    """The cells of a grid, the last key's values changing fastest, and the words with one value, which are laid over all of them. Raises
    WrongUse where a word is no KEY=VALUES, or no key has several.

    >>> grid, rest = cells(["training.learning_rate=1e-4,3e-4", "adapter.rank=8,16", "training.max_steps=10"])
    >>> [cell.name for cell in grid][:2], rest
    (['learning_rate=1e-4,rank=8', 'learning_rate=1e-4,rank=16'], ['training.max_steps=10'])
    """
    axes, rest = dict[str, list[str]](), list[str]()
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise WrongUse(f"a key of a sweep is written section.key=VALUE,VALUE, and {word!r} came")
        values = split(text)
        if key in axes:
            raise WrongUse(f"{key} comes twice: write all of its values after one another, {key}=A,B,C")
        if len(values) == 1:
            rest.append(word)
        elif "" in values or len(set(values)) < len(values):
            raise WrongUse(f"{word} has a value that is empty or comes twice: leave it out")
        else:
            axes[key] = values
    if not axes:
        raise WrongUse(
            "a sweep needs a key with several values, such as training.learning_rate=1e-4,3e-4; finebits train takes one of each"
        )
    ends = [key.rpartition(".")[2] for key in axes]
    short = {key: end if ends.count(end) == 1 else key for key, end in zip(axes, ends, strict=True)}
    grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [Cell(_name({short[k]: v for k, v in cell.items()}), cell) for cell in grid], rest


def _name(values: Mapping[str, str]) -> str:
    """As a folder can be called: what of a value cannot be in a name makes it end with a hash of all."""
    text = ",".join(f"{k}={v}" for k, v in values.items())
    safe = re.sub(r"[^A-Za-z0-9._=,+-]+", "-", text)[:LONGEST]
    return safe if safe == text else f"{safe}-{digest(text)[:6]}"


def recipes(base: Recipe, grid: Sequence[Cell], load: Any) -> dict[str, Recipe]:
    """A recipe for every cell, each with its own output_dir; `load` makes one of overrides. All are read before any is trained, so that a value
    that cannot be stops the sweep at once."""
    place = Path(base.output_dir) / FOLDER
    lay = lambda cell: [f"{k}={v}" for k, v in cell.values.items()]  # noqa: E731
    return {cell.name: load([*lay(cell), f"output_dir={json.dumps(str(place / cell.name))}"]) for cell in grid}


def same(recipe: Recipe) -> bool:
    """Does the folder of a recipe hold a run of just this one?"""
    folder = RunFolder(recipe.output_dir)
    record = folder.record()
    return bool(record) and not folder.differences(record, recorded(recipe), record.get("data", ""), ())


def plan_of(recipe: Recipe, before: Sequence[Recipe]) -> Path | None:
    """The plan of a run that was planned from the same: what differs is not asked for by planning. None where there is none."""
    for other in before:
        alike = all(getattr(recipe, s) == getattr(other, s) for s in ("model", "budget", "data", "export"))
        if alike and Settings.of(recipe) == Settings.of(other) and RunFolder(other.output_dir).record():
            return Path(other.output_dir) / PLAN
    return None


def table(named: Mapping[str, Recipe], grid: Sequence[Cell], said: Mapping[str, str]) -> dict[str, Any]:
    """sweep.json: every cell with what it came to, and its paired difference from the best on the same rows. `said` holds the words of cells
    that failed."""
    from finebits.evaluate.heldout import table as compared

    rows, found = [], {}
    for cell in grid:
        recipe = named[cell.name]
        folder = RunFolder(recipe.output_dir)
        seen = summary.read(folder.path) if folder.path.is_dir() else None
        alike = seen is not None and bool(seen.record) and same(recipe)
        row: dict[str, Any] = {"cell": cell.name, "values": dict(cell.values), "path": str(folder), "status": "not run"}
        if alike and seen is not None:
            row |= {k: v for k, v in seen.to_json().items() if k in ("status", "bits", "steps", "before", "after", "memory", "seconds")}
            scored = scores.read(folder.run(main_run(recipe)) / SCORES) if seen.status == FINISHED else None
            if scored is not None:
                found[cell.name] = (scored, seen.record["data"], recipe.evaluation.limit)
        if cell.name in said:
            row |= {"status": "failed", "said": said[cell.name]}
        rows.append(row)
    best = min(found, key=lambda name: found[name][0].loss, default=None)
    if best is not None:
        of, *rest = found[best]
        fair = {n: s for n, (s, *other) in found.items() if other == rest and s.tokens.tolist() == of.tokens.tolist()}
        entries = compared(fair, {n: n for n in fair}, dict.fromkeys(fair, "tuned"), best)["entries"]
        pairs = {e["key"]: (e["paired"] or {}).get("loss") for e in entries}
        for row in rows:
            row |= {"paired": pairs[row["cell"]]} if pairs.get(row["cell"]) is not None else {}
    return {"schema": SCHEMA, "best": best, "cells": rows}
