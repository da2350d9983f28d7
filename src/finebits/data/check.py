"""The gate before a run: what would be trained, what would be lost, and which rows are wrong.

A mask that trains nothing, or never trains the token that ends an answer, gives a loss curve that looks fine; so these are failures with
line numbers, not lines in a log. Everything is judged by the labels: one token id may be padding, the end of a turn and EOS at once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from finebits.data.arrays import Example, Tokens
from finebits.data.error import DataError
from finebits.data.finding import Finding, agree, lines_, rows_
from finebits.data.forms._turns import disorder
from finebits.data.limits import UNKNOWN, Limits
from finebits.data.rows import Row, Rows, gathered
from finebits.data.tokens import Encoded, TemplateError, encode, ready
from finebits.data.turns import template_sha, unmet
from finebits.errors import Invalid
from finebits.losses import IGNORED

SCHEMA = "finebits.data/1"
BUCKETS = 16
SHOWN = 8


class GateFailed(Invalid):
    """The data set must not be trained on. `check` holds what was found."""

    code = 4

    def __init__(self, message: str, check: Check) -> None:
        super().__init__(message)
        self.check = check

    def data(self) -> dict[str, Any]:
        return {"check": self.check.to_json()}


@dataclass(frozen=True)
class Check:
    """What the gate saw.

    `lengths` are tokens a row before cutting; `tokens` and `trained_tokens` count what is left after it. `turns` holds how many assistant
    turns (or texts) end with a trained token, and how many there are. `preview` holds the first rows: their line, and their text in pieces
    of (text, whether it is trained). `examples` are the rows that could be tokenized, as the trainer meets them.
    """

    path: str
    format: str
    why: str
    rows: int
    lengths: tuple[int, ...]
    tokens: int
    trained_tokens: int
    truncated: int
    turns: tuple[int, int]
    max_length: int
    assistant_only_loss: bool
    template_sha: str | None
    pad_is_eos: bool
    problems: tuple[Finding, ...]
    preview: tuple[tuple[int | str, tuple[tuple[str, bool], ...]], ...]
    examples: Tokens
    packed: tuple[int, float] | None = None  # how many packs the rows make, and which share of them is filled
    template: str = ""  # its text
    learned: str = ""  # what the loss is on, where it is no text

    @property
    def ok(self) -> bool:
        return not any(finding.level == "fail" for finding in self.problems)

    def quantile(self, share: float) -> int:
        """The length in tokens that this share of the rows does not exceed; 0 if no row could be tokenized."""
        ordered = sorted(self.lengths)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0

    @property
    def packing(self) -> str:
        """In words what packing makes of the rows; empty where they are not packed."""
        packs, filled = self.packed or (0, 0.0)
        said = f"packing: {len(self.examples):,} rows in {packs:,} packs of up to {self.max_length:,} tokens, {filled:.1%} filled"
        return said if self.packed else ""

    def histogram(self) -> list[tuple[int, int]]:
        """(up to this many tokens, rows) in buckets of one width."""
        width = -(-max(self.lengths, default=0) // BUCKETS) or 1
        counts: dict[int, int] = defaultdict(int)
        for length in self.lengths:
            counts[max(0, length - 1) // width] += 1
        return [(width * (i + 1), counts[i]) for i in range(max(counts, default=-1) + 1)]

    def to_json(self) -> dict[str, Any]:
        """The content of data.json."""
        return {
            "schema": SCHEMA,
            "ok": self.ok,
            "path": self.path,
            "format": self.format,
            "why": self.why,
            "rows": self.rows,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "max_length": self.max_length,
            "lengths": {
                "p50": self.quantile(0.5),
                "p95": self.quantile(0.95),
                "max": max(self.lengths, default=0),
                "histogram": [[*bucket] for bucket in self.histogram()],
            },
            "truncated": self.truncated,
            "template_sha": self.template_sha,
            **({"template": self.template} if self.template else {}),
            **({} if self.packed is None else {"packing": {"packs": self.packed[0], "filled": self.packed[1]}}),
            "problems": [finding.to_json() for finding in self.problems],
            "preview": [{"line": line, "pieces": [[*piece] for piece in pieces]} for line, pieces in self.preview],
        }

    def text(self, colour: bool = False) -> str:
        """The check as lines for a terminal; without colour, trained text stands in [[ ]]."""
        share = f"{self.trained_tokens / self.tokens:.1%}" if self.tokens else "none"
        what = "assistant turns only" if self.format == "messages" and self.assistant_only_loss else "every token but a row's first"
        what = "what the rows mark" if self.format == "tokens" else what
        template = f"the tokenizer's own, sha {self.template_sha[:6]}" if self.template_sha else f"none ({self.format} rows)"
        lines = [
            ("", "format", f"{self.format} ({self.why})"),
            *([] if self.learned else [("", "template", template)]),
            (
                "",
                "loss on",
                f"{self.learned}: rows {self.rows:,}" if self.learned else f"{what}: {share} of {self.tokens:,} tokens, rows {self.rows:,}",
            ),
            (
                "",
                "lengths",
                f"half up to {self.quantile(0.5):,} tokens, 95% up to {self.quantile(0.95):,}, longest {max(self.lengths, default=0):,}",
            ),
        ]
        if self.packed is not None:
            lines.append(("", "packing", self.packing.removeprefix("packing: ")))
        kinds = {finding.kind for finding in self.problems}
        if self.lengths and not self.learned and not kinds & {"no_trained_token", "truncated_away"}:
            lines.append(("ok", "rows without any trained token", "0"))
        if self.turns[1] and "end_of_turn" not in kinds:
            lines.append(("ok", "end-of-turn token trained", f"{self.turns[0]:,}/{self.turns[1]:,}"))
        if self.lengths and "roles" not in kinds and self.format == "messages":
            lines.append(("ok", "roles in order", f"{self.rows:,}/{self.rows:,}"))
        if self.lengths and "truncated" not in kinds and "truncated_away" not in kinds:
            lines.append(("ok", f"truncated at {self.max_length:,}", "0"))
        for finding in self.problems:
            where = f"   {lines_(finding.lines)}" if finding.lines else ""
            fix = f"      fix: {finding.fix}" if finding.fix and finding.level != "info" else ""
            lines.append((finding.level, finding.message, where + fix))
        out = []
        for mark, name, value in lines:
            wide = 11 if not mark else 34
            paint = {"ok": "32", "warn": "33", "fail": "31;1"}.get(mark)
            label = f"{mark:<10} " if mark else ""
            label = f"\x1b[{paint}m{label}\x1b[0m" if colour and paint else label
            out.append(f" {label}{name:<{wide}}{value}".rstrip())
        for line, pieces in self.preview[:1]:
            out.append(f" preview (line {line}; trained tokens in {'green' if colour else '[[ ]]'})")
            out += ["   " + row for row in _painted(pieces, colour).split("\n")]
        return "\n".join(out)


def check(
    rows: Rows | Iterable[Row | Mapping[str, Any]],
    tokenizer: Any,
    max_length: int,
    assistant_only_loss: bool = True,
    limits: Limits = UNKNOWN,
) -> Check:
    """Look at every row as the trainer would see it.

    `tokenizer` is a transformers tokenizer, `max_length` counts tokens, `limits` are what the model can take of them. Raises DataError if
    the tokenizer has no chat template (or, for texts, no EOS token); what is wrong with rows is in the result's `problems`.
    """
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, one to see and one to predict; got {max_length}", code=2)
    rows = gathered(rows)
    ready(rows, tokenizer)
    wrong: dict[tuple[str, str], list[int | str]] = defaultdict(list)
    seen: list[Encoded] = []
    several = len({row.path for row in rows}) > 1
    special = [token for token in tokenizer.all_special_tokens if token.strip()]
    opened = ""
    examples: list[Example] = []
    for row in (answer for row in rows for answer in row.answers):
        line = f"{row.path}:{row.line}" if several else row.line
        disordered = disorder(row.messages) if row.messages is not None else None
        if disordered:
            wrong["roles", disordered].append(line)
            continue
        try:
            encoded = encode(row, tokenizer, assistant_only_loss, rows.path)
        except TemplateError as e:
            wrong["template", e.reason].append(line)
            continue
        seen.append(replace(encoded, line=line))
        examples.append(encoded.cut(max_length))
        if any(m["role"] == "assistant" and not m["content"].strip() and len(m) == 2 for m in row.messages or ()):
            wrong["empty_answer", ""].append(line)
        if written := next((token for token in special for m in row.messages or () if token in m["content"]), None):
            wrong["special_text", written].append(line)
        if thoughtless(encoded, row, tokenizer):
            wrong["empty_reasoning", ""].append(line)
        if row.messages is not None and len(seen) == 1:
            opened = unmet(row, tokenizer)

    findings = [
        Finding("roles", "fail", tuple(at), f"{rows_(at)} {agree(at, reason)}", _mend(reason))
        for (kind, reason), at in wrong.items()
        if kind == "roles"
    ]
    findings += [
        Finding("template", "fail", tuple(at), f"{rows_(at)} cannot be masked: {reason}", "mend these rows, or use another chat template")
        for (kind, reason), at in wrong.items()
        if kind == "template"
    ]
    findings += _masks(seen, tokenizer, max_length)
    findings += limits.findings(seen, tokenizer, max_length)
    if at := wrong.get(("empty_answer", "")):
        findings.append(Finding("empty_answer", "warn", tuple(at), f"{rows_(at)} {agree(at, 'hold an empty answer')}", "leave them out"))
    if at := wrong.get(("empty_reasoning", "")):
        message = f"{rows_(at)} {agree(at, 'learn')} an empty <think></think>: the tuned model is taught not to think"
        fix = "ask it without thinking too (enable_thinking=False), or give the answers their reasoning_content"
        findings.append(Finding("empty_reasoning", "warn", tuple(at), message, fix))
    findings += [
        Finding(
            "special_text",
            "warn",
            tuple(at),
            f"{rows_(at)} with the token {token} in their text, which is read as that token",
            "write it otherwise",
        )
        for (kind, token), at in wrong.items()
        if kind == "special_text"
    ]
    if opened:
        message = f"the generation prompt {opened!r} is not how the chat template begins these answers: the tuned model is asked otherwise"
        findings.append(Finding("generation_prompt", "warn", (), message, "give the answers what it opens, or use another chat template"))
    same = tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id
    if same:
        findings.append(Finding("pad_is_eos", "info", (), "pad == eos: harmless here, labels follow the lengths and not the token id"))

    tokens = Tokens.of(examples, max_length, assistant_only_loss)
    ended = [end is not None and e.trained[end] for e in seen for end in e.ends]
    return Check(
        path=rows.path,
        format=rows.format,
        why=rows.why,
        rows=len(rows),
        lengths=tuple(len(e.ids) for e in seen),
        tokens=len(tokens.ids),
        trained_tokens=int(tokens.trained.sum()),
        truncated=sum(e.truncated > 0 for e in examples),
        turns=(sum(ended), len(ended)),
        max_length=max_length,
        assistant_only_loss=assistant_only_loss,
        template_sha=template_sha(tokenizer) if rows.format == "messages" else None,
        template=str(tokenizer.chat_template) if rows.format == "messages" else "",
        pad_is_eos=same,
        problems=tuple(findings),
        preview=tuple((s.line, tuple(pieces(e.input_ids, e.labels, tokenizer))) for s, e in zip(seen, examples[:SHOWN])),
        examples=tokens,
    )


def thoughtless(encoded: Encoded, row: Row, tokenizer: Any) -> bool:
    """Is an empty block of reasoning, which templates of hybrid models write where an answer brings none, among what a row's answers teach?"""
    marked = "</think>" in str(tokenizer.chat_template) if row.messages is not None else "</think>" in (row.text or "")
    if not (marked or any("</think>" in m["content"] for m in row.messages or ())):
        return False
    learned = [id for id, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
    return re.search(r"<think>\s*</think>", tokenizer.decode(learned, skip_special_tokens=False)) is not None


def _mend(disorder: str) -> str:
    incomplete = disorder.startswith("end with") or disorder == "hold no assistant turn"
    return "mend these rows or leave them out" + (" (--drop-incomplete; in a recipe data.drop_incomplete)" if incomplete else "")


def require(check: Check) -> None:
    """Raises GateFailed, in one sentence with the line numbers, unless the check is ok."""
    failed = [finding for finding in check.problems if finding.level == "fail"]
    if failed:
        what = "; ".join(f"{p.message} ({lines_(p.lines)})" if p.lines else p.message for p in failed)
        fixes = "; ".join(dict.fromkeys(p.fix for p in failed if p.fix))
        raise GateFailed(f"{check.path} does not pass the data gate: {what}. Fix: {fixes}.", check)


def pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """The text of the tokens, in runs that are trained or not.

    >>> from types import SimpleNamespace
    >>> words = SimpleNamespace(decode=lambda ids, **_: " ".join("?abc"[i] for i in ids))  # in the place of a tokenizer
    >>> list(pieces([1, 2, 3], [-100, 2, 3], words))
    [('a', False), ('b c', True)]
    """
    for trained, run in groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED):
        yield tokenizer.decode([id for id, _ in run], skip_special_tokens=False), trained


