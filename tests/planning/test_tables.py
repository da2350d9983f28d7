"""Adapters over tables of embeddings in a plan: named by the recipe, refused where they cannot lie, counted, measured, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
import tiny_llama as tiny
from finebits.carrier import Following, tables
from finebits.interop.hf import load_planned
from finebits.interop.planning import Settings, plan_model
from finebits.interop.selecting import Mistake
from finebits.interop.trainer import trainer
from finebits.plan.base import Plan
from finebits.plan.footprint import Footprint
from finebits.plan.levers import Levers
from finebits.plan.memory import moments
from finebits.plan.seen import Batch
from finebits.recipe import Recipe, call

NAME, V, N = "model.embed_tokens", 128, 64
Q = ["q_proj", "embed_tokens"]


def settings(**more: Any) -> Settings:
    given: dict[str, Any] = dict(formats=(fb.NF(4, 32),), adapter=fb.LoRA(rank=4, alpha=4), init=fb.Zeros(), reserve=0.0, loss_chunk=8)
    return Settings(**given | dict(dtype="float32", max_length=16) | more)


def test_asked_for_by_the_recipe_and_by_a_lora_config() -> None:
    asked = ["adapter.trainable_token_indices=[3, 9]", "adapter.ensure_weight_tying=true"]
    of = Settings.of(Recipe.parse("model: {model_name_or_path: m}", overrides=asked))
    assert of.trainable_token_indices == [3, 9] and of.ensure_weight_tying
    only = Recipe.parse("model: {model_name_or_path: m}", overrides=["adapter={paper: trainable_tokens, indices: [9, 3]}"])
    assert only.adapter_value() == fb.TrainableTokens((3, 9))
    from peft import LoraConfig

    theirs = LoraConfig(target_modules=Q, trainable_token_indices={"embed_tokens": [3, 9]}, ensure_weight_tying=True)
    made = call.recipe("m", None, {}, None, theirs)
    assert made.adapter.trainable_token_indices == {"embed_tokens": [3, 9]} and made.adapter.ensure_weight_tying


@pytest.mark.parametrize(
    "more",
    [
        dict(target_modules=Q),
        dict(target_modules=Q, embeddings=(fb.Int(8, 32),), ensure_weight_tying=True, rank_pattern={"embed_tokens": 6}),
        dict(target_modules=r".*(q_proj|embed_tokens)", adapter=fb.VeRA(rank=4)),
        dict(trainable_token_indices=[3, 9], ranks=(2, 4)),
        dict(trainable_token_indices={"embed_tokens": [3, 9]}, dropout=0.1),
        dict(adapter=fb.TrainableTokens((9, 3)), init=fb.Zeros()),
    ],
    ids=["lora", "followed", "vera", "tokens and ranks", "tokens", "tokens alone"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_number_of_it(more: dict[str, Any], tied: bool, small: Path, small_untied: Path) -> None:
    plan = plan_model(small if tied else small_untied, None, None, settings(**more))
    model, _ = load_planned(plan)
    trained = Footprint.of(plan).trained
    count = lambda p: sum(t.numel() for t in p if t.requires_grad)  # noqa: E731
    own = count(tables(model)[NAME].p.parameters())
    assert plan.memory["adapters"] == 4 * count(model.parameters()) and trained.words == own
    follows = tied and (bool(more.get("ensure_weight_tying")) or plan.over[NAME].over == "table")
    assert isinstance(model.lm_head, Following) == follows and trained.followed == (own if follows else 0)
    assert Footprint.of(plan).beside == sum(p.numel() for p in tables(model)[NAME].p.parameters())
    assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
    if "rank_pattern" in more:
        assert plan.over[NAME].rank == 6


def test_the_moments_that_it_is_held_at(small: Path) -> None:
    bare, more = (plan_model(small, None, None, settings(target_modules=t)) for t in (["q_proj"], Q))
    g, (one, other) = Footprint.of(more).geometry, (Footprint.of(p).trained for p in (bare, more))
    assert other.words == 4 * (V + N) and other.followed == 0
    before, after = moments(g, 0, one, more.workload), moments(g, 0, other, more.workload)
    assert "words" not in before and after["words"]["one block"] == 4 * other.words
    assert after["step"]["optimizer's work"] == 3 * 4 * other.words and after["loss"].get("gradients") == before["loss"].get("gradients")
    seen = [Footprint.of(p).geometry.observed.shared(Batch(1, 16, 16)) for p in (bare, more)]
    assert seen[1] - seen[0] == 4 * 16 * 4  # the rows of B, for the gradient of A
    followed = plan_model(small, None, None, settings(target_modules=Q, ensure_weight_tying=True))
    footprint = Footprint.of(followed)
    early = moments(footprint.geometry, 0, footprint.trained, followed.workload)["loss"]
    assert early["gradients"] == 4 * other.words and (g.copies, footprint.geometry.copies) == (1, 3)


def test_embeddings_that_are_adapted_stay_on_the_device(small_untied: Path) -> None:
    for more in (dict(target_modules=Q), dict(trainable_token_indices=[3]), dict(adapter=fb.TrainableTokens((3,)), init=fb.Zeros())):
        plan = plan_model(small_untied, None, None, settings(levers=("embeddings", "micro_batch"), **more), fast=True)
        assert plan.levers.embeddings == Levers().embeddings and Footprint.of(plan).geometry.lookup == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(target_modules=["embed_tokens"]), "names model.embed_tokens and no linear of the model, whose bits are planned: name some"),
        (dict(target_modules=Q, adapter=fb.DoRA()), "DoRA cannot lie over a table of embeddings: its update is no product L R"),
        (dict(target_modules=Q, adapter=fb.MixLoRA()), "MixLoRA lies over no such thing by name: leave it out"),
        (dict(target_modules=Q, modules_to_save=["embed_tokens"]), "trained itself .adapter.modules_to_save. and under an adapter"),
        (dict(target_modules=Q, ranks=(2, 4)), "adapter.ranks gives linear layers their ranks, and model.embed_tokens is a table"),
        (dict(target_modules=Q, trainable_token_indices=[1]), "target_modules names model.embed_tokens: leave one of the two out"),
        (dict(adapter=fb.TrainableTokens((1,)), trainable_token_indices=[1]), "the adapter trains tokens itself: leave one of the two out"),
        (dict(trainable_token_indices=[V]), "word 128 is to be trained, and the table of embeddings has those from 0 to 127"),
        (dict(trainable_token_indices={"lm_head": [3]}), "names lm_head, and the table of input embeddings is model.embed_tokens"),
    ],
)
def test_what_is_refused_while_planning(more: dict[str, Any], message: str, small: Path) -> None:
    with pytest.raises(Mistake, match=message):
        plan_model(small, None, None, settings(**more))


@pytest.mark.parametrize(
    "more", [dict(target_modules=Q, embeddings=(fb.Int(8, 32),)), dict(trainable_token_indices=[3, 9, 50])], ids=["lora", "tokens"]
)
def test_trained_stopped_and_gone_on_with(more: dict[str, Any], small: Path, tmp_path: Path) -> None:
    """A run that goes on from a checkpoint ends where one ends that was never stopped; what is saved is loaded to the bit."""
    plan = plan_model(small, None, None, settings(gradient_checkpointing=False, **more))
    rows: Any = [{k: [(i * j) % 60 + 1 for j in range(1, 12)] for k in ("input_ids", "labels")} for i in range(1, 9)]

    def run(resume: str | None = None) -> nn.Module:
        model, tokenizer = load_planned(plan)
        arguments = dict(max_steps=4, per_device_train_batch_size=2, learning_rate=0.05, save_strategy="steps", save_steps=2, seed=1)
        arguments |= dict(report_to="none", use_cpu=True, logging_steps=1)
        engine = trainer(model, tokenizer, rows, tmp_path / "checkpoints", arguments, [], loss_chunk=8)
        engine.train(resume_from_checkpoint=resume)
        return model

    whole = {k: p.detach().clone() for k, p in run().named_parameters() if p.requires_grad}
    model = run(str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert all(torch.equal(p, whole[k]) for k, p in model.named_parameters() if p.requires_grad)
    born = dict(load_planned(plan)[0].named_parameters())
    assert any(not torch.equal(p, born[k]) for k, p in model.named_parameters() if k.startswith(f"{NAME}.p."))
    fb.save(model, tmp_path / "saved")
    again, _ = fb.load(tmp_path / "saved")
    assert torch.equal(tiny.logits(again), tiny.logits(model))
