"""Results go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from finebits.messages import Message
from finebits.progress import alive

HERE = Path(__file__).parents[1]
BOLD, RED, GREEN, YELLOW, PLAIN = "\x1b[1m", "\x1b[31;1m", "\x1b[32m", "\x1b[33m", "\x1b[0m"


def remark(line: str) -> None:
    """A line on stderr, whatever becomes of it: what serves goes on where a disk of logs is full."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


class Form(StrEnum):
    """How results are printed."""

    auto = "auto"
    human = "human"
    json = "json"
    quiet = "quiet"


@dataclass
class Screen:
    """Where results go. One result a command: `show` prints it in the form that was asked for."""

    form: Form = Form.auto
    traceback: bool = False
    verb: str = "finebits"
    code: int = 0
    stopped: Callable[[], str] = lambda: ""  # how to go on after Ctrl-C, where a verb can
    warnings: list[dict[str, str]] = field(default_factory=list)

    @property
    def colour(self) -> bool:
        """Paint stdout? Never under NO_COLOR; where nobody said, only on a terminal."""
        return not os.environ.get("NO_COLOR") and (self.form is Form.human or (self.form is Form.auto and sys.stdout.isatty()))

    def show(self, data: Any, human: Callable[[], str], quiet: str = "", schema: str | None = None) -> None:
        """The result: `data` in JSON, `human()` for people, `quiet` (a path, or nothing) for scripts."""
        if self.form is Form.json:
            self.envelope(data, schema or f"finebits.{self.verb}/1")
        elif self.form is Form.quiet:
            if quiet:
                print(quiet)
        else:
            print(human().rstrip("\n"))

    def envelope(self, data: Any, schema: str) -> None:
        """One JSON object on stdout."""
        document = {"schema": schema, "ok": not self.code, "exit": self.code, "data": data, "warnings": self.warnings}
        wide = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
        print(json.dumps(document, ensure_ascii=not wide, default=str))

    def failed(self, message: Message) -> None:
        """The sentence on stderr; in JSON the envelope on stdout as well."""
        self.code = message.code
        if self.form is Form.json:
            self.envelope({"message": message.text, "hint": message.hint, **message.data}, "finebits.error/1")
        lines = message.text.splitlines() or ["stopped"]
        hint = [f"   {message.hint}"] if message.hint else []
        mark = f"{RED}x{PLAIN}" if sys.stderr.isatty() and not os.environ.get("NO_COLOR") else "x"
        print("\n".join([f"{mark}  {lines[0]}", *(f"   {line}" for line in lines[1:]), *hint]), file=sys.stderr)

    def warned(self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any) -> None:
        """Takes the place of warnings.showwarning: ours become results, others go to stderr as ever, but for what libraries say to one another
        of their next versions."""
        if Path(filename).is_relative_to(HERE):
            self.warnings.append({"code": category.__name__, "hint": str(message)})
            remark(f"!  {message}")
        elif self.form is not Form.quiet and not issubclass(category, FutureWarning):
            remark(warnings.formatwarning(message, category, filename, lineno).rstrip())

    @contextlib.contextmanager
    def working(self, long: bool = False) -> Iterator[None]:
        """While a job runs, which is never silent for long, and speaks at once if it is a `long` one: where a program reads stdout, only the
        result may go there; quiet silences progress too."""
        with contextlib.ExitStack() as stack:
            if self.form is Form.json:
                stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            elif self.form is Form.quiet:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(alive("starting", at_once=long))
            yield