def _masks(seen: Sequence[Encoded], tokenizer: Any, max_length: int) -> Iterator[Finding]:
    none = [e.line for e in seen if not any(e.trained)]
    if none:
        fix = "give every row an answer, or leave it out"
        yield Finding("no_trained_token", "fail", tuple(none), f"{rows_(none)} without any trained token", fix)
    open_ = [e.line for e in seen if any(e.trained) and not all(end is not None and e.trained[end] for end in e.ends)]
    if open_:
        fix = "use a chat template that ends the assistant's turn with a special token"
        message = f"{rows_(open_)} whose end of turn is not trained: the model would never stop"
        yield Finding("end_of_turn", "fail", tuple(open_), message, fix)
    away = [e.line for e in seen if any(e.trained) and not any(e.trained[:max_length])]
    if away:
        message = f"{rows_(away)} with no trained token left at {max_length:,} tokens"
        yield Finding("truncated_away", "fail", tuple(away), message, "raise max_length, or leave them out")
    gone = set(away)
    cut = [e for e in seen if len(e.ids) > max_length and e.line not in gone]
    if cut:
        lost, had = sum(sum(e.trained[max_length:]) for e in cut), sum(sum(e.trained) for e in cut)
        at = [e.line for e in cut]
        loss = f"{rows_(at)} {agree(at, 'lose')} {lost / had:.0%} of the trained tokens"
        message = f"truncated at {max_length:,}: {len(at) / len(seen):.1%} ({loss})"
        yield Finding("truncated", "warn", tuple(at), message, "raise max_length")
    bos = tokenizer.bos_token_id
    double = [e.line for e in seen if bos is not None and e.ids[:2] == [bos, bos]]
    if double:
        yield Finding("double_bos", "warn", tuple(double), f"{rows_(double)} with two BOS tokens", "take the BOS token out of the text")


def _painted(pieces: Sequence[tuple[str, bool]], colour: bool) -> str:
    out = []
    for text, trained in pieces:
        # A data set must not be able to steer the terminal.
        text = "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
        limit = 800 if trained else 400
        if len(text) > 1.2 * limit:
            text = f"{text[: limit // 2]} … {text[-limit // 2 :]}"
        if trained:
            body = text.rstrip("\n")
            text = (f"\x1b[32m{body}\x1b[0m".replace("\n", "\x1b[0m\n\x1b[32m") if colour else f"[[{body}]]") + text[len(body) :]
        out.append(text)
    return "".join(out).rstrip("\n")
