"""The tables of a run, made once and shown twice: aligned text in a terminal, sortable HTML on the page."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finebits.plan.base import at_end
from finebits.plan.levers import Workload
from finebits.report.cells import ABSENT, Column, Json, Table, count, difference, number, percent, plain, short, signed, size, span, text

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


# --- what a run measured ------------------------------------------------------------------------------------------------------------


def deviation(planned: float | None, measured: float | None) -> float | None:
    """measured / planned - 1."""
    return None if planned is None or measured is None or not planned else measured / planned - 1


def memory_table(memory: Json) -> Table:
    """Planned against measured, term by term; the terms are those of the training peak and add up to its row."""
    rows: list[tuple[Any, ...]] = [(term, planned, None, None) for term, planned in memory["planned"].items()]
    total = sum(memory["planned"].values())
    rows.append(("training peak", total, memory.get("measured_peak"), deviation(total, memory.get("measured_peak"))))
    strong = frozenset({len(rows) - 1})
    for row in memory.get("rows") or []:
        rows.append((f"{row['phase']} peak", row["planned"], row["measured"], deviation(row["planned"], row["measured"])))
    stored = memory.get("stored")
    if stored:
        rows.append(("stored weights", stored["planned"], stored["measured"], deviation(stored["planned"], stored["measured"])))
    columns = Column("term"), Column("planned", size), Column("measured", size), Column("deviation", signed)
    return Table("memory", columns, rows, strong)


def evaluation_table(evaluation: Json) -> Table:
    """One row an entry, with the intervals that the evaluation gives."""
    level = lambda key, show: Column(SPELLED[key], span(show), (key, f"{key} low", f"{key} high"))  # noqa: E731
    columns = (
        Column("model"),
        Column("stage"),
        Column("bits", bits),
        level("loss", lambda v: number(v, 3)),
        *([Column("perplexity", lambda v: number(v, 2))] if measured(evaluation, "perplexity") else []),
        *([level("accuracy", percent)] if measured(evaluation, "accuracy") else []),
        level("kl", number),
        level("top1", percent),
        Column("gap closed", lambda v: percent(v, 0)),
    )
    rows = []
    for e in evaluation["entries"]:
        ends = e.get("intervals") or {}
        with_ends = {k: (e.get(k), *(ends.get(k) or (None, None))) for k in ("loss", "accuracy", "kl", "top1")}
        rows.append(
            (
                e["name"],
                e.get("stage"),
                e.get("bits"),
                with_ends["loss"],
                *([e.get("perplexity")] if measured(evaluation, "perplexity") else []),
                *([with_ends["accuracy"]] if measured(evaluation, "accuracy") else []),
                with_ends["kl"],
                with_ends["top1"],
                e.get("gap_closed"),
            )
        )
    return Table("evaluation", columns, rows)


SPELLED = {"loss": "held-out loss", "kl": "KL to full precision", "top1": "top-1 agreement", "accuracy": "accuracy"}


def measured(evaluation: Json, quantity: str) -> bool:
    """Does any entry have it?"""
    return any(quantity in e for e in evaluation["entries"])


def brief_table(evaluation: Json) -> Table:
    """The same for a terminal: bits, loss with its interval, what of the gap is closed; KL and agreement where there is room."""
    columns = (
        Column("model"),
        Column("bits", bits),
        Column("held-out loss", span(lambda v: number(v, 3))),
        *([Column("accuracy", span(percent))] if measured(evaluation, "accuracy") else []),
        Column("gap closed", lambda v: percent(v, 0)),
        Column("KL", number, optional=True),
        Column("top-1", percent, optional=True),
    )
    ends = lambda e, k: (e.get(k), *((e.get("intervals") or {}).get(k) or (None, None)))  # noqa: E731
    levels = lambda e: [ends(e, k) for k in ("loss", "accuracy") if k == "loss" or measured(evaluation, k)]  # noqa: E731
    rows = [(e["name"], e.get("bits"), *levels(e), e.get("gap_closed"), e.get("kl"), e.get("top1")) for e in evaluation["entries"]]
    return Table("evaluation", columns, rows)


PEERS = {
    "qlora": "QLoRA",
    "loftq": "the same bits from LoftQ's start",
    "zeros": "the same bits from QLoRA's start",
    "lora16": "16-bit LoRA",
    "full": "untuned",
}


def verdict(evaluation: Json) -> str:
    """What came out, in a sentence to repeat: "3.1 bits: loss 3.02; QLoRA at 4.1 bits 3.10; 16-bit LoRA 3.00." Empty where nothing was tuned."""
    entries = {e["key"]: e for e in evaluation["entries"] if e.get("loss") is not None}
    main = evaluation.get("main")
    if main is None:
        tuned = [k for k, e in entries.items() if e.get("stage") == "tuned"]
        main = next((k for k in tuned if k not in PEERS), next((k for k in ("loftq", "zeros") if k in tuned), None))
    if main not in entries:
        return ""
    own = entries[main]
    others = [k for k in PEERS if k in entries and k != main and k != "full"] or [k for k in ("full",) if k in entries]
    losses = [entries[k]["loss"] for k in (main, *others)]
    digits = next((d for d in (2, 3) if len({round(v, d) for v in losses}) == len(losses)), 4)
    clauses = [f"{own['bits']:.1f} bits: loss " if own.get("bits") is not None else "Loss "]
    clauses[0] += number(own["loss"], digits)
    for k in others:
        at = f" at {entries[k]['bits']:.1f} bits" if k == "qlora" and entries[k].get("bits") is not None else ""
        clauses.append(f"{PEERS[k]}{at} {number(entries[k]['loss'], digits)}")
    few = too_few(evaluation)
    return "; ".join(clauses) + "." + (f" With {few}, that decides nothing." if few else "")


def too_few(evaluation: Json) -> str:
    """ "too few rows (7)" where no interval could be given."""
    with_ends = any((e.get("intervals") or {}).get("loss") for e in evaluation["entries"])
    return "" if with_ends or evaluation.get("rows") is None else f"too few rows ({evaluation['rows']})"


def paired_table(evaluation: Json, keys: bool = False) -> Table:
    """Differences on the same rows, with what the interval allows to say; with `keys`, the entries go by those."""
    names = {e["key"]: e["key"] if keys else e["name"] for e in evaluation["entries"]}
    rows = []
    for e in evaluation["entries"]:
        pair = dict(e.get("paired") or {})
        against = pair.pop("against", None)
        for quantity, ends in pair.items():
            if ends is None:
                continue
            middle, lo, hi = ends
            reading = _reading(middle, lo, hi, too_few(evaluation))
            word = quantity if keys else SPELLED.get(quantity, quantity)
            rows.append((names[e["key"]], names.get(against, against), word, (middle, lo, hi), reading))
    column = Column("difference", span(difference), ("difference", "difference low", "difference high"))
    return Table("paired", (Column("model"), Column("against"), Column("quantity"), column, Column("reading")), rows)


def preference_table(evaluation: Json) -> Table:
    """How every entry prefers what was liked: of pairs, or of single answers."""
    kinds = {"accuracy": percent, "margin": number, "loss": number}
    columns = [Column(k, span(show), (k, f"{k} low", f"{k} high")) for k, show in kinds.items()]
    rows = [(e["key"], *(tuple(e["preference"][k]) for k in kinds)) for e in evaluation["entries"] if "preference" in e]
    return Table("preferences", (Column("model"), *columns), rows)


def _reading(middle: float, lo: float | None, hi: float | None, few: str) -> str:
    if lo is None or hi is None:
        return few or "undecided"
    return "higher" if lo > 0 else "lower" if hi < 0 else "equal" if lo == middle == hi == 0 else "undecided"


def measures_table(measure: Json) -> Table:
    """What answers or rows of a task got, with the difference from the model's rival on the same rows.

    >>> entries = [{"name": "base", "value": 0.25, "interval": [0.1, 0.4], "key": "none", "paired": None}]
    >>> print(measures_table({"name": "rows", "measure": "exact", "rows": 40, "entries": entries}).text(), end="")
     model                score  against  difference  reading
     base  25.0% [10.0%, 40.0%]  –                 –  –
    """
    few = "" if any(e["interval"] for e in measure["entries"]) else f"too few rows ({measure['rows']})"
    share = all(0 <= e["value"] <= 1 for e in measure["entries"])
    names, rows = {e["key"]: e["name"] for e in measure["entries"]}, []
    for e in measure["entries"]:
        pair = e["paired"]
        level = (e["value"], *(e["interval"] or (None, None)))
        if pair is None:
            rows.append((e["name"], level, None, (None, None, None), None))
            continue
        middle, lo, hi = pair["difference"]
        rows.append((e["name"], level, names[pair["against"]], (middle, lo, hi), _reading(middle, lo, hi, few)))
    columns = (
        Column("model"),
        Column("score", span(percent if share else number), ("score", "score low", "score high")),
        Column("against"),
        Column("difference", span(difference), ("difference", "difference low", "difference high")),
        Column("reading"),
    )
    return Table(f"{measure['name']}, {measure['measure']}", columns, rows)


def _started(line: Json) -> str:
    """A start that was tried, by name: its method, and what of it is not as usual is left to recipe.yaml."""
    return text(line["init"]["paper"])


def choices_table(choices: Json) -> Table:
    """What was chosen for every matrix, and by how much: the output error left, the next best start and its error, as shares of zeros'."""
    rows = []
    for name, choice in choices.items():
        tried, won = choice["tried"], choice["won"]
        zeros = tried[0]["error"]
        others = sorted((t["error"], _started(t)) for i, t in enumerate(tried) if i != won)
        error, other = others[0] if others else (None, None)
        rows.append((name, _started(tried[won]), choice["share"], other, None if error is None or not zeros > 0 else error / zeros))
    columns = Column("module"), Column("start"), Column("output error left", percent), Column("next best"), Column("its error", percent)
    return Table("start of every matrix", columns, rows)


