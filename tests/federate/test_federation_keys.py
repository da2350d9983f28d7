"""The federation of a recipe: what its keys reach, settings of aggregators that each do something, what is refused with what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finebits import registry
from finebits.federate.base import Sent, Server
from finebits.recipe import Recipe
from finebits.run.federated import How

BASE = "{model: {model_name_or_path: m}, data: {datasets: [{path: a.jsonl}]}, adapter: {rank: 8}}"
SETTINGS = {
    ("flora", "cap"): 2,
    ("fedex_lora", "rank"): 1,
    ("lora_fair", "weight"): 10.0,
    ("hetlora", "share"): 0.5,
    ("hetlora", "penalty"): 0.5,
}


def parse(*overrides: str) -> Recipe:
    return Recipe.parse(BASE, overrides=list(overrides))


def made(aggregator: Any) -> list[Any]:
    """All that a round has of an aggregator: what acts on a client's training, what it sends of it, what the server makes of that."""
    gen = torch.Generator().manual_seed(0)
    draw = lambda by: {"q": {"A": by * torch.randn(4, 9, generator=gen), "B": torch.randn(7, 4, generator=gen)}}  # noqa: E731
    start, all_of = draw(1.0), [Sent(draw(0.1), 1), Sent(draw(0.1), 3)]
    server = aggregator(Server(start), [s._replace(tensors=aggregator.kept(start, s.tensors)) for s in all_of]).server
    rules = [sorted(vars(rule).items()) for rule in aggregator.rules()]
    return [rules, *(t.tolist() for part in (server.tensors, server.residual) for p in part.values() for t in p.values())]


def test_every_setting_of_every_aggregator_is_listed() -> None:
    found = {(n, k) for n in registry.names("federate") for k in registry.to_json(registry.from_json("federate", n)) if k != "paper"}
    optional = {("flora", "cap"), ("fedex_lora", "rank")}  # left out of JSON where they are None
    assert found | optional == set(SETTINGS)


@pytest.mark.parametrize(("paper", "key"), sorted(SETTINGS))
def test_a_setting_reaches_the_round_and_does_something(paper: str, key: str) -> None:
    said = f"{{paper: {paper}, {key}: {SETTINGS[paper, key]}}}"
    for written in (
        parse(f"federation.aggregators=[{said}]"),
        parse(f"federation.aggregators=[{paper}]", f"federation.aggregators.0.{key}={SETTINGS[paper, key]}"),
    ):
        value = How.of(written).values[paper]
        assert getattr(value, key) == SETTINGS[paper, key] and written.aggregator_values() == {paper: value}
    assert made(value) != made(registry.from_json("federate", paper))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("federation.aggregators=[flor]", "did you mean|Did you mean 'flora'"),
        ("federation.aggregators=[{paper: lora_fair, wieght: 0.1}]", "lora_fair has no setting 'wieght': did you mean weight"),
        ("federation.aggregators=[{paper: fedavg, cap: 4}]", "fedavg has no setting 'cap'"),
        ("federation.aggregators=[{paper: lora_fair, weight: 0.0}]", "it must be positive"),
        ("federation.aggregators=[{paper: flora, cap: 1.5}]", "cap"),
        ("federation.aggregators=[{cap: 4}]", "with the key paper"),
        ("federation.aggregators=[flora, {paper: flora, cap: 4}]", "flora is there twice"),
        ("federation.aggregators=[]", "federation.aggregators"),
        ("federation.clinets=3", "did you mean clients"),
        ("federation.clients=0", "of at least 1"),
        ("federation.client_ranks=[4, 0]", "of at least 1"),
        ("federation.fraction_train=0", "above 0"),
    ],
)
def test_what_is_unknown_or_out_of_bounds_is_refused_with_what_was_meant(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(override)


def test_options_lay_over_the_recipe_and_leave_settings_of_aggregators(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from finebits.cli import main
    from finebits.run import federated

    calls: list[How] = []
    monkeypatch.setattr(federated, "federate", lambda recipe, how, *flags: calls.append(how) or {"apps": {}})
    recipe = tmp_path / "keys.yaml"
    keys = (
        "{aggregators: [fedavg, {paper: flora, cap: 4}], clients: 7, rounds: 4, delta: 0.001, client_ranks: [8, 2], compare_central: false}"
    )
    recipe.write_text(f"{{model: {{model_name_or_path: m}}, data: {{datasets: [{{path: a.jsonl}}]}}, federation: {keys}}}\n")
    assert main(["federate", str(recipe), "--prepare"]) == 0
    assert calls[-1] == How(("fedavg", {"paper": "flora", "cap": 4}), 7, 4, ranks=(8, 2), delta=1e-3, central=False)
    words = ["--aggregator", "flora,hetlora", "--rounds", "2", "--fraction-train", "0.5", "--central", "--clip", "0.5", "--epsilon", "8"]
    assert main(["federate", str(recipe), "--prepare", *words]) == 0
    laid = How(({"paper": "flora", "cap": 4}, "hetlora"), 7, 2, fraction=0.5, ranks=(8, 2), clip=0.5, epsilon=8.0, delta=1e-3)
    assert calls[-1] == laid
