"""The cost table: what its losses are, that it is kept and goes on after a kill; ranks, starts, locks and the second budget in a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import finebits as fb
from finebits.interop import planning, pricing
from finebits.interop.hf import load_planned
from finebits.interop.planning import Settings, plan_model
from finebits.merging.base import Factors
from finebits.plan import cost, measured
from finebits.plan.base import Infeasible, Plan, Spec
from finebits.plan.kl_curve import Point
from finebits.plan.solve import again
from finebits.qtensor import QTensor
from finebits.report.tables import matrices
from finebits.stats.base import Statistic
from finebits.stats.fisher_diag import FisherDiag
from finebits.stats.gram import Gram
from finebits.stats.mean_square import MeanSquare
from finebits.tasks.causal_lm import CausalLM
from tiny_llama import names

FORMATS = tuple(fb.NF(bits, block=32, scale="bf16") for bits in (2, 3, 4, 8))
ROWS = [{"text": " ".join(f"w{(i * j * j) % 120 + 1}" for j in range(14))} for i in range(1, 9)]


def settings(**more: Any) -> Settings:
    given = dict(formats=FORMATS, adapter=fb.LoRA(rank=4, alpha=4), init=fb.Zeros(), max_length=16, per_device_train_batch_size=2)
    return Settings(**given | dict(reserve=0.0, loss_chunk=8, dtype="float32", calibration_rows=4) | more)  # type: ignore[arg-type]


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The matrices that are really priced, in order."""
    seen: list[str] = []
    real = pricing.check_finite

    def note(W: torch.Tensor, what: str) -> None:
        seen.append(what.removesuffix(".weight"))
        real(W, what)

    monkeypatch.setattr(pricing, "check_finite", note)
    return seen


def table(home: Path) -> Path:
    (found,) = (home / "costs").iterdir()
    return found


# -- what the losses are


def stats(X: torch.Tensor, G: torch.Tensor) -> dict[type[Statistic], Statistic]:
    found: dict[type[Statistic], Statistic] = {S: S() for S in (Gram, MeanSquare, FisherDiag)}
    for s in found.values():
        s.add(X, G)
    return found


def test_losses_by_hand() -> None:
    W, X, G = torch.randn(5, 32), torch.randn(40, 32) * torch.rand(32), torch.randn(40, 5)
    held, q = stats(X, G), fb.quantize(W, fb.NF(2, 32)).dequantize()
    D = W - q
    wanted = {
        "weight": D.square().sum() / W.square().sum(),
        "output": (D.square() @ X.square().mean(0)).sum() / (W.square() @ X.square().mean(0)).sum(),
        "fisher": 0.5 * 3.0 * (torch.einsum("tm,tn->tmn", G, X).square().mean(0) * D.square()).sum(),
    }
    wanted["kl"] = wanted["fisher"]
    for objective, value in wanted.items():
        loss = cost.error(objective, W, held, 3.0)
        (cell,) = cost.row(W, [Spec(fb.NF(2, 32))], {}, loss, 4)
        assert cell.loss == pytest.approx(float(value), rel=1e-4) and cell.bytes == 5 * (8 + 4) and cell.overhead == 20
        assert loss(torch.zeros_like(W)) == 0
    with pytest.raises(ValueError, match="it can be weight, output, fisher, kl"):
        cost.error("speed", W, held)
    with pytest.raises(ValueError, match="the objective output needs MeanSquare"):
        cost.error("output", W, {})
    assert cost.error("weight", torch.zeros(2, 32), {})(torch.zeros(2, 32)) == 0


def test_fisher_estimates_the_kl_of_a_softmax() -> None:
    """One layer that makes the logits: ½ Σ F D² with exact Fisher diagonals against the KL of a small random move."""
    W, X = 0.5 * torch.randn(6, 16), torch.randn(3000, 16)
    p = (X @ W.T).softmax(-1)
    drawn = torch.nn.functional.one_hot(torch.multinomial(p, 1)[:, 0], 6).float()
    D = 0.03 * torch.randn(6, 16)
    q = (X @ (W - D).T).log_softmax(-1)
    kl = float((p * (p.log() - q)).sum(-1).mean())
    held = stats(X, p - drawn)
    assert cost.error("fisher", W, held)(D) == pytest.approx(kl, rel=0.3)


