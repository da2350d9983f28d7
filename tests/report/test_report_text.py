"""The terminal's tables say what the plan and the files hold, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from run_folder import chosen

from finebits import registry
from finebits.formats.int import Int
from finebits.formats.nf import NF
from finebits.plan.base import Plan, Spec
from finebits.plan.levers import Levers
from finebits.progress import Progress
from finebits.report import cells, results, tables, text


@pytest.mark.parametrize(
    ("format", "name"),
    [
        (NF(3, 64, "bf16"), "nf3-b64-bf16"),
        (Int(4, 128, symmetric=False), "int4a-b128"),
        (Int(8, 128, scale="fp16"), "int8-b128-fp16"),
        (NF(4, 64), "nf4-b64"),
        (None, "dense"),
    ],
)
def test_short_names_of_values_and_of_their_json(format: NF | Int | None, name: str) -> None:
    assert text.short(format) == name
    assert text.short(registry.to_json(format)) == name


def test_other_settings_of_a_format_are_spelled_out() -> None:
    scale = {"paper": "double", "bits": 8, "block": 256}
    assert text.short({"paper": "grid", "bits": 3, "block": 64, "scale": scale, "depth": 2}) == "grid3-b64-double8-b256-depth=2"


def test_summary_prints_the_figures_of_the_plan(plan: Plan) -> None:
    said = text.plan_summary(plan)
    assert plan.summary() == said and "\x1b" not in said
    assert "210 linear matrices with 106,168,320 weights" in said
    assert cells.size(plan.peak) in said and "34.5 MiB to spare" in said
    assert "lagrange: loss 0.18135 (output error), within 0.017 % of the bound 0.18132" in said
    stored = 8 * sum(c["bytes"] for c in plan.costs.values()) / 106_168_320
    assert f"average {stored:.3f} bits per linear weight" in said
    assert all(term in said for term in (*plan.memory, *plan.rows, *tables.levers(plan)))
    assert max(map(len, said.splitlines())) <= 110


def test_summary_of_a_plan_by_hand_leaves_out_what_it_does_not_hold() -> None:
    said = text.plan_summary(Plan({"lm_head": Spec(NF(4, 64)), "model.layers.0.fc": Spec()}))
    for absent in ("Budget", "Memory", "Peaks", "Solver", "Adapter", "average", "weights"):
        assert absent not in said
    assert "nf4-b64" in said and "dense" in said


def test_names_cannot_steer_the_terminal() -> None:
    evil = "\x1b[2J\r"
    specs = {f"model.layers.0.{evil}": Spec(NF(4, 64)), "b": Spec(NF(2, 64))}
    plan = Plan(specs, model=evil, memory={evil: 9}, levers=Levers(attn_implementation=evil), rows={evil: 1})
    for said in (text.plan_summary(plan), text.memory_table({"planned": {evil: 9}})):
        assert "\x1b" not in said and "\r" not in said and "\\x1b[2J" in said


def test_what_rules_of_blocks_decided_and_where_ranks_went_is_said(plan: Plan) -> None:
    assert not any(line.startswith((" Blocks", " Ranks", " What was tried")) for line in text.plan_summary(plan).splitlines())
    said = text.plan_summary(chosen(plan))
    assert max(map(len, said.splitlines())) <= 100
    lines = " ".join(line.strip() for line in said.splitlines())
    assert "Blocks     16 on 70, 64 on 139, dense on 1 scales take 12.5% of the codes, the share that is allowed (R6) " in lines
    assert "on 30 matrices blocks begin anew with every head of 64 columns (R9)" in lines
    assert "Ranks      given out by eva_ranks(rho=2.0): 0 on 1, 8 on 105, 32 on 104" in lines
    assert "Adapter    lora(scaling=lora) on 209 matrices, start loftq(" in lines
    (taken,) = (line for line in said.splitlines() if "taken" in line)
    assert taken.split()[:3] == ["uniform", "64", "0.21"] and "0.3 [0.294, 0.306]" in taken
    assert "model.layers.1.self_attn.q_proj at 16" in said
    bent = text.plan_summary(replace(plan, solver=plan.solver | {"trials": [{"saturation": 3.0, "loss": 0.2, "kl": 0.1, "error": 0.0}]}))
    assert "losses bent, κ = 3" in bent and "taken" in bent
    by_bits = replace(chosen(plan), solver=plan.solver, sizes={"adapters": {"8": {}, "32": {}}})
    assert "Ranks      chosen with the bits: 0 on 1, 8 on 105" in text.plan_summary(by_bits)


def test_no_bound_no_claim() -> None:
    assert text.solver_line({"name": "unbounded", "loss": 0.5, "bound": None, "gap": 0.0}) == "unbounded: loss 0.5"
    assert "not read" in text.solver_line({"name": "lagrange", "loss": 0.5, "bound": 0.5, "gap": 0.0, "measured": False})


def test_the_bar_is_to_scale_and_ends_at_the_budget() -> None:
    bar, *below = text.memory_bar({"weights": 300, "inputs": 100}, budget=800)
    assert len(bar) == text.WIDTH + 2 and bar.count(".") == text.WIDTH // 2
    assert bar.index("|", 1) == pytest.approx(3 / 8 * text.WIDTH, abs=1)
    assert "100.0%" not in below[0] and "75.0%" in below[0] and "400 B" in below[-1]


def test_protected_matrices_are_grouped() -> None:
    specs = {f"m.{i}.down": Spec(NF(4 if i in (0, 1, 5) else 2, 64)) for i in range(6)} | {"head": Spec(NF(4, 64))}
    assert tables.most_protected(tables.matrices(Plan(specs))) == ["down in layers 0-1, 5", "head"]
    assert tables.most_protected(tables.matrices(Plan({"a.0.b": Spec(), "a.1.b": Spec()}))) == []


def test_colour_only_when_asked(run: Path) -> None:
    export = json.loads((run / "export.json").read_text())
    assert "\x1b" not in text.export_table(export)
    assert "\x1b[32m" in text.export_table(export, colour=True)


def test_memory_table_sums_and_deviates(run: Path) -> None:
    memory = json.loads((run / "runs/loftq/memory.json").read_text())
    rows = results.memory_table(memory).rows
    total = next(r for r in rows if r[0] == "training peak")
    assert sum(r[1] for r in rows[: rows.index(total)]) == total[1] == memory["planned_peak"]
    said = text.memory_table(memory)
    assert "+3.1%" in said
    stored = next(line for line in said.splitlines() if "stored" in line)
    assert stored.endswith("exact")
    assert next(r for r in rows if r[0] == "save peak")[1:] == (None, memory["rows"][2]["measured"], None)


def test_evaluation_table_has_intervals_gap_and_pairs(run: Path) -> None:
    found = json.loads((run / "evaluation.json").read_text())
    said = text.evaluation_table(found)
    assert "1.423 [1.375, 1.471]" in said and "92%" in said
    reading = {tuple(line.split()[-3:]): line for line in said.splitlines() if "against" not in line}
    assert ("[-0.0600,", "-0.0360]", "lower") in reading
    assert "undecided" in said
    for width in (100, 80):
        assert max(map(len, text.evaluation_table(found, width=width).splitlines())) <= width
    narrow = text.evaluation_table(found, width=80)
    assert "top-1" in said and "top-1" not in narrow and "1.423 [1.375, 1.471]" in narrow and "[-0.0600, -0.0360]  lower" in narrow


def test_one_sentence_says_what_came_out() -> None:
    def entry(key: str, loss: float, bits: float | None, stage: str = "tuned") -> dict:
        return {"key": key, "name": key, "stage": stage, "loss": loss, "bits": bits, "intervals": {"loss": [loss - 1, loss + 1]}}

    found = {"rows": 100, "entries": [entry("full", 3.5, 16, "start"), entry("auto_start", 3.3, 3.1, "start"), entry("auto", 3.021, 3.1)]}
    assert results.verdict(found) == "3.1 bits: loss 3.02; untuned 3.50."
    found["entries"] += [entry("lora16", 3.0, 16), entry("qlora", 3.1, 4.127)]
    assert results.verdict(found) == "3.1 bits: loss 3.02; QLoRA at 4.1 bits 3.10; 16-bit LoRA 3.00."
    found["entries"][-1]["loss"] = 3.0208  # as many decimals as tell them apart
    assert results.verdict(found) == "3.1 bits: loss 3.0210; QLoRA at 4.1 bits 3.0208; 16-bit LoRA 3.0000."
    assert results.verdict({"rows": 100, "entries": [entry("full", 3.5, 16, "start")]}) == ""
    found["entries"] = [*found["entries"][:3], entry("zeros", 3.2, 3.1), entry("loftq", 3.1, 3.1)]
    said = "3.1 bits: loss 3.02; the same bits from LoftQ's start 3.10; the same bits from QLoRA's start 3.20."
    assert results.verdict(found) == results.verdict(found | {"main": "auto"}) == said
    assert results.verdict(found | {"main": "zeros"}) == "3.1 bits: loss 3.20; the same bits from LoftQ's start 3.10."
    assert results.verdict(found | {"entries": found["entries"][3:]}).startswith("3.1 bits: loss 3.10; the same bits from QLoRA's")
    assert results.verdict(found | {"main": "auto", "entries": found["entries"][3:]}) == ""  # nothing of the own run yet
    few = {"rows": 7, "entries": [entry("auto", 3.0, None) | {"intervals": {"loss": None}}]}
    assert results.verdict(few) == "Loss 3.00. With too few rows (7), that decides nothing."


def test_few_rows_and_equal_runs_are_called_so() -> None:
    entries = [{"key": "full", "name": "full", "loss": 3.0}, {"key": "auto", "name": "auto", "loss": 3.0}]
    entries[1]["paired"] = {"against": "full", "loss": [-0.5, None, None], "kl": None}
    few = {"rows": 7, "tokens": 9, "entries": entries}
    (row,) = results.paired_table(few).rows
    assert row[-1] == "too few rows (7)" and "no intervals: too few rows (7)" in text.evaluation_table(few)
    entries[1]["paired"] = {"against": "full", "loss": [0.0, 0.0, 0.0]}
    assert results.paired_table({"rows": 100, "entries": entries}).rows[0][-1] == "equal"


def test_progress_counts_memory_as_the_budget_does() -> None:
    event = {"rss": 610 * 2**20}
    assert Progress("train", baseline=400 * 2**20, budget=332 * 2**20).memory(event) == "210 of 332 MiB"
    assert Progress("train", baseline=400 * 2**20).memory(event) == "210 MiB"
    assert Progress("train", budget=8 * 2**30).memory(event | {"device": 2**30}) == "1024 of 8192 MiB"


def test_columns_line_up(run: Path) -> None:
    for name, make in (("evaluation", results.evaluation_table), ("export", results.export_table)):
        table = make(json.loads((run / f"{name}.json").read_text()))
        lines = table.text().splitlines()
        first = [c for c, col in enumerate(table.columns) if col.numeric][0]
        ends = {line.index(row[first]) + len(row[first]) for line, row in zip(lines[1:], table.shown(), strict=True)}
        assert len(ends) == 1


def test_an_entry_without_figures_is_shown_as_absent() -> None:
    said = text.evaluation_table({"rows": None, "tokens": 3, "entries": [{"key": "full", "name": "full", "loss": float("nan")}]})
    assert "nan" in said and "–" in said
