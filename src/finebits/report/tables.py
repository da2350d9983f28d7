"""The tables of a plan, made once and shown twice: aligned text in a terminal, sortable HTML on the page."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finebits.plan.base import at_end
from finebits.plan.levers import Workload
from finebits.report.cells import ABSENT, Column, Json, Table, count, plain, short, size, text

if TYPE_CHECKING:
    from finebits.plan.base import Plan


@dataclass(frozen=True)
class Matrix:
    """One linear matrix of a plan. Shape, bytes and menu are there where the plan holds their costs.

    >>> (one,) = matrices(fb.Plan({"layers.3.q_proj": fb.Spec(fb.NF(4))}, costs={"layers.3.q_proj": {"shape": [8, 128], "bytes": 576}}))
    >>> one.layer, one.format, one.dimensions, one.bits
    (3, 'nf4-b64', '8 × 128', 4.5)
    """

    name: str
    layer: int | None
    kind: str
    format: str
    code: int  # bits of one code, 16 for a dense weight
    shape: tuple[int, ...] | None
    bytes: int | None
    loss: float | None
    menu: list[tuple[str, int, float]]
    chosen: str  # as its line of the menu is called
    head: bool = False  # the output head, which is no linear layer of a block

    @property
    def weights(self) -> int | None:
        return None if self.shape is None else math.prod(self.shape)

    @property
    def dimensions(self) -> str | None:
        return None if self.shape is None else " × ".join(map(str, self.shape))

    @property
    def bits(self) -> float | None:
        """Stored bits per weight, scales and padding included."""
        return None if self.bytes is None or not self.weights else 8 * self.bytes / self.weights


def place(name: str) -> tuple[int | None, str]:
    """ "model.layers.3.self_attn.q_proj" -> (3, "self_attn.q_proj"); a module outside the layers has no number.

    >>> place("model.layers.3.self_attn.q_proj"), place("lm_head")
    ((3, 'self_attn.q_proj'), (None, 'lm_head'))
    """
    match = re.search(r"(?:^|\.)(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else (None, name)


def matrices(plan: Plan) -> list[Matrix]:
    """Every module of the plan with what it costs."""
    rows = []
    for name, spec in plan.modules.items():
        cost = plan.costs.get(name) or {}
        shape, stored = cost.get("shape"), cost.get("bytes")
        code = getattr(spec.format, "bits", None)
        if code is None:
            code = 16 if not shape or stored is None else round(8 * stored / math.prod(shape))
        menu = [(offered(o), o["bytes"], o["loss"]) for o in cost.get("menu") or []]
        named, size = short(spec.format), tuple(shape) if shape else None
        chosen = menu[cost["chosen"]][0] if "chosen" in cost else named
        rows.append(Matrix(name, *place(name), named, code, size, stored, cost.get("loss"), menu, chosen, at_end(cost) is not None))
    return rows


def offered(line: Json) -> str:
    """A line of a menu by name: the format, and the rank and start where a plan chose these too.

    >>> offered({"format": {"paper": "nf", "bits": 4, "block": 64}, "rank": 8, "init": {"paper": "qera"}})
    'nf4-b64 rank 8 qera'
    """
    rank = f" rank {line['rank']}" if line.get("rank") is not None else ""
    return short(line.get("format")) + rank + (f" {line['init']['paper']}" if line.get("init") else "")


def average_bits(matrices: Sequence[Matrix]) -> float | None:
    """Stored bits per linear weight over all matrices but the head; None where the plan does not price them all.

    >>> costs = {"a": {"shape": [8, 128], "bytes": 576}, "b": {"shape": [8, 128], "bytes": 448}}
    >>> average_bits(matrices(fb.Plan({"a": fb.Spec(fb.NF(4)), "b": fb.Spec(fb.NF(3))}, costs=costs)))  # of 4.5 and 3.5
    4.0
    """
    matrices = [m for m in matrices if not m.head] or matrices
    if not matrices or any(m.bytes is None or not m.weights for m in matrices):
        return None
    return 8 * sum(m.bytes or 0 for m in matrices) / sum(m.weights or 0 for m in matrices)


def formats_table(plan: Plan) -> Table:
    """Histogram of the formats that the plan chose, fewest bits first.

    >>> costs = {"a": {"shape": [8, 128], "bytes": 576}, "b": {"shape": [8, 128], "bytes": 448}}
    >>> formats_table(fb.Plan({"a": fb.Spec(fb.NF(4)), "b": fb.Spec(fb.NF(3))}, costs=costs)).shown()
    [['nf3-b64', '1', '1,024', '448 B', '3.50'], ['nf4-b64', '1', '1,024', '576 B', '4.50']]
    """
    groups: dict[str, list[Matrix]] = defaultdict(list)
    for m in matrices(plan):
        groups[m.format].append(m)
    rows = []
    for name, group in sorted(groups.items(), key=lambda g: (average_bits(g[1]) or g[1][0].code, g[0])):
        priced = average_bits(group) is not None
        weights = sum(m.weights or 0 for m in group) if priced else None
        rows.append((name, len(group), weights, sum(m.bytes or 0 for m in group) if priced else None, average_bits(group)))
    columns = Column("format"), Column("matrices", count), Column("weights", count), Column("stored", size), Column("bits per weight", bits)
    return Table("formats", columns, rows)


def bits(v: float | None) -> str:
    return ABSENT if v is None else f"{v:.2f}"


def matrices_table(plan: Plan) -> Table:
    """One row a matrix."""
    rows = [(m.name, m.layer, m.dimensions, m.format, m.bits, m.bytes, brief(m.loss)) for m in matrices(plan)]
    heads = ("module", text), ("layer", count), ("shape", text), ("format", text), ("bits per weight", bits)
    return Table("bits of every matrix", (*(Column(*h) for h in heads), Column("stored", size), Column("loss", figures)), rows)


def brief(v: float | None) -> float | None:
    """Three figures of a number, or None where there is no finite one.

    >>> brief(0.123456), brief(float("inf"))
    (0.123, None)
    """
    return None if v is None or not math.isfinite(v) else float(f"{v:.3g}")


def figures(v: float | None) -> str:
    return ABSENT if v is None else f"{v:.3g}"


def pareto_table(plan: Plan) -> Table:
    """The curve of memory against loss that a plan has solved, from the smallest budget up.

    >>> pareto_table(fb.Plan({}, solver={"pareto": [{"peak": 1024, "loss": 0.5}]})).rows
    [(1024, 0.5)]
    """
    points = plan.solver.get("pareto") or []
    return Table("pareto", (Column("training peak", size), Column(loss_word(plan), figures)), [(p["peak"], p["loss"]) for p in points])


def most_protected(matrices: Sequence[Matrix], most: int = 4) -> list[str]:
    """The matrices with the most bits per weight, by kind: "mlp.down_proj in layers 0-1, 29". Empty where all are alike."""
    level = {m.name: m.bits if m.bits is not None else float(m.code) for m in matrices}
    if not matrices or len({m.format for m in matrices}) < 2:
        return []
    top = max(level.values())
    kinds: dict[str, list[int]] = defaultdict(list)
    for m in matrices:
        if level[m.name] >= top - 0.01:
            kinds[m.kind] += [] if m.layer is None else [m.layer]
    lines = [f"{kind} in layer{'s' * (len(layers) > 1)} {ranges(layers)}" if layers else kind for kind, layers in kinds.items()]
    return lines if len(lines) <= most else [*lines[:most], f"{len(lines) - most} more kinds"]


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 7] -> "0-2, 7".

    >>> ranges([0, 1, 2, 7])
    '0-2, 7'
    """
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def fits(row: Json) -> str:
    """What a row of alternatives is to the budgets: "chosen", "yes", "no, +1.2 MiB", "no, saved +3 MiB"; a dash where there is none.

    >>> fits({"over": 1258291, "chosen": False}), fits({"over": 0, "chosen": True})
    ('no, +1.2 MiB', 'chosen')
    """
    over, phase = row["over"], f" ({row['breaks']})" if row.get("breaks") else ""
    if row["chosen"]:
        return "chosen"
    if row.get("saved"):
        return f"no, +{size(over)}{phase}, saved +{size(row['saved'])}" if over else f"no, saved +{size(row['saved'])}"
    return ABSENT if over is None else f"no, +{size(over)}{phase}" if over else "yes"