def starts_table(choices: Json) -> Table:
    """Every start that was tried: its mean output error as a share of zeros', matrices that it won, and the mean of what it left there."""
    shares: dict[str, list[float]] = defaultdict(list)
    won: dict[str, list[float]] = defaultdict(list)
    for choice in choices.values():
        zeros = choice["tried"][0]["error"]
        for line in choice["tried"]:
            shares[_started(line)].append(line["error"] / zeros if zeros > 0 else 1.0)
        won[_started(choice["tried"][choice["won"]])].append(choice["share"])
    mean = lambda v: sum(v) / len(v) if v else None  # noqa: E731
    rows = [(name, mean(errors), len(won[name]), mean(won[name])) for name, errors in shares.items()]
    rows.sort(key=lambda r: (-r[2], r[0]))
    columns = Column("start"), Column("output error left", percent), Column("matrices won", count), Column("left where it won", percent)
    return Table("starts", columns, rows)


def refined_table(refined: Json) -> Table:
    """Losses of refinements, by block and for the whole model: means over the first and the last epoch."""
    rows = [(name or "the whole model", first, last, deviation(first, last)) for name, (first, last) in refined.items()]
    return Table(
        "refinement", (Column("block"), Column("first epoch", number), Column("last epoch", number), Column("change", signed)), rows
    )


