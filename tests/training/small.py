"""A tiny quantized Llama under LoRA, rows for it, and a trainer over both: what the tests of training share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import finebits as fb
from finebits.data.arrays import Example
from finebits.plan.base import Plan, Spec
from tiny_llama import fresh, names

TRAINING = {"learning_rate": 0.02, "lr_scheduler_type": "constant", "max_steps": 6, "per_device_train_batch_size": 2, "seed": 5}


class Padded:
    """What of a tokenizer a trainer asks here."""

    pad_token_id = 0
    eos_token_id = 2


def model(init: Any = None) -> Any:
    spec = Spec(format=fb.NF(3, block=16), adapter=fb.LoRA(rank=4, alpha=8.0), init=init or fb.LoftQ(steps=1))
    return fb.build(fresh(seed=1), Plan({n: spec for n in names()}))


def rows(count: int = 12, seed: int = 3) -> list[Example]:
    gen = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = (torch.arange(6 + i % 4) * 3 + int(torch.randint(1, 50, (1,), generator=gen))).remainder(120).add(3).tolist()
        found.append(Example(ids, [-100] * 3 + ids[3:], i + 1))
    return found


def trained(folder: Path, examples: Any = None, resume: str | None = None, made: Any = None, **more: Any) -> Any:
    """An engine that has trained; keywords of `trainer` and of its arguments."""
    from finebits.interop.trainer import trainer

    own = {k: more.pop(k) for k in ("held", "objective", "patience", "events", "watch", "loss_chunk", "rules") if k in more}
    rules = own.pop("rules", ())
    given = rows() if examples is None else examples
    given = given if own.get("objective") is not None else [vars(e) for e in given]
    engine = trainer(made if made is not None else model(), Padded(), given, folder, TRAINING | more, rules, **own)
    engine.train(resume_from_checkpoint=resume)
    return engine


def adapters(engine: Any) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in engine.model.named_parameters() if p.requires_grad}


def equal(a: Any, b: Any) -> bool:
    left, right = adapters(a), adapters(b)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
