"""Small suites that need no hub: questions with what is right about an answer. `spam` asks about the mails that examples/spam_mail.py writes (or
a file of rows {"text", "label"}); every other name is a task of the package reasoning-gym, which makes its questions from a seed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finebits.data.rows import read
from finebits.errors import Invalid
from finebits.evaluate.matching import number, plain

SPAM = Path("runs/spam/data/held_out.jsonl")
QUESTIONS = 40  # of a suite, where no limit was named
SEED = 42
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """What is asked, a reference to show, and `score`, which gives an answer 0 to 1.

    >>> Question("2 + 2?", "4", lambda answer: float(answer == "4")).score("4")
    1.0
    """

    text: str
    reference: str
    score: Callable[[str], float]

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a conversation that waits for its answer."""
        return [{"role": "user", "content": self.text}]


def suite(name: str, limit: int | None = None) -> list[Question]:
    """The questions of `spam`, `spam:FILE`, or a task of reasoning-gym; at most `limit`. Raises Invalid where its rows are not there, with the
    command that makes them, or the package is not."""
    if name == "spam" or name.startswith("spam:"):
        return spam(Path(name.partition(":")[2] or SPAM), limit)
    return gym(name, limit or QUESTIONS)


def spam(file: Path, limit: int | None = None) -> list[Question]:
    """Which of its labels a text has, in one word. Texts are taken label by label in turn, so that few of them are of all labels.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "a.json").write_text('[{"text": "Hi", "label": "ham"}, {"text": "Buy", "label": "spam"}]')
    ...     first, second = spam(Path(folder, "a.json"))
    >>> first.reference, first.score("It is ham."), first.score("ham or spam")  # one label alone
    ('ham', 1.0, 0.0)
    """
    if not file.is_file():
        how = "python examples/spam_mail.py writes it" if file == SPAM else "name a file of rows with a text and a label"
        raise Invalid(f"the suite spam reads {file}, and it is not there: {how}")
    by_label: dict[str, list[str]] = {}
    for row in read(file):
        if row.text is None or row.label is None:
            raise Invalid(f"{file}:{row.line}: the suite spam wants rows with a text and a label")
        by_label.setdefault(str(row.label), []).append(row.text)
    labels = sorted(by_label)
    turns = [(label, texts[i]) for i in range(max(map(len, by_label.values()))) for label, texts in by_label.items() if i < len(texts)]
    ask = f"Is this message {' or '.join(labels)}? Answer with one word."
    return [Question(f"{ask}\n\n{text}", label, _names(label, labels)) for label, text in turns[: limit or QUESTIONS]]


def _names(label: str, labels: Sequence[str]) -> Callable[[str], float]:
    def score(answer: str) -> float:
        words = set(re.findall(r"\w+", plain(answer)))
        return float({one for one in labels if plain(one) in words} == {label})

    return score


def gym(task: str, count: int) -> list[Question]:
    """So many questions of a task of reasoning-gym, scored by that package: an answer is what stands in <answer> tags, else the last number
    where the reference is one, else all that was said."""
    try:
        from reasoning_gym import create_dataset  # pyright: ignore[reportMissingImports]
        from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise Invalid(
            f"{task} is a suite of the package reasoning-gym, which is not installed (spam is built in): pip install reasoning-gym"
        ) from e
    if task not in DATASETS:
        near = difflib.get_close_matches(task, DATASETS, 3)
        raise Invalid(f"reasoning-gym has no task {task}{': did you mean ' + ' or '.join(near) if near else ''}")
    made: Any = create_dataset(task, size=count, seed=SEED)

    def question(entry: Any) -> Question:
        reference = str(entry["answer"])
        return Question(str(entry["question"]), reference, lambda said: float(made.score_answer(extracted(said, reference), entry)))

    return [question(made[i]) for i in range(count)]


def extracted(said: str, reference: str) -> str:
    """The answer in what was said.

    >>> extracted("First 3, so <answer> 12 </answer>.", "12"), extracted("3 and 4 are 7.", "7"), extracted(" Yes ", "No")
    ('12', '7', 'Yes')
    """
    if tagged := TAGGED.findall(said):
        return tagged[-1].strip()
    if re.fullmatch(r"-?[\d.,]+", reference.strip()) and (found := number(said)) is not None:
        return f"{found:g}" if found != int(found) else str(int(found))
    return said.strip()