def held_to(export: Json) -> str:
    """What verification asks for, in words: the tolerance on logits binds all but merged models, which are rounded anew."""
    more = (
        "; rounded is another model by design, which loses what stands there"
        if any(t.get("verdict") == "rounded" for t in checks(export))
        else ""
    )
    return f"logits within {figures(export.get('tolerance'))}; merged, which is rounded to bfloat16 or a type of GGUF: KL and loss{more}"


def bounds(target: Json) -> str | None:
    """What this target was held to, where its row says so.

    >>> bounds({"bounds": {"logits": None, "kl": 0.01, "loss": 0.01}})
    'KL ≤ 0.01, loss ± 0.01'
    """
    held = target.get("bounds")
    if held is None:
        return None
    logits = "" if held["logits"] is None else f"logits ≤ {figures(held['logits'])}, "
    return f"{logits}KL ≤ {figures(held['kl'])}, loss ± {figures(held['loss'])}"


def export_table(export: Json) -> Table:
    """The verification of everything that was exported."""
    heads = ("target", text), ("size", size), ("max |Δ logit|", figures), ("KL vs trained", number), ("top-1 agree", percent)
    loss = Column("held-out loss", lambda v: number(v, 3)), Column("− trained's", difference)
    columns = (*(Column(*h) for h in heads), *loss, Column("read by", text), Column("verdict"))
    keys = ("name", "bytes", "max_logit_difference", "kl", "top1", "loss", "lost", "reader", "verdict")
    rows = [tuple(t.get(k) for k in keys) for t in checks(export)]
    return Table("export", columns, rows)


def checks(export: Json) -> list[Json]:
    """What was read of every target by the libraries that it is for, and then by the runtimes that serve it.

    >>> [row["reader"] for row in checks({"targets": [{"reader": "transformers", "runtimes": [{"reader": "vLLM"}]}]})]
    ['transformers', 'vLLM']
    """
    return [row for t in export["targets"] for row in (t, *t.get("runtimes", ()))]


def failed(export: Json) -> list[str]:
    """What is not the model that was trained, as stock libraries read it or as a runtime serves it.

    >>> failed({"targets": [{"name": "gptq", "verdict": "same", "runtimes": [{"name": "gptq", "reader": "vLLM", "verdict": "fail"}]}]})
    ['gptq in vLLM']
    """
    rows = [(t, row) for t in export["targets"] for row in (t, *t.get("runtimes", ()))]
    return [t["name"] if row is t else f"{t['name']} in {row['reader']}" for t, row in rows if row.get("verdict") == "fail"]


def told(export: Json) -> list[str]:
    """What is another model, and why runtimes were not asked, in sentences.

    >>> why = {"name": "gguf", "reader": "llama.cpp", "verdict": "not run", "note": "there is no compiler"}
    >>> told({"targets": [{"name": "gguf", "runtimes": [why]}, {"name": "merged", "verdict": "fail"}]})
    ['gguf in llama.cpp: not run: there is no compiler.', 'merged: not the model that was trained: look at the folder, and do not publish it.']
    """
    said = dict[tuple[str, str, str], list[str]]()
    for row in (row for t in export["targets"] for row in t.get("runtimes", ()) if "note" in row):
        said.setdefault((row["reader"], row["verdict"], row["note"]), []).append(row["name"])
    lines = [f"{', '.join(names)} in {reader}: {what}: {note.rstrip('.')}." for (reader, what, note), names in said.items()]
    wrong = failed(export)
    return lines + ([f"{', '.join(wrong)}: not the model that was trained: look at the folder, and do not publish it."] if wrong else [])
