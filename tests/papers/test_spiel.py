"""SpIEL (arXiv:2401.16405): sparse deltas whose places move; with SM3 (arXiv:1901.11150) its variant MA."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import finebits as fb
import tiny_llama as tiny
from finebits.optim.sm3 import SM3
from finebits.rules import spiel
from papers.rules import llama, recomputing, tensors, trained, words

K = 60  # of 10 000: rank 0.3, which no rank is


def student(k: int, m: int = 100, n: int = 100, format: Any = None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    linear = nn.Linear(n, m, bias=False)
    model = fb.build(nn.Sequential(linear), fb.Plan({"0": fb.Spec(format, adapter=fb.Sparse(rank=1))}))
    p, gen = model[0].p["default"], torch.Generator().manual_seed(seed + 1)
    index = torch.randperm(m * n, generator=gen)[:k].sort().values.int()
    p["delta"], p["index"] = nn.Parameter(torch.zeros(k)), nn.Parameter(index, requires_grad=False)
    return model


def fit(
    rules: list[Any], optim: str = "adamw", seed: int = 0, steps: int = 400, look: Any = lambda run, loss: None
) -> tuple[nn.Module, set]:
    """Regression whose true change has 50 entries."""
    model, gen = student(K, seed=seed), torch.Generator().manual_seed(seed + 7)
    W, places = model[0].weight.detach().clone(), torch.randperm(10_000, generator=gen)[:50]
    W.view(-1)[places] += torch.where(torch.rand(50, generator=gen) < 0.5, -1.0, 1.0) * (0.5 + torch.rand(50, generator=gen))
    rows = [{"x": torch.randn(64, 100, generator=gen)} for _ in range(steps)]
    loss = lambda model, batch: (model(batch["x"]) - batch["x"] @ W.mT).square().sum()  # noqa: E731
    optimizer = SM3().make(trained(model), lr=0.05) if optim == "sm3" else torch.optim.AdamW(trained(model), lr=0.02, weight_decay=0.0)
    fb.train(model, [[row] for row in rows], optimizer, total=steps, loss=loss, tokens=lambda b: 64, rules=rules, on_step=look)
    return model, set(places.tolist())


def recovered(model: nn.Module, places: set) -> int:
    index = tensors(model)["index"]
    assert len(index.unique()) == K and torch.equal(index, index.sort().values) and 0 <= int(index.min()) and int(index.max()) < 10_000
    return len(places & set(index.tolist()))


def test_a_planted_support_is_recovered() -> None:
    assert recovered(*fit([fb.SpIEL(every=20, accumulate=5)], steps=200)) >= 48
    assert recovered(*fit([], steps=1)) < 5  # places that do not move


def test_ma_takes_the_largest_products_of_sm3_s_accumulators() -> None:
    """The first time all places go: they are the 60 largest of the outer product, which here alone is formed."""
    found: dict[int, set[int]] = {}

    def look(run: Any, loss: float) -> None:
        (state,) = run.optimizer.state.values()
        assert {k: t.shape for k, t in state.items()} == {"0": (100,), "1": (100,)}  # all that SM3 keeps
        found[run.step] = set(torch.outer(state["0"], state["1"]).flatten().topk(K).indices.tolist())

    model, _ = fit([fb.SpIEL("ma", every=5)], "sm3", steps=5, look=look)
    assert set(tensors(model)["index"].tolist()) == found[5]
    model, places = fit([fb.SpIEL("ma", every=5)], "sm3", steps=60)
    recovered(model, places)  # unique, in order, in range
    with pytest.raises(ValueError, match="take training.optim sm3"):
        fit([fb.SpIEL("ma")], steps=1)
    with pytest.raises(ValueError, match="take training.optim adamw"):
        fit([fb.SpIEL("ag")], "sm3", steps=30)


def test_an_event_is_that_of_a_dense_reference_and_leaves_all_others_to_the_bit() -> None:
    rule, seen, gen = fb.SpIEL(every=4, accumulate=3, rate=0.5, schedule="cosine"), {}, torch.Generator().manual_seed(3)
    model = student(12, 7, 9)
    rows = [torch.randn(8, 9, generator=gen) for _ in range(12)]
    loss = lambda model, batch: (model(batch["x"]) ** 2).sum()  # noqa: E731
    p, dense = tensors(model), []
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)

    class Watch(fb.Rule):
        def after_backward(self, run: Any) -> None:
            W = model[0].stack().weight.detach().requires_grad_()
            (rows[run.step] @ W.mT).square().sum().div(8).backward()
            dense.append(W.grad)

        def after_step(self, run: Any) -> None:
            state = optimizer.state[p["delta"]]
            kept = [t.detach().clone() for t in (p["index"], p["delta"], state["exp_avg"], state["exp_avg_sq"], rule.ages["0.default"])]
            seen[run.step, "before" if self is first else "after"] = kept

    first, last = Watch(), Watch()
    last.after_backward = lambda run: None  # type: ignore[method-assign]
    steps = [[{"x": x}] for x in rows]
    fb.train(model, steps, optimizer, total=12, loss=loss, tokens=lambda b: 8, rules=[first, rule, last])
    for step, share in ((7, 1.0), (11, rule.share(11, 12))):
        (index, phi, m, v, _), (now, phi2, m2, v2, ages) = seen[step, "before"], seen[step, "after"]
        candidates = dense[step - 3].abs().flatten().topk(12).indices.sort().values
        found = [dense[i].flatten()[candidates] for i in (step - 2, step - 1)]
        gone = index[phi.abs().argsort()[: int(share * 12)]].tolist()
        stay = set(index.tolist()) - set(gone)
        grown = [c for c in candidates[(found[0] + found[1]).abs().argsort(descending=True)].tolist() if c not in stay][: len(gone)]
        new = [c for c in grown if c not in gone]
        leave = [g for g in gone if g not in grown][: len(new)]
        assert set(now.tolist()) == set(index.tolist()) - set(leave) | set(new) and torch.equal(now, now.sort().values)
        for j, place in enumerate(now.tolist()):
            if place in new:
                g = torch.stack([f[candidates.tolist().index(place)] for f in found])
                assert ages[j] == 2 and phi2[j] == 0
                torch.testing.assert_close(m2[j], (1 - 0.9**2) * g.mean(), rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(v2[j], (1 - 0.999**2) * g.square().mean(), rtol=1e-4, atol=1e-7)
            else:
                i = index.tolist().index(place)
                assert (m2[j], v2[j]) == (m[i], v[i])
                assert phi2[j] == phi[i] or seen[step, "before"][4][i] != step - 1  # one that is younger has a step of its own


def test_every_entry_s_step_has_its_own_age() -> None:
    """After an event: Adam in float64, with the moments and the age that each entry has."""
    rule, ref = fb.SpIEL(every=3, accumulate=2, rate=0.5), {}
    model = student(10, 6, 8)
    p, gen = tensors(model), torch.Generator().manual_seed(5)
    optimizer = torch.optim.AdamW(trained(model), lr=0.05, weight_decay=0.1)

    def look(run: Any, loss: float) -> None:
        state = optimizer.state[p["delta"]]
        if ref.get("age") is not None and not rule.share(run.step, 20):
            a, m, v = ref["age"] + 1, state["exp_avg"].double(), state["exp_avg_sq"].double()
            step = m / (1 - 0.9**a) / ((v / (1 - 0.999**a)).sqrt() + 1e-8)
            torch.testing.assert_close(p["delta"].double(), ref["phi"] * (1 - 0.05 * 0.1) - 0.05 * step, rtol=1e-4, atol=1e-6)
        ref.update(phi=p["delta"].detach().double(), age=rule.ages["0.default"].double())

    rows = [[{"x": torch.randn(8, 8, generator=gen)}] for _ in range(14)]
    loss = lambda model, batch: (model(batch["x"]) - 1).square().sum()  # noqa: E731
    fb.train(model, rows, optimizer, total=20, loss=loss, tokens=lambda b: 8, rules=[rule], on_step=look)
    assert set(rule.ages["0.default"].tolist()) != {14}


def test_all_entries_without_reselection_are_dense_adamw() -> None:
    model, gen = student(63, 7, 9), torch.Generator().manual_seed(3)
    W = model[0].weight.detach().clone()
    D = torch.zeros_like(W).requires_grad_()
    both = [torch.optim.AdamW(params, lr=0.05) for params in (trained(model), [D])]
    for _ in range(20):
        x = torch.randn(8, 9, generator=gen)
        for y, optimizer in zip((model(x), x @ (W + D).mT), both, strict=True):
            optimizer.zero_grad()
            (y - 1).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(tensors(model)["delta"].view(7, 9), D, rtol=0, atol=1e-5)


@pytest.mark.parametrize("again", [False, True])
def test_gradients_are_seen_a_few_rows_at_a_time(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where blocks are computed again, and with the density loss beside it."""
    from finebits.adapters import _rows

    made: list[tuple[int, ...]] = []
    whole = spiel._gradient
    monkeypatch.setattr(_rows, "SLAB", 48)
    monkeypatch.setattr(spiel, "_gradient", lambda x, g, rows: made.append((rows.stop - rows.start, x.shape[-1])) or whole(x, g, rows))
    model = llama(fb.Sparse(rank=2))
    model = recomputing(model) if again else model
    before = {k: t.clone() for k, t in model.state_dict().items() if k.endswith("index")}
    rules = [fb.SpIEL(every=3, accumulate=2, rate=0.5), *([] if again else [fb.DensityLoss(weight=0.1)])]
    losses = fb.train(model, [[words()]] * 6, torch.optim.AdamW(trained(model), lr=0.01), total=6, rules=rules)
    assert made and all(m * n <= 48 for m, n in made) and losses[-1] < losses[0]
    assert any(not torch.equal(t, before[k]) for k, t in model.state_dict().items() if k in before)


