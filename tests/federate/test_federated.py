"""A federation from its recipe: results, resume, whose base it is, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import federation
import finebits as fb
from finebits.build import hosts
from finebits.evaluate.heldout import score
from finebits.federate import _rounds as loop
from finebits.interop.federated import Clients
from finebits.recipe import Recipe
from finebits.run import federated
from finebits.run.federated import How, deal

HOW = How(("flora", "hetlora"), clients=3, rounds=2, alpha=0.3, ranks=(4, 2, 1))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Any]]:
    recipe = federation.recipe(tmp_path_factory.mktemp("federated"))
    return recipe, federated.federate(recipe, HOW)


def test_curves_bytes_and_a_picture(made: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, told = made
    out = Path(recipe.output_dir)
    assert json.loads((out / "federated.json").read_text()) == told
    assert list(told["curves"]) == ["flora", "hetlora", "central"] and sum(told["clients"]) == 40
    for curve in told["curves"].values():
        assert [e["round"] for e in curve["rounds"]] == [0, 1, 2]
        assert curve["rounds"][-1]["loss"] < curve["rounds"][0]["loss"]
        assert all(e["interval"][0] < e["loss"] < e["interval"][1] for e in curve["rounds"])
    flora, hetlora = (told["curves"][k]["rounds"][1] for k in ("flora", "hetlora"))
    ends = 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))  # in and out of the linears of two layers
    assert flora["up"] == hetlora["up"] == hetlora["down"] == 4 * (4 + 2 + 1) * ends and flora["down"] == 3 * flora["up"]
    text = (out / "federated.svg").read_text()
    assert (
        text.count("xmlns=") == 1
        and len(ElementTree.fromstring(text)) == 4  # style, ground, title, chart
        and text.count("raw ") >= 6
        and "http://www.w3.org/2000/svg" in text
        and all(name in text for name in told["curves"])
    )
    assert "flora" in federated.summary(told) and "from central" in federated.summary(told)


def test_the_saved_model_is_the_last_round_over_codes_that_nobody_touched(made: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, told = made
    place = Path(recipe.output_dir) / "federate" / "flora"
    model, _ = fb.load(place / "model")
    start, _ = fb.load(place / "start")
    first = dict(hosts(start))
    for name, host in hosts(model):
        assert "rounds" in host.kinds
        weight: Any = host.weight
        before: Any = first[name].weight
        assert all(torch.equal(t, before.parts[k]) for k, t in weight.parts.items())
    clients = Clients(place)
    rows = [vars(e) for e in clients.rows][:8]
    batch = clients.task.batch(rows, clients.processor)
    now = loop.load(place / "rounds")
    assert now is not None
    clients.put(now[0].server, clients.rank)
    assert score(model, [batch]).loss == pytest.approx(score(clients.model, [batch]).loss, rel=1e-6)


def test_rounds_go_on_to_the_bit_and_touch_adapters_alone(made: tuple[Recipe, dict[str, Any]]) -> None:
    place = Path(made[0].output_dir) / "federate" / "flora"
    whole = loop.load(place / "rounds")
    assert whole is not None
    clients = Clients(place)
    weights = {name: host.weight for name, host in clients.hosts.items()}
    first = next(loop.rounds(clients.federation, clients, clients.begun(), 2))
    second = list(loop.rounds(Clients(place).federation, Clients(place), first, 2))[-1]
    assert all(host.weight is weights[name] for name, host in clients.hosts.items())
    for name, p in whole[0].server.residual.items():
        assert all(torch.equal(t, second.server.residual[name][k]) for k, t in p.items())


def test_rounds_of_one_client_are_the_epochs_of_one_run(made: tuple[Recipe, dict[str, Any]]) -> None:
    """Without moments, R rounds of E epochs are R·E epochs: of the same rows in the same order, from where the round before ended."""
    clients = Clients(Path(made[0].output_dir) / "federate" / "hetlora")
    clients.federation = loop.Federation(fb.FedAvg(), clients=1)
    how = {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": -1, "learning_rate": 0.5}
    rows = list(range(10))

    def after(rounds: int, epochs: float) -> dict[str, dict[str, torch.Tensor]]:
        training = clients.job["training"] | how | {"num_train_epochs": epochs}
        clients.job |= {"dealt": [rows], "rounds": rounds, "training": training}
        begun = clients.begun()._replace(ranks=(clients.rank,))
        return list(loop.rounds(clients.federation, clients, begun, rounds))[-1].server.tensors  # type: ignore[return-value]

    two, one = after(2, 1.0), after(1, 2.0)
    for name, p in clients.born.items():
        assert not torch.equal(one[name]["B"], p["B"])
        for k in p:
            torch.testing.assert_close(two[name][k], one[name][k], rtol=1e-6, atol=1e-8)
    clients.job["training"] |= {"max_steps": 1, "per_device_train_batch_size": 4}
    met = [clients.met(0, number) for number in (1, 2, 3)]
    assert sorted(r for batches in met for batch in batches for r in batch) == rows  # all of them before any again


def test_a_step_of_every_client_is_a_step_on_the_rows_of_all(made: tuple[Recipe, dict[str, Any]]) -> None:
    """SGD without clipping: the mean of what it moves at clients who share the rows is what it moves centrally, whoever has which labels."""
    clients = Clients(Path(made[0].output_dir) / "federate" / "hetlora")
    how = {"optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 1, "learning_rate": 0.5, "max_grad_norm": 0.0}

    def after(dealt: list[list[int]]) -> dict[str, dict[str, torch.Tensor]]:
        training = clients.job["training"] | how | {"per_device_train_batch_size": len(dealt[0])}
        clients.job |= {"dealt": dealt, "training": training}
        clients.federation = loop.Federation(fb.FedAvg(), clients=len(dealt))
        begun = clients.begun()._replace(ranks=(clients.rank,) * len(dealt))
        return next(loop.rounds(clients.federation, clients, begun, 1)).server.tensors  # type: ignore[return-value]

    apart, central = after([[0, 4], [1, 5], [2, 6], [3, 7]]), after([list(range(8))])  # of one kind each, as long as each other
    for name, p in clients.born.items():
        assert not torch.equal(central[name]["B"], p["B"])
        for k in p:
            torch.testing.assert_close(apart[name][k], central[name][k], rtol=1e-4, atol=1e-7)


def test_a_folder_is_gone_on_with_or_replaced_and_never_mixed(made: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, told = made
    with pytest.raises(ValueError, match="--resume"):
        federated.federate(recipe, HOW)
    with pytest.raises(ValueError, match="other rows or settings"):
        federated.federate(recipe, HOW._replace(dropout=0.5), resume=True)
    assert federated.federate(recipe, HOW, resume=True) == told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"noise": 1.0}, "give --clip too"),
        ({"clip": 1.0}, "one of --noise and --epsilon"),
        ({"clip": 1.0, "noise": 1.0}, "take fedavg, ffa_lora or fed_sb"),
        ({"aggregators": ("ffa_lora",)}, "FFALoRA averages factors of one rank"),
        ({"aggregators": ("flora",), "ranks": (8, 2)}, "raise adapter.rank"),
        ({"rounds": 0}, "at least 1"),
        ({"aggregators": ("fed_sb",), "ranks": (), "clip": 1.0, "noise": 1.0}, "take the objective weight"),
    ],
)
def test_what_makes_no_rounds_is_said_before_anything_is_read(change: dict[str, Any], words: str) -> None:
    recipe = Recipe.parse("model: {model_name_or_path: /nowhere}\nadapter: {rank: 4}")
    with pytest.raises(ValueError, match=words):
        federated.federate(recipe, HOW._replace(**change))


def test_private_rounds_say_what_they_come_to(made: tuple[Recipe, dict[str, Any]]) -> None:
    recipe = made[0].model_copy(update={"output_dir": made[0].output_dir + "-private"})
    how = How(("fed_sb",), clients=3, rounds=1, clip=0.1, epsilon=8.0, delta=1e-3, central=False)
    told = federated.federate(recipe, how)
    assert 7.9 < told["privacy"]["epsilon"] <= 8.0 and "epsilon" in federated.summary(told)
    clients = Clients(Path(recipe.output_dir) / "federate" / "fed_sb")
    assert clients.rank == 4 and clients.scale == 2.0 and clients.once > 0
    begun, now = clients.begun().server.tensors, loop.load(Path(recipe.output_dir) / "federate" / "fed_sb" / "rounds")
    assert now is not None
    moved = torch.cat([(now[0].server.tensors[name]["R"] - p["R"]).flatten() for name, p in begun.items()])
    std = told["privacy"]["noise"] * 0.1 / 3
    assert moved.std().item() == pytest.approx(std, rel=0.25)  # of 14 matrices of 16 numbers, beside which the updates are small


def test_rows_without_kinds_are_not_skewed() -> None:
    with pytest.raises(ValueError, match="leave --alpha out"):
        deal(list(range(100)), HOW, 0)
    assert sorted(map(len, deal([None] * 99, HOW._replace(alpha=None), 0))) == [33, 33, 33]


def test_options_reach_the_job_and_mistakes_are_usage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    from finebits.cli import main

    calls: list[Any] = []
    monkeypatch.setattr(federated, "federate", lambda *words: calls.append(words) or {"apps": {}})
    recipe = tmp_path / "r.yaml"
    recipe.write_text("{model: {model_name_or_path: m}, data: {datasets: [{path: a.jsonl}]}}\n")
    words = [
        "federate",
        str(recipe),
        "--aggregator",
        "flora,hetlora",
        "--clients",
        "5",
        "--rounds",
        "3",
        "--alpha",
        "0.5",
        "--ranks",
        "8,4",
    ]
    words += ["--fraction", "0.5", "--dropout", "0.1", "--no-central", "--prepare", "--resume", "seed=7"]
    assert main(words) == 0
    r, how, *flags = calls[0]
    assert r.training.seed == 7 and flags == [True, False, True]
    assert how == How(("flora", "hetlora"), 5, 3, 0.5, 0.5, 0.1, (8, 4), central=False)
    for wrong, said in (
        ("--ranks=8,x", "numbers with commas"),
        ("--ranks=0", "of at least 1"),
        ("--aggregator=flor", "did you mean flora"),
    ):
        assert main(["federate", str(recipe), wrong]) == 2
        assert said in capsys.readouterr().err
