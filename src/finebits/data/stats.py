"""Figures of a data set: lengths, what is trained, what cutting at several lengths and packing would do, rows that say the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from finebits.data.arrays import Tokens
from finebits.data.duplicates import repeated
from finebits.data.packing import best_fit
from finebits.data.rows import Rows

SCHEMA = "finebits.data_stats/1"
SHARES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
LEAST = 64  # the shortest length that cutting is shown for


def stats(rows: Rows, tokens: Tokens, max_length: int) -> dict[str, Any]:
    """Figures of rows that were tokenized without cutting.

    >>> from finebits.data.arrays import Example
    >>> from finebits.data.rows import shaped
    >>> rows = shaped([(1, {"text": "a"}), (2, {"text": "b"})], "a.jsonl")
    >>> tokens = Tokens.of([Example([5, 6, 7], [-100, 6, 7], 1), Example([5, 8], [-100, 8], 2)], 3, True)
    >>> held = stats(rows, tokens, max_length=2)
    >>> held["tokens"], held["trained_tokens"], held["lengths"]["p50"], held["cut"][0]
    (5, 3, 3, {'max_length': 2, 'rows': 1, 'tokens': 1, 'trained_tokens': 1, 'nothing_left': 0})
    """
    lengths, trained = tokens.lengths, tokens.labelled
    longest = max(lengths, default=0)
    grid = {max_length}
    step = LEAST
    while step < longest:
        grid.add(step)
        step *= 2
    same = repeated(rows.rows)
    packs = best_fit([min(n, max_length) for n in lengths], max_length)
    kept = sum(min(n, max_length) for n in lengths)
    return {
        "schema": SCHEMA,
        "path": rows.path,
        "format": rows.format,
        "why": rows.why,
        "rows": len(rows),
        "files": dict(Counter(row.path or rows.path for row in rows)),
        "tokenized": len(lengths),
        "tokens": sum(lengths),
        "trained_tokens": sum(trained),
        "max_length": max_length,
        "lengths": _quantiles(lengths),
        "trained": _quantiles(trained),
        "cut": [_cut(tokens, at) for at in sorted(grid)],
        "packing": {"packs": len(packs), "filled": kept / (len(packs) * max_length) if packs else 0.0},
        "duplicates": {"rows": sum(len(s) - 1 for s in same), "lines": [[rows[i].line for i in s[:8]] for s in same[:8]]},
    }


def text(held: dict[str, Any]) -> str:
    """The figures as lines for a terminal."""
    names = ["mean", *(f"p{round(100 * s)}" for s in SHARES), "max"]
    share = f"{held['trained_tokens'] / held['tokens']:.1%}" if held["tokens"] else "none"
    lines = [
        f" {'rows':<11}{held['rows']:,} {held['format']} ({held['why']})",
        *(
            [f" {'files':<11}" + ", ".join(f"{path} {n:,}" for path, n in list(held["files"].items())[:6])]
            if len(held["files"]) > 1
            else []
        ),
        f" {'tokens':<11}{held['tokens']:,}, {share} of them trained",
        "",
        f" {'':<16}" + "".join(f"{name:>9}" for name in names),
        *(
            f" {what:<16}" + "".join(f"{held[key][name]:>9,}" for name in names)
            for what, key in (("tokens a row", "lengths"), ("trained", "trained"))
        ),
        "",
        f" {'cut at':>9}{'rows cut':>12}{'tokens lost':>14}{'trained lost':>15}{'nothing left':>15}",
    ]
    for cut in held["cut"]:
        rows, all_ = max(held["tokenized"], 1), (max(held["tokens"], 1), max(held["trained_tokens"], 1))
        lost = (
            f"{cut['rows'] / rows:>12.1%}{cut['tokens'] / all_[0]:>14.1%}{cut['trained_tokens'] / all_[1]:>15.1%}{cut['nothing_left']:>15,}"
        )
        lines.append(f" {cut['max_length']:>9,}{lost}{'   max_length' if cut['max_length'] == held['max_length'] else ''}")
    packing, same = held["packing"], held["duplicates"]
    lines += [
        "",
        f" {'packing':<11}{held['tokenized']:,} rows in {packing['packs']:,} packs of {held['max_length']:,}, {packing['filled']:.1%} filled",
    ]
    again = "; ".join("lines " + ", ".join(map(str, group)) for group in same["lines"][:3])
    lines.append(f" {'duplicates':<11}{same['rows']:,}{f' ({again})' if again else ''}")
    return "\n".join(lines)


def _quantiles(numbers: Sequence[int]) -> dict[str, int]:
    ordered = sorted(numbers)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0  # noqa: E731
    mean = round(sum(ordered) / len(ordered)) if ordered else 0
    return {"mean": mean} | {f"p{round(100 * s)}": at(s) for s in SHARES} | {"max": ordered[-1] if ordered else 0}


def _cut(tokens: Tokens, at: int) -> dict[str, int]:
    """What is lost where rows are cut at a length."""
    lengths = torch.tensor(tokens.lengths, dtype=torch.int64)
    place = torch.arange(len(tokens.ids)) - torch.repeat_interleave(tokens.ends - lengths, lengths)
    lost = tokens.trained & (place >= at)
    row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    left = torch.zeros(len(lengths), dtype=torch.int64).index_add_(0, row, (tokens.trained & (place < at)).long())
    had = torch.tensor(tokens.labelled, dtype=torch.int64)
    return {
        "max_length": at,
        "rows": int((lengths > at).sum()),
        "tokens": int((lengths - at).clamp_min(0).sum()),
        "trained_tokens": int(lost.sum()),
        "nothing_left": int(((left == 0) & (had > 0)).sum()),
    }
