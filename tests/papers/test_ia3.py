"""IA³ (arXiv:2205.05638): a factor for every output or input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits.adapters.base import Base
from finebits.build import Adapted
from papers.stock_peft import trained, under


@pytest.mark.parametrize("side", ["output", "input"])
def test_values_and_gradients_are_those_of_peft(side: str) -> None:
    from peft import IA3Config

    W, b, x = torch.randn(12, 20), torch.randn(12), torch.randn(5, 20)
    layer = under(IA3Config(target_modules=["0"], feedforward_modules=["0"] if side == "input" else []), W, b)
    (theirs,) = trained(layer).values()
    l = theirs.detach().flatten().clone().requires_grad_()  # noqa: E741
    ours, wanted = fb.IA3(side).forward({"l": l}, x, Base(W, b)), layer(x)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(l.grad, theirs.grad.flatten(), rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]


def test_the_module_says_which_side() -> None:
    ia3 = fb.IA3()
    assert [ia3.at(f"model.layers.3.{name}").side for name in ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")] == [
        "output",
        "output",
        "input",
    ]
    assert fb.IA3(feedforward=("up_proj",)).at("mlp.down_proj").side == "output"


def test_parameter_count_of_a_llama_from_shapes_alone() -> None:
    """Llama-3.2-3B, k, v and down."""
    shapes = {"k_proj": (1024, 3072), "v_proj": (1024, 3072), "down_proj": (3072, 8192)}
    assert 28 * sum(fb.IA3().at(name).size(*shape) for name, shape in shapes.items()) == 286_720


def test_a_plan_scales_the_inputs_of_what_leaves_a_block(tmp_path: Path) -> None:
    made = fb.plan_model(
        str(tiny.folder(tmp_path)), None, adapter=fb.IA3(), target_modules=["k_proj", "down_proj"], max_length=16, fast=True
    )
    sides = {name.rpartition(".")[2]: spec.adapter.side for name, spec in made.modules.items() if spec.adapter is not None}
    assert sides == {"k_proj": "output", "down_proj": "input"}


@pytest.mark.parametrize("adapter", [fb.IA3(), fb.IA3("input"), fb.DoRA(rank=2)], ids=str)
def test_what_small_steps_have_learned_is_there_in_16_bits(adapter: Any) -> None:
    """Factors near 1, and outputs that they change by less than 16 bits tell apart."""
    host = Adapted.over(torch.nn.Linear(64, 48))
    host.weight.data, host.bias.data = torch.randn(48, 64).bfloat16(), torch.randn(48).bfloat16()
    host.add("default", adapter, torch.Generator().manual_seed(0))
    x = torch.randn(500, 64).bfloat16()
    with torch.no_grad():
        before, was = host(x).float(), host.stack(torch.float32)(x.float())
        host.p["default"]["mag" if isinstance(adapter, fb.DoRA) else "l"].mul_(1.001)
        moved, wanted = host(x).float() - before, host.stack(torch.float32)(x.float()) - was
    assert float((moved * wanted).sum() / wanted.square().sum()) == pytest.approx(1.0, abs=0.05)
