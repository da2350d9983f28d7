"""S²FT (arXiv:2412.06289): heads and channels of a block, at their full rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits.adapters.base import Base
from finebits.build import hosts, needs
from finebits.interop.selecting import Mistake, fitted
from papers.kept import kept

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
ALL = ("o", "q", "k", "v", "down", "up", "gate")


def plan(adapter: fb.S2FT, model: Any, format: Any = None, names: Any = None) -> fb.Plan:
    """As planning makes it: every module has its own part."""
    names = names or tiny.names()
    whole = fitted(model, adapter, names)
    return fb.Plan({name: fb.Spec(format, adapter=whole.at(name)) for name in names}, seed=3)


def sides(model: Any) -> dict[str, tuple[torch.Tensor, Any]]:
    return {name: (h.p["default"]["index"].long(), h.kinds["default"]) for name, h in hosts(model) if h.active}


@pytest.mark.parametrize("kv", [4, 2])
def test_gradients_are_slices_of_the_dense_ones_and_a_block_s_matrices_go_together(kv: int) -> None:
    heads = {"num_key_value_heads": kv}
    dense, batch = tiny.fresh(**heads), tiny.batches()[0]
    model = tiny.fresh(**heads)
    fb.build(model, plan(fb.S2FT(share=0.5, trains=ALL), model))
    dense(**batch).loss.backward()
    model(**batch).loss.backward()
    whole, d = dict(dense.named_parameters()), 64 // 4
    for name, (at, kind) in sides(model).items():
        G, p = whole[f"{name}.weight"].grad, model.get_submodule(name).p["default"]
        own, wanted = (p["V"].grad, G[:, at]) if kind.part == "columns" else (p["U"].grad, G[at])
        torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-6)
    found = {name: set(at.tolist()) for name, (at, _) in sides(model).items()}
    for i in (0, 1):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        groups = {at // d for at in found[f"{attention}.v_proj"]}
        assert len(groups) == kv // 2 and found[f"{attention}.k_proj"] == found[f"{attention}.v_proj"]
        assert found[f"{attention}.o_proj"] == found[f"{attention}.q_proj"] == {c for c in range(64) if c // d // (4 // kv) in groups}
        assert found[f"{mlp}.down_proj"] == found[f"{mlp}.up_proj"] == found[f"{mlp}.gate_proj"]
    assert found["model.layers.0.mlp.down_proj"] != found["model.layers.1.mlp.down_proj"]


def test_all_channels_are_full_fine_tuning() -> None:
    """Ten steps of AdamW without decay, of o and down."""
    some = [n for n in tiny.names() if n.endswith(("o_proj", "down_proj"))]
    dense, model = tiny.fresh().double(), tiny.fresh().double()
    before = {n: dense.get_submodule(n).weight.detach().clone() for n in some}
    dense.requires_grad_(False)
    fb.build(model, fb.Plan(plan(fb.S2FT(share=1.0), model, names=some).modules, levers=fb.Levers(dtype="float32")))
    model.double()
    held = [dense.get_submodule(n).weight.requires_grad_(True) for n in some]
    own = [p for p in model.parameters() if p.requires_grad]
    both = [torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0) for params in (held, own)]
    for _, batch in zip(range(10), tiny.batches() * 10, strict=False):
        for net, optimizer in zip((dense, model), both, strict=True):
            optimizer.zero_grad()
            net(**batch).loss.backward()
            optimizer.step()
    for n, W in zip(some, held, strict=True):
        assert not torch.equal(W, before[n])
        torch.testing.assert_close(model.get_submodule(n).stack().weight.double(), W, rtol=0, atol=1e-6)


def test_of_the_tokens_s_numbers_are_kept_over_columns_and_all_over_rows() -> None:
    m, n, x = 32, 64, torch.randn(200, 64, requires_grad=True)
    for W in (torch.randn(m, n), fb.quantize(torch.randn(m, n), fb.NF(2))):
        there = [x, *(W.parts.values() if isinstance(W, fb.QTensor) else [W])]
        for part, wanted in (("columns", 8), ("rows", n)):
            adapter = fb.S2FT(share=0.125 if part == "columns" else 0.25, part=part)
            p = adapter.params(Base(W), torch.Generator().manual_seed(0), {})
            p = {k: t.requires_grad_(t.is_floating_point()) for k, t in p.items()}
            count = lambda t, p=p, adapter=adapter, W=W: kept(lambda: adapter.forward(p, x[:t] * 1.0, Base(W)), [*there, *p.values()])  # noqa: E731
            assert count(200) - count(100) == 4 * 100 * wanted


@pytest.mark.parametrize("by", ["weight", "activation", "product", "gradient"])
def test_the_largest_are_chosen_and_rows_follow(by: str) -> None:
    model, gen = tiny.fresh(), torch.Generator().manual_seed(1)
    made = plan(fb.S2FT(share=0.25, by=by, trains=("o", "v", "down", "up")), model, fb.NF(2, block=32))
    wanted: dict[str, torch.Tensor] = {}
    stats: dict[str, Any] = {}
    asked = needs(made)
    assert set(asked) == (set() if by == "weight" else {n for n in made.modules if n.endswith(("o_proj", "down_proj"))})
    for name in (n for n in made.modules if n.endswith(("o_proj", "down_proj"))):
        W = model.get_submodule(name).weight.detach().clone()
        x, g = torch.randn(30, W.shape[1], generator=gen), torch.randn(30, W.shape[0], generator=gen)
        stats[name] = {S: S() for S in asked.get(name, ())}
        for S, s in stats[name].items():
            s.add(x, g if S.backward else None)
        score = {"weight": W.norm(dim=0), "activation": x.norm(dim=0), "gradient": (g.mT @ x).norm(dim=0)}
        score["product"] = score["weight"] * score["activation"]
        units = 2 if name.endswith("o_proj") else W.shape[1]
        wanted[name] = score[by].square().view(units, -1).sum(1).topk(max(1, units // 4)).indices
    found = {name: at for name, (at, _) in sides(fb.build(model, made, stats)).items()}
    for name, units in wanted.items():
        wide = 32 if name.endswith("o_proj") else 1
        assert set((found[name] // wide).tolist()) == set(units.tolist())
        beside = name.replace("o_proj", "v_proj").replace("down_proj", "up_proj")
        assert set((found[beside] // (16 if wide > 1 else 1)).tolist()) == set(units.tolist())


def test_it_is_saved_and_exported_as_a_lora_without_error_and_leaves_the_base(tmp_path: Path) -> None:
    from finebits.export.base import check_plan
    from finebits.interop.peft import export, stock

    net = tiny.fresh()
    model = fb.build(tiny.fresh(), plan(fb.S2FT(share=0.2, trains=("o", "v", "down", "up")), net))
    before = tiny.logits(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    wanted = tiny.logits(model)
    assert float((wanted - before).abs().max()) > 0.1
    merged = tiny.fresh()
    for name, host in hosts(model):
        merged.get_submodule(name).weight.data = host.stack().weight.detach()
    torch.testing.assert_close(tiny.logits(merged), wanted, rtol=0, atol=1e-4)
    fb.save(model, tmp_path / "saved")
    from finebits import store

    assert torch.equal(tiny.logits(store.apply(tiny.fresh(), store.read(tmp_path / "saved"))), wanted)
    check_plan(plan(fb.S2FT(share=0.2, by="weight", units=3, trains=("o", "down")), net), ["adapter"])
    export(model, tmp_path / "x", "adapter")
    torch.testing.assert_close(tiny.logits(stock(tmp_path / "x", "adapter")), wanted, rtol=0, atol=1e-4)
    for _, host in hosts(model):
        host.active = []
    assert torch.equal(tiny.logits(model), tiny.logits(net))  # to the bit: the base was never touched


def test_what_cannot_be_chosen_is_refused() -> None:
    for wrong in ({"share": 0.0}, {"by": "best"}, {"trains": ("norm",)}, {"by": "weight", "trains": ("up",)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fb.S2FT(**wrong)
    with pytest.raises(ValueError, match="how many h.0.attn.o_proj has is not said"):
        fb.S2FT().at("h.0.attn.o_proj")
    with pytest.raises(ValueError, match="3 heads, and 20 rows or columns"):
        fb.S2FT(units=3).shapes(12, 20)
    with pytest.raises(ValueError, match="build the model from a plan"):
        fb.S2FT(by="weight").params(Base(torch.randn(4, 4)), torch.Generator(), {})
    with pytest.raises(Mistake, match="trains o, down, and no planned module is known"):
        fitted(tiny.fresh(), fb.S2FT(), ["model.layers.0.self_attn.q_proj"])


def test_planning_counts_what_is_built_and_keeps_less_of_columns(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "m")
    kept = {}
    for trains in (("o", "down"), ("v", "up")):
        made = fb.plan_model(tmp_path / "m", None, adapter=fb.S2FT(share=0.25, trains=trains), max_length=64, fast=True)
        model = fb.build(tiny.fresh(), made)
        own = {k: p for k, p in model.named_parameters() if ".p." in k}
        assert made.sizes["trained"]["trained"] == sum(p.numel() for p in own.values() if p.requires_grad)
        assert made.sizes["trained"]["frozen"] == sum(p.numel() for k, p in own.items() if k.endswith("index"))
        assert {n.rpartition(".")[2][0] for n, s in made.modules.items() if s.adapter} == {t[0] for t in trains}
        kept[trains] = sum(made.sizes["geometry"]["observed"]["kept"][1])
    assert kept["o", "down"] < kept["v", "up"]
