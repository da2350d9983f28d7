"""Exports inside the runtimes that serve them, llama.cpp and vLLM: each lives in an environment of its own and is asked in a process of its own,
by a script that imports nothing of finebits; what passes between are files of tokens and of logits.

Verification by stock libraries (finebits.interop.peft) says that the files hold what was trained. Here the served model answers: KL from the
trained model, top-1 agreement and loss on held-out rows, in the runtime's own arithmetic; texts must be cut into the tokens that were
trained, and the chat template be the tokenizer's, byte for byte. A target may be its own rounding, and what the runtime's arithmetic costs,
away. The largest difference is that of log-probabilities, from the trained model in float32 with its own weights: within the tolerance a row
is "same", and above it decides nothing, since a runtime's arithmetic is its own. A runtime that does not support a model, or is not here, is
told as not run, and decides nothing. Where it computes something else, or fails on the folder, that is a row too, with the verdict "fail".
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from finebits.errors import Invalid
from finebits.evaluate.heldout import Batch, Scores, Teacher, own, score
from finebits.export.base import WEIGHTS, target
from finebits.interop.peft import FAIL, KL, LOSS, verdict
from finebits.losses import IGNORED
from finebits.meter import HUGE, MALLOC
from finebits.tasks.causal_lm import CausalLM

NOT_RUN = "not run"
PIECES = "12 345\n\n  naïve … Straße\t你好 🙂's"  # what tokenizers cut differently
UNSUPPORTED = re.compile(r"not (?:yet |currently )?support|unsupported|NotImplementedError|requires? (?:a )?(?:GPU|CUDA)", re.IGNORECASE)


@dataclass(frozen=True)
class Runtime:
    """A program that serves models, as it is found and asked.

    >>> RUNTIMES["llama_cpp"].reads("gguf:q4_k_m"), RUNTIMES["vllm"].reads("gguf:q4_k_m")
    (True, False)
    """

    name: str
    script: str  # beside this file
    module: str  # of Python, that its environment has
    environment: str  # a folder that is looked for where finebits is started
    made_by: str
    targets: tuple[str, ...]
    costs: float  # nats a token, of its arithmetic
    lacks: tuple[tuple[str, str], ...] = ()  # a sign among what it says as it fails: why it does not run this here

    def reads(self, to: str) -> bool:
        """Is a target one of those that it serves?"""
        return to.partition(":")[0] in self.targets

    def arguments(self, folder: Path) -> list[str]:
        """Model and adapter (or -) of a target's folder."""
        base = folder / "base" if (folder / "base").is_dir() else folder
        if self.name == "vLLM":
            return [str(base), str(folder) if (folder / "adapter_config.json").is_file() else "-"]
        adapter = folder / "adapter.gguf"
        return [str(base / "model.gguf"), str(adapter) if adapter.is_file() else "-"]


RUNTIMES = {
    "llama_cpp": Runtime(
        "llama.cpp", "llama_logits.py", "llama_cpp", ".venv-llama", "make verify-llama", ("gguf",), 1e-2
    ),  # on a CPU it rounds what enters a product with a quantized weight to 8 bits
    "vllm": Runtime(
        "vLLM",
        "vllm_logits.py",
        "vllm",
        ".venv-vllm",
        "make verify-vllm",
        ("adapter", "peft", "merged", "compressed_tensors", "gptq"),
        1e-3,  # products of codes are not summed in torch's order, some in 16 bits
        (("no attribute 'cpu_gemm_wna16'", "vLLM multiplies codes of 4 bits on CPUs with AVX-512 alone"),),
    ),
}


class Answers(NamedTuple):
    """What a runtime made of the rows: a file of logits (positions, vocabulary), whose code it was, what texts were cut into, the template."""

    logits: np.ndarray
    by: str
    tokens: list[list[int]]
    template: str


class NotRun(Exception):
    """A runtime does not compute this here, and why."""


class Failing(Exception):
    """A runtime that computes this elsewhere failed on it: the last that it said."""


def found(named: Mapping[str, str | None], beside: bool) -> dict[str, str]:
    """{runtime that is to be asked: the python of its environment}: those that a recipe names and, where they are looked for (`beside`), all
    others, by an environment in the current folder that has the name which the Makefile gives it, or by this very one; "" where there is none.
    Raises ValueError where a named one is not there.

    >>> found({"vllm": "nowhere/bin/python"}, beside=False)
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: export.runtimes.vllm names nowhere/bin/python, and there is no such file: give the python of an environment
    that has vllm
    """
    pythons = dict[str, str]()
    for key, runtime in RUNTIMES.items():
        python = named.get(key)
        if python is not None and not Path(python).is_file():
            raise Invalid(
                f"export.runtimes.{key} names {python}, and there is no such file: give the python of an environment that has {runtime.module}"
            )
        if python is None and beside:
            places = (Path(runtime.environment, *end) for end in (("bin", "python"), ("Scripts", "python.exe")))
            python = next((str(p) for p in places if p.is_file()), None)
            if python is None:
                python = "" if importlib.util.find_spec(runtime.module) is None else sys.executable
        if python is not None:
            pythons[key] = python
    return pythons


