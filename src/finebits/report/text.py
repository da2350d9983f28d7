"""The terminal's view of a plan and a run. Plain text; colour codes only where they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finebits.report import cells, results, tables, why
from finebits.report.cells import columns, count, paint, percent, short, size

if TYPE_CHECKING:
    from finebits.plan.base import Plan

__all__ = ["columns", "evaluation_table", "export_table", "measured_anew", "memory_table", "plan_summary", "requantized", "short"]

WIDTH = 76


def plan_summary(plan: Plan, colour: bool = False) -> str:
    """What the plan holds, in a few lines: model, budget, memory, levers, bits, protection, solver.

    Only figures that the plan really has are printed; a plan written by hand gets fewer lines.
    """
    matrices, lines = tables.matrices(plan), []

    def say(label: str, *texts: str) -> None:
        for i, text in enumerate(texts):
            head = paint(f"{'' if i else label:<10}", "label", colour)
            lines.append(f" {head} {text if label == 'Memory' else cells.clean(text)}".rstrip())

    weights = [m.weights for m in matrices]
    in_them = f" with {count(sum(w or 0 for w in weights))} weights" if matrices and all(weights) else ""
    say("Model", plan.model or "unnamed", f"{len(matrices)} linear matrices{in_them}")
    for notice in plan.notices:
        say("Notice", *wrap(notice.split(), " "))
    if plan.budget is not None:
        left = plan.budget - plan.need
        room = f"{size(left)} to spare" if left >= 0 else f"{size(-left)} too much"
        held = round(plan.budget * (plan.sizes.get("reserve") or 0.0))
        room += f" (reserve {size(held)})" if held and left >= 0 else ""
        largest = max(plan.phases, key=lambda phase: plan.phases[phase])
        most = "" if largest == "training" else f", {largest} {size(plan.need)}"
        say("Budget", tables.stated(plan) + (f"   predicted training peak {size(plan.peak)}{most}   {room}" if plan.memory else ""))
    table = tables.alternatives_table(plan)
    if table is not None:
        lines += ["", *what_fits(plan, colour), ""]
    rest = tables.buys_table(plan)
    if rest is not None and plan.budget is not None:
        lines += [f" Much is left over: of {size(plan.budget)} the job takes {size(plan.need)}. The rest could buy, each alone:"]
        lines += [*rest.text(colour).rstrip("\n").splitlines(), ""]
    if plan.memory:
        say("Memory", *memory_bar(plan.memory, plan.budget, colour))
    if plan.host:
        say(
            "Host",
            *(
                f"{size(nbytes)} of {term} stay in host memory and off the {plan.levers.device} device"
                for term, nbytes in plan.host.items()
            ),
        )
    if plan.rows:
        say("Peaks", *wrap([f"{phase} {size(peak)}" for phase, peak in plan.rows.items()]))
    if shown := tables.levers(plan):
        say("Levers", *wrap([f"{k} {v}" for k, v in shown.items()], " | "))
    average = tables.average_bits(matrices)
    say("Bits", *format_bars(tables.formats_table(plan)))
    if average is not None:
        say("", f"average {average:.3f} bits per linear weight, scales and padding included")
    protected = tables.most_protected(matrices)
    if protected:
        say("Protected", *wrap(protected, "; "))
    table = why.adapters_table(plan)
    if table is not None:
        lines += ["", " Adapters to choose from", *table.text(colour, 100).rstrip("\n").splitlines()]
        lines += [*(f" {line}" for line in wrap(why.CHOSEN.split(), " ")), ""]
    table = why.ranks_table(plan)
    own = ("rank", "alpha") if table is not None else ()  # of every matrix
    adapters = Counter((why.named(s.adapter, own), why.named(s.init)) for s in plan.modules.values() if s.adapter is not None)
    say("Adapter", *(f"{adapter} on {n} matrices, start {init}" for (adapter, init), n in adapters.items()))
    if table is not None:
        first, *more = [f"{r} on {n:,}" for r, n, _ in table.rows]
        say("Ranks", *wrap([f"{why.giver(plan)}: {first}", *more], ", "))
    table = why.sizes_table(plan)
    if table is not None:
        say("Blocks", *wrap([", ".join(f"{block} on {n:,}" for block, n, *_ in table.rows), *why.rules(plan)], "; "))
    if plan.solver:
        say("Solver", solver_line(plan.solver))
    if plan.solver.get("kl"):
        say("Predicted", kl_line(plan.solver["kl"]))
    table = why.trials_table(plan)
    if table is not None:
        lines += ["", " What was tried: quantized, and measured on calibration rows (in brackets one standard error)"]
        lines += [*table.text(colour, 100).rstrip("\n").splitlines(), ""]
    if plan.solver.get("serve"):
        serve = plan.solver["serve"]
        if pool := serve.get("pool"):
            of = [f"{size(pool['page'] * pool['adapter_pages'])} for its own adapter and {pool['adapters']} of rank {pool['rank']}"]
            of += [f"{size(pool['page'] * pool['cache_pages'])} for keys and values of {pool['tokens']:,} tokens"]
            whole = (
                f"{size(serve['planned'])} of a serve budget of {size(serve['budget'])}: {size(serve['planned'] - pool['bytes'])} saved, "
            )
            say("Served", *wrap(f"{whole}{' and '.join(of)} (finebits serve --budget {pool['bytes']})".split(), " "))
        else:
            say("Saved", f"{size(serve['planned'])} of a serve budget of {size(serve['budget'])}")
    return "\n".join(lines) + "\n"


def what_fits(plan: Plan, colour: bool = False) -> list[str]:
    """The alternatives as a table, lettered, the chosen one marked, and how sure the figures are."""
    alternatives = plan.solver["alternatives"]
    word, wide = tables.loss_word(plan), max(len(r["name"]) for r in alternatives)
    title = "What else there is" if plan.budget is None else f"What fits in {size(plan.budget)}"
    lines = [paint(f" {title}".ljust(wide + 8) + f"{'bits':>7}{'peak':>12}{word:>16}", "head", colour)]
    for letter, row in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", alternatives, strict=False):
        text = f" {'>' if row['chosen'] else ' '} {letter}  {row['name']:<{wide}} {row['bits']:>7.2f}{size(row['peak']):>12}"
        text += f"{tables.figures(row['loss']):>16}   {tables.fits(row)}"
        lines.append(paint(text, "strong" if row["chosen"] else "same" if row["over"] == 0 else "", colour))
    probed = plan.solver.get("probed")
    sure = "memory from shapes, within about 10 %; --probe measures it" if plan.levers.device == "cpu" else "memory from shapes, not probed"
    if probed:
        off = cells.signed(results.deviation(probed["planned"], probed["measured"]))
        sure = f"memory probed: {size(probed['measured'])} measured where {size(probed['planned'])} was planned ({off}), and planned anew"
    return [*lines, f"   {sure}"]


def buys_table(offers: Sequence[Any], verdict: str, budget: int, device: str, colour: bool = False) -> str:
    """Models within one budget, the best buy first, what each is judged by, and on what the order rests."""
    wide = max(len(cells.clean(o.model)) for o in offers)
    title = f" What fits in {size(budget)} ({device})"
    fit = [o for o in offers if o.effective is not None]
    nats, all_nats = any(o.predicted for o in fit), all(o.predicted for o in fit)
    heads = f"{'parameters':>11}{'bits':>7}{'peak':>12}{'effective':>11}" + f"{'nats a byte':>24}" * nats
    lines = [paint(f"{title:<{wide + 5}}{heads}", "head", colour)]
    for i, o in enumerate(offers):
        name = f" {'>' if i == 0 and o.effective is not None else ' '} {cells.clean(o.model):<{wide}} {billions(o.parameters):>12}"
        if o.effective is None:
            lines.append(f"{name}{cells.ABSENT:>7}{cells.ABSENT:>12}{cells.ABSENT:>11}   no, needs {size(o.smallest)}")
            continue
        low, best, high = o.predicted or (0.0, 0.0, 0.0)
        known = f"{best:.3f}" + (f" [{low:.3f}, {high:.3f}]" if high > low else "")
        lines.append(
            f"{name}{o.bits:>7.2f}{size(o.peak):>12}{billions(o.effective):>11}" + f"{known if o.predicted else cells.ABSENT:>24}" * nats
        )
        lines.append(paint(f"   {'':<{wide}}   {o.basis}; {o.levers}", "free", colour))
    predicted = (
        "The order rests on the loss that is predicted before training: the full-precision model's on",
        "the calibration's rows, and what the plan adds to it, a byte of text, so that tokenizers do",
        "not count. How much fine-tuning mends is not in it.",
    )
    thumb = (
        "The order rests on a rule of thumb: parameters, each matrix discounted by ten times the",
        "relative error of its format before training (4 bits come out as the best use of a byte).",
        "What the models were trained on, and how much fine-tuning mends, are not in it.",
    )
    mixed = ("Predicted losses do not decide: a model without one is among those that fit.",) if nats and not all_nats else ()
    rest = predicted if fit and all_nats else (*mixed, *thumb)
    return "\n".join([*lines, "", f" {cells.clean(verdict)}", *(f" {line}" for line in rest)]) + "\n"


def billions(n: float) -> str:
    """8030261248 -> "8.03 B"."""
    return f"{n / 1e9:.2f} B" if abs(n) >= 1e9 else f"{n / 1e6:.0f} M"


def format_bars(formats: cells.Table) -> list[str]:
    """One line a format: matrices, stored bits per weight, and a bar of the matrices."""
    wide = max((len(r[0]) for r in formats.rows), default=0)
    most = max((r[1] for r in formats.rows), default=1)
    lines = []
    for name, n, *_, average in formats.rows:
        per = "" if average is None else f"{average:6.2f} bits per weight  "
        lines.append(f"{name.ljust(wide)}  {n:>5,} matrices  {per}{'#' * max(1, round(24 * n / most))}")
    return lines


def solver_line(solver: Mapping[str, Any]) -> str:
    """ "lagrange: loss 0.01234, within 0.02 % of the bound 0.01233"; without a bound there is no gap to speak of."""
    clauses = []
    if solver.get("loss") is not None:
        kind = f" ({solver['objective']} error)" if solver.get("objective") else ""
        clauses.append(f"loss {solver['loss']:.5g}{kind}")
    if solver.get("bound") is not None and solver.get("gap") is not None:
        clauses.append(f"within {100 * solver['gap']:.2g} % of the bound {solver['bound']:.5g}")
    if solver.get("measured") is False:
        clauses.append("typical errors, weights not read")
    name = str(solver.get("name", "unnamed"))
    return f"{name}: {', '.join(clauses)}" if clauses else name


def kl_line(kl: Mapping[str, Any]) -> str:
    """ "KL 0.034 – 0.046 (80%) before training, from 3 evaluated variants; 0.041 on calibration rows": not a bare number."""
    low, _, high = kl["interval"]
    line = f"KL {low:.3g} – {high:.3g} ({kl['share']:.0%}) before training, from {len(kl['variants'])} evaluated variants"
    return line + (f"; {kl['measured']:.3g} on calibration rows" if kl.get("measured") is not None else "")


def memory_bar(memory: Mapping[str, int], budget: int | None, colour: bool = False) -> list[str]:
    """A bar to scale, and every term below it with the letter of its piece. Dots up to the end are what the budget leaves free."""
    total = sum(memory.values())
    scale = max(total, budget or 0) or 1
    memory = {cells.clean(k): v for k, v in memory.items() if v or not total}
    terms = [(k, v) for k, v in memory.items() if v > 0]
    edges, done = [0], 0
    for _, v in terms:
        done += v
        edges.append(round(WIDTH * done / scale))
    letters = dict(zip((k for k, _ in terms), "abcdefghijklmnopqrstuvwxyz", strict=False))
    pieces = []
    for (term, _), a, b in zip(terms, edges, edges[1:], strict=False):
        inside, letter = max(b - a - 1, 0), letters.get(term, "#")
        pieces.append("|" * (b > a) + (f" {term} " if len(term) + 3 <= inside else "").ljust(inside, letter))
    bar = "".join(pieces) + "|"
    if budget and budget > total:
        bar += paint("." * (WIDTH - edges[-1]), "free", colour) + "|"
    wide = max((len(k) for k in memory), default=0)
    below = [
        f"{letters.get(k, ' ')} {k.ljust(wide)}  {size(v):>12}  {percent(v / total) if total else cells.ABSENT:>6}"
        for k, v in memory.items()
    ]
    return [bar, *below, paint(f"  {'sum'.ljust(wide)}  {size(total):>12}", "strong", colour)]


def evaluation_table(evaluation: Mapping[str, Any], colour: bool = False, width: int = 100) -> str:
    """evaluation.json as aligned text in `width` columns: intervals, the share of the gap closed, paired differences, and a sentence."""
    few = results.too_few(evaluation)
    how = f"no intervals: {few}" if few else "95% intervals by resampling rows"
    over = f" {count(evaluation.get('rows'))} held-out rows, {count(evaluation.get('tokens'))} {evaluation.get('unit', 'tokens')}, {how}\n"
    pairs = results.paired_table(evaluation, keys=True)
    below = "\n Paired differences, the same rows in both\n" + pairs.text(colour, width) if pairs.rows else ""
    liked = results.preference_table(evaluation)
    below += "\n Preferences on held-out rows\n" + liked.text(colour, width) if liked.rows else ""
    verdict = results.verdict(evaluation)
    below += f"\n {paint(verdict, 'strong', colour)}\n" if verdict else ""
    return over + results.brief_table(evaluation).text(colour, width) + below


def measured_anew(evaluation: Mapping[str, Any], colour: bool = False, width: int = 100) -> str:
    """What `finebits eval` measured beside a run's own evaluation: rows, another text, answers and tasks, each with what may be said of it."""
    parts = [f" {evaluation['what']} on {evaluation['data']}\n"] if evaluation["entries"] else []
    parts += [evaluation_table(evaluation, colour, width)] if evaluation["entries"] else []
    if other := evaluation.get("forgetting"):
        parts.append(f" Forgetting: {other['text']}\n" + evaluation_table(other, colour, width))
    for part in evaluation.get("measures", ()):
        parts.append(f" {part['name']}: {part['measure']}, {count(part['rows'])} rows\n" + results.measures_table(part).text(colour, width))
    return "\n".join([*parts, *(f" {note}\n" for note in evaluation["notes"])])


