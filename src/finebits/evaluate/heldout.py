"""Loss, KL to a teacher and top-1 agreement on held-out rows, without a vocabulary-sized tensor of all positions.

The teacher's final hidden states at the labelled positions are kept in bf16; its logits are made again, through its own head, a few
positions at a time, and so are the model's. Logits are float32 products whatever the model computes in: what is compared is the models,
not the rounding of their heads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from finebits import causal_lm
from finebits.build import Adapted
from finebits.errors import Invalid
from finebits.evaluate.exact import SLICE, exact, product
from finebits.losses import IGNORED
from finebits.tensorfile import Spool, Stored

SCHEMA = "finebits.evaluation/1"
RESAMPLES, SEED = 2000, 42
LEAST = 20  # rows: resampling fewer says nothing of rows that were not drawn

Batch = Mapping[str, Tensor]
Hidden = Callable[[Batch], Tensor]  # a batch -> final hidden states (b, t, h)
Head = Callable[[Tensor], Tensor]  # hidden states (p, h) -> logits (p, v), float32


@dataclass(frozen=True)
class Teacher:
    """Final hidden states (p, h) of every batch's labelled positions, held or in a file, and the head that makes logits of them."""

    head: Head
    states: list[Tensor] | Path

    def batch(self, i: int) -> Tensor:
        """The states of batch i."""
        return Stored(self.states)[str(i)] if isinstance(self.states, Path) else self.states[i]

    def __len__(self) -> int:
        return len(Stored(self.states) if isinstance(self.states, Path) else self.states)


@dataclass(frozen=True)
class Scores:
    """Sums of every row, in the order of the batches (float64): −log p over its labelled tokens, their number, KL(teacher‖model), positions
    whose most likely token is the teacher's. `kl` and `agree` are None where there was no teacher."""

    nll: np.ndarray
    tokens: np.ndarray
    kl: np.ndarray | None = None
    agree: np.ndarray | None = None

    @property
    def loss(self) -> float:
        """Mean −log p of a token."""
        return float(self.nll.sum() / self.tokens.sum())


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is put back."""
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def backbone(model: nn.Module) -> Hidden:
    """The final hidden states of a transformers causal model, on the device of its parameters."""
    device = next(p.device for p in model.parameters())
    return lambda batch: causal_lm.states(model, {k: v.to(device) for k, v in batch.items()})


def head_of(head: causal_lm.Head) -> Head:
    """The logits of final hidden states, as float32 products.

    A dense head is multiplied in slices, so that its float32 copy never exists; the weight is held as it is now, also if the module is
    quantized later.
    """
    module: Any = head.module
    plain = type(module) is nn.Linear
    weight, bias = (module.weight, module.bias) if plain else (torch.empty(0), None)

    def logits(h: Float[Tensor, "p h"]) -> Float[Tensor, "p v"]:
        if plain:
            return head.shape(product(h, weight, bias))
        return head.shape(exact(module)(h)) if isinstance(module, Adapted) else head(h)

    return logits


def teacher(
    model: nn.Module,
    batches: Sequence[Batch],
    hidden: Hidden | None = None,
    head: Head | None = None,
    file: Path | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Teacher:
    """One pass over the batches (dicts of input_ids, attention_mask, labels with −100). With `file`, states go to a safetensors file batch
    by batch instead of memory: 2 · h bytes a labelled position either way."""
    hidden, head = _parts(model, hidden, head, batches)
    with evaluating(model):
        if file is None:
            return Teacher(head, [_labelled(hidden(b), b)[0].to(dtype) for b in batches])
        file.parent.mkdir(parents=True, exist_ok=True)
        with Spool(file) as spool:
            for i, b in enumerate(batches):
                spool.add(str(i), _labelled(hidden(b), b)[0].to(dtype))
            spool.close({})
    return Teacher(head, file)


def score(
    model: nn.Module,
    batches: Sequence[Batch],
    teacher: Teacher | None = None,
    chunk: int = 256,
    hidden: Hidden | None = None,
    head: Head | None = None,
) -> Scores:
    """Per-row sums of a model on the batches that the teacher saw. At most 3 · chunk · vocabulary floats exist at a time.

    Raises ValueError if nothing is labelled, or if the teacher's states are of other batches.
    """
    hidden, head = _parts(model, hidden, head, batches)
    if teacher is not None and len(teacher) != len(batches):
        raise Invalid(f"the teacher saw {len(teacher)} batches and {len(batches)} are to be scored: give both the same batches")
    rows = []
    with evaluating(model):
        for i, b in enumerate(batches):
            states, y, row = _labelled(hidden(b), b)
            if teacher is not None and len(teacher.batch(i)) != len(y):
                raise Invalid(f"batch {i} has {len(y)} labelled positions and the teacher saw {len(teacher.batch(i))}: other batches")
            rows.append(_sums(states, y, row, b["labels"].shape[0], head, teacher, i, chunk))
    sums = np.concatenate(rows, 1)
    if not sums[1].sum():
        raise Invalid("no position of the held-out rows has a label: nothing can be scored")
    return Scores(sums[0], sums[1]) if teacher is None else Scores(*sums)


def own(teacher: Teacher, batches: Sequence[Batch], chunk: int = 256) -> Scores:
    """The teacher's own scores, from the states that it left: KL 0, agreement everywhere."""
    rows = []
    with torch.no_grad():
        for i, b in enumerate(batches):
            keep = b["labels"][:, 1:] != IGNORED
            y, row = b["labels"][:, 1:][keep], keep.nonzero()[:, 0]
            rows.append(_sums(teacher.batch(i), y, row, len(b["labels"]), teacher.head, teacher, i, chunk))
    return Scores(*np.concatenate(rows, 1))


