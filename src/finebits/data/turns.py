"""Where the assistant's turns lie in a conversation as the chat template writes it.

What is trained on is the one text that the template makes of the whole conversation. Three ways lead to the turns in it:

1. The template marks them itself, with {% generation %}.
2. By prefixes: the text up to a turn, with the generation prompt, is what the model is given; what the text with that turn adds is what it
   must write. This holds where a template only ever appends.
3. By probes, where a template writes earlier turns otherwise once later ones follow (Qwen3 drops their thoughts, Phi-3 ends the last one
   with EOS): the turn's content is exchanged for two others, and what stays the same on both sides is not it. Its turn begins behind the
   generation prompt and ends where the template ends a turn.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from finebits.data.error import DataError
from finebits.data.rows import Row

PROBES = ("Quartz", "Zebra")  # they share no first and no last letter, and hold nothing that a template strips or splits at
THOUGHTS = frozenset(("reasoning_content", "reasoning", "thinking"))  # transformers gives a template all three where one is there
OPENS, CLOSES = "\ue0f1[", "]\ue0f1"  # of the private use area: no text that a template writes
MARK = re.compile(
    r"(?P<open>\{%[-+]?\s*generation\s*(?P<cut>[-+]?)%\})(?P<after>\s*)|(?P<before>[ \t]*)(?P<close>\{%(?P<trim>[-+]?)\s*endgeneration\b)"
)


class TemplateError(DataError):
    """The chat template cannot say which tokens are the assistant's. `reason` is the same text without the place.

    >>> error = TemplateError("a.jsonl:3", "the chat template has no generation prompt")
    >>> str(error), error.reason
    ('a.jsonl:3: the chat template has no generation prompt', 'the chat template has no generation prompt')
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.reason = reason


def spans(row: Row, tokenizer: Any, where: str) -> Iterator[tuple[str, bool]]:
    """The rendered conversation in pieces: (text, whether it is an assistant's turn). Raises TemplateError."""
    chat = Chat(row, tokenizer, where)
    chat.read()
    if marked(chat.template):
        return iter(chat.marked())
    return iter(chat.prefixes() or chat.probed())


def unmet(row: Row, tokenizer: Any) -> str:
    """The generation prompt of a conversation if the template does not begin its answers so, and the tuned model will meet what it was not
    tuned on; else nothing."""
    chat = Chat(row, tokenizer, "")
    last = max(i for i, message in enumerate(chat.messages) if message["role"] == "assistant")
    opening = chat.opening(last)
    return "" if opening in chat.render(chat.messages) else opening


