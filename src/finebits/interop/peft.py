"""Exports as a boundary: a target's folder out, and the proof that the libraries it is for compute what was trained.

What the tolerance of `verify` applies to. Two models in half precision differ by their rounding, which says nothing about the files; so
the largest logit difference is taken with both sides computing in float32: the exported files as their readers read them, and our
model with the weights that it has (evaluate/exact.py). This difference must not exceed the tolerance: same weights, same
function. A target that rounds weights once more, as `merged` does to bf16, and scales that take an adapter in in less than float32, have it
reported, and it may make the verdict "same". For all, KL from
the trained model as it runs (packed, in its own dtype) must be small, which ties the proof to what was trained and evaluated, kernels included;
and the two losses in float32 must agree, since rounding moves the loss of unlikely words by more than a wrong file might. A target that rounds
to few bits has wider bounds of its own for both, and its verdict is "rounded": another model by design, and `lost`, the nats a token that its
loss is above that of what was trained, says by how much.

Weights in codes are decoded by the library that the layout belongs to, one at a time, where it is installed and has a way to; `reader` says
whose code it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finebits import artefacts
from finebits.errors import Invalid
from finebits.evaluate.exact import float32
from finebits.evaluate.heldout import Batch, Head, Hidden, Teacher, evaluating, head_of, own, score, teacher
from finebits.export._fold import rounds as rescaled_roundly
from finebits.export._peft import BASE, TENSORS
from finebits.export.base import WEIGHTS, Extras, VerificationFailed, said, target, write
from finebits.interop.checkpoint import config_of, fingerprint, weight_files
from finebits.interop.configs import class_of
from finebits.interop.stock import Stock
from finebits.store import plan_of
from finebits.tasks import base as tasks

KL, LOSS = 1e-2, 1e-2  # nats a token: more than half-precision arithmetic differs by, less than a wrong weight does
SAME, OK, ROUNDED, FAIL = "same", "ok", "rounded", "fail"


def export(
    model: Any,
    folder: str | Path,
    to: str,
    tokenizer: Any = None,
    *,
    base_name: str | None = None,
    data: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    memory: Mapping[str, Any] | None = None,
    requantized: Mapping[str, Any] | None = None,
    importance: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `folder` for one target (a name of finebits.export); returns its row of export.json as far as it is known without verification:
    name, path, bytes, and a note where there is something to be known of it.

    `base_name` is what the adapter says that it belongs to, for example a hub id; otherwise `folder`/base as an absolute path. `data`,
    `recipe`, `memory` and `requantized` go into the cards, the last into a file of its own too. `importance` is how much columns of weights
    count where they are rounded anew. Files of others in `folder` stay. Raises ValueError for an adapter or a weight that the target does not
    hold, and, without `overwrite`, if the folder holds another model or files of others under names that would be written.
    """
    folder = Path(folder)
    bytes_ = write(to, model, folder, Extras(tokenizer, base_name, data, recipe, memory, requantized, importance), overwrite, _base_of)
    note = said(to, model)
    return {"name": to, "path": str(folder), "bytes": bytes_} | ({} if note is None else {"note": note})


def _base_of(folder: Path) -> dict[str, str]:
    """By which the base of an adapter is known where it lies somewhere else."""
    base = folder / BASE
    return {"base": fingerprint(base)} if (base / "config.json").is_file() and weight_files(base) else {}


