"""What a user reads when something stops: one sentence, what to do, and the exit code.

Codes: 0 done, 1 runtime failure, 2 bad usage or recipe, 3 does not fit the budget, 4 the data gate failed, 5 out of memory, 6 verification
failed, 130 interrupted. An exception of finebits carries its own as `.code`, and perhaps a `.hint`.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, NamedTuple

CODES = (1, 2, 3, 4, 5, 6, 130)
HERE = Path(__file__).parent
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
    """`text` is a sentence (of a recipe: every mistake with its line), `hint` what to do about it, `data` more of it for programs."""

    text: str
    code: int
    hint: str = ""
    data: dict[str, Any] = {}


def explain(error: BaseException) -> Message:
    """What to say about an exception that reached the command line."""
    code = getattr(error, "code", None)
    if isinstance(error, KeyboardInterrupt):
        return Message("interrupted", 130, "finebits train RECIPE --resume goes on from the last checkpoint, if training had begun")
    if _out_of_memory(error):
        return Message(
            f"out of memory: {_first(error)}",
            5,
            "plan with a smaller budget.memory, or lower data.max_length, training.per_device_train_batch_size or training.loss_chunk",
        )
    if isinstance(error, Exception) and isinstance(code, int) and code in CODES and type(error).__module__.startswith("finebits."):
        hint = str(getattr(error, "hint", ""))
        data = {"problems": [p.to_json() for p in error.problems]} if hasattr(error, "problems") else {}
        data |= {"check": error.check.to_json()} if hasattr(error, "check") else {}
        return Message(str(error), code, "" if hint in str(error) else hint, data)
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):  # typer's own: a wrong option or argument
        context = getattr(error, "ctx", None)
        hint = f"see {context.command_path} --help" if context else "see finebits --help"
        option = str(getattr(error, "option_name", "")).lstrip("-").replace("-", "_").split("=")[0]
        if option:
            from finebits.recipe import leaves

            hint = f"keys of a recipe are written without dashes: {option}=VALUE" if option.split(".")[-1] in leaves() else hint
        return Message(_sentence(error.format_message()), 2, hint)
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        if package in EXTRAS:
            return Message(f"this needs the package {package}, which is not installed", 1, f"pip install 'finebits[{EXTRAS[package]}]'")
        return Message(f"the module {error.name} is not installed", 1)
    if isinstance(error, OSError) and error.strerror:
        return Message(f"{error.filename}: {_sentence(error.strerror)}" if error.filename is not None else _sentence(error.strerror), 1)
    if isinstance(error, (ValueError, TypeError, RuntimeError, KeyError)) and _ours(error):
        return Message(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error), 1)
    return Message(f"{type(error).__name__}: {_first(error)}{_where(error)}", 1, "run it again with --traceback to see the whole way there")


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = str(error)
    return isinstance(error, RuntimeError) and ("DefaultCPUAllocator: can't allocate memory" in said or "CUDA out of memory" in said)


def _first(error: BaseException) -> str:
    """The first line of what an exception says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else "no further words"


def _sentence(text: str) -> str:
    """Without the capital and the full stop that stand in the way in the middle of a line."""
    text = text.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def _ours(error: BaseException) -> bool:
    """Was it raised by a `raise` of finebits? Then its words were written for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(HERE) and (frames[-1].line or "").startswith("raise ")


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return ""
    file = Path(frames[-1].filename)
    return f" (in {'/'.join(file.parts[-2:])}, line {frames[-1].lineno})"
