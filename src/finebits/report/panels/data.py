"""The rows: their lengths, what of them is trained, what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from finebits.report import cells, svg
from finebits.report.cells import Column, Table, count, number, percent
from finebits.report.folder import Folder
from finebits.report.panels.base import LONGEST, Block, Panel

PREVIEWS = 6  # rows shown


def panel(run: Folder) -> Panel | None:
    data = run.data
    if not data:
        return None
    blocks = []
    lengths = data.get("lengths") or {}
    bins = lengths.get("histogram") or []
    if bins:
        edges = [0, *(b[0] for b in bins)]
        counts = [b[1] for b in bins]
        marked = {f"{k} {lengths[k]:,}": float(lengths[k]) for k in ("p50", "p95", "max") if lengths.get(k) is not None}
        marked |= {f"cut at {data['max_length']:,}": float(data["max_length"])} if data.get("max_length") else {}
        even = len({b - a for a, b in zip(edges, edges[1:], strict=False)}) == 1
        note = "" if even else "Bins are drawn equally wide; they are not equally long."
        table = Table(
            "lengths",
            (Column("over", count), Column("up to tokens", count), Column("rows", count)),
            list(zip(edges, edges[1:], counts, strict=False)),
        )
        chart = svg.fitted(partial(svg.histogram, "Lengths of rows", edges, counts, marked, "tokens in a row"), 520)
        blocks.append(Block(chart, head="Lengths", note=note, tables=[table], half=True))
    facts = [("File", f"{data.get('path', cells.ABSENT)} ({data.get('format', cells.ABSENT)})"), ("Rows", count(data.get("rows")))]
    chart, listed = None, []
    if data.get("tokens"):
        trained = data.get("trained_tokens") or 0
        rest = data["tokens"] - trained
        facts += [("Tokens", count(data["tokens"])), ("Trained", f"{count(trained)} ({percent(trained / data['tokens'])})")]
        bar = svg.Bar("tokens", [("trained", trained, "s0 fill"), ("context", rest, "planned")])
        chart = svg.fitted(partial(svg.bars, "Trained share of the tokens", [bar], lambda v: f"{v:,.0f}", "tokens", None), 520)
        columns = Column("tokens"), Column("count", count), Column("share", percent)
        listed = [Table("trained", columns, [(k, v, v / data["tokens"]) for k, v in (("trained", trained), ("context", rest))])]
    if packing := data.get("packing"):
        facts += [("Packs", f"{count(packing['packs'])}, {percent(packing['filled'])} filled")]
    facts += [("Truncated rows", count(data.get("truncated")))]
    packs = data.get("packing")
    if packs:
        per = rows / packs["packs"] if (rows := data.get("rows")) and packs["packs"] else None
        said = f"{count(packs['packs'])} packs of up to {count(data.get('max_length'))} tokens, {percent(packs['filled'])} filled"
        facts.append(("Packing", said + (f", {number(per, 1)} rows in each" if per else "")))
    elif data.get("tokens"):
        facts.append(("Packing", "off: a row is an example of its own (data.packing puts several into one)"))
    facts += [("Chat template", f"sha {data['template_sha']}")] if data.get("template_sha") else []
    blocks.append(Block(chart, head="Trained share", tables=listed, facts=facts, half=True, problems=data.get("problems") or ()))
    preview = [{"line": p.get("line"), "pieces": _pieces(p["pieces"])} for p in (data.get("preview") or [])[:PREVIEWS]]
    if preview:
        blocks.append(Block(head="Mask preview", note="Marked text is what the loss sees.", preview=preview))
    if data.get("template"):
        blocks.append(Block(head="Chat template", folded="the template that made these texts", code=str(data["template"])[: 8 * LONGEST]))
    return Panel("data", "Data", blocks)


def _pieces(pieces: Sequence[Sequence[Any]]) -> list[tuple[str, bool]]:
    """The pieces of one row, cut where the row gets long."""
    kept, room = [], LONGEST
    for piece, trained in pieces:
        kept.append((str(piece)[:room], bool(trained)))
        room -= len(str(piece))
        if room <= 0:
            return [*kept, (" …", False)]
    return kept
