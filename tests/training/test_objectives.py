"""Objectives over answers: their formulas by hand, TRL's own losses, the reference without a second model, and runs that learn to prefer."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
from finebits.data.arrays import Example, Tokens, load, save
from finebits.errors import Invalid
from finebits.interop.preferring import Preferring, alike, bare, log_probs
from finebits.objectives.base import Said
from finebits.objectives.dpo import DPO
from finebits.objectives.kto import KTO
from finebits.objectives.orpo import ORPO
from finebits.tasks.causal_lm import CausalLM
from training.small import Padded, adapters, equal, model, rows, trained

pytest.importorskip("trl")


def pairs(count: int = 8) -> list[Example]:
    """To every prompt an answer of rising words, which is liked, and one of falling words."""
    found = []
    for i in range(count):
        prompt = [3 + 5 * i % 100, 4 + 3 * i % 100, 7]
        up, down = [20, 21, 22, 23, 2], [60, 59, 58, 2]
        found += [Example([*prompt, *up], [-100] * 3 + up, i + 1), Example([*prompt, *down], [-100] * 3 + down, i + 1, liked=False)]
    return found


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_dpo_is_its_formula() -> None:
    said = Said.of([-2.0, -5.0, -1.0, -1.5], [-2.5, -4.0, -1.0, -1.0])
    m = [0.3 * (0.5 + 1.0), 0.3 * (0.0 + 0.5)]
    assert DPO(beta=0.3).losses(said).tolist() == pytest.approx([-math.log(sigmoid(x)) for x in m])
    wrong = DPO(beta=0.3, label_smoothing=0.2).losses(said).tolist()
    assert wrong == pytest.approx([-0.8 * math.log(sigmoid(x)) - 0.2 * math.log(sigmoid(-x)) for x in m])


def test_orpo_is_its_formula() -> None:
    said = Said.of([-2.0, -6.0], [0.0, 0.0], tokens=[4, 3])
    p, q = math.exp(-0.5), math.exp(-2.0)
    ratio = math.log(p / (1 - p)) - math.log(q / (1 - q))
    assert ORPO(lam=0.4).losses(said).item() == pytest.approx(0.5 - 0.4 * math.log(sigmoid(ratio)))


def test_kto_is_its_formula() -> None:
    said = Said.of([-2.0, -3.0], [-2.5, -2.0], z=0.1)
    got = KTO(beta=0.5, desirable=2.0, undesirable=3.0).losses(said).tolist()
    assert got == pytest.approx([2 - 2 * sigmoid(0.5 * (0.5 - 0.1)), 3 - 3 * sigmoid(0.5 * (0.1 + 1.0))])


def test_odds_are_those_of_trl() -> None:
    import os

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from types import SimpleNamespace

    from trl.experimental.orpo import ORPOTrainer

    means = -torch.rand(6).double() * 3 - 0.05
    host: Any = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    theirs, *_ = ORPOTrainer.odds_ratio_loss(host, means[0::2], means[1::2])
    said = Said(means * 5, torch.zeros(6), torch.full((6,), 5), torch.tensor([True, False] * 3))
    ours = ORPO(lam=0.25).losses(said) + means[0::2]
    assert torch.allclose(ours.float(), -theirs, atol=1e-6)


@pytest.mark.parametrize("bad", [{"beta": 0.0}, {"beta": -1.0}, {"label_smoothing": 0.5}])
def test_settings_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(Invalid, match=next(iter(bad))):
        DPO(**bad)


def full(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """log π(y | x) by the whole logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    y = batch["labels"][:, 1:]
    return (logits.gather(-1, y.clamp(min=0)[..., None])[..., 0] * (y != -100)).sum(-1)


def test_log_probabilities_and_their_gradients_are_those_of_all_logits() -> None:
    made, batch = model(), CausalLM().batch([vars(e) for e in pairs(3)], Padded())
    weights = torch.tensor([1.0, -0.5, 2.0, -1.0, 0.3, 0.0])
    held = [p for p in made.parameters() if p.requires_grad]
    ours, theirs = log_probs(CausalLM(), made, batch, 4), full(made, batch)
    assert torch.allclose(ours, theirs, atol=1e-4)
    one = torch.autograd.grad((ours * weights).sum(), held)
    two = torch.autograd.grad((theirs * weights).sum(), held)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("objective", [DPO(reference="base"), KTO(reference="base")])