def alternatives_table(plan: Plan) -> Table | None:
    """What else there was, most memory first; None where the plan does not say."""
    alternatives = plan.solver.get("alternatives")
    if not alternatives:
        return None
    rows = [(r["name"], r["bits"], r["peak"], r["loss"], fits(r), r["levers"]) for r in alternatives]
    heads = ("plan", text), ("bits per weight", bits), ("training peak", size), (loss_word(plan), figures), ("fits", text), ("levers", text)
    return Table("alternatives", tuple(Column(*h) for h in heads), rows, frozenset(i for i, r in enumerate(alternatives) if r["chosen"]))


def buys_table(plan: Plan) -> Table | None:
    """What the rest of the budget could buy, each alone; None where little is left."""
    buys = plan.solver.get("buys")
    if not buys:
        return None
    rows = [(r["change"], r["peak"], r["bits"], r["note"]) for r in buys]
    return Table("the rest could buy", (Column("change"), Column("peak", size), Column("bits per weight", bits), Column("note")), rows)


def stated(plan: Plan) -> str:
    """The budget for a reader, in bytes and as it was stated: "3.1 bits a linear weight, which takes 322 MiB"."""
    if plan.budget is None:
        return ""
    if not plan.stated:
        return size(plan.budget)
    of = plan.solver.get("share_of")
    return f"{size(plan.budget)}, {plan.stated}" + (f" ({size(of)})" if of is not None else " a linear weight")


def loss_word(plan: Plan) -> str:
    """What a plan's losses are, in words."""
    return {"output": "output error", "weight": "weight error", "fisher": "Fisher loss", "kl": "Fisher loss"}.get(
        str(plan.solver.get("objective")), str(plan.solver.get("objective") or "loss")
    )


def levers(plan: Plan) -> dict[str, str]:
    """The levers for a reader; what was counted of the rows in a few words."""
    values = Workload(plan.levers, start=plan.start).to_json() | {"model_revision": plan.model_revision}
    shown = {k: plain(v) for k, v in values.items() if v not in (None, "device")}
    counted = plan.counted.of(plan.levers.per_device_train_batch_size)
    if counted:
        shown["worst batches"] = ", ".join(f"{t:,} tokens a row with {k:,} trained in all" for t, k, *_ in counted["worst"])
    return shown
