"""Training that goes on from a PEFT folder: what it plans, begins with, and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits.build import all_hosts
from finebits.interop.hf import load_planned
from finebits.interop.selecting import Mistake
from finebits.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def configs() -> dict[str, Any]:
    import peft

    lora = dict(r=4, lora_alpha=10, rank_pattern={"v_proj": 2, r"layers\.1.*q_proj": 3}, alpha_pattern={"down_proj": 6})
    return {
        "lora": peft.LoraConfig(**lora, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True),
        "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "prompts": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }


def trained(base: Path, place: Path, config: Any) -> Any:
    """Two steps with stock PEFT, saved; the model."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(place)
    return model.eval()


def planned(base: Path, place: Path, **more: Any) -> fb.Plan:
    said: dict[str, Any] = dict(max_length=16, dtype="float32", candidates=["nf4-b32"]) | more
    return fb.plan_model(str(base), None, folder=str(place), **said)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompts"])
def test_it_begins_where_peft_ended(kind: str, tmp_path: Path) -> None:
    base = tiny.worded(tmp_path / "base")
    theirs = trained(base, tmp_path / "adapter", configs()[kind])
    plan = planned(base, tmp_path / "adapter", overrides={".*": None})
    again = fb.Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan and len(plan.modules) == 14 and "goes on from" in plan.notices[0]
    ours, _ = load_planned(again)
    with torch.no_grad():
        got, wanted = ours.eval()(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    torch.testing.assert_close(got, wanted[:, -got.shape[1] :], rtol=1e-4, atol=1e-4)
    assert all(p.requires_grad for _, host in all_hosts(ours) for p in host.p.parameters())


def test_every_linear_is_quantized_and_the_ranks_are_the_folders(tmp_path: Path) -> None:
    base = tiny.worded(tmp_path / "base")
    trained(base, tmp_path / "adapter", configs()["lora"])
    plan = planned(base, tmp_path / "adapter")
    ours, _ = load_planned(plan)
    assert all(spec.format == fb.NF(4, block=32) for spec in plan.modules.values())
    ranks = {name: (a.rank, a.alpha, a.scaling) for name, spec in plan.modules.items() if (a := spec.adapter) is not None}
    assert len(ranks) == 6
    assert ranks["model.layers.1.self_attn.q_proj"] == (3, 10.0, "rslora") and ranks["model.layers.0.self_attn.v_proj"] == (
        2,
        10.0,
        "rslora",
    )
    assert ranks["model.layers.0.mlp.down_proj"] == (4, 6.0, "rslora")
    numbers = sum(p.numel() for _, host in all_hosts(ours) for p in host.p.parameters())
    assert 4 * numbers == plan.memory["adapters"]
    dense, _ = load_planned(planned(base, tmp_path / "adapter", overrides={".*": None}))
    theirs = dict(dense.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in ours.named_parameters() if p.requires_grad)


def test_what_says_the_same_twice_is_refused_with_its_line() -> None:
    text = "model: {model_name_or_path: m}\nadapter:\n  folder: runs/a\n  rank: 8\n  target_modules: [q_proj]\n"
    with pytest.raises(fb.recipe.RecipeError) as e:  # type: ignore[attr-defined]
        Recipe.parse(text, "a.yaml")
    assert "a.yaml:4" in str(e.value) and "leave rank out" in str(e.value) and "a.yaml:5" in str(e.value)
    recipe = Recipe.parse("model: {model_name_or_path: m}\nadapter: {lora_model_dir: runs/a, lora_dropout: 0.1}")
    assert Recipe.parse(recipe.to_yaml()) == recipe and recipe.adapter.folder == "runs/a"


def test_another_base_and_what_a_plan_has_no_place_for_are_refused(tmp_path: Path) -> None:
    from peft import LoraConfig

    base, other = tiny.worded(tmp_path / "base"), tiny.worded(tmp_path / "other", seed=5)
    trained(base, tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(Mistake, match="trained over .*base .*another model than"):
        planned(other, tmp_path / "adapter")
    plan = planned(base, tmp_path / "adapter")
    trained(base, tmp_path / "adapter", LoraConfig(r=2, target_modules=["k_proj"]))
    with pytest.raises(ValueError, match="not as it was when the plan was made"):
        load_planned(plan)
    trained(base, tmp_path / "whole", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    with pytest.raises(Mistake, match="holds model.*norm.weight beside its adapters"):
        planned(base, tmp_path / "whole")
    with pytest.raises(Mistake, match="there is no PEFT adapter at"):
        planned(base, tmp_path / "nothing")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(Mistake, match="is a pickle"):
        planned(base, tmp_path / "pickled")
