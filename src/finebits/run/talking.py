"""A conversation with a model, line by line: its answers come as they are made, with what was said before, from one of its voices or from two
side by side. What begins with a slash is a command."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from finebits.errors import FinebitsError, Invalid
from finebits.evaluate.generate import Continuation, Sampling, Streamer, continued
from finebits.files import Occupied, write_text
from finebits.interop.voices import NONE, UNTUNED, Voices
from finebits.run.answering import encoded, legible
from finebits.run.places import voices_of

HELP = """\
/adapter [NAME|none]   which adapter speaks; without a name, which there are
/side                  answers of the untuned and the tuned model, one under the other; again: no more
/system [TEXT]         what every conversation begins with; without a text, nothing
/reset                 forget what was said
/save FILE             write the conversation as a row of messages, which finebits trains on
/help   /quit"""
HOLDS = "\ufffd"  # a character that is not whole yet


class Talk:
    """`out` gets answers, `notes` what the program itself says.

    A line is taken by `said`, which is false once it was told to quit.
    """

    def __init__(self, voices: Voices, how: Sampling, max_new_tokens: int, system: str | None = None, out: TextIO | None = None) -> None:
        self.voices, self.how, self.most, self.system = voices, how, max_new_tokens, system
        self.out, self.turns, self.side = out or sys.stdout, list[dict[str, Any]](), False
        self.asked = 0

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def said(self, line: str) -> bool:
        """Take one line; False once it is the last."""
        line = line.strip()
        if line.startswith("/"):
            word, _, rest = line[1:].partition(" ")
            if word in ("quit", "exit"):
                return False
            command: Callable[[str], None] | None = getattr(self, f"_{word}", None) if word in WORDS else None
            if command is None:
                self.note(f"there is no /{word}; /help shows what there is")
                return True
            try:
                command(rest.strip())
            except FinebitsError as e:
                self.note(f"x  {e}")
        elif line:
            self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        self.turns.append({"role": "user", "content": line})
        self.asked += 1
        asked = ([{"role": "system", "content": self.system}] if self.system else []) + self.turns
        try:
            ids = encoded(asked if self.voices.processor.chat_template else asked[-1:], self.voices.processor)
            before, after = self._pair()
            if self.side:
                for name in (before, after):
                    print(f"[{name}]", file=self.out)
                    with self.voices.as_(name):
                        text = self._spoken(ids)
            else:
                text = self._spoken(ids)
        except FinebitsError as e:
            self.turns.pop()
            self.note(f"x  {e}")
            return
        self.turns.append({"role": "assistant", "content": text})  # of the tuned one, where there are two: it comes last

    def _pair(self) -> tuple[str, str]:
        """Whom /side lets speak: as it was before tuning, and the one that speaks, else the first there is."""
        names = self.voices.names
        after = self.voices.speaking if self.voices.speaking not in (None, UNTUNED) else next((n for n in names if n != UNTUNED), NONE)
        return (UNTUNED if UNTUNED in names else NONE), str(after)

    def _spoken(self, ids: list[int]) -> str:
        """One answer, written as it comes. Ctrl-C ends it, and it stands as far as it came."""
        came, shown = list[int](), 0
        stops = self.voices.stops

        def said(id: int) -> None:
            nonlocal shown
            if id in stops:
                return
            came.append(id)
            text = legible(self.voices.processor.decode(came, skip_special_tokens=True))
            if not text.endswith(HOLDS):
                print(text[shown:], end="", file=self.out, flush=True)
                shown = len(text)

        streamer, stopped = Streamer(said), True
        try:
            made = continued(self.voices.model, [ids], self.most, stops, self.how, [self.asked], streamer)
            stopped = made[0].stopped
        except KeyboardInterrupt:
            made = [Continuation(came, False)]
            self.note(" (stopped)")
        text = self.voices.processor.decode(made[0].ids, skip_special_tokens=True)
        print(legible(text)[shown:], file=self.out, flush=True)
        speed = "" if streamer.speed is None else f", {streamer.speed:.1f} tokens/s"
        cut = "" if stopped else ", not ended"
        self.note(f"  ({len(made[0].ids)} tokens{speed}{cut})")
        return text

    # Commands ------------------------------------------------------------------------------------------------------------------------

    def _adapter(self, name: str) -> None:
        if name:
            self.voices.switch(name)
        speaking = self.voices.speaking or NONE
        self.note(f"speaking: {speaking}; there are: {', '.join((*self.voices.names, NONE))}")

    def _side(self, rest: str) -> None:
        if not self.side and not self.voices.names:
            raise Invalid("there is one model and no adapter, so nothing to lay beside it: start with --adapter FOLDER, or with a run")
        self.side = not self.side
        self.note(f"side by side: {' and '.join(self._pair())}" if self.side else "one answer at a time")

    def _system(self, text: str) -> None:
        self.system = text or None
        self.note("the system message is set" if text else "there is no system message")

    def _reset(self, rest: str) -> None:
        self.turns.clear()
        self.note("forgotten")

    def _save(self, name: str) -> None:
        if not name or not self.turns:
            raise Invalid("/save FILE writes what was said: name a file, once something was")
        if Path(name).exists():
            raise Occupied(f"{name} is there already: name another file")
        row = {"messages": ([{"role": "system", "content": self.system}] if self.system else []) + self.turns}
        write_text(Path(name), json.dumps(row, ensure_ascii=False) + "\n")
        self.note(f"wrote {name}")

    def _help(self, rest: str) -> None:
        self.note(HELP)


WORDS = ("adapter", "side", "system", "reset", "save", "help")


def typed(prompt: str = "> ") -> Iterable[str]:
    """Lines of stdin until it ends; in a terminal with a prompt, and with Python's line editing where it has it. Ctrl-C clears a line, and
    twice in a row ends."""
    terminal = sys.stdin.isatty()
    if terminal:
        try:
            import readline  # noqa: F401  # input() edits lines with it
        except ImportError:
            pass
    again = False
    while True:
        try:
            line = input(prompt) if terminal else sys.stdin.readline()
        except EOFError:
            return
        except KeyboardInterrupt:
            if again or not terminal:
                raise
            again = True
            print("  (Ctrl-C again, or /quit, ends)", file=sys.stderr)
            continue
        if not terminal and not line:
            return
        again = False
        yield line


def welcome(voices: Voices, title: str) -> str:
    """What is said first."""
    names = ", ".join((*voices.names, NONE)) if voices.names else ""
    speaks = f"; speaking: {voices.speaking or NONE} of {names}" if names else ""
    return textwrap.fill(f"{title}{speaks}. /help shows what there is, /quit ends.", 100)


def talk(
    what: str, adapters: Sequence[str], system: str | None, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> tuple[Talk, str]:
    """(a conversation with a model, what is said first)."""
    how = Sampling(temperature, top_p, seed)
    voices = voices_of(what, adapters)
    return Talk(voices, how, max_new_tokens, system), welcome(voices, what)