def test_the_reference_is_the_base_and_no_second_model(objective: Any) -> None:
    """Of the same codes, with nothing over them."""
    made = model()
    before = sum(p.numel() for p in made.parameters())
    p = Preferring(objective, CausalLM(), Padded(), 1, 16)
    given = p.rows(pairs(3))
    p.refer(made, given, 4)
    held = {k: v for k, v in made.named_modules() if isinstance(v, fb.Adapted)}
    plain = model(init=fb.Zeros())  # the same codes under adapters that do nothing
    for name, host in {k: v for k, v in plain.named_modules() if isinstance(v, fb.Adapted)}.items():
        host.weight = held[name].weight
    batch = p.batch(given)
    assert torch.allclose(batch["reference"], full(plain, batch).detach(), atol=1e-4)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    with bare(made):
        assert torch.allclose(log_probs(CausalLM(), made, inputs, 16), batch["reference"], atol=1e-4)
    assert sum(p.numel() for p in made.parameters()) == before
    start = Preferring(replace(objective, reference="start"), CausalLM(), Padded(), 1, 16)
    again = start.rows(pairs(3))
    start.refer(made, again, 4)
    assert not torch.allclose(start.batch(again)["reference"], batch["reference"], atol=1e-3)  # LoftQ's start is nearer to the weights


def test_other_answers_follow_their_own_prompts() -> None:
    given = [{"input_ids": e.input_ids, "labels": e.labels} for e in rows(3)]
    made = alike(given)
    assert made[0]["other_input_ids"][:3] == given[0]["input_ids"][:3]
    assert made[0]["other_labels"][3:] == given[1]["labels"][3:][: len(made[0]["other_labels"]) - 3]


def test_what_is_unwanted_outlives_its_file(tmp_path: Path) -> None:
    tokens = Tokens.of(pairs(2), 16, True)
    save(tmp_path / "t.safetensors", {"train": tokens}, {})
    again = load(tmp_path / "t.safetensors")[0]["train"]
    assert [e.liked for e in again] == [True, False, True, False] == [e.liked for e in tokens.within(5, True)]


LEARNT = {"max_steps": 12, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 6}


@pytest.mark.parametrize("objective", [DPO(), ORPO(), KTO()], ids=lambda o: type(o).__name__)
def test_runs_learn_to_prefer(objective: Any, tmp_path: Path) -> None:
    """From the start, where DPO is log 2 and KTO a half; held-out answers too."""
    engine = trained(tmp_path, pairs(8), objective=objective, held=pairs(10)[12:], eval_on_start=True, **LEARNT)
    seen = [e for e in engine.state.log_history if "eval_loss" in e]
    assert seen[0]["eval_loss"] > seen[-1]["eval_loss"] and seen[-1]["eval_margin"] > seen[0]["eval_margin"]
    assert seen[-1]["eval_accuracy"] == 1.0
    first = {"DPO": math.log(2), "KTO": 0.5}.get(type(objective).__name__)
    assert first is None or seen[0]["eval_loss"] == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("objective", [DPO(), ORPO(), KTO()], ids=lambda o: type(o).__name__)
def test_passes_of_a_step_are_one_large_batch(objective: Any, tmp_path: Path) -> None:
    """KTO's z too. And a resumed run is the run."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "sgd", "learning_rate": 0.5}
    many = trained(tmp_path / "a", pairs(8), objective=objective, per_device_train_batch_size=2, gradient_accumulation_steps=8, **settings)
    one = trained(tmp_path / "b", pairs(8), objective=objective, per_device_train_batch_size=16, **settings)
    left, right = adapters(many), adapters(one)
    assert all(torch.allclose(left[k], right[k], atol=1e-5) for k in left)
    again = trained(
        tmp_path / "c",
        pairs(8),
        objective=objective,
        resume=str(tmp_path / "b" / "checkpoint-2"),
        per_device_train_batch_size=16,
        **settings,
    )
    assert equal(again, one)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no whole number of pairs"):
        trained(tmp_path, pairs(2)[:3], objective=DPO())
    with pytest.raises(Invalid, match="takes two rows of a batch"):
        trained(tmp_path, pairs(2), objective=DPO(), per_device_train_batch_size=3)
