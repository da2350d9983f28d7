"""CoLoRA's ranks (arXiv:2408.01099): parts that add up to the change of the loss, and ranks that follow them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finebits as fb


class Toy(nn.Module):
    """Three linears, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList([nn.Linear(6, 9), nn.Linear(9, 7), nn.Linear(7, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts[:-1]:
            x = torch.tanh(part(x))
        return self.parts[-1](x)


def toy() -> nn.Module:
    return fb.build(Toy(), fb.Plan({f"parts.{i}": fb.Spec(adapter=fb.LoRA(rank=2, alpha=2)) for i in range(3)}))


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def rows(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    gen = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 6, generator=gen), torch.randn(8, 4, generator=gen)) for _ in range(3)]


def test_signed_parts_add_up_to_the_change_of_the_loss() -> None:
    model, held = toy(), rows(1)
    before = sum(float(loss(model, b).detach()) for b in held) / 3
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.4 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    change = sum(float(loss(model, b).detach()) for b in held) / 3 - before
    parts = fb.CoLoRA(points=64).attributed(model, dict(fb.hosts(model)), held, loss)
    assert {name: len(part) for name, part in parts.items()} == {"parts.0": 9, "parts.1": 7, "parts.2": 4}
    assert sum(float(part.sum()) for part in parts.values()) == pytest.approx(change, rel=0.01)
    few = fb.CoLoRA(points=1).attributed(model, dict(fb.hosts(model)), held, loss)
    assert sum(float(part.sum()) for part in few.values()) == pytest.approx(change, rel=0.5)


class Beside(nn.Module):
    """Three linears side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def test_a_search_leaves_no_gate_and_finds_the_layer_that_learns() -> None:
    """What the rows show is another weight of one linear."""
    model = fb.build(Beside(), fb.Plan({f"parts.{i}": fb.Spec(adapter=fb.LoRA(rank=2, alpha=2)) for i in range(3)}))
    x, target = torch.randn(16, 6, generator=torch.Generator().manual_seed(3)), Beside()
    target.parts[1].weight.data += 1.0
    batches = [(x, target(x).detach())] * 3
    found = fb.CoLoRA(passes=10, rate=0.02).search(model, dict(fb.hosts(model)), batches, batches, loss)
    assert found["parts.1"] > 10 * max(found["parts.0"], found["parts.2"]) >= 0
    assert not any(m._forward_hooks for m in model.modules()) and all(p.grad is None for p in model.parameters())


def test_ranks_follow_contributions_and_keep_to_the_budget() -> None:
    planner, contributions = fb.CoLoRA(), {f"m{i}": (i + 1) / 10 for i in range(8)}
    choice = planner(planner.menu(contributions, fb.LoRA(rank=8)), 64)
    given = [choice[f"m{i}"].spec.adapter.rank for i in range(8)]
    assert given == sorted(given) and sum(given) == 64 and set(given) <= {4, 8, 16} and given[0] < given[-1]
    with pytest.raises(ValueError, match="one of each"):
        fb.CoLoRA(points=0)
