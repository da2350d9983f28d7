"""Label smoothing through the chunked loss is transformers' own, gradients too; schedulers and noise reach the trainer."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from finebits.losses import IGNORED, each_cross_entropy
from finebits.tasks._head import Head
from training.small import trained

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_smoothing_is_that_of_transformers(smoothing: float) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    W = torch.randn(31, 8)
    states, labels = torch.randn(11, 8, requires_grad=True), torch.randint(0, 31, (11,))
    ours = each_cross_entropy(states, W, labels, 4, smoothing=smoothing).mean()
    (grad,) = torch.autograd.grad(ours, states)
    padded = torch.cat([labels, torch.tensor([IGNORED])])
    logits = torch.cat([states @ W.T, torch.zeros(1, 31)])
    theirs = LabelSmoother(epsilon=smoothing)(SimpleNamespace(logits=logits[None]).__dict__, padded[None])
    (wanted,) = torch.autograd.grad(theirs, states)
    assert abs(float((ours - theirs).detach())) < 1e-6 and float((grad - wanted).abs().max()) < 1e-6


@pytest.mark.parametrize("cap", [None, 5.0])
def test_smoothing_is_the_same_through_every_head(cap: float | None) -> None:
    """Frozen, capped, quantized and trained."""
    linear = nn.Linear(16, 32)
    states, labels = torch.randn(7, 16, requires_grad=True), torch.randint(0, 32, (7,))
    found = []
    for trains in (False, True):
        linear.requires_grad_(trains)
        loss = Head(linear, 0.5, cap).loss(states, labels, 3, 0.2)
        found.append((loss.detach(), torch.autograd.grad(loss, states)[0]))
    assert float((found[0][0] - found[1][0]).abs()) < 1e-4 and float((found[0][1] - found[1][1]).abs().max()) < 1e-5


def test_each_place_may_weigh_otherwise() -> None:
    W, labels = torch.randn(9, 4), torch.tensor([1, 2, 8])
    states, weights = torch.randn(3, 4, requires_grad=True), torch.tensor([1.0, -2.0, 0.5])
    (ours,) = torch.autograd.grad((each_cross_entropy(states, W, labels, 2) * weights).sum(), states)
    theirs = nn.functional.cross_entropy(states @ W.T, labels, reduction="none")
    (wanted,) = torch.autograd.grad((theirs * weights).sum(), states)
    assert float((ours - wanted).abs().max()) < 1e-6


def test_a_smoothed_run_is_evaluated_without(tmp_path: Path) -> None:
    from finebits.evaluate.heldout import score
    from training.test_during import EVERY, HELD

    engine = trained(tmp_path, label_smoothing_factor=0.3, **EVERY, max_steps=2)
    last = [e["eval_loss"] for e in engine.state.log_history if "eval_loss" in e][-1]
    assert last == pytest.approx(score(engine.model, HELD).loss, rel=1e-5)
    plain = trained(tmp_path / "b", max_steps=2)
    first = lambda run: next(e["loss"] for e in run.state.log_history if "loss" in e)  # noqa: E731
    assert first(engine) != pytest.approx(first(plain), rel=1e-3)


SCHEDULES: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"min_lr": 0.005},
    "cosine_warmup_with_min_lr": {"min_lr": 0.005},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "polynomial": {"power": 2.0},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_transformers_move_the_rate(tmp_path: Path, name: str) -> None:
    from training.test_during import EVERY

    more = EVERY if name == "reduce_lr_on_plateau" else {}
    engine = trained(tmp_path, max_steps=6, lr_scheduler_type=name, lr_scheduler_kwargs=SCHEDULES[name], **more | {"learning_rate": 0.2})
    rates = [e["learning_rate"] for e in engine.state.log_history if "learning_rate" in e]
    assert all(math.isfinite(r) for r in rates) and rates[-1] < max(rates) <= 0.2


def test_a_schedule_without_its_settings_is_refused_before_anything_is_made() -> None:
    from finebits.interop.arguments import check_arguments

    with pytest.raises(ValueError, match="lr_scheduler_kwargs of warmup_stable_decay"):
        check_arguments({"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {}, "report_to": "none"})
    with pytest.raises(ValueError, match="lr_scheduler_kwargs of cosine"):
        check_arguments({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 3}, "report_to": "none"})
    with pytest.raises(ValueError, match="report_to names wandb"):
        check_arguments({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {}, "report_to": ["wandb"]})


def test_noise_is_neftunes(tmp_path: Path) -> None:
    """α / √(tokens × width) at most, on the embeddings, in training alone."""
    engine = trained(tmp_path, neftune_noise_alpha=5.0, max_steps=1)
    still = trained(tmp_path / "b", max_steps=1)
    loss = lambda run: next(e["loss"] for e in run.state.log_history if "loss" in e)  # noqa: E731
    assert loss(engine) != loss(still)
    hooks = engine.model.get_input_embeddings()._forward_hooks.values()
    assert not [hook for hook in hooks if "neftune" in hook.__name__]
