"""Ollama's Modelfile beside a GGUF file: where the weights lie, the chat template in Ollama's language, and where an answer ends.

Ollama renders templates of Go's text/template, not the Jinja of a tokenizer. What a template puts around a message of each role is cut
out of conversations that it has rendered; the Go template of these pieces is written only where it gives those conversations back as they were.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from finebits.export._gguf import begins

Messages = Sequence[tuple[str, str]]  # role and content
S, U, A, V, B, W = (f"<{c}0{c}>" for c in "SUAVBW")  # contents that stand in no template
TRIED: tuple[Messages, ...] = (
    (("user", U),),
    (("system", S), ("user", U)),
    (("user", U), ("assistant", A), ("user", V)),
    (("system", S), ("user", U), ("assistant", A), ("user", V), ("assistant", B), ("user", W)),
)


class Turns(NamedTuple):
    """What stands before and after the content of a role, what opens a conversation without a system message, and what asks for an answer."""

    around: dict[str, tuple[str, str]]
    lead: str
    ask: str

    def text(self, messages: Messages) -> str:
        """A conversation that the model is to answer.

        >>> Turns({"user": ("U: ", "; "), "assistant": ("A: ", "; ")}, "", "A: ").text([("user", "hi")])
        'U: hi; A: '
        """
        said = "".join(self.around[role][0] + content + self.around[role][1] for role, content in messages)
        return ("" if any(role == "system" for role, _ in messages) else self.lead) + said + self.ask

    def go(self) -> str:
        """The same in Ollama's language, without line breaks of its own.

        >>> Turns({"user": ("U: ", "; "), "assistant": ("A: ", "; ")}, "", "A: ").go()[:59]
        '{{ range .Messages }}{{ if eq .Role "user" }}U: {{ .Content'
        """
        lead = f"{{{{ if not .System }}}}{self.lead}{{{{ end }}}}" if self.lead else ""
        roles = [f'{{{{ if eq .Role "{role}" }}}}{a}{{{{ .Content }}}}{b}{{{{ end }}}}' for role, (a, b) in self.around.items()]
        return f"{lead}{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{self.ask}"


def modelfile(model: str, adapter: str | None, tokenizer: Any, ends: Iterable[int]) -> str:
    """The text of a Modelfile; `ends` are the tokens that end an answer.

    >>> modelfile("./model.gguf", None, None, ())
    'FROM ./model.gguf\\n'
    """
    lines = [f"FROM {model}", *([f"ADAPTER {adapter}"] if adapter else [])]
    if getattr(tokenizer, "chat_template", None):
        found = turns(tokenizer)
        lines.append(
            "# the chat template has no form in Ollama's language: write TEMPLATE by hand, or let Ollama choose by the one in the file"
            if found is None
            else f'TEMPLATE """{found.go()}"""'
        )
    lines += (
        [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in (tokenizer.decode([i]) for i in ends)] if tokenizer else []
    )
    return "\n".join(lines) + "\n"


def turns(tokenizer: Any) -> Turns | None:
    """What the chat template puts around messages; None where that depends on more than their roles."""
    texts = [_rendered(tokenizer, messages, True) for messages in TRIED]
    answered = _rendered(tokenizer, TRIED[2][:2], False)
    if texts[0] is None or texts[2] is None or answered is None:
        return None
    plain = _rendered(tokenizer, TRIED[0], False)
    if plain is None or not texts[0].startswith(plain) or any(c not in texts[2] for c in (U, A, V)) or U not in plain or A not in answered:
        return None
    before, after = plain.split(U)[0], plain.split(U)[1]
    opening, closing = texts[2].split(U)[1].split(A)[0].removeprefix(after), answered.split(A)[1]
    user = texts[2].split(A)[1].split(V)[0].removeprefix(closing)
    around = {"user": (user, after), "assistant": (opening, closing)}
    if texts[1] is not None and S in texts[1]:
        system = texts[1].split(S)[0], texts[1].split(S)[1].split(U)[0].removesuffix(user)
        around = {"system": system, **around}
    found = Turns(around, before.removesuffix(user), texts[0].removeprefix(plain))
    known = [(m, t) for m, t in zip(TRIED, texts, strict=True) if "system" in around or not any(role == "system" for role, _ in m)]
    wrong = any(found.text(messages) != text for messages, text in known)
    return (
        None if wrong or any(mark in "".join((found.lead, found.ask, *sum(around.values(), ()))) for mark in ("{{", "}}", '"""')) else found
    )


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's end, then what the model's generation config says, which has what closes a turn.

    >>> ends_of(None, None)
    []
    """
    if tokenizer is None:
        return []
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])]
    return list(dict.fromkeys(i for i in found if i is not None))


def _rendered(tokenizer: Any, messages: Messages, answer: bool) -> str | None:
    """A conversation, without the token that a reader of the file puts first; None where the template refuses it."""
    made = [{"role": role, "content": content} for role, content in messages]
    try:
        text = tokenizer.apply_chat_template(made, tokenize=False, add_generation_prompt=answer)
    except Exception:  # a template raises what it likes where it knows no such role
        return None
    return text.removeprefix(tokenizer.bos_token) if begins(tokenizer) else text