def test_ranks_and_starts_lower_the_loss() -> None:
    W = torch.randn(24, 64)
    specs = [Spec(fb.NF(2, 32), adapter=fb.LoRA(rank=r, alpha=r), init=i) for r in (2, 8) for i in (fb.Zeros(), fb.LoftQ(steps=1))]
    cells = cost.row(W, specs, {}, cost.error("weight", W, {}), 4, starts=True)
    zeros2, loftq2, zeros8, loftq8 = (c.loss for c in cells)
    assert loftq8 < loftq2 < zeros2 == zeros8 and cells[0].trained == 2 * 88 and cells[2].trained == 8 * 88
    small, large = cost.options(cells, specs)[0], cost.options(cells, specs)[2]
    assert large.bytes == small.bytes and large.more["trained"] - small.more["trained"] == 6 * 88
    assert large.more["serve"] - small.more["serve"] == 4 * 6 * 88


# -- kept on disk


def test_a_second_plan_prices_nothing(small: Path, priced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path))
    first = plan_model(small, None, ROWS, settings())
    assert priced == names()
    assert plan_model(small, first.peak - 20_000, ROWS, settings()).solver["objective"] == "output" and priced == names()
    plan_model(small, None, ROWS, settings(locks={"down_proj": fb.Int(4, 32)}))
    assert priced[len(names()) :] == [n for n in names() if n.endswith("down_proj")]  # the others' candidates did not change
    before = len(priced)
    plan_model(small, None, ROWS[1:], settings())  # other calibration rows
    plan_model(small, None, None, settings(objective="weight"))
    assert len(priced) == before + 2 * len(names()) and len(list((tmp_path / "costs").iterdir())) == 3


def test_a_killed_run_goes_on_where_it_stopped(small: Path, priced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path))

    def killed(done: int, total: int, name: str) -> None:
        if name == names()[5]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan_model(small, None, None, settings(objective="weight"), progress=killed)
    path = table(tmp_path)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["module"] for line in lines] == names()[:6]
    path.write_text("\n".join(lines)[:-9])  # the kill came in the middle of a line
    priced.clear()
    made = plan_model(small, None, None, settings(objective="weight"))
    assert priced == names()[5:]
    path.unlink()
    assert plan_model(small, None, None, settings(objective="weight")).to_json() == made.to_json()