def _sums(states: Tensor, y: Tensor, row: Tensor, rows: int, head: Head, teacher: Teacher | None, batch: int, chunk: int) -> np.ndarray:
    out = torch.zeros(4, rows, dtype=torch.float64)
    seen = None if teacher is None else teacher.batch(batch)
    for i in range(0, len(y), chunk):
        at, labels = row[i : i + chunk].cpu(), y[i : i + chunk]
        logits = head(states[i : i + chunk])
        log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
        nll = -log_q.gather(1, labels.to(log_q.device)[:, None])[:, 0]
        out[0].index_add_(0, at, nll.double().cpu())
        out[1].index_add_(0, at, torch.ones(len(at), dtype=torch.float64))
        if seen is None or teacher is None:
            continue
        logits = teacher.head(seen[i : i + chunk]).to(log_q.device)
        agree = logits.argmax(-1) == log_q.argmax(-1)
        log_p = logits.sub_(logits.logsumexp(-1, keepdim=True))
        terms = (log_p - log_q).mul_(log_p.exp_())
        kl = torch.stack([part.sum(-1, dtype=torch.float64) for part in terms.split(SLICE, -1)]).sum(0)  # a wider sum is of a copy
        del logits, log_p, log_q, terms  # before the next chunk's exist
        out[2].index_add_(0, at, kl.cpu())
        out[3].index_add_(0, at, agree.double().cpu())
    return out.numpy()


def _labelled(hidden: Float[Tensor, "b t h"], batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """States (p, h), label and row of every position that predicts a labelled token."""
    y = batch["labels"][:, 1:].to(hidden.device)
    keep = y != IGNORED
    return hidden[:, :-1][keep], y[keep], keep.nonzero()[:, 0]


def _parts(model: nn.Module, hidden: Hidden | None, head: Head | None, batches: Sequence[Batch]) -> tuple[Hidden, Head]:
    if not batches:
        raise Invalid("there are no held-out batches to score")
    return hidden or backbone(model), head or head_of(causal_lm.head(model))


def table(
    scores: Mapping[str, Scores],
    names: Mapping[str, str],
    stages: Mapping[str, str],
    against: str | Mapping[str, str] = "full",
    bits: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """evaluation.json: token-weighted means, 95% intervals by resampling rows (2,000 times, seeded), and differences by the same resamples.
    Of fewer than LEAST rows there are no intervals. `bits` are those of a linear weight, where an entry has some.

    `against` names the entry that each is compared with, one for all or one for each key. `gap_closed` of a tuned entry x is
    (loss(full) − loss(x)) / (loss(full) − loss(lora16)), None where either is missing or 16-bit LoRA did not improve on `full`.
    Raises ValueError if two entries were not scored on the same rows.
    """
    if not scores:
        raise Invalid("there are no scores to make a table of")
    first = next(iter(scores.values()))
    for key, s in scores.items():
        if len(s.tokens) != len(first.tokens) or not np.array_equal(s.tokens, first.tokens):
            raise Invalid(f"{key} was not scored on the rows of {next(iter(scores))}: the entries of one table need the same batches")
    rows = len(first.tokens)
    counts = np.random.default_rng(SEED).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES).astype(np.float64)
    weight = counts @ first.tokens
    counts, weight = counts[weight > 0], weight[weight > 0]

    def mean(sums: np.ndarray | None) -> float | None:
        return None if sums is None else float(sums.sum() / first.tokens.sum())

    def interval(sums: np.ndarray | None) -> list[float] | None:
        return None if sums is None or rows < LEAST else [float(v) for v in np.quantile(counts @ sums / weight, (0.025, 0.975))]

    def minus(a: np.ndarray | None, b: np.ndarray | None) -> list[float | None] | None:
        return None if a is None or b is None else [mean(a - b), *(interval(a - b) or (None, None))]  # type: ignore[list-item]

    entries = []
    for key, s in scores.items():
        other = against if isinstance(against, str) else against.get(key)
        if other is not None and other not in scores and not isinstance(against, str):
            raise Invalid(f"{key} is to be compared with {other}, which was not scored (there are {', '.join(scores)})")
        o = scores.get(other) if other is not None and other != key else None
        closed = None
        if stages[key] == "tuned" and "full" in scores and "lora16" in scores:
            gap = scores["full"].loss - scores["lora16"].loss
            closed = (scores["full"].loss - s.loss) / gap if gap > 0 else None
        entries.append(
            {
                "key": key,
                "name": names[key],
                "stage": stages[key],
                "bits": (bits or {}).get(key),
                "loss": s.loss,
                "perplexity": math.exp(s.loss) if s.loss < 700 else None,
                "kl": mean(s.kl),
                "top1": mean(s.agree),
                "intervals": {"loss": interval(s.nll), "kl": interval(s.kl), "top1": interval(s.agree)},
                "paired": None if o is None else {"against": other, "loss": minus(s.nll, o.nll), "kl": minus(s.kl, o.kl)},
                "gap_closed": closed,
            }
        )
    return {"schema": SCHEMA, "rows": rows, "tokens": int(first.tokens.sum()), "entries": entries}
