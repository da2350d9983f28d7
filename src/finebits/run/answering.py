"""Answers to a file of prompts, batch by batch: what was answered before is kept, and what is drawn depends on the seed and on the prompt's
place alone, so that a file which was interrupted ends as one that was not."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finebits.data.error import DataError, characters
from finebits.errors import Invalid
from finebits.evaluate.generate import Continuation, Sampling, continued, together
from finebits.files import Occupied, locked, write_text
from finebits.interop.voices import Voices
from finebits.progress import Progress
from finebits.run.places import voices_of
from finebits.runfolder import digest

KEYS = ("messages", "prompt", "question", "instruction")


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for its answer, and the answer that its row has, if it has one."""

    messages: tuple[dict[str, Any], ...]
    reference: str | None = None

    @property
    def text(self) -> str:
        """What was said last."""
        return str(self.messages[-1]["content"])


def prompts(path: Path, system: str | None = None) -> list[Prompt]:
    """Of a .txt file one a line; of .json and .jsonl rows one each: {"prompt": …}, {"messages": […]} of which a last answer is the reference, or
    a string. `system` goes before conversations that have none. Raises DataError with the file and the line.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     _ = Path(place, "a.txt").write_text("Say hello.\\n\\nAnd bye.\\n")
    ...     print([p.text for p in prompts(Path(place, "a.txt"))])
    ['Say hello.', 'And bye.']
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is no text in UTF-8 ({e.reason} at byte {e.start}): save it as UTF-8") from None
    if path.suffix.lower() == ".txt":
        made = [_asked(line.strip(), f"{path}:{i}") for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        made = [_asked(record, where) for where, record in _records(path, text)]
    if not made:
        raise DataError(f"{path} holds no prompt: write one a line, or rows with {' or '.join(KEYS[:2])}")
    return [with_system(p, system) for p in made]


def _records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".json":
        lines = [(1, text)]
    for i, line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{path}:{i}: not JSON ({str(e).split(':')[0]}): a .jsonl file has one JSON value a line") from None
        for j, record in enumerate(value) if path.suffix == ".json" and isinstance(value, list) else [(i, value)]:
            yield f"{path}:{j if path.suffix != '.json' else f'row {j + 1}'}", record


def _asked(record: Any, where: str) -> Prompt:
    characters(record, where)
    if isinstance(record, str) and record.strip():
        return Prompt(({"role": "user", "content": record},))
    key = next((k for k in KEYS if isinstance(record, dict) and k in record), None)
    if key is None or isinstance(record, str):
        raise DataError(f"{where}: a prompt is a string or a row with {', '.join(KEYS)}; got {str(record)[:60]}")
    value, said = record[key], record.get("system")
    if key == "instruction" and isinstance(value, str) and record.get("input"):
        value = f"{value}\n\n{record['input']}"  # as finebits.data.forms.instruction has it
    if isinstance(value, str) and value.strip():
        reference = next((record[k] for k in ("completion", "answer", "output", "reference") if isinstance(record.get(k), str)), None)
        return with_system(Prompt(({"role": "user", "content": value},), reference), said if isinstance(said, str) and said else None)
    turns = value if isinstance(value, list) else []
    if not turns or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in turns):
        raise DataError(f"{where}: {key} must be a text, or a list of turns with role and content; got {str(value)[:60]}")
    last = turns[-1]["role"] == "assistant"
    if last and len(turns) == 1:
        raise DataError(f"{where}: the conversation has an answer and nothing that it answers")
    return Prompt(tuple(turns[:-1] if last else turns), str(turns[-1]["content"]) if last else None)


def with_system(prompt: Prompt, system: str | None) -> Prompt:
    """The same under a system message, where it has none."""
    if system is None or prompt.messages[0]["role"] == "system":
        return prompt
    return Prompt(({"role": "system", "content": system}, *prompt.messages), prompt.reference)


def encoded(messages: Sequence[dict[str, Any]], tokenizer: Any) -> list[int]:
    """A conversation as the model's own template writes it, open for the answer; where there is no template, what was said last, as it is."""
    if not tokenizer.chat_template:
        if len(messages) > 1:
            raise Invalid(
                "this model's tokenizer has no chat template, so that it knows no turns: give one text at a time, or a model made for chats"
            )
        return list(tokenizer(str(messages[-1]["content"]))["input_ids"])
    try:
        made = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, return_dict=True)
    except Exception as e:  # templates are programs, and refuse in their own words
        raise Invalid(f"the chat template does not take this conversation: {' '.join(str(e).split())[:200]}") from e
    return list(made["input_ids"])


