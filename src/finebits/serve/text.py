"""Tokens into text as they come: no character before it is whole, and nothing that may turn out to be the beginning of a stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

HALF = "\ufffd"  # what a decoder gives for bytes that are no whole character yet


class Written:
    """The text of one answer. `add` gives what of it is certain and new; `rest` what was held back, once the answer is over.

    >>> words = Written(lambda ids: " ".join(["so", "on", "and"][i] for i in ids), ["and so"])
    >>> [words.add(i) for i in (0, 1, 2, 1)], words.ended
    (['so', ' on', ' ', 'and on'], False)
    >>> [words.add(i) for i in (2, 0)], words.ended, words.rest()
    ([' ', ''], True, '')
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self.decode, self.stops, self.ended = decode, stops, False
        self.ids: list[int] = []
        self._from = self._read = 0  # the text of ids[:_read] is out; decoding begins a little before, at _from
        self._held = ""

    def add(self, id: int) -> str:
        self.ids.append(id)
        before, now = self.decode(self.ids[self._from : self._read]), self.decode(self.ids[self._from :])
        if len(now) <= len(before) or now.endswith(HALF):
            return ""
        self._from, self._read = self._read, len(self.ids)
        self._held += now[len(before) :]
        return self._certain()

    def _certain(self) -> str:
        found = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.ended, out, self._held = True, self._held[: min(found)], ""
            return out
        keep = max((n for stop in self.stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
        out, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return out

    def rest(self) -> str:
        """What was held back, halves of characters included."""
        if self.ended:
            return ""
        before, now = self.decode(self.ids[self._from : self._read]), self.decode(self.ids[self._from :])
        self._from = self._read = len(self.ids)
        out, self._held = self._held + now[len(before) :], ""
        return out