def closing(tokenizer: Any) -> int | None:
    """The token that closes an assistant's turn in the chat template: the first behind the content that is none of text; None if there is
    none."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": PROBES[1]}]
    chat = Chat(Row(0, tuple(turns)), tokenizer, "")
    try:
        text = chat.render(turns)
    except TemplateError:
        return None
    rest = text[text.rfind(PROBES[1]) + len(PROBES[1]) :].lstrip()
    tokens = [token for token in chat.added if token.strip() and rest.startswith(token.strip())]
    return tokenizer.get_added_vocab()[max(tokens, key=len)] if tokens else None


def template_sha(tokenizer: Any) -> str | None:
    """The sha256 of a tokenizer's chat template, in hexadecimal digits; None where it has none.

    >>> from types import SimpleNamespace as Tokenizer
    >>> template_sha(Tokenizer(chat_template="{{ messages }}"))[:6], template_sha(Tokenizer(chat_template=None))
    ('f24189', None)
    """
    template = getattr(tokenizer, "chat_template", None)
    return hashlib.sha256(str(template).encode()).hexdigest() if template else None


def marked(template: str) -> bool:
    """Does the template mark the assistant's turns itself?

    >>> marked("{% generation %}{{ message.content }}{% endgeneration %}"), marked("{{ message.content }}")
    (True, False)
    """
    return any(m["open"] for m in MARK.finditer(template))


class Chat:
    """A row, and its template to render it and its like."""

    def __init__(self, row: Row, tokenizer: Any, where: str) -> None:
        self.row, self.messages, self.template_kwargs = row, list(row.messages or ()), dict(row.template_kwargs)
        self.where, self.tokenizer = where, tokenizer
        named = tokenizer.chat_template
        if isinstance(named, Mapping):  # several, by name
            named = named.get("tool_use" if "tools" in self.template_kwargs and "tool_use" in named else "default", "")
        self.template = str(named or "")
        self.added = [*tokenizer.get_added_vocab()]  # the tokens that are none of text, such as those that open and close a turn

    def render(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False, turn: int = 0, **more: Any) -> str:
        """The text of these messages. `turn` is the one to name if that fails; 0 is the last."""
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=prompt, **{**self.template_kwargs, **more}
            )
            return str(text)
        except Exception as e:  # templates raise what they like
            turn = turn or len(messages)
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise self.error(f"the chat template does not render turn {turn} ({messages[turn - 1]['role']}): {reason}") from None

    def error(self, reason: str) -> TemplateError:
        return TemplateError(self.where, reason)

    def read(self) -> None:
        """Raises TemplateError if a message or the row holds something that the template leaves out without a word."""
        for i, message in enumerate(self.messages):
            for key in (k for k in message if k not in ("role", "content")):
                if message["role"] == "tool" and key in ("name", "tool_call_id"):
                    continue  # they link the answer to the call before it, which stands there anyway
                if key in THOUGHTS:
                    read = any(_mentions(self.template, k) for k in THOUGHTS)  # of an earlier turn, perhaps: left out on purpose
                else:
                    less = {k: v for k, v in message.items() if k != key}
                    read = _mentions(self.template, key) and self._differs([*self.messages[:i], less, *self.messages[i + 1 :]])
                if not read:
                    what = f'turn {i + 1} ({message["role"]}) has the key "{key}", which the chat template does not read'
                    raise self.error(f"{what}: take it out, or use a template that does")
        for key in self.template_kwargs:
            if not _mentions(self.template, key):
                raise self.error(f'the row has "{key}", which the chat template does not read: take it out, or use a template that does')

    def _differs(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        text = self.render(self.messages)
        try:
            return self.render(messages) != text
        except TemplateError:
            return True

    def marked(self) -> list[tuple[str, bool]]:
        """By the template's own marks."""
        plain = self.render(self.messages)
        text = self.render(self.messages, chat_template=_signed(self.template))
        pieces: list[tuple[str, bool]] = []
        for i, part in enumerate(text.split(OPENS)):
            turn, _, rest = part.partition(CLOSES) if i else ("", "", part)
            pieces += [(turn, True), (rest, False)] if i else [(rest, False)]
        if "".join(t for t, _ in pieces) != plain:
            raise self.error("the chat template marks the assistant's turns by {% generation %} in a way that cannot be followed")
        turns, marks = sum(m["role"] == "assistant" for m in self.messages), sum(answer for _, answer in pieces)
        if self.row.untrained and marks != turns:
            reason = f"the chat template marks {marks} answers by {{% generation %}} and the row has {turns}"
            raise self.error(f"{reason}, so nothing says which of them is not to be learned")
        return pieces

    def prefixes(self) -> list[tuple[str, bool]] | None:
        """By what every turn adds. None where what was written before a turn changes when it comes, or does not begin it."""
        pieces: list[tuple[str, bool]] = []
        done = ""
        for i, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            if i == 0:
                raise self.error("turn 1 is the assistant's: there is nothing that it answers")
            before, after = self.render(self.messages[:i], True), self.render(self.messages[: i + 1])
            if not before.startswith(done) or not after.startswith(before):
                return None
            answer = after[len(before) :]
            if not answer.lstrip().startswith(message["content"].strip()) and before == self.render(self.messages[:i]):
                reason = f"the chat template has no generation prompt, so nothing says where the answer in turn {i + 1} begins"
                raise self.error(reason)
            pieces += [(before[len(done) :], False), (answer, True)]
            done = after
        text = self.render(self.messages)
        return [*pieces, (text[len(done) :], False)] if text.startswith(done) else None

    def probed(self) -> list[tuple[str, bool]]:
        """By exchanging the content of one turn after the other, in the text of the whole conversation."""
        text, pieces, done = self.render(self.messages), [], 0
        for i, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            begin, end = self._turn(text, i, done)
            pieces += [(text[done:begin], False), (text[begin:end], True)]
            done = end
        return [*pieces, (text[done:], False)]

    def _turn(self, text: str, i: int, done: int) -> tuple[int, int]:
        """Where turn i lies in `text`, behind `done`."""
        probes = [{"role": "assistant", "content": probe} for probe in PROBES]
        others = [self.render([*self.messages[:i], probe, *self.messages[i + 1 :]], turn=i + 1) for probe in probes]
        head = min(len(os.path.commonprefix([text, other])) for other in others)
        tail = min(len(os.path.commonprefix([text[head:][::-1], other[::-1]])) for other in others)
        content, behind = max(head, done), max(len(text) - tail, done)
        if others[0] == others[1]:
            raise self.error(f"the chat template does not write the content of turn {i + 1} (assistant)")
        # the generation prompt, as far as it is how this turn begins
        opening = self.opening(i)
        if not opening:
            raise self.error(f"the chat template has no generation prompt, so nothing says where the answer in turn {i + 1} begins")
        begin = self._behind(text, opening, done, content)
        if begin is None:
            raise self.error(f"the chat template's generation prompt is not how it begins turn {i + 1} (assistant)")
        # how the template ends a turn, as far as it ends this one so
        alone = self.render([*self.messages[:i], probes[0]])
        closing = alone[alone.rfind(PROBES[0]) + len(PROBES[0]) :]
        same = os.path.commonprefix([text[behind:], closing])
        if same != closing:
            same = same[: max(_ends(same, self.added), default=0)]
        return begin, behind + len(same)

    def opening(self, i: int) -> str:
        """The generation prompt before turn i; empty if the template has none."""
        asked, before = self.render(self.messages[:i], True), self.render(self.messages[:i])
        return asked[len(os.path.commonprefix([asked, before])) :]

    def _behind(self, text: str, opening: str, done: int, content: int) -> int | None:
        """Where the turn begins: behind the last `opening` before its content, or behind as much of it as stands there, up to the end of a
        line or of a token that is none of text."""
        for end in sorted({len(opening), *_ends(opening, {*self.added, "\n"})}, reverse=True):
            at = text.rfind(opening[:end], done, content)
            if at >= 0 and opening[:end].strip():
                return at + end
        return None


def _ends(text: str, parts: Iterable[str]) -> list[int]:
    """Where `parts` end in a text."""
    return [match.end() for part in parts for match in re.finditer(re.escape(part), text)]


def _signed(template: str) -> str:
    """The template with OPENS and CLOSES written at its marks. What a tag of a block strips around itself (Jinja's trim_blocks and
    lstrip_blocks are on) is stripped here, since the signs stand in between."""

    def sign(match: re.Match[str]) -> str:
        if match["open"]:
            after = match["after"]
            after = "" if match["cut"] == "-" else after if match["cut"] == "+" else after.removeprefix("\n")
            return f'{match["open"]}{{{{ "{OPENS}" }}}}{after}'
        starts = match.start() == 0 or template[match.start() - 1] == "\n"
        before = "" if starts and match["trim"] != "+" else match["before"]
        dash = "-" if match["trim"] == "-" else ""
        return f'{before}{{{{{dash} "{CLOSES}" }}}}{match["close"]}'

    return MARK.sub(sign, template)


def _mentions(template: str, key: str) -> bool:
    """Does the template name the key, as .key, 'key' or a variable?"""
    return re.search(rf"(?<![\w]){re.escape(key)}(?!\w)", template) is not None