def test_a_resumed_run_has_its_places_at_once() -> None:
    rule, model = fb.SpIEL(every=3, accumulate=2), student(10, 6, 8)
    rows = [[{"x": torch.randn(8, 8)}] for _ in range(6)]
    loss = lambda model, batch: (model(batch["x"]) - 1).square().sum()  # noqa: E731
    fb.train(model, rows, torch.optim.AdamW(trained(model)), total=9, loss=loss, tokens=lambda b: 8, rules=[rule])
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    other, anew = fb.SpIEL(every=3, accumulate=2), student(10, 6, 8)
    assert not torch.equal(tensors(anew)["index"], tensors(model)["index"])
    other.load_state_dict(torch.load(file, weights_only=True))
    other.before_forward(fb.Run(anew, dict(fb.hosts(anew)), torch.optim.AdamW(trained(anew)), 6, 9))
    assert torch.equal(tensors(anew)["index"], tensors(model)["index"])


def test_two_deltas_switch_on_one_base_and_merge(tmp_path: Path) -> None:
    """Saved, loaded, switched, exported merged."""
    from finebits import store
    from finebits.build import generator, hosts
    from finebits.interop.peft import export, verify

    plan = tiny.plan(fb.Sparse(rank=3), format=None, init=fb.Zeros())
    one, two = (tiny.tuned(plan, seed=s) for s in (1, 2))
    fb.save(one, tmp_path / "one")
    again = store.apply(tiny.fresh(), store.read(tmp_path / "one"))
    wanted = [tiny.logits(m) for m in (one, two)]
    assert torch.equal(tiny.logits(again), wanted[0])
    for (name, host), (_, other) in zip(hosts(again), hosts(two), strict=True):
        held = {k: t.detach().clone() for k, t in other.tensors("default").items()}
        host.add("second", fb.Sparse(rank=3), generator(0, name), held)
    for active, logits in ((["second"], wanted[1]), (["default"], wanted[0])):
        for _, host in hosts(again):
            host.active = active
        assert torch.equal(tiny.logits(again), logits)
    export(two, tmp_path / "merged", "merged")
    assert verify(tmp_path / "merged", "merged", two, tiny.batches())["verdict"] in ("same", "ok")


def test_settings_without_a_meaning_are_refused(unchecked: None) -> None:
    for wrong in ({"variant": "x"}, {"schedule": "x"}, {"every": -1}, {"rate": 0.0}, {"pool": 0.5}, {"accumulate": 1}, {"accumulate": 20}):
        with pytest.raises(ValueError, match="SpIEL"):
            fb.SpIEL(**wrong)