@dataclass(frozen=True)
class How:
    """With what answers are made."""

    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    batch: int = 4


def answer(voices: Voices, asked: Sequence[Prompt], out: Path, how: How, model: str) -> dict[str, Any]:
    """Answer all prompts into `out`, a row each, written as its batch is done; rows that are there are kept. Returns what was done: rows, kept,
    tokens a second. Raises Occupied where `out` holds anything else, or answers that were made in another way."""
    mark = digest(model, voices.speaking, how.max_new_tokens, vars(how.sampling))
    names = [hashlib.sha256(json.dumps([mark, i, p.messages], sort_keys=True).encode()).hexdigest()[:16] for i, p in enumerate(asked)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.resolve().parent, "is being written to by another finebits: wait for it, or name another folder"):
        done = _kept(out, names)
        progress, size, tokens, begun = Progress("generate"), together(voices.model, how.batch), 0, time.perf_counter()
        with out.open("a", encoding="utf-8") as file:
            for i in range(0, len(asked), size):
                part = range(i, min(i + size, len(asked)))
                if all(names[j] in done for j in part):
                    continue
                # A batch is answered whole, also if a part of it is there: what stands beside a row may move the last bit of its numbers.
                ids = [encoded(asked[j].messages, voices.processor) for j in part]
                made = continued(voices.model, ids, how.max_new_tokens, voices.stops, how.sampling, [j for j in part])
                tokens += sum(len(c.ids) for c in made)
                file.writelines(_row(j, names[j], asked[j], c, voices) for j, c in zip(part, made, strict=True) if names[j] not in done)
                file.flush()
                progress(part[-1] + 1, len(asked), "answered")
    seconds = time.perf_counter() - begun
    return {
        "path": str(out),
        "rows": len(asked),
        "kept": len(done),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds if tokens else None,
    }


def _row(index: int, name: str, prompt: Prompt, made: Continuation, voices: Voices) -> str:
    text = voices.processor.decode(made.ids, skip_special_tokens=True).strip()
    row: dict[str, Any] = {
        "id": name,
        "row": index + 1,
        "prompt": prompt.text,
        "answer": text,
        "tokens": len(made.ids),
        "stopped": made.stopped,
    }
    if prompt.reference is not None:
        row["reference"] = prompt.reference
    return json.dumps(row, ensure_ascii=False) + "\n"


def _kept(out: Path, names: Sequence[str]) -> set[str]:
    """The names of the rows that `out` holds; a last line that was cut short is taken off it."""
    if not out.exists():
        return set()
    text = out.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    known = set[str]()
    for i, line in enumerate(whole.splitlines(), 1):
        try:
            known.add(json.loads(line)["id"])
        except (ValueError, TypeError, KeyError):
            raise Occupied(f"{out}:{i} is no answer that finebits wrote: name another file with --out") from None
    if known - set(names) or (not whole and not text.startswith('{"id"'[: len(text)])):
        raise Occupied(f"{out} holds answers of another model, to other prompts, or made with other settings: name another file with --out")
    if whole != text:
        write_text(out, whole)
    return known


def legible(text: str) -> str:
    """Without characters that would steer a terminal.

    >>> legible("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    return "".join(c if c in "\n\t" or c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def generate(
    what: str,
    asked: Path | str,
    out: Path | None,
    adapters: Sequence[str],
    system: str | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch: int,
) -> dict[str, Any]:
    """Answer a file of prompts into `out`, or one prompt in words."""
    how = How(max_new_tokens, Sampling(temperature, top_p, seed), batch)
    if isinstance(asked, Path):
        assert out is not None
        read = prompts(asked, system)  # before a model is loaded
        return answer(voices_of(what, adapters), read, out, how, what)
    voices = voices_of(what, adapters)
    one = with_system(Prompt(({"role": "user", "content": asked},)), system)
    made = continued(voices.model, [encoded(one.messages, voices.processor)], max_new_tokens, voices.stops, how.sampling)[0]
    text = voices.processor.decode(made.ids, skip_special_tokens=True).strip()
    return {"answer": legible(text), "tokens": len(made.ids), "stopped": made.stopped}
