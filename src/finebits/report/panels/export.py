"""What was exported, and whether it does what was trained."""

from __future__ import annotations

from dataclasses import replace

from finebits.report import cells, results, tables, templates
from finebits.report.cells import Column, count
from finebits.report.folder import Folder
from finebits.report.panels.base import Block, Panel
from finebits.report.text import requantized


def panel(run: Folder) -> Panel | None:
    if not run.export:
        return None
    paths = [(t["name"], t.get("path") or cells.ABSENT) for t in run.export["targets"]]
    paths += [(f"{t['name']} on the hub", t["hub"]["url"]) for t in run.export["targets"] if "hub" in t]
    verified = any(t.get("verdict") for t in run.export["targets"])
    over = f"{count(run.export.get('rows'))} held-out rows. What is held to: {results.held_to(run.export)}"
    lead = f"Loaded again from disk and compared with the trained model on {over}." if verified else "Written and not verified."
    anew = next((t["requantized"] for t in run.export["targets"] if "requantized" in t), None)
    lead += "" if anew is None else " " + " ".join(requantized(anew))
    table = results.export_table(run.export)
    targets = results.checks(run.export)
    if any(results.bounds(t) for t in targets):
        cut = lambda row, own: (*row[:-1], own, row[-1])  # noqa: E731
        columns = cut(table.columns, Column("held to"))
        table = replace(table, columns=columns, rows=[cut(r, results.bounds(t)) for r, t in zip(table.rows, targets, strict=True)])
    tolerance = run.export.get("tolerance")
    loose = [
        t["name"]
        for t in targets
        if t.get("verdict") in ("ok", "rounded") and tolerance and (t.get("max_logit_difference") or 0) > tolerance
    ]
    note = ""
    if loose:
        over = f"the logits of {', '.join(loose)} differ by more than {tables.figures(tolerance)}"
        note = f"{over[0].upper()}{over[1:]}: weights are rounded once more when they are written so. That decides nothing; KL and loss do."
    note = " ".join([*([note] if note else []), *results.told(run.export)])
    facts, template = _template(run)
    return Panel("export", "Export verification", [Block(tables=[table], facts=[*paths, *facts], note=note, open=True), *template], lead)


def _template(run: Folder) -> tuple[list[tuple[str, str]], list[Block]]:
    """A fact where every export holds the chat template that was trained with; else a block that says which do not, and where they part."""
    trained = (run.record.get("about") or {}).get("template_sha") or (run.data or {}).get("template_sha")
    if not trained or not run.templates:
        return [], []
    said, difference = templates.problems(trained, run.base, run.templates)
    if not said:
        return [("Chat template", f"the one that was trained with in every export, sha {trained[:6]}")], []
    return [], [Block(head="Chat template", problems=said, code=difference)]
