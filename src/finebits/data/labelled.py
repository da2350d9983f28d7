"""Rows that carry a label: which class each is of, and what the gate finds wrong with them.

In arrays the class of a row follows its numbers, and is what is learned of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from finebits.data.arrays import Example, Tokens
from finebits.data.check import SHOWN, Check
from finebits.data.error import DataError
from finebits.data.finding import Finding, agree, rows_
from finebits.data.limits import Limits
from finebits.data.rows import Row, Rows
from finebits.data.tokens import Encoded
from finebits.losses import IGNORED


def kind(row: Row, names: Sequence[str]) -> int | None:
    """The number of a row's class: its label is a name of these, or a number; None where it is neither.

    >>> [kind(Row(1, text="…", label=label), ["ham", "spam"]) for label in ("spam", 0, "eggs")]
    [1, 0, None]
    """
    if isinstance(row.label, int) and not isinstance(row.label, bool):
        return row.label if 0 <= row.label < len(names) else None
    return names.index(row.label) if row.label in names else None


def classes(rows: Rows, names: Sequence[str]) -> list[int]:
    """The class of every row. Raises DataError, naming the first row that has none.

    >>> rows = Rows("a.jsonl", "text", "", (Row(1, text="…", label="spam"), Row(2, text="…", label="eggs")))
    >>> classes(rows[:1], ["ham", "spam"])
    [1]
    >>> classes(rows, ["ham", "spam"])
    Traceback (most recent call last):
        ...
    finebits.data.error.DataError: a.jsonl:2: the row has the "label" 'eggs'; wanted one of 'ham', 'spam', or its number from 0 to 1
    """
    numbers = []
    for row in rows:
        one = kind(row, names)
        if one is None:
            got = 'no "label"' if row.label is None else f'the "label" {row.label!r}'
            raise DataError(f"{row.path or rows.path}:{row.line}: the row has {got}; wanted {_known(names)}")
        numbers.append(one)
    return numbers


def looked_at(
    rows: Rows,
    names: Sequence[str],
    seen: Sequence[Encoded | None],
    shown: Iterable[str],
    cut: Callable[[Row, Encoded], list[int]],
    max_length: int,
    limits: Limits,
    tokenizer: Any = None,
) -> Check:
    """What the gate says of labelled rows. `seen` are the rows as the model is given them, uncut, None where a row holds nothing of the kind
    that the model takes; `shown` begins with the first rows in words, and `cut` gives a row's numbers as the trainer meets them."""
    several = len({row.path for row in rows}) > 1
    lines = [f"{row.path}:{row.line}" if several else row.line for row in rows]
    kinds = [kind(row, names) for row in rows]
    findings = []
    if at := [line for line, e in zip(lines, seen, strict=True) if e is None]:
        findings.append(
            Finding("nothing", "fail", tuple(at), f"{rows_(at)} {agree(at, 'hold nothing that this model takes')}", "leave them out")
        )
    if at := [line for line, k in zip(lines, kinds, strict=True) if k is None]:
        message = f"{rows_(at)} without a label of the model ({_known(names)})"
        findings.append(Finding("label", "fail", tuple(at), message, "mend these labels, or leave the rows out"))
    counts = Counter(k for k in kinds if k is not None)
    if lost := [name for i, name in enumerate(names) if not counts[i]]:
        findings.append(Finding("classes", "info", (), f"no row is of {', '.join(map(repr, lost[:5]))}"))
    usable = [e for e in seen if e is not None]
    if tokenizer is not None:
        findings += limits.findings(usable, tokenizer, max_length)
    if at := [e.line for e in usable if len(e.ids) > max_length]:
        message = f"truncated at {max_length:,}: {len(at) / len(usable):.1%} of the rows"
        findings.append(Finding("truncated", "warn", tuple(at), message, "raise max_length"))
    known = [(row, e, k) for row, e, k in zip(rows, seen, kinds, strict=True) if e is not None and k is not None]
    examples = [example(row, cut(row, e), k, len(e.ids), rows.path) for row, e, k in known]
    preview = [(line, ((text, False), (f" → {row.label}", True))) for line, row, text in zip(lines, rows, shown, strict=False)]
    shares = ", ".join(f"{names[k]} {n / max(sum(counts.values()), 1):.0%}" for k, n in counts.most_common(4))
    return Check(
        path=rows.path,
        format=rows.format,
        why=f"{rows.why}; labels: {shares}{', …' if len(counts) > 4 else ''}",
        rows=len(rows),
        lengths=tuple(len(e.ids) for e in usable),
        tokens=sum(min(len(e.ids), max_length) for e in usable),
        trained_tokens=sum(counts.values()),
        truncated=sum(len(e.ids) > max_length for e in usable),
        turns=(0, 0),
        max_length=max_length,
        assistant_only_loss=False,
        template_sha=None,
        pad_is_eos=False,
        problems=tuple(findings),
        preview=tuple(preview[:SHOWN]),
        examples=Tokens.of(examples, max_length, False),
        learned="a label a row",
    )


def example(row: Row, numbers: Sequence[int], label: int, length: int, path: str) -> Example:
    """A row of numbers, `length` of them before it was cut, with its class behind them.

    >>> made = example(Row(1, text="…"), [5, 6], label=1, length=4, path="a.jsonl")
    >>> made.input_ids, made.labels, made.truncated
    ([5, 6, 1], [-100, -100, 1], 2)
    """
    return Example([*numbers, label], [IGNORED] * len(numbers) + [label], row.line, max(length - len(numbers), 0), row.path or path)


def within(tokens: Tokens, max_length: int) -> Tokens:
    """The same with no row longer than `max_length`, its class aside.

    >>> tokens = Tokens.of([Example([5, 6, 7, 1], [-100, -100, -100, 1], 1)], 3, False)  # three tokens of class 1
    >>> within(tokens, 2)[0].input_ids
    [5, 6, 1]
    """
    if max(tokens.lengths, default=0) <= max_length + 1:
        return tokens
    keep = lambda values: [*values[: min(max_length, len(values) - 1)], values[-1]]  # noqa: E731
    cut = ((e, max(len(e.input_ids) - 1 - max_length, 0)) for e in tokens)
    examples = (Example(keep(e.input_ids), keep(e.labels), e.line, e.truncated + n, e.path) for e, n in cut)
    return Tokens.of(examples, max_length, False)


def _known(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")
    return f"one of {shown}, or its number from 0 to {len(names) - 1}"
