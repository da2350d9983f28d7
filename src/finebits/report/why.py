"""Why blocks and ranks are what they are, as a plan says it: what the rules of block sizes decided, what was tried, where ranks went."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from finebits import registry
from finebits.report import cells, tables
from finebits.report.cells import Column, Table, count, percent, size, text
from finebits.report.tables import figures

if TYPE_CHECKING:
    from finebits.plan.base import Plan


def sizes_table(plan: Plan) -> Table | None:
    """Matrices of every block size, what their scales take as a share of their codes, and their losses; None where no rule chose blocks."""
    blocks = plan.solver.get("blocks")
    if not blocks:
        return None
    groups = defaultdict(list)
    for row in blocks["rows"]:
        groups[row["block"]].append(row)
    order = sorted(groups, key=lambda b: b if isinstance(b, int) else math.inf)
    mean = lambda rows: sum(r["overhead"] for r in rows) / len(rows)  # noqa: E731
    rows = [(_size(b), len(groups[b]), mean(groups[b]), sum(r["loss"] for r in groups[b])) for b in order]
    columns = Column("block"), Column("matrices", count), Column("scales, of the codes", percent), Column(tables.loss_word(plan), figures)
    return Table("block sizes", columns, rows)


def _size(block: int | str | None) -> str:
    return "dense" if block is None else str(block)


def blocks_table(plan: Plan) -> Table:
    """One row a matrix: its block, and what the next smaller one would save for how much (R12)."""
    rows = [(r["module"], _size(r["block"]), r["overhead"], r["loss"], r["reason"]) for r in plan.solver["blocks"]["rows"]]
    heads = (
        ("module", text),
        ("block", text),
        ("scales, of the codes", percent),
        (tables.loss_word(plan), figures),
        ("a smaller block", text),
    )
    return Table("block of every matrix", tuple(Column(*h) for h in heads), rows)


def rules(plan: Plan) -> list[str]:
    """What the rules of block sizes decided for all matrices together, in clauses."""
    blocks = plan.solver["blocks"]
    binds = {"overhead": ", the share that is allowed (R6)", "memory": ", as far as the memory goes (R7)"}.get(blocks["active"], "")
    clauses = [f"scales take {percent(blocks['overhead'])} of the codes{binds}"]
    units = Counter(unit for s in plan.modules.values() if (unit := getattr(s.format, "unit", None)) is not None)
    clauses += [
        f"on {n} matri{'x' if n == 1 else 'ces'} blocks begin anew with every head of {unit} columns (R9)" for unit, n in units.items()
    ]
    return clauses


def trials_table(plan: Plan) -> Table | None:
    """What was quantized and measured on calibration rows before the plan was settled, the one that was taken first (R12)."""
    tried = plan.solver.get("trials")
    if not tried:
        return None
    named = lambda t: t.get("choice") or f"losses bent, κ = {t['saturation']:g}"  # noqa: E731
    rows = [(named(t), t["loss"], (t["kl"], *_ends(t)), "taken" if i == 0 else "") for i, t in enumerate(tried)]
    columns = Column("choice"), Column(f"{tables.loss_word(plan)}, predicted", figures), _kl(), Column("")
    return Table("what was tried", columns, rows)


def _ends(tried: cells.Json) -> tuple[float | None, float | None]:
    """One standard error, which is given as a share of the KL, to either side."""
    off = tried["kl"] * tried["error"]
    return (tried["kl"] - off, tried["kl"] + off) if off else (None, None)


def _kl() -> Column:
    return Column("KL, measured", cells.span(figures), ("KL", "KL low", "KL high"))


CHOSEN = (
    "Taken is the adapter beside which the budget leaves the weights the least loss, the first of equals. "
    "That goes by memory alone: what each of them learns is not in it."
)


def adapters_table(plan: Plan) -> Table | None:
    """The adapters that could have been, what each takes in a step, and what that leaves to the weights; None where there was one alone."""
    lines = plan.solver.get("adapters")
    if not lines:
        return None
    parts = ("parameters", "gradients", "optimizer", "activations")
    rows = []
    for line in lines:
        fit = "taken" if line["chosen"] else "yes" if line["fits"] else f"no, needs {size(line['needs'])}"
        beside = sum(line[k] for k in parts) if line["fits"] else None
        left = (line.get(k) for k in ("weights", "bits", "loss"))
        own = registry.to_json(registry.load("adapters", line["adapter"]["paper"])())
        usual = {k for k, v in line["adapter"].items() if own.get(k) == v and k != "rank"}
        rows.append((named(line["adapter"], usual - {"paper"}), *(line.get(k) for k in ("trained", *parts)), beside, *left, fit))
    heads = [Column("adapter"), Column("trained", count, optional=True), *(Column(k, size, optional=True) for k in parts)]
    heads += [
        Column("together", size),
        Column("left to weights", size),
        Column("bits", tables.bits),
        Column(tables.loss_word(plan), figures),
    ]
    return Table("adapters", (*heads, Column("fits")), rows, frozenset(i for i, line in enumerate(lines) if line["chosen"]))


def ranks(plan: Plan) -> dict[str, int]:
    """The rank of every matrix where they were given out or chosen; empty where all are as the recipe has them."""
    by_module = {name: 0 if s.adapter is None else getattr(s.adapter, "rank", None) for name, s in plan.modules.items()}
    varied = plan.solver.get("ranks") or plan.sizes.get("adapters")
    return {name: r for name, r in by_module.items() if r is not None} if varied else {}


def giver(plan: Plan) -> str:
    """Where the ranks come from: "given out by eva_ranks(rho=2.0)"."""
    method = plan.solver.get("ranks")
    return f"given out by {named(method)}" if method else "chosen with the bits"


def named(value: Any, without: Collection[str] = ()) -> str:
    """A method, or its JSON, and its settings but for those left out: lora(rank=16, alpha=32)."""
    data = dict(value) if isinstance(value, Mapping) else registry.to_json(value)
    name, data = data["paper"], {k: v for k, v in data.items() if k not in ("paper", *without)}
    return f"{name}({', '.join(f'{k}={cells.plain(v)}' for k, v in data.items())})" if data else name


def ranks_table(plan: Plan) -> Table | None:
    """How many matrices have each rank, and of which kinds these are; None where ranks do not differ by anybody's choice."""
    by_module = ranks(plan)
    if not by_module:
        return None
    groups: dict[int, Counter[str]] = defaultdict(Counter)
    for name, r in by_module.items():
        groups[r][tables.place(name)[1]] += 1
    kinds = lambda counts: ", ".join(f"{kind.rpartition('.')[2]} {n}" for kind, n in counts.most_common())  # noqa: E731
    rows = [(str(r), groups[r].total(), kinds(groups[r])) for r in sorted(groups)]
    return Table("ranks", (Column("rank"), Column("matrices", count), Column("which")), rows)
