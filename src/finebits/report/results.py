"""The tables of what a run measured, made once and shown twice as those of its plan are (`tables`)."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from finebits.report.cells import Column, Json, Table, count, difference, number, percent, signed, size, span, text
from finebits.report.tables import bits, figures


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
