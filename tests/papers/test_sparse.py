"""Sparse fine-tuning: SHiRA (arXiv:2406.13175), and rows or columns as in S²FT (arXiv:2412.06289)."""

from __future__ import annotations

import pytest
import torch

import finebits as fb
from finebits.adapters import _rows
from finebits.adapters.base import Base
from papers.stock_peft import trained, under


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of PEFT
@pytest.mark.parametrize("tile", [1 << 20, 50])
def test_values_and_gradients_are_those_of_peft(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import ShiraConfig

    monkeypatch.setattr(_rows, "SLAB", tile)
    W, x = torch.randn(12, 20), torch.randn(5, 20)
    layer = under(ShiraConfig(r=2, target_modules=["0"], random_seed=3), W)
    ((_, theirs),) = trained(layer).items()
    rows, columns = layer.shira_indices["default"].long()
    p = {"delta": theirs.detach().clone().requires_grad_(), "index": (rows * 20 + columns).int()}
    adapter = fb.Sparse("entries", rank=2)
    assert {k: tuple(t.shape) for k, t in p.items()} == adapter.shapes(12, 20)
    ours, wanted = adapter.forward(p, x, Base(W)), layer(x)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(p["delta"].grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["entries", "rows", "columns"])
def test_a_hundred_steps_with_decay_leave_the_rest_to_the_bit(part: str) -> None:
    linear = torch.nn.Linear(20, 12)
    before, spec = linear.weight.detach().clone(), fb.Spec(adapter=fb.Sparse(part, rank=2))
    model = fb.build(torch.nn.Sequential(linear), fb.Plan({"0": spec}))
    host, x = model[0], torch.randn(30, 20)
    index = host.p.default.index.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        (model(x) - x[:, :12]).square().sum().backward()
        optimizer.step()
    moved = host.stack().weight.detach() != before
    inside = torch.zeros(12, 20, dtype=torch.bool)
    where = {"entries": lambda: inside.view(-1), "rows": lambda: inside, "columns": lambda: inside.mT}[part]()
    where[index.long()] = True
    assert torch.equal(moved, inside) and torch.equal(host.p.default.index, index) and torch.equal(linear.weight, before)


@pytest.mark.parametrize("part", ["entries", "rows", "columns"])
def test_magnitude_takes_the_largest(part: str) -> None:
    W = torch.randn(12, 20)
    index = fb.Sparse(part, "magnitude", rank=2).params(Base(W), torch.Generator(), {})["index"].long()
    size = {"entries": W.abs().flatten(), "rows": W.norm(dim=1), "columns": W.norm(dim=0)}[part]
    rest = torch.ones(len(size), dtype=torch.bool)
    rest[index] = False
    assert size[index].min() > size[rest].max() and len(index.unique()) == (64 if part == "entries" else 2)


def test_counts_are_lora_s() -> None:
    """SHiRA's published count on Llama-3.2-3B, q and v, r = 32."""
    shira = fb.Sparse("entries", rank=32)
    assert 28 * (shira.size(3072, 3072) + shira.size(1024, 3072)) == 9_175_040
    with pytest.raises(ValueError, match="31 bits"):
        shira.shapes(2**16, 2**16)


def test_unknown_words_are_refused(unchecked: None) -> None:
    for wrong in ({"part": "heads"}, {"by": "best"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fb.Sparse(**wrong)


def test_what_is_saved_comes_back(tmp_path) -> None:
    """Places are whole numbers, in the file too."""
    linear, x = torch.nn.Linear(20, 12), torch.randn(3, 20)
    weights = {k: t.clone() for k, t in linear.state_dict().items()}
    model = fb.build(torch.nn.Sequential(linear), fb.Plan({"0": fb.Spec(fb.NF(4, 20), adapter=fb.Sparse("rows", rank=2))}))
    model[0].p.default.delta.data.normal_()
    fb.save(model, tmp_path / "x")
    other = torch.nn.Sequential(torch.nn.Linear(20, 12))
    other[0].load_state_dict(weights)
    from finebits import store

    again = store.apply(other, store.read(tmp_path / "x"))
    assert again[0].p.default.index.dtype == torch.int32 and torch.equal(again(x), model(x))