def verify(
    folder: str | Path,
    to: str,
    model: Any,
    batches: Sequence[Batch],
    trained: Teacher | None = None,
    tolerance: float = 1e-3,
    chunk: int = 256,
    reference: Teacher | None = None,
) -> dict[str, Any]:
    """Run an exported folder through the modules of transformers and peft alone, block by block, and compare it with the trained model on
    held-out batches.

    Returns a row of export.json: name, path, bytes, reader, max_logit_difference, kl, top1, loss, lost, bounds, verdict ("same", "ok" or
    "rounded"). `trained` is `teacher(model, batches)` of the model as it was trained, `reference` is `exactly(model, batches)`; both are made
    here if not given. The head of this module says what must hold.
    Peak memory above the model: embeddings and head of the artefact, and one block of it in float32. Raises VerificationFailed (code 6).
    """
    folder = Path(folder)
    artefacts.settle(folder)
    trained = trained or teacher(model, batches, dtype=_dtype(model))
    reference = reference or exactly(model, batches)
    with evaluating(model), float32(model):
        exact = own(reference, batches, chunk=chunk).loss
    kind = target(to)
    try:
        theirs = streamed(folder, to)
    except Invalid as e:
        raise VerificationFailed(
            f"{folder} is not what stock libraries read: {e}", {"name": to, "path": str(folder), "verdict": FAIL}
        ) from e
    rounds = bool(kind.rounds) or (kind.scales is not None and rescaled_roundly(model, kind.scales))
    states = theirs.hidden(batches)
    head = head_of(tasks.of(theirs.model).head(theirs.model))
    scores = score(theirs.model, batches, trained, chunk, states, head)
    difference = _max_difference(states, head, batches, reference, chunk)
    assert scores.kl is not None and scores.agree is not None
    kl, top1 = float(scores.kl.sum() / scores.tokens.sum()), float(scores.agree.sum() / scores.tokens.sum())
    most_kl, most_loss = max(KL, kind.rounds), LOSS
    if kind.rounds > KL:  # of few bits: differences of two losses of a token spread by √2KL
        most_loss = kind.rounds + 3 * math.sqrt(2 * max(kl, 0.0) / float(scores.tokens.sum()))
    same = difference <= tolerance
    ok = kl <= most_kl and abs(scores.loss - exact) <= most_loss and (same or rounds)
    result = {
        "name": to,
        "path": str(folder),
        "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.suffix in WEIGHTS),
        "reader": theirs.by,
        "max_logit_difference": difference,
        "kl": kl,
        "top1": top1,
        "loss": scores.loss,
        "lost": scores.loss - exact,
        "bounds": {"logits": None if rounds else tolerance, "kl": most_kl, "loss": most_loss},
        "verdict": verdict(kind.rounds, same) if ok else FAIL,
    }
    if not ok:
        raise VerificationFailed(
            f"{folder} is not the model that was trained: largest logit difference {difference:.3g} (tolerance {tolerance:g}, "
            f"{'reported only' if rounds else 'binding'}), KL {kl:.3g} (at most {most_kl:g}), "
            f"loss {scores.loss:.4f} against {exact:.4f} (at most {most_loss:.3g} apart)",
            result,
        )
    return result


def exactly(model: Any, batches: Sequence[Batch]) -> Teacher:
    """What the model as it was trained gives in float32: what logits are compared with."""
    with evaluating(model), float32(model):
        return teacher(model, batches, dtype=torch.float32)


def verdict(rounds: float, same: bool) -> str:
    """What is said of an artefact that passes, of a target that `rounds` so: its logits are the `same`, its KL and loss are, or it was rounded
    to few bits and is what that leaves.

    >>> verdict(0.0, same=True), verdict(1e-2, same=False), verdict(0.3, same=False)
    ('same', 'ok', 'rounded')
    """
    return SAME if same else ROUNDED if rounds > KL else OK


def table(results: Sequence[dict[str, Any]], tolerance: float, rows: int) -> dict[str, Any]:
    """export.json."""
    return {"targets": list(results), "tolerance": tolerance, "rows": rows}


def stock(folder: Path, to: str, dtype: torch.dtype = torch.float32) -> Any:
    """An exported folder as people load it, with the libraries that it is for alone."""
    read = target(to).read(folder)
    model = class_of(config_of(read.base)).from_pretrained(read.base, dtype=dtype) if read.load is None else read.load(dtype)
    if not (folder / TENSORS).exists():
        return model
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, folder)
    return adapted if adapted.active_peft_config.is_prompt_learning else adapted.get_base_model()


def streamed(folder: Path, to: str, dtype: torch.dtype = torch.float32) -> Stock:
    """What those libraries make of an exported folder, with one block of it in memory."""
    return Stock(target(to).read(folder), folder / TENSORS, dtype)


def _max_difference(hidden: Hidden, head: Head, batches: Sequence[Batch], reference: Teacher, chunk: int) -> float:
    largest = 0.0
    with torch.no_grad():
        for i, b in enumerate(batches):
            ours, (theirs, *_) = reference.batch(i), tasks.picked(reference.task, hidden(b), b)
            for j in range(0, len(ours), chunk):
                gap = (reference.head(ours[j : j + chunk]) - head(theirs[j : j + chunk]).to(ours.device)).abs().max()
                largest = max(largest, float(gap))
    return largest


def _dtype(model: nn.Module) -> torch.dtype:
    return getattr(torch, plan_of(model).levers.dtype)
