"""Laws of a training rule, in the plain loop."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
from finebits.plan.base import Plan, Spec
from finebits.rules.base import Rule, Run
from variants import methods

RULES = [c for c in methods("rules") if "router" not in getattr(c, "needs", ())]  # of experts: tests/laws/test_module_adapters.py
every = pytest.mark.parametrize("cls", RULES)
STEPS = 16


def student() -> nn.Module:
    """Two quantized layers under gated adapters, the architecture that rules share."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6))
    spec = Spec(format=fb.NF(4, block=16), adapter=fb.Gated(rank=4, alpha=8.0))
    return fb.build(model, Plan({"0": spec, "2": spec}))


def batches(count: int, parts: int = 1) -> list[list[dict[str, Tensor]]]:
    gen = torch.Generator().manual_seed(11)
    rows = [(torch.randn(8, 12, generator=gen), torch.randn(8, 6, generator=gen)) for _ in range(count)]
    return [[{"x": a, "y": b} for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True)] for x, y in rows]


def square(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().sum()


def run(rules: list[Rule], on_step: Callable[[Run, float], None] = lambda run, loss: None, parts: int = 1) -> tuple[list[float], nn.Module]:
    model = student()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    count = lambda batch: batch["x"].shape[0]  # noqa: E731
    losses = fb.train(model, batches(STEPS, parts), optimizer, total=STEPS, loss=square, tokens=count, rules=rules, on_step=on_step)
    return losses, model


def test_folder_is_not_empty() -> None:
    assert methods("rules")


@every
def test_null_setting_vanishes(cls: type[Rule]) -> None:
    losses, model = run([cls(**cls.null)])
    plain, same = run([])
    assert losses == plain
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True) if a.requires_grad)


@every
def test_state_goes_through_a_file_and_training_goes_on_the_same(cls: type[Rule]) -> None:
    expected, _ = run([cls()])
    rules = [cls()]

    def swap(run: Run, loss: float) -> None:
        if run.step == STEPS - 10:
            file = io.BytesIO()
            torch.save(rules[0].state_dict(), file)
            file.seek(0)
            rules[0] = cls()
            rules[0].load_state_dict(torch.load(file, weights_only=True))

    losses, _ = run(rules, swap)
    assert losses == expected


@every
def test_loading_copies(cls: type[Rule]) -> None:
    """Training on does not write into the checkpoint that was loaded."""
    kept: list[dict] = []
    rules = [cls()]

    def look(run: Run, loss: float) -> None:
        if run.step == 5:
            kept.append(copy.deepcopy(rules[0].state_dict()))

    run(rules, look)
    state, before = kept[0], copy.deepcopy(kept[0])
    other = cls()
    other.load_state_dict(state)
    run([other])
    assert str(state) == str(before)


@every
@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_do_not_matter(cls: type[Rule], parts: int) -> None:
    whole, model = run([cls()])
    cut, same = run([cls()], parts=parts)
    assert cut == pytest.approx(whole, rel=1e-4)
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@every
def test_shapes_and_modules_never_change(cls: type[Rule]) -> None:
    expected = {k: v.shape for k, v in student().state_dict().items()}
    _, model = run([cls()])
    assert {k: v.shape for k, v in model.state_dict().items()} == expected


@every
def test_the_quantized_base_is_never_touched(cls: type[Rule]) -> None:
    before = {k: v.clone() for k, v in student().state_dict().items() if ".p." not in k}
    _, model = run([cls()])
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