def verify(
    folder: Path,
    to: str,
    pythons: Mapping[str, str],
    trained: Teacher,
    batches: Sequence[Batch],
    tokenizer: Any,
    chunk: int = 256,
    exact: Teacher | None = None,
    tolerance: float = 1e-3,
) -> list[dict[str, Any]]:
    """Run an exported folder in those of the runtimes that serve its target; rows of export.json: name, bytes, reader, max_logit_difference, kl,
    top1, loss, lost, bounds, verdict ("same", "ok", "rounded", "fail" with a note, or "not run" with one that says why). `trained` is
    `teacher(model, batches)` of the model as it was trained, `exact` the same in float32 (finebits.interop.peft.exactly).

    Memory: `chunk` rows of logits at a time; those of all places lie in a file beside the folder meanwhile, and the runtime holds the model.
    """
    rows = []
    for key, python in pythons.items():
        runtime = RUNTIMES[key]
        if not runtime.reads(to):
            continue
        row: dict[str, Any] = {"name": to, "reader": runtime.name}
        if not isinstance(trained.task, CausalLM):
            rows.append(row | {"verdict": NOT_RUN, "note": "it is asked for the next token of a text, and this model answers otherwise"})
        elif not python:
            rows.append(row | {"verdict": NOT_RUN, "note": _missing(key, runtime)})
        else:
            with tempfile.TemporaryDirectory(prefix=".replay-", dir=folder.parent) as scratch:
                try:
                    answers = ask(runtime, python, folder, asked(batches, tokenizer), Path(scratch))
                except NotRun as e:
                    rows.append(row | {"verdict": NOT_RUN, "note": str(e)})
                except Failing as e:
                    rows.append(row | {"verdict": FAIL, "note": f"{python} does not run {folder}: {e}"})
                else:
                    rows.append(judged(row, runtime, folder, answers, trained, exact or trained, batches, tokenizer, chunk, tolerance))
    return rows


def _missing(key: str, runtime: Runtime) -> str:
    return (
        f"there is no {runtime.environment} here with {runtime.module}: {runtime.made_by} makes it, or name the python of an environment as "
        f"export.runtimes.{key}"
    )


def asked(batches: Sequence[Batch], tokenizer: Any) -> dict[str, Any]:
    """Tokens of every row without padding, the positions whose next tokens are labels, and texts to be cut.

    >>> ids = torch.tensor([[5, 6, 7, 0]])
    >>> batch = {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0]]), "labels": torch.tensor([[-100, -100, 7, -100]])}
    >>> asked([batch], None)
    {'rows': [[5, 6, 7]], 'from': [[1]], 'texts': []}
    """
    rows, places = list[list[int]](), list[list[int]]()
    for b in batches:
        for ids, mask, labels in zip(b["input_ids"], b["attention_mask"], b["labels"], strict=True):
            if at := (labels[1:] != IGNORED).nonzero()[:, 0].tolist():
                rows.append(ids[: int(mask.sum())].tolist())  # rows are filled up on the right
                places.append(at)
    texts = [] if tokenizer is None else [*(tokenizer.decode(ids) for ids in rows), PIECES]
    return {"rows": rows, "from": places, "texts": texts}


def ask(runtime: Runtime, python: str, folder: Path, questions: Mapping[str, Any], scratch: Path) -> Answers:
    """What the runtime in the environment of `python` makes of a folder. Raises NotRun where it does not support what it is given here, and
    Failing where it fails otherwise."""
    rows, out = scratch / "rows.json", scratch / "out"
    rows.write_text(json.dumps(questions), encoding="utf-8")
    script = Path(__file__).with_name(runtime.script)
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", *MALLOC, *HUGE}} | {"PYTHONSAFEPATH": "1"}
    command = [python, str(script), *runtime.arguments(folder), str(rows), str(out)]
    try:
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as e:
        raise NotRun(f"{python} cannot be started ({e.strerror or e})") from None
    if done.returncode:
        told = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        if (why := next((why for sign, why in runtime.lacks if sign in done.stderr), None)) is not None:
            raise NotRun(why)
        if f"No module named '{runtime.module}'" in done.stderr:
            raise NotRun(f"the environment of {python} has no {runtime.module}")
        if (line := next((line for line in reversed(told) if UNSUPPORTED.search(line)), None)) is not None:
            raise NotRun(line)
        raise Failing(told[-1] if told else f"it ended with exit code {done.returncode} and said nothing")
    said = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    return Answers(np.load(out.with_suffix(".npy"), mmap_mode="r"), said["by"], said["tokens"], said["template"])


