"""Laws of what hosts of one shape hold together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
from finebits import store
from finebits.build import hosts
from finebits.plan import cost
from finebits.plan.base import Plan, Spec
from finebits.tensorfile import Stored
from variants import methods, variants

SHARING = [a for cls in methods("adapters") for a in variants(cls, rank=(4,), basis=(3,), bases=("dense",)) if a.shared]
every = pytest.mark.parametrize("adapter", SHARING, ids=lambda a: type(a).__name__)
SHAPES = [(16, 16), (9, 16), (16, 9), (16, 16), (9, 16)]


def plan(adapter: Any, format: Any = None) -> Plan:
    return Plan({str(i): Spec(format, adapter=adapter) for i in range(len(SHAPES))})


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(n, m) for m, n in SHAPES))


def model(adapter: Any, format: Any = None) -> nn.Sequential:
    """Layers of three shapes, two of which occur twice; all that is trained is moved."""
    built = fb.build(dense(), plan(adapter, format))
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in built.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=gen))
    return built


def tensors(model: nn.Module, i: int) -> dict[str, Tensor]:
    return dict(hosts(model))[str(i)].tensors("default")


def test_some_adapters_share() -> None:
    assert SHARING


@every
def test_equal_shapes_have_one_storage_and_others_their_own(adapter: Any) -> None:
    built = model(adapter)
    for k in tensors(built, 0):
        one, same, other = (tensors(built, i)[k] for i in (0, 3, 1))
        assert (one is same) == (k in adapter.shared) and one.data_ptr() != other.data_ptr()
        assert (one.data_ptr() == same.data_ptr()) == (k in adapter.shared)
    names = [n for n, _ in built.named_parameters()]
    assert not [n for n in names if n.startswith("3.p.") and n.rpartition(".")[2] in adapter.shared]
    assert len(names) == len({id(p) for p in built.parameters()})


@every
def test_a_shared_gradient_is_the_sum_of_the_layers(adapter: Any) -> None:
    built, apart, x = model(adapter), model(adapter), torch.randn(5, 16)
    for _, host in hosts(apart):  # the same numbers, every host's own
        for k, p in host.p["default"].items():
            host.p["default"][k] = nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad)
    for m in (built, apart):
        y = x
        for i in (0, 1, 2, 3, 4):
            y = m[i](y if i != 4 else y[:, :16])
        y.square().sum().backward()
    for i, j in ((0, 3), (1, 4), (2, 2)):
        for k, p in tensors(built, i).items():
            if p.requires_grad:
                alone = [tensors(apart, layer)[k].grad for layer in sorted({i, j} if k in adapter.shared else {i})]
                torch.testing.assert_close(p.grad, torch.stack(alone).sum(0), rtol=1e-4, atol=1e-4)


@every
def test_the_planner_counts_it_once(adapter: Any) -> None:
    built = model(adapter)
    all_of = {p for _, host in hosts(built) for p in host.p.parameters()}
    trained, frozen = cost.together((adapter, shape) for shape in SHAPES)
    assert trained == sum(p.numel() for p in all_of if p.requires_grad)
    assert trained + frozen == sum(p.numel() for p in all_of)


@every
@pytest.mark.parametrize("format", [None, fb.NF(4, block=16)], ids=str)
def test_a_file_holds_it_once_and_loads(adapter: Any, format: Any, tmp_path: Path) -> None:
    built, x = model(adapter, format), torch.randn(3, 16)
    store.save(built, tmp_path / "a")
    names = set(Stored(tmp_path / "a" / "adapter.safetensors").lines)
    own = set(tensors(built, 0)) - adapter.shared
    assert names == {f"{i}.default.{k}" for i in range(5) for k in own} | {f"{i}.default.{k}" for i in range(3) for k in adapter.shared}
    again = store.apply(dense(), store.read(tmp_path / "a"))
    for i in range(5):
        assert all(torch.equal(t, tensors(again, i)[k]) for k, t in tensors(built, i).items())
    assert all(tensors(again, 0)[k] is tensors(again, 3)[k] for k in adapter.shared)
    assert torch.equal(again[0](x), built[0](x))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n, p in built.named_parameters() if p.requires_grad}


@every
def test_a_copy_shares_among_itself_alone(adapter: Any) -> None:
    built = model(adapter)
    twin = copy.deepcopy(built)
    for k in adapter.shared:
        one, same = tensors(twin, 0)[k], tensors(twin, 3)[k]
        assert one is same and one is not tensors(built, 0)[k] and torch.equal(one, tensors(built, 0)[k])


@every
def test_a_state_goes_through_a_state_dict(adapter: Any) -> None:
    built, other = model(adapter), fb.build(dense(), plan(adapter))
    missing, unexpected = other.load_state_dict({k: v.clone() for k, v in built.state_dict().items()})
    assert not missing and not unexpected
    x = torch.randn(3, 16)
    assert torch.equal(other[3](x), built[3](x)) and all(tensors(other, 0)[k] is tensors(other, 3)[k] for k in adapter.shared)


@every
def test_the_plain_loop_moves_it_once_a_step(adapter: Any) -> None:
    """By SGD: the sum of both layers' gradients, taken once."""
    built = model(adapter)
    before = copy.deepcopy(built)
    optimizer = torch.optim.SGD([p for p in built.parameters() if p.requires_grad], lr=1e-3)
    batch = {"x": torch.randn(6, 16), "y": torch.randn(6, 16)}
    loss = lambda m, b: (m[3](m[0](b["x"])) - b["y"]).square().sum()  # noqa: E731
    fb.train(built, [[batch]], optimizer, total=1, loss=loss, tokens=lambda b: 6)
    (loss(before, batch) / 6).backward()
    for k, p in tensors(before, 0).items():
        if p.requires_grad:
            torch.testing.assert_close(tensors(built, 0)[k], p.detach() - 1e-3 * p.grad)
