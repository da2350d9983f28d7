"""Weights one at a time: as the inner optimizer alone, through a transform, layer by layer, and from a checkpoint."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
import tiny_llama as tiny
from finebits.interop.trainer import trainer
from finebits.optim._shell import Shell
from finebits.optim.galore import GaLore


def inner(held: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(held, lr=0.02, weight_decay=0.1)


class Halves:
    """The first half of a gradient's rows, of which there must be two."""

    def fits(self, m: int, n: int) -> bool:
        return m % 2 == 0

    def before(self, G: Tensor, state: dict[str, Any]) -> Tensor:
        state["seen"] = state.get("seen", 0) + 1
        return G[: len(G) // 2].clone()

    def after(self, N: Tensor, G: Tensor, state: dict[str, Any]) -> Tensor:
        return torch.cat([N, torch.zeros_like(N)])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def steps(net: nn.Module, optimizer: torch.optim.Optimizer, count: int, first: int = 0) -> None:
    for i in range(first, first + count):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(i))
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def numbers(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("layerwise", [False, True])
def test_is_the_inner_optimizer(layerwise: bool) -> None:
    ours, theirs = model(), model()
    groups = lambda net: [{"params": net[0].parameters(), "lr": 0.05}, {"params": net[2].parameters(), "weight_decay": 0.0}]  # noqa: E731
    steps(ours, Shell(groups(ours), inner, layerwise=layerwise), 5)
    steps(theirs, torch.optim.AdamW(groups(theirs), lr=0.02, weight_decay=0.1), 5)
    assert torch.equal(numbers(ours), numbers(theirs))


def test_a_transform_sees_matrices_that_fit_it_and_its_change_decays_apart() -> None:
    net, plain = model(), model()
    shell = Shell([{"params": net.parameters()}], inner, Halves())
    steps(net, shell, 1)
    steps(plain, torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.1), 1)
    assert torch.allclose(net[0].weight[:2], plain[0].weight[:2]) and torch.allclose(net[2].weight, plain[2].weight)
    assert torch.allclose(net[0].weight[2:], model()[0].weight[2:] * (1 - 0.02 * 0.1))
    assert shell.state[net[0].weight]["transform.seen"] == 1 and "transform.seen" not in shell.state[net[2].weight]
    assert shell.state[net[0].weight]["exp_avg"].shape == (2, 5)


def test_layer_by_layer_there_is_one_gradient_at_a_time() -> None:
    net, alive = model(), []
    shell = Shell(net.parameters(), inner, Halves(), layerwise=True)
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: alive.append(sum(q.grad is not None for q in net.parameters())))
    steps(net, shell, 1)
    assert alive == [0, 0, 0, 0]  # the shell's own hooks come first


@pytest.mark.parametrize("format", [None, fb.Int(8)], ids=str)
def test_layer_by_layer_in_the_trainer_there_is_no_gradient_left(format: Any, tmp_path: Path) -> None:
    """Whose device the model is moved to once there is an optimizer."""
    built = fb.build(tiny.fresh(), tiny.plan(fb.Full(), format, fb.Zeros()))
    rows = [{"input_ids": [*range(3, 11)], "labels": [*range(3, 11)]} for _ in range(4)]
    settings = {"optim": GaLore(rank=4, layerwise=True), "max_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.0}
    left: list[int] = []
    pads = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    engine = trainer(built, pads, rows, tmp_path, settings)
    step = engine.training_step

    def watched(*args: Any, **more: Any) -> Any:
        loss = step(*args, **more)
        left.append(sum(p.grad is not None for p in built.parameters()))
        return loss

    engine.training_step = watched  # type: ignore[method-assign]
    before = [p.detach().clone() if format is None else p.dequantize() for p in built.parameters() if p.requires_grad]
    engine.train()
    after = [p.detach() if format is None else p.dequantize() for p in built.parameters() if p.requires_grad]
    kept = weakref.ref(engine.optimizer.optimizer)  # type: ignore[union-attr]
    engine = step = watched = None
    gc.collect()
    assert kept() is None  # weights hold no optimizer once training is over
    assert left == [0, 0] and all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_goes_on_from_a_checkpoint_bit_for_bit_in_the_dtype_that_it_kept() -> None:
    whole, net = model().bfloat16(), model().bfloat16()
    make = lambda held: Shell(held, inner, Halves())  # noqa: E731
    run = lambda net, opt, count, first: [_one(net, opt, i) for i in range(first, first + count)]  # noqa: E731

    def _one(net: nn.Module, opt: Shell, i: int) -> None:
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(i)).bfloat16()
        net(x).float().square().sum().backward()
        for p in net.parameters():
            opt.state[p].setdefault("transform.note", torch.tensor([1.0 + 2**-20]))
        opt.step()
        opt.zero_grad()

    run(whole, make(whole.parameters()), 4, 0)
    begun = make(net.parameters())
    run(net, begun, 2, 0)
    file = io.BytesIO()
    torch.save(begun.state_dict(), file)
    file.seek(0)
    again = make(net.parameters())
    again.load_state_dict(torch.load(file, weights_only=True))
    first = next(iter(net.parameters()))
    assert again.state[first]["transform.note"] == 1.0 + 2**-20  # a bfloat16 would not hold it
    kept = copy.deepcopy(again.state[first]["exp_avg"])
    run(net, again, 2, 2)
    assert torch.equal(numbers(net), numbers(whole)) and not torch.equal(kept, again.state[first]["exp_avg"])