def test_prices_are_those_of_statistics_of_the_whole_model(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients and inputs come block by block; the whole model at once gives the same."""
    given: dict[str, Any] = dict(objective="fisher", quantizer=fb.GPTQ())
    streamed = plan_model(small, None, ROWS, settings(**given))

    def whole(self: Any, wanted: Any, drawn: bool = False, progress: Any = None) -> Any:
        model, batches = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32), self.batches(self.rows)
        loss = self.task.drawn(torch.Generator().manual_seed(0)) if drawn else CausalLM().loss
        yield fb.collect(model, batches, loss, wanted, keep=lambda b: b["attention_mask"].bool())

    monkeypatch.setattr(pricing.Calibration, "statistics", whole)
    monkeypatch.setattr(pricing.CostTable, "_append", lambda self, line: None)
    monkeypatch.setenv("FINEBITS_HOME", "/nowhere")
    again = plan_model(small, None, ROWS, settings(**given))
    for name, c in streamed.costs.items():
        assert [line["loss"] for line in c["menu"]] == pytest.approx([line["loss"] for line in again.costs[name]["menu"]], rel=1e-4)


# -- objectives in a plan


def test_kl_is_predicted_as_an_interval(small: Path, tmp_path: Path) -> None:
    free = plan_model(small, None, ROWS, settings(objective="kl"))
    made = plan_model(small, free.peak - 30_000, ROWS, settings(objective="kl"), pareto=4)
    kl = made.solver["kl"]
    low, best, high = kl["interval"]
    assert 0 < low < best < high and kl["share"] == 0.8 and len(kl["variants"]) == 3
    assert [v["kl"] for v in sorted(kl["variants"], key=lambda v: v["loss"])] == sorted(v["kl"] for v in kl["variants"])
    tried = made.solver["trials"]
    assert sorted(t["saturation"] for t in tried) == [0, 1, 3, 10] and [t["kl"] for t in tried] == sorted(t["kl"] for t in tried)
    assert kl["measured"] == tried[0]["kl"] and made.solver["loss"] == pytest.approx(tried[0]["loss"]) and made.peak <= free.peak - 30_000
    assert made.solver["gap"] == pytest.approx(made.solver["loss"] / made.solver["bound"] - 1)
    curve = [p["kl"][1] for p in made.solver["pareto"]]
    assert curve == sorted(curve, reverse=True)
    assert "KL " in made.summary() and "(80%) before training, from 3 evaluated variants" in made.summary()
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").solver == made.solver
    made.to_html(tmp_path / "plan.html")


def test_trials_keep_what_really_loses_least() -> None:
    """The measurement, not the table, decides between plans of one budget."""
    menu = {
        f"m{i}": [fb.Option(Spec(f), f.bits * (i + 1), (i + 1) * 16 * 4.0**-f.bits) for f in FORMATS]  # type: ignore[union-attr]
        for i in range(5)
    }
    choices = measured.saturated(menu, lambda m: fb.Lagrange()(m, 52))
    best, tried = measured.trials([Point(sum(o.loss for o in c.values()), 1.0 / (1 + i)) for i, c in enumerate(choices)])
    assert best == len(choices) - 1 and tried[0]["saturation"] == measured.SATURATIONS[-1]
    assert all(o in menu[name] for c in choices for name, o in c.items())  # losses are the menu's own, not the bent ones
    assert choices[0] == fb.Lagrange()(menu, 52) != choices[-1]


def test_objectives_without_rows_say_what_to_do(small: Path) -> None:
    for objective in ("fisher", "kl"):
        with pytest.raises(ValueError, match=f"the objective {objective} weighs errors by .* name data.datasets"):
            plan_model(small, None, None, settings(objective=objective))
        with pytest.raises(ValueError, match="--fast reads neither"):
            plan_model(small, None, ROWS, settings(objective=objective), fast=True)
    assert plan_model(small, None, None, settings()).solver["objective"] == "weight"
    with pytest.raises(ValueError, match="the objective is 'best'"):
        plan_model(small, None, ROWS, settings(objective="best"))


# -- ranks, starts, locks, the second budget


def test_ranks_and_bits_together(small: Path, tmp_path: Path) -> None:
    given = settings(ranks=(2, 4, 16), inits=(fb.Zeros(), fb.LoftQ(steps=1)))
    free = plan_model(small, None, ROWS, given)
    made = plan_model(small, free.peak - 120_000, ROWS, given)
    found = {getattr(s.adapter, "rank", None) for s in made.modules.values()}
    assert len(found) > 1 and found <= {2, 4, 16} and made.peak <= free.peak - 120_000
    assert {s.adapter.s for s in made.modules.values()} == {1.0}  # alpha moves with the rank
    trained = sum(s.adapter.size(*made.costs[n]["shape"]) for n, s in made.modules.items())
    assert made.memory["adapters"] == 4 * trained
    assert all({"rank", "init"} <= line.keys() for c in made.costs.values() for line in c["menu"])
    for m in matrices(made):
        rank, init = made.modules[m.name].adapter.rank, type(made.modules[m.name].init).__name__.lower()
        assert m.chosen == f"{m.format} rank {rank} {init}" and len({name for name, *_ in m.menu}) == 24
    made.to_html(tmp_path / "plan.html")
    model, _ = load_planned(made)
    held = sum(p.nbytes for p in model.parameters() if isinstance(p.data, QTensor))
    assert held == made.memory["linear weights"] and sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    with pytest.raises(ValueError, match="--fast does not read them"):
        plan_model(small, None, None, given, fast=True)
    with pytest.raises(ValueError, match="the smallest on offer is 65"):
        plan_model(small, None, None, settings(ranks=(65,)))


def test_a_serve_budget_is_kept(small: Path) -> None:
    free = plan_model(small, None, ROWS, settings(serve_budget=10**9))
    whole = free.solver["serve"]["planned"]
    linears = free.memory["linear weights"]
    assert whole == linears + free.memory["embeddings"] + free.memory["head"] + free.memory["norms and other"] + free.memory["adapters"]
    made = plan_model(small, free.peak, ROWS, settings(serve_budget=whole - 15_000))
    assert whole - 17_000 < made.solver["serve"]["planned"] <= whole - 15_000 and "Saved" in made.summary()
    with pytest.raises(Infeasible, match="the smallest model that can be saved takes .*the serve budget is") as caught:
        plan_model(small, None, ROWS, settings(serve_budget=10_000))
    assert caught.value.code == 3
    fits = plan_model(small, None, ROWS, settings(serve_budget=caught.value.smallest))
    assert fits.solver["serve"]["planned"] == caught.value.smallest
    ranked = settings(serve_budget=whole - 15_000, ranks=(2, 8), init=fb.LoftQ(steps=1))
    both = plan_model(small, free.peak + 10_000, ROWS, ranked)
    assert both.solver["name"] == "milp" and both.solver["serve"]["planned"] <= whole - 15_000 and both.peak <= free.peak + 10_000


def test_a_serve_budget_holds_adapters_and_tokens(small: Path) -> None:
    """Their pages are those of a server: one with so many bytes has them all, and one with a page less has not."""
    from finebits.interop.serving import based
    from finebits.serve.engine import Engine, Limits
    from finebits.serve.grouped import pages_of

    asked = dict(serve_budget=10**9, serve_adapters=3, serve_rank=8, serve_tokens=40)
    free, with_them = (plan_model(small, None, None, settings(**more)) for more in (dict(serve_budget=10**9), asked))
    pool = with_them.solver["serve"]["pool"]
    assert with_them.solver["serve"]["planned"] == free.solver["serve"]["planned"] + pool["bytes"]
    model = AutoModelForCausalLM.from_pretrained(small)
    engine = Engine(based(model), Limits(pool["bytes"]))
    others, own = ({n: Factors(torch.ones(m, r), torch.ones(r, k)) for n, (m, k) in shapes(model).items()} for r in (8, 4))
    assert engine.pool.page_bytes == pool["page"] and engine.cache.pages(40) == pool["cache_pages"]
    assert 3 * pages_of(others, engine.pool.elements) + pages_of(own, engine.pool.elements) == pool["adapter_pages"]
    assert engine.pool.count == pool["adapter_pages"] + pool["cache_pages"]
    engine.stop()
    whole = with_them.solver["serve"]["planned"]
    less = plan_model(small, None, None, settings(**asked | dict(serve_budget=whole - 15_000)))
    assert less.solver["serve"]["planned"] <= whole - 15_000 and less.solver["serve"]["pool"] == pool
    assert (
        "Served" in less.summary() and "3 of rank 8" in less.summary() and f"--budget {pool['bytes']}" in " ".join(less.summary().split())
    )
    assert again(Plan.from_json(less.to_json())).solver["serve"] == less.solver["serve"]
    with pytest.raises(Infeasible, match="the pages that it is served with take .*the serve budget is") as caught:
        plan_model(small, None, None, settings(**asked | dict(serve_budget=pool["bytes"])))
    assert caught.value.code == 3 and "3 adapters and 40 tokens" in str(caught.value)
    for more, said in (
        (dict(serve_adapters=3), "there is none: give budget.serve_memory"),
        (dict(serve_budget=10**9, serve_rank=3), "say how many, or leave it out"),
        (dict(serve_budget=10**9, serve_adapters=3, adapter=fb.DoRA(rank=4)), "DoRA is none"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            plan_model(small, None, None, settings(**more))
        assert refused.value.code == 2  # type: ignore[attr-defined]


def shapes(model: Any) -> dict[str, tuple[int, int]]:
    return {n: tuple(model.get_submodule(n).weight.shape) for n in names()}


@pytest.mark.parametrize("adapter", [fb.VeRA(rank=8), fb.S2LoRA(rank=4)], ids=lambda a: type(a).__name__)
def test_what_matrices_share_is_planned_once(small: Path, adapter: Any) -> None:
    made = plan_model(small, None, None, settings(adapter=adapter, serve_budget=10**9))
    model, _ = load_planned(made)
    size = lambda wanted: sum(p.numel() for n, p in model.named_parameters() if ".p." in n and wanted(p))  # noqa: E731
    assert made.memory["adapters"] == 4 * size(lambda p: p.requires_grad) > 0
    assert made.memory["frozen factors"] == 4 * size(lambda p: not p.requires_grad)
    assert made.solver["serve"]["planned"] == sum(p.nbytes for p in model.parameters())


def test_locks_hold_and_a_lock_without_a_match_is_an_error(small: Path) -> None:
    locks = {"layers.1.mlp.up_proj": fb.Int(4, 32), "layers.0.self_attn.*": None, "down_proj": fb.NF(4, 32)}
    made = plan_model(small, None, None, settings(locks=locks, overrides={".*down_proj": fb.NF(2, 32)}))
    assert made.modules["model.layers.1.mlp.up_proj"].format == fb.Int(4, 32)
    assert made.modules["model.layers.0.self_attn.k_proj"].format is None
    assert {made.modules[f"model.layers.{i}.mlp.down_proj"].format for i in (0, 1)} == {fb.NF(4, 32)}
    with pytest.raises(planning.Mistake, match="--lock names down_prj.*did you mean down_proj") as caught:
        plan_model(small, None, None, settings(locks={"down_prj": None}))
    assert caught.value.code == 2


def test_side_constraints_reach_the_plan(small: Path) -> None:
    made = plan_model(small, None, None, settings(planner=fb.MILP(ties=(("gate_proj", "up_proj"),), formats=2)))
    assert len({s.format for s in made.modules.values()}) <= 2 and made.solver["name"] == "milp"
    budget = made.peak - 20_000
    made = plan_model(small, budget, None, settings(planner=fb.MILP(ties=(("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")))))
    for i in (0, 1):
        at = lambda part, i=i: made.modules[f"model.layers.{i}.{part}"].format  # noqa: E731
        assert at("mlp.gate_proj") == at("mlp.up_proj")
        assert at("self_attn.q_proj") == at("self_attn.k_proj") == at("self_attn.v_proj")
    assert made.peak <= budget and 0 <= made.solver["gap"] < 1e-4
