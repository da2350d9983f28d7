"""The size of a batch that a plan chooses: the largest that the budget holds, with the rows of a step as they were."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from finebits.plan.base import Infeasible
from finebits.plan.levers import TRAINING
from finebits.plan.solve import again
from finebits.recipe import Recipe, RecipeError
from finebits.recipe.rows import rows_of
from finebits.recipe.settings import Settings
from finebits.run import plans
from finebits.run.plans import priced, probed
from tiny_llama import worded

RECIPE = """
model: {{model_name_or_path: {model}, dtype: float32}}
budget: {{memory: 2GiB, reserve: "0"}}
data: {{datasets: [{{path: {rows}, format: text}}], max_length: 96, test_split_size: 0.2}}
quantization: {{candidates: [nf4-b32-bf16], objective: weight}}
adapter: {{rank: 4, alpha: 4, init: zeros}}
training: {{max_steps: 2, per_device_train_batch_size: auto, effective_batch_size: 12}}
evaluation: {{samples: 0, full_precision: false}}
"""
HEAD = "{model: {model_name_or_path: m}, budget: {memory: 1GiB}}"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = tmp_path_factory.mktemp("sizes")
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": " ".join(f"w{(i * j) % 120 + 1}" for j in range(60))}) + "\n" for i in range(40)))
    return Recipe.parse(RECIPE.format(model=worded(root / "llama", tie_word_embeddings=True), rows=rows))


@pytest.fixture(scope="module")
def roomy(recipe: Recipe) -> Any:
    return priced(recipe, rows_of(recipe))


def sizes(plan: Any) -> tuple[int, int]:
    return plan.levers.per_device_train_batch_size, plan.levers.gradient_accumulation_steps


def test_auto_is_the_largest_part_of_a_step_that_fits(roomy: Any) -> None:
    """By hand: every size alone, and what it takes. The menu has one format, so that a size is all that there is to choose."""
    assert sizes(roomy) == (12, 1) and {*roomy.counted.batches} == {"12", "6", "4", "3", "2", "1"}
    alone = replace(roomy, sizes=roomy.sizes | {"pulls": []}, budget=None)
    needs = {b: again(alone, per_device_train_batch_size=b, gradient_accumulation_steps=12 // b).need for b in (12, 6, 4, 3, 2, 1)}
    budgets = sorted({*needs.values(), *(n - 1 for n in needs.values())})
    found = []
    for budget in budgets:
        fits = [b for b, need in needs.items() if need <= budget]
        if not fits:
            with pytest.raises(Infeasible, match="Does not fit"):
                again(roomy, budget)
            continue
        size, passes = sizes(again(roomy, budget))
        found.append(size)
        assert size == max(fits) and size * passes == 12
    assert len({*found}) > 2


def test_a_probe_is_of_the_size_that_is_planned(recipe: Recipe, roomy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that holds more than was thought gets a smaller batch, which is probed again."""
    small = again(roomy, again(roomy, per_device_train_batch_size=2, gradient_accumulation_steps=6).need)
    tight = replace(roomy, budget=roomy.need)
    more, seen = roomy.need - small.need + roomy.memory["runtime"], []

    def probe(recipe: Recipe, made: Any, material: Any) -> dict[str, Any]:
        seen.append(sizes(made)[0])
        peaks = {"load": 1, "train": 2, "eval": 1, "save": 1}
        return {"planned": made.peak, "peaks": peaks, "runtime": more}

    monkeypatch.setattr(plans, "_probe", probe)
    new, _ = probed(recipe, tight, None)  # pyright: ignore[reportArgumentType]
    assert seen[0] == 12 and seen[-1] == sizes(new)[0] < 12 and len(seen) == 2 and new.counted.runtime == more
    assert not any("probes led" in notice for notice in new.notices)


def test_a_step_is_divided_by_hand_too() -> None:
    of = lambda *words: Settings.of(Recipe.parse(HEAD, overrides=words))  # noqa: E731
    pair = lambda s: (s.per_device_train_batch_size, s.gradient_accumulation_steps)  # noqa: E731
    assert pair(of("effective_batch_size=16", "per_device_train_batch_size=4")) == (4, 4)
    assert pair(of("per_device_train_batch_size=auto")) == (16, 1) and of("per_device_train_batch_size=auto").levers == ("micro_batch",)
    assert of("per_device_train_batch_size=auto", "levers=all").levers.count("micro_batch") == 1 and of().levers == ()
    assert "effective_batch_size" not in TRAINING


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gradient_accumulation_steps=4", "per_device_train_batch_size=auto"], "say effective_batch_size"),
        (["effective_batch_size=6", "per_device_train_batch_size=4"], "a multiple of per_device_train_batch_size"),
        (
            ["effective_batch_size=16", "per_device_train_batch_size=4", "gradient_accumulation_steps=2"],
            "leave gradient_accumulation_steps",
        ),
        (["per_device_train_batch_size=auto", "budget.memory=3.1 bits"], r"\(3.1 bits\) is no size"),
        (["per_device_train_batch_size=auto", "budget.memory=null"], "sets no limit"),
        (["per_device_train_batch_size=auto", "effective_batch_size=3", "training.loss=dpo"], "effective_batch_size, which is 3"),
        (["per_device_train_batch_size=0"], "a number of at least 1 or auto"),
        (["per_device_train_batch_size=most"], "a whole number or auto"),
    ],
)
def test_what_cannot_be_is_said_at_once(words: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.parse(HEAD, overrides=words)
