"""The choice among starts: the least output error, zeros where nothing helps, and a table of what was tried."""

from __future__ import annotations

import json

import pytest
import torch

import finebits as fb
from finebits.init.auto import Auto
from finebits.plan.base import Plan, Spec
from finebits.run.start import chosen
from finebits.stats.fisher_diag import FisherDiag
from finebits.stats.gram import Gram
from papers.gram import inputs, output_error, seen

ADAPTER = fb.LoRA(rank=5, alpha=15.0)


def test_it_is_the_best_of_its_candidates() -> None:
    W, stats = torch.randn(24, 70), seen(inputs(200, 70), None, Gram)
    quantize = lambda V: fb.quantize(V, fb.NF(2, block=16))  # noqa: E731
    R = stats[Gram].value()
    choice = Auto().choose(W, ADAPTER, quantize, stats)
    errors = [error for _, error in choice.tried]
    assert choice.tried[0][0] is None and errors[0] == pytest.approx(output_error(quantize(W).dequantize(), W, R), rel=1e-4)
    assert choice.best == errors.index(min(errors)) and 0 < choice.share < 0.7
    for init, error in choice.tried[1:]:
        Q, p = init(W, ADAPTER, quantize, stats)
        assert error == pytest.approx(output_error(ADAPTER.merged(p, Q), W, R), rel=1e-4)
    Q, p = Auto()(W, ADAPTER, quantize, stats)
    assert output_error(ADAPTER.merged(p, Q), W, R) == pytest.approx(min(errors), rel=1e-4)


def test_zeros_where_nothing_helps() -> None:
    stats = seen(torch.randn(90, 40), None, Gram)
    quantize = lambda V: fb.quantize(V, fb.NF(3, block=16))  # noqa: E731
    for W in (torch.zeros(12, 40), quantize(torch.randn(12, 40)).dequantize()):
        choice = Auto(("loftq", "qera")).choose(W, ADAPTER, quantize, stats)
        assert choice.best == 0 and choice.start == {} and choice.share == 1.0
        assert torch.equal(choice.base.codes(), quantize(W).codes())


def test_its_needs_are_those_of_its_candidates() -> None:
    assert Auto(("loftq",)).needs == {Gram}
    assert Auto((fb.LQLoRA(weighting="fisher"),)).needs == {Gram, FisherDiag}
    assert Auto(("loftq",)).exact and not Auto(("kasa",)).exact
    with pytest.raises(ValueError, match="Auto needs Gram"):
        Auto(("loftq",))(torch.randn(9, 20), ADAPTER, lambda V: V, {})
    with pytest.raises(ValueError, match="Did you mean 'loftq'"):
        Auto(("lofqt",))


def test_it_travels_in_a_plan() -> None:
    init = Auto((fb.LoftQ(steps=3), "qera", {"paper": "lq_lora", "weighting": "fisher"}))
    plan = Plan({"a": Spec(format=fb.NF(3), adapter=ADAPTER, init=init)})
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.modules["a"].init == init and again == plan
    nested = Auto((init, "zeros"))
    assert fb.registry.from_json("init", json.loads(json.dumps(fb.registry.to_json(nested)))) == nested


def test_a_built_model_says_what_was_chosen() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 24), torch.nn.Linear(24, 40))
    stats = {"0": seen(inputs(200, 64), None, Gram), "1": seen(inputs(200, 24), None, Gram)}
    specs = {n: Spec(fb.NF(2, block=16), adapter=ADAPTER, init=i) for n, i in (("0", Auto(("loftq", "qera"))), ("1", fb.QERA()))}
    made = fb.choices(fb.build(model, Plan(specs), stats))
    assert set(made) == {"0"} and json.loads(json.dumps(made)) == made
    errors = [t["error"] for t in made["0"]["tried"]]
    assert [t["init"]["paper"] for t in made["0"]["tried"]] == ["zeros", "loftq", "qera"]
    assert errors[made["0"]["won"]] == min(errors) and made["0"]["share"] == pytest.approx(min(errors) / errors[0])
    won = made["0"]["tried"][made["0"]["won"]]["init"]["paper"]
    assert chosen(made) == f"{won} won 1 of 1 matrices; output error {made['0']['share']:.3f} of zeros' on average"
