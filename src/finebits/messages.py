"""What a user reads when something stops: one sentence, what to do, and the exit code.

Codes: 0 done, 1 runtime failure, 2 bad usage or recipe, 3 does not fit the budget, 4 the data gate failed, 5 out of memory, 6 verification
failed, 130 interrupted. A FinebitsError carries its own.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, NamedTuple

from finebits.errors import FinebitsError, out_of_memory

EXTRAS = {
    "transformers": "hf",
    "accelerate": "hf",
    "huggingface_hub": "hf",
    "gguf": "hf",
    "trl": "train",
    "peft": "train",
    "datasets": "train",
    "psutil": "train",
    "highspy": "milp",
    "starlette": "serve",
    "uvicorn": "serve",
}


class Message(NamedTuple):
    """`text` is a sentence (of a recipe: every mistake with its line), `hint` what to do about it, `data` more of it for programs.

    >>> Message("interrupted", 130)
    Message(text='interrupted', code=130, hint='', data={})
    """

    text: str
    code: int
    hint: str = ""
    data: dict[str, Any] = {}


def explain(error: BaseException) -> Message:
    """What to say about an exception that ended a command, or a process of it.

    >>> explain(FileNotFoundError(2, "No such file or directory", "rows.jsonl")).text
    'rows.jsonl: no such file or directory'
    >>> explain(MemoryError("16 GiB")).code
    5
    """
    if isinstance(error, KeyboardInterrupt):
        return Message("interrupted", 130)
    if out_of_memory(error):
        return Message(
            f"out of memory: {_first(error)}",
            5,
            "plan with a smaller budget.memory, or lower data.max_length, training.per_device_train_batch_size or training.loss_chunk",
        )
    if isinstance(error, FinebitsError):
        text = str(error)
        return Message(text, error.code, "" if error.hint in text else error.hint, error.data())
    if isinstance(error, ImportError) and error.name:
        package = error.name.split(".")[0]
        absent = isinstance(error, ModuleNotFoundError)
        if package in EXTRAS and not (absent and error.name == package):
            other = f"the {package} that is installed has not all that this uses of it: {_first(error)}"
            return Message(other, 1, f"pip install -U 'finebits[{EXTRAS[package]}]'; finebits doctor names what is too old")
        if package in EXTRAS:
            return Message(f"this needs the package {package}, which is not installed", 1, f"pip install 'finebits[{EXTRAS[package]}]'")
        if absent:
            return Message(f"the module {error.name} is not installed", 1)
    if isinstance(error, OSError) and error.strerror:
        return Message(f"{error.filename}: {sentence(error.strerror)}" if error.filename is not None else sentence(error.strerror), 1)
    return Message(f"{type(error).__name__}: {_first(error)}{_where(error)}", 1, "run it again with --traceback to see the whole way there")


def _first(error: BaseException) -> str:
    """The first line of what an exception says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no further words"


def sentence(text: str) -> str:
    """Without the capital and the full stop that stand in the way in the middle of a line.

    >>> sentence("Permission denied.")
    'permission denied'
    """
    text = text.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    file = Path(frames[-1].filename)
    return f" (in {'/'.join(file.parts[-2:])}, line {frames[-1].lineno})"
