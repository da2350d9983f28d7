"""Adapters that are trained as they are served, while planning: what they train and keep is counted; what they cannot lie over is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
from finebits.adapters.base import Base
from finebits.interop.selecting import Mistake
from finebits.plan.problem import menu_of
from finebits.served import served

ROWS = [{"text": " ".join(f"w{(i * j * j) % 120 + 1}" for j in range(14))} for i in range(1, 9)]


def planned(small: Path, adapter: Any, budget: str | None = None, **said: Any) -> fb.Plan:
    more: dict[str, Any] = dict(max_length=32, per_device_train_batch_size=2, dtype="float32", gradient_checkpointing=False) | said
    return fb.plan_model(str(small), budget, fast=True, adapter=adapter, init=fb.Zeros(), **more)


def test_the_dense_weight_is_counted_while_training_and_the_codes_where_it_is_served(small: Path) -> None:
    adapter = fb.L4Q(rank=2, bits=3, block=32, symmetric=False)
    plan = planned(small, adapter)
    shapes = [tuple(cost["shape"]) for cost in plan.costs.values()]
    trained = sum(2 * (m + n) + 2 * m * (n // 32) for m, n in shapes)
    assert plan.memory["linear weights"] == sum(4 * m * n for m, n in shapes)
    assert plan.memory["adapters"] == 4 * trained and plan.memory["optimizer"] == 8 * trained
    for name, (option,) in menu_of(plan).items():
        m, n = plan.costs[name]["shape"]
        assert option.more["serve"] == adapter.grid.storage_bits(m, n) // 8 and option.bytes == 4 * m * n
    model, _ = fb.load_planned(plan)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_what_is_kept_of_the_tokens_is_the_inputs_or_their_sums(small: Path) -> None:
    """No more than under a product, and less where sums over blocks are enough."""
    lora = planned(small, fb.LoRA(rank=2), candidates=["int4a-b32-fp16"])
    whole, sums = planned(small, fb.L4Q(rank=2, block=32)), planned(small, fb.QALoRA(rank=2, block=32))
    assert sums.memory["activations"] < whole.memory["activations"] <= lora.memory["activations"]


def test_candidates_that_are_left_out_are_those_that_it_makes_codes_of(small: Path) -> None:
    assert {s.format for s in planned(small, fb.L4Q(block=32)).modules.values()} == {None}
    formats = {s.format for s in planned(small, fb.PEQA(32), budget="3.6 bits").modules.values()}
    assert formats <= set(fb.PEQA(32).candidates) and formats


def test_a_quantizer_gives_it_its_first_codes_out_of_calibration_rows_and_changes_no_price(small: Path) -> None:
    """Swept, since every block is measured behind those that are in codes; a refinement of blocks then trains the adapter there."""
    adapter, searched = fb.L4Q(rank=2, bits=3, block=32), fb.GPTQ(scales="search")
    nearest, found = planned(small, adapter), planned(small, adapter, quantizer=searched, calibration="sweep", calibration_rows=4)
    assert menu_of(nearest) == {n: [replace(o, spec=replace(o.spec, quantizer=fb.RTN())) for o in m] for n, m in menu_of(found).items()}
    assert nearest.memory == found.memory
    with pytest.raises(ValueError, match="calibration rows"):
        fb.load_planned(found)
    model, _ = fb.load_planned(found, ROWS)
    specs = {n: replace(s, format=adapter.grid, adapter=None) for n, s in found.modules.items()}
    theirs, _ = fb.load_planned(replace(found, modules=specs), ROWS)
    for (_, ours), (_, other) in zip(fb.hosts(model), fb.hosts(theirs), strict=True):
        assert {k: torch.equal(p, other.weight.parts[k]) for k, p in served(ours).parts.items()} == {"codes": True, "scale": True}
    refined, _ = fb.load_planned(replace(found, start=replace(found.start, refine=(fb.ApiQ(epochs=1),))), ROWS)
    assert refined.finebits.refined and any(p.any() for n, p in refined.named_parameters() if n.endswith(".B"))


@pytest.mark.parametrize(
    ("adapter", "candidates", "said"),
    [
        (fb.PEQA(64), ["int4-b32"], "PEQA trains the scales of integers in blocks of 64 .* this weight is Int.*block=32"),
        (fb.QALoRA(block=32), ["int4-b32"], "QALoRA moves real minima of blocks, and Int.* has none"),
        (fb.L4Q(), ["nf4-b64"], "L4Q rounds the weight that it trains to 4 bits itself, .*leave quantization.candidates out"),
    ],
)
def test_what_it_cannot_lie_over_is_refused(small: Path, adapter: Any, candidates: list[Any], said: str) -> None:
    with pytest.raises(Mistake, match=said):
        planned(small, adapter, candidates=candidates)


def test_birth_over_a_weight_without_values_is_of_the_right_shape() -> None:
    for adapter in (fb.L4Q(rank=2), fb.EfficientDM(rank=2), fb.PEQA(), fb.QALoRA(rank=2), fb.LoTA(rank=2)):
        shapes = adapter.shapes(64, 256)
        p = {k: torch.empty(s, device="meta") for k, s in shapes.items()}
        assert adapter.forward(p, torch.empty(3, 256, device="meta"), Base(torch.empty(64, 256, device="meta"))).shape == (3, 64)