def memory_table(memory: Mapping[str, Any], colour: bool = False) -> str:
    """memory.json as aligned text: planned, measured, deviation. The deviation is measured / planned - 1."""
    return results.memory_table(memory).text(colour)


def export_table(export: Mapping[str, Any], colour: bool = False) -> str:
    """export.json as aligned text, with the tolerance that the verdicts were given under."""
    over = f" reference = the trained model, {count(export.get('rows'))} held-out rows\n {results.held_to(export)}\n"
    anew = next((t["requantized"] for t in export["targets"] if "requantized" in t), None)
    more = "".join(f" {line}\n" for line in ([] if anew is None else requantized(anew)) + results.told(export))
    return over + results.export_table(export).text(colour) + more


def requantized(report: Mapping[str, Any]) -> list[str]:
    """What requantized.json says, in sentences.

    >>> how = {"name": "int4-b32", "quantizer": {"paper": "gptq"}, "refine": [], "rows": 32, "loss": 3.02, "tuned": 3.0, "kl": 0.01}
    >>> requantized(how | {"layers": {"up_proj": {"kept": 0.97, "noise": 4.0}}})[1]
    "Of what the adapter adds to a layer's outputs, rounding keeps 97% in the median layer; least: up_proj 97%."
    """
    how = f"{report['name']} by {report['quantizer']['paper']}"
    how += "".join(f", {r['paper']}" for r in report["refine"])
    lines = [
        f"Base and adapter, rounded to {how} on {report['rows']} training rows: held-out loss {report['loss']:.3f}, tuned "
        f"{report['tuned']:.3f}, KL {report['kl']:.4f}."
    ]
    kept = sorted((layer["kept"], name) for name, layer in report["layers"].items() if layer["kept"] is not None)
    if kept:
        least = ", ".join(f"{name} {share:.0%}" for share, name in kept[:3])
        lines += [
            f"Of what the adapter adds to a layer's outputs, rounding keeps {kept[len(kept) // 2][0]:.0%} in the median layer; least: {least}."
        ]
    return lines


def wrap(items: Sequence[str], between: str = "   ") -> list[str]:
    """Items in lines of at most WIDTH characters; an item is never broken."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(between) + len(item) <= WIDTH:
            lines[-1] += between + item
        else:
            lines.append(item)
    return lines
