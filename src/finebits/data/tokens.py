"""Rows to token ids and the labels that they are trained on.

Which tokens of a conversation are trained is found in the text that the chat template makes of it (finebits.data.turns). No token id is
asked: in SmolLM2's template the BOS token opens every turn and the padding token is the token that ends one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from finebits.data.arrays import Example, Tokens
from finebits.data.error import DataError
from finebits.data.rows import Row, Rows, gathered
from finebits.data.turns import TemplateError, spans
from finebits.errors import Invalid
from finebits.losses import IGNORED


@dataclass(frozen=True)
class Encoded:
    """One row before it is cut: ids, whether each is trained, and where each assistant turn (or the document) ends.

    `ends[k]` is the position of the token that closes turn k, None if nothing but the turn's own text ends it.

    >>> row = Encoded([1, 5, 6, 2], [False, False, True, True], ends=(3,), line=1)  # the answer is 6, and 2 ends it
    >>> row.cut(3)
    Example(input_ids=[1, 5, 6], labels=[-100, -100, 6], line=1, truncated=1, path='')
    """

    ids: list[int]
    trained: list[bool]
    ends: tuple[int | None, ...]
    line: int | str
    path: str = ""
    liked: bool = True

    def cut(self, max_length: int) -> Example:
        """The first `max_length` tokens.

        >>> Encoded([1, 5], [False, True], ends=(None,), line=1).cut(8).truncated
        0
        """
        ids, trained = self.ids[:max_length], self.trained[:max_length]
        labels = [id if train else IGNORED for id, train in zip(ids, trained, strict=True)]
        return Example(ids, labels, self.line, len(self.ids) - len(ids), self.path, self.liked)


def tokenize(
    rows: Rows | Tokens | Iterable[Row | Mapping[str, Any]], tokenizer: Any, max_length: int, assistant_only_loss: bool = True
) -> Tokens:
    """One example a row, in order, none longer than `max_length` tokens; of a pair of answers the one liked more, and then the other. `rows` may
    also be a list of {"messages": …} or {"text": …}; those that were tokenized before are cut.

    In a conversation the content of every assistant turn and the token that ends the turn are trained (with `assistant_only_loss=False`
    every token but the first); in a text every token but the first, and the EOS token that is put behind it. `tokenizer` is a transformers
    tokenizer. Raises DataError if it has no chat template or no EOS token, and TemplateError, naming line and turn, if the template cannot
    render the row, does not say where its answers begin, or leaves out what a message holds.

    >>> from finebits.data.arrays import Example
    >>> tokens = Tokens.of([Example([5, 6, 7], [-100, 6, 7], 1)], 3, True)
    >>> tokenize(tokens, tokenizer=None, max_length=2)[0].input_ids  # those that were tokenized before are cut
    [5, 6]
    """
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, one to see and one to predict; got {max_length}", code=2)
    if isinstance(rows, Tokens):
        return rows.within(max_length, assistant_only_loss)
    source = gathered(rows)
    ready(source, tokenizer)
    answers = (answer for row in source for answer in row.answers)
    examples = (encode(row, tokenizer, assistant_only_loss, source.path).cut(max_length) for row in answers)
    return Tokens.of(examples, max_length, assistant_only_loss)


def ready(rows: Rows, tokenizer: Any) -> None:
    """Raises DataError if the tokenizer lacks what these rows need."""
    if rows.format == "messages" and not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{rows.path} holds messages, and the model's tokenizer has no chat template: use an instruct model, or text rows")
    if rows.format == "text" and tokenizer.eos_token_id is None:
        raise DataError(f"{rows.path} holds texts, and the model's tokenizer has no EOS token to end them with")


def encode(row: Row, tokenizer: Any, assistant_only_loss: bool = True, path: str = "") -> Encoded:
    """One row, uncut. Raises TemplateError as `tokenize` does."""
    if row.tokens is not None:
        given, learned = row.tokens
        return Encoded([*given], [False, *learned[1:]], (), row.line, row.path or path)
    if row.messages is None:
        ids = [*tokenizer(row.text or "")["input_ids"]]
        # Some tokenizers put the EOS token behind every text themselves.
        if ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        return Encoded(ids, [False] + [True] * (len(ids) - 1), (len(ids) - 1,), row.line, row.path or path, row.liked)

    where = f"{row.path or path}:{row.line}"
    unheard = [i for i in row.untrained if row.messages[i]["role"] != "assistant"]
    if unheard and not assistant_only_loss:
        turn = f"turn {unheard[0] + 1} ({row.messages[unheard[0]]['role']})"
        raise TemplateError(where, f"{turn} is not to be learned, and without assistant_only_loss every turn of others is: take one back")
    learned = iter(i not in row.untrained for i, message in enumerate(row.messages) if message["role"] == "assistant")
    ids: list[int] = []
    trained: list[bool] = []
    ends: list[int | None] = []
    for piece, answer in _pieces(list(spans(row, tokenizer, where)), tokenizer):
        keep = 0 if assistant_only_loss else len(piece)
        if answer and not next(learned, True):
            keep = 0
        elif answer:
            closing, end = _closing(piece, tokenizer)
            ends.append(None if end is None else len(ids) + end)
            keep = closing if assistant_only_loss else keep
        ids += piece
        trained += [i < keep for i in range(len(piece))]
    trained[:1] = [False] * len(trained[:1])  # nothing stands before the first token
    return Encoded(ids, trained, tuple(ends), row.line, row.path or path, row.liked)


def _pieces(spans: Sequence[tuple[str, bool]], tokenizer: Any) -> Iterator[tuple[list[int], bool]]:
    """The ids of each span.

    A span is encoded together with all before it, so that words keep the spaces they have in running text; where that would melt the border
    into one token, the text is cut there, as it is when the model is given a prompt and asked for an answer.
    """
    while spans:
        prefixes = accumulate(text for text, _ in spans)
        known: list[int] = []
        for done, ids in enumerate(tokenizer(list(prefixes), add_special_tokens=False)["input_ids"]):
            if ids[: len(known)] != known:
                break
            yield ids[len(known) :], spans[done][1]
            known = ids
        else:
            return
        spans = spans[done:]


def _closing(ids: list[int], tokenizer: Any) -> tuple[int, int | None]:
    """How many tokens of an assistant turn are trained, and where the one that ends it is: a special token, behind it only white space."""
    for i in reversed(range(len(ids))):
        if tokenizer.decode([ids[i]]).strip():
            special = not tokenizer.decode([ids[i]], skip_special_tokens=True).strip()
            return (i + 1, i) if special else (len(ids), None)
    return len(ids), None


def pad_of(tokenizer: Any) -> int:
    """The id that rows are filled up with; labels, not ids, say what is trained, so that any will do where the tokenizer names none.

    >>> from types import SimpleNamespace as Tokenizer
    >>> pad_of(Tokenizer(pad_token_id=3, eos_token_id=2)), pad_of(Tokenizer(pad_token_id=None, eos_token_id=2))
    (3, 2)
    >>> pad_of(Tokenizer(pad_token_id=None, eos_token_id=None))
    0
    """
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return 0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id


def to_batch(examples: Sequence[Example], pad_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, each (len(examples), longest) of int64, padded on the right to a `multiple`.

    The mask and the labels follow the lengths, so `pad_id` may be a token that also occurs in the text.

    >>> from finebits.data.arrays import Example
    >>> batch = to_batch([Example([5, 6, 7], [-100, 6, 7], 1), Example([5, 2], [-100, 2], 2)], pad_id=2, multiple=4)
    >>> batch["input_ids"][1], batch["attention_mask"][1], batch["labels"][1]  # 2 ends the text and fills the row
    (tensor([5, 2, 2, 2]), tensor([1, 1, 0, 0]), tensor([-100,    2, -100, -100]))
    """
    if not examples:
        raise Invalid("a batch needs at least one example; got none")
    width = -(-max(len(example.input_ids) for example in examples) // multiple) * multiple

    def padded(rows: Iterator[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    return {
        "input_ids": padded((e.input_ids for e in examples), pad_id),
        "attention_mask": padded(([1] * len(e.input_ids) for e in examples), 0),
        "labels": padded((e.labels for e in examples), IGNORED),
    }