def judged(
    row: dict[str, Any],
    runtime: Runtime,
    folder: Path,
    answers: Answers,
    trained: Teacher,
    exact: Teacher,
    batches: Sequence[Batch],
    tokenizer: Any,
    chunk: int,
    tolerance: float,
) -> dict[str, Any]:
    """The row of what was answered."""
    name, wrong = row["name"], list[str]()
    width = trained.head(trained.batch(0)[:1]).shape[-1]
    if answers.logits.shape[-1] != width:
        wrong.append(f"it knows {answers.logits.shape[-1]} words, the trained model {width}")
    if tokenizer is not None:
        texts = asked(batches, tokenizer)["texts"]
        if answers.tokens != [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]:
            wrong.append("texts are cut into other tokens")
        if answers.template != (tokenizer.chat_template if isinstance(getattr(tokenizer, "chat_template", None), str) else ""):
            wrong.append("the chat template is another")
    made = None if answers.logits.shape[-1] != width else scored(answers.logits, trained, batches, chunk)
    rounds, same = target(name).rounds, False
    most = max(KL, rounds) + runtime.costs
    result = row | {"reader": answers.by, "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.suffix in WEIGHTS)}
    if made is not None:
        assert made.kl is not None and made.agree is not None
        tokens, reference = float(made.tokens.sum()), own(exact, batches, chunk).loss
        kl, largest = float(made.kl.sum()) / tokens, difference(answers.logits, exact, chunk)
        apart, same = max(LOSS, rounds) + 3 * math.sqrt(2 * max(kl, 0.0) / tokens), largest <= tolerance  # losses of a token spread by √2KL
        result |= {"max_logit_difference": largest, "kl": kl, "top1": float(made.agree.sum()) / tokens, "loss": made.loss}
        result |= {"lost": made.loss - reference, "bounds": {"logits": None, "kl": most, "loss": apart}}
        if not kl <= most:
            wrong.append(f"KL is {kl:.3g} (at most {most:g})")
        if not abs(made.loss - reference) <= apart:
            wrong.append(f"the loss is {made.loss:.4f} and was {reference:.4f} (at most {apart:.3g} apart)")
    if wrong:
        return result | {"verdict": FAIL, "note": f"{folder} is not the model that was trained where it runs: {'; '.join(wrong)}"}
    return result | {"verdict": verdict(rounds, same)}


def difference(logits: np.ndarray, exact: Teacher, chunk: int = 256) -> float:
    """The largest difference of a log-probability from the trained model's.

    >>> difference(np.array([[1.0, 2.0]], np.float32), Teacher(lambda h: h, [torch.tensor([[0.0, 1.0]])]))  # which a constant does not change
    0.0
    """
    largest, done = 0.0, 0
    for i in range(len(exact)):
        for part in exact.batch(i).split(chunk):
            theirs = torch.from_numpy(np.array(logits[done : done + len(part)])).float()
            ours, done = exact.head(part).float().cpu(), done + len(part)
            largest = max(largest, float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max()))
    return largest


def scored(logits: np.ndarray, trained: Teacher, batches: Sequence[Batch], chunk: int = 256) -> Scores:
    """Scores of logits (positions, vocabulary), in the order of `asked`, against the trained model's.

    >>> ids, labels = torch.tensor([[0, 1]]), torch.tensor([[-100, 1]])
    >>> trained = Teacher(lambda h: h, [torch.tensor([[0.0, 1.0]])])
    >>> scored(np.array([[0.0, 1.0]], np.float32), trained, [{"input_ids": ids, "labels": labels}]).kl
    array([0.])
    """
    device, numbers, done = trained.batch(0).device, dict[int, Tensor](), 0
    for b in batches:  # states stand for where the logits of a place lie
        keep = trained.task.targets(b["labels"]) != IGNORED
        place = torch.zeros(b["labels"].shape, dtype=torch.long)
        place[:, :-1][keep] = torch.arange(done, done + int(keep.sum()))
        numbers[id(b)], done = place[..., None].to(device), done + int(keep.sum())
    if done != len(logits):
        raise Invalid(f"{done} places were asked for, and {len(logits)} were answered")
    head = lambda at: torch.from_numpy(np.array(logits[at[:, 0].cpu().numpy()])).float().to(device)  # noqa: E731
    return score(torch.nn.Module(), batches, trained, chunk, lambda b: numbers[id(b)], head)
