"""Adapters over what is no matrix: planned, counted, trained in the Trainer, resumed, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import finebits as fb
import tiny_llama as tiny
from finebits import registry
from finebits.build import all_hosts
from finebits.export import base as exports
from finebits.interop.trainer import trainer
from finebits.optim.base import named
from finebits.plan import memory
from finebits.recipe import Recipe
from finebits.recipe.settings import Settings
from finebits.tasks import base as tasks

ADAPTERS: list[Any] = [
    fb.LoRA(rank=4),
    fb.MixLoRA(rank=4, experts=4, attention=fb.LoRA(rank=4)),
    fb.Bottleneck(position="feed_forward", reduction=8),
    fb.BiAdaptFormer(units=8),
    fb.PromptTuning(tokens=8),
    fb.PrefixTuning(tokens=8),
    fb.PTuning(tokens=8, hidden=16),
]
T, B = 32, 2


def planned(small: Path, adapter: Any, **more: Any) -> fb.Plan:
    said: dict[str, Any] = dict(max_length=T, per_device_train_batch_size=B, candidates=["nf4-b32"], dtype="float32", dropout=0.0) | more
    return fb.plan_model(str(small), None, fast=True, adapter=adapter, **said)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 128, (B, T), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def kept(model: Any) -> int:
    """Bytes that a step keeps for its backward pass between the embeddings and the last norm, parameters and what is shared aside."""
    known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    known |= {
        part.untyped_storage()._cdata for _, host in all_hosts(model) if hasattr(host, "weight") for part in host.weight.parts.values()
    }
    found: dict[int, tuple[int, Tensor]] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            found[storage._cdata] = storage.nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tasks.of(model).states(model, batch())
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda a: type(a).__name__)
def test_a_plan_counts_what_the_model_holds(small: Path, adapter: Any) -> None:
    plan = planned(small, adapter, gradient_checkpointing=False)
    assert fb.Plan.from_json(plan.to_json()) == plan and bool(plan.over) == (adapter.over != "matrix") == ("over" in plan.to_json())
    model, _ = fb.load_planned(plan)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    (first,) = memory.batches(plan.workload)
    moments = memory.moments(memory.Geometry.of(plan.sizes["geometry"]), 0, memory.Trained(**plan.sizes["trained"]), plan.workload, first)
    assert plan.memory["adapters"] == moments["first block"]["gradients"] == 4 * numbers and plan.memory["optimizer"] == 8 * numbers
    said, held = moments["loss"]["activations"] + moments["loss"]["loss chunk"], kept(model.train())
    # The observer's blocks are given states that want a gradient; those of the first block want none before its adapter.
    assert 0.8 * held < said < (3.0 if adapter.over == "feed_forward" else 1.6) * held, (said, held)
    outside = {"LoRA"} if isinstance(adapter, fb.MixLoRA | fb.LoRA) else set()
    assert {type(s.adapter).__name__ for s in plan.modules.values() if s.adapter} == outside


def test_virtual_tokens_take_the_memory_of_tokens(small: Path) -> None:
    plain, long = (planned(small, fb.PromptTuning(tokens=n), gradient_checkpointing=True) for n in (1, 33))
    width = 64 * 4
    inputs = {n: p.memory["block inputs"] for n, p in ((1, plain), (33, long))}
    assert inputs[33] - inputs[1] == 2 * B * 32 * width
    assert long.memory["one block"] > 1.5 * plain.memory["one block"]


def test_a_recipe_names_it(small: Path) -> None:
    recipe = Recipe.parse(
        f"model: {{model_name_or_path: {small}}}\n"
        "adapter: {paper: mixlora, rank: 4, experts: 4, attention: {paper: lora, rank: 2}}\n"
        "rules: [mixlora_balance]\n"
    )
    adapter = fb.MixLoRA(rank=4, experts=4, attention=fb.LoRA(rank=2))
    assert recipe.adapter_value() == adapter and recipe.init_value() == fb.Zeros()
    plan = fb.plan_model(str(small), None, settings=Settings.of(recipe), fast=True)
    assert plan.over == {f"model.layers.{i}.mlp": adapter for i in range(2)}
    adapters = {name.rpartition(".")[2]: spec.adapter for name, spec in plan.modules.items()}
    assert adapters == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), fb.LoRA(rank=2)) | dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj")
    )


@pytest.mark.parametrize("adapter", [ADAPTERS[1], ADAPTERS[4], ADAPTERS[5]], ids=lambda a: type(a).__name__)
def test_the_trainer_trains_it_and_goes_on_from_a_checkpoint(small: Path, adapter: Any, tmp_path: Path) -> None:
    plan = planned(small, adapter)
    rows = [{k: b[k][0].tolist() for k in ("input_ids", "labels")} for b in tiny.batches(rows=6, size=1)]

    def run(steps: int, folder: str, resume: bool = False) -> Any:
        model, processor = fb.load_planned(plan)
        rules = [fb.MixLoRABalance(0.1)] if isinstance(adapter, fb.MixLoRA) else []
        settings = dict(max_steps=steps, per_device_train_batch_size=2, learning_rate=0.01, save_strategy="steps", save_steps=2, seed=7)
        more = dict(lr_scheduler_type="constant", gradient_checkpointing=True)
        engine = trainer(model, processor, rows, tmp_path / folder, settings | more | {"weight_decay": 0.1}, rules)
        if isinstance(adapter, fb.MixLoRA):
            decayed = engine.get_decay_parameter_names(model)
            assert any(n.endswith("gate_A") for n in decayed) and not any(n.endswith("router") for n in decayed)
        engine.train(resume_from_checkpoint=resume or None)
        return model, [entry["loss"] for entry in engine.state.log_history if "loss" in entry]

    whole, losses = run(4, "whole")
    run(2, "cut")
    again, more = run(4, "cut", resume=True)
    assert more[-2:] == losses[-2:] and losses[-1] != losses[0]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True) if a.requires_grad)
    fb.save(whole, tmp_path / "saved")
    assert torch.equal(tiny.logits(fb.load(tmp_path / "saved")[0]), tiny.logits(whole.eval()))


@pytest.mark.parametrize("more", [{"paper": "galore"}, {"paper": "q_galore", "inner": "adamw", "layerwise": True}])
def test_weights_trained_through_a_thin_basis_resume_to_the_bit(small: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    """In the Trainer, weights in codes of 8 bits, stopped between two searches for a basis."""
    kind = registry.from_json("optim", {"rank": 4, "gap": 3} | more)
    plan = planned(small, fb.Full(), optim=kind, candidates=["int8-b32"], max_grad_norm=0.0)
    rows = [{"input_ids": list(range(i, i + 12)), "labels": list(range(i, i + 12))} for i in range(3, 19)]

    def run(steps: int, folder: str, resume: bool = False) -> tuple[Any, list[float]]:
        model, processor = fb.load_planned(plan)
        settings = dict(max_steps=steps, per_device_train_batch_size=2, learning_rate=0.01, save_strategy="steps", save_steps=2, seed=7)
        settings |= dict(lr_scheduler_type="constant", max_grad_norm=0.0, optim=kind)
        engine = trainer(model, processor, rows, tmp_path / folder, settings)
        engine.train(resume_from_checkpoint=resume or None)
        assert any("transform.svds" in state for state in engine.optimizer.state.values())
        return model, [entry["loss"] for entry in engine.state.log_history if "loss" in entry]

    whole, losses = run(4, "whole")
    run(2, "cut")
    again, more_losses = run(4, "cut", resume=True)
    assert more_losses[-2:] == losses[-2:] and losses[-1] != losses[0]
    assert all(
        torch.equal(a.dequantize(), b.dequantize()) for a, b in zip(whole.parameters(), again.parameters(), strict=True) if a.requires_grad
    )


def test_what_cannot_be_had_together_is_refused(small: Path) -> None:
    with pytest.raises(ValueError, match="dropout of the inputs has no meaning for PromptTuning"):
        planned(small, fb.PromptTuning(), dropout=0.1)
    with pytest.raises(ValueError, match="galore transforms gradients of weights that are trained themselves, and LoRA trains others"):
        planned(small, fb.LoRA(), optim=named("galore"))
    assert planned(small, fb.Full(), optim=named("galore")).levers.optim == named("galore")
    with pytest.raises(ValueError, match="ranks are chosen matrix by matrix, and MixLoRA lies over none"):
        planned(small, fb.MixLoRA(), ranks=[2, 4])
    with pytest.raises(ValueError, match="adapter.rank_pattern is of matrices, and MixLoRA lies over none: leave it out"):
        planned(small, fb.MixLoRA(), rank_pattern={"q_proj": 4})
    with pytest.raises(ValueError, match=r"export target merged cannot hold PrefixTuning over model: it depends on its input"):
        exports.check_plan(planned(small, fb.PrefixTuning()), ["merged"])
    exports.check_plan(planned(small, fb.PrefixTuning()), [])
    with pytest.raises(ValueError, match="builds the whole model: use load_planned and save"):
        fb.start_folder(planned(small, fb.PromptTuning()), "/nowhere")
