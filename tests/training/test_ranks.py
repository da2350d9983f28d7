"""Two gloo ranks, which words of accelerate start, train as one process with all their rows: whole models, under our trainer, torch's
DistributedDataParallel and `fully_shard`; and models that are cut (FSDP2). One pair of ranks for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from training import cut_ranks, ranked
from variants import methods

ROOT = Path(__file__).parents[2]
START = "import sys; from finebits.interop.launching import launch; sys.exit(launch(sys.argv[1:3], 'cpu', sys.argv[3:], 'training.ranked'))"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Two gloo ranks of two rows, and one process of four."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FINEBITS_SHAPES": "off"}
    command = [sys.executable, "-c", START, "--num_processes", "2", str(two)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr[-4000:]
    alone = {"launched": ranked.run(one / "launched", 4), "cut": {"runs": cut_ranks.run(one / "cut", 4)}}
    return json.loads((two / "found.json").read_text()), alone


@pytest.mark.parametrize("name", ["plain", "kto"])
def test_two_ranks_are_one_process_with_twice_the_rows(both: tuple[Any, Any], name: str) -> None:
    two, one = (found["launched"][name] for found in both)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5) and len(two["losses"]) == 3
    assert two["evals"] == pytest.approx(one["evals"], abs=1e-4)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-4)
    assert two["saved"] == one["saved"] == ["checkpoint-3"]


@pytest.fixture(scope="module")
def found(both: tuple[Any, Any]) -> dict[str, Any]:
    return both[0]["plain"]


def test_two_ranks_train_like_one_process(found: dict[str, Any]) -> None:
    ddp = found["ddp"]
    assert ddp["equal on ranks"] and ddp["base untouched"] and ddp["falls"]
    assert ddp["gradients"] < 1e-6 and ddp["losses"] < 1e-5 and ddp["parameters"] < 1e-5


def test_adapters_over_what_is_no_matrix_get_the_gradients_of_both_ranks(found: dict[str, Any]) -> None:
    assert found["places"].keys() == {"feed_forward", "attention", "model"}
    assert all(off is not None and off < 1e-5 for off in found["places"].values())


def test_shards_train_like_one_process_and_give_the_whole_state(found: dict[str, Any]) -> None:
    """Each rank has half of the packed weights."""
    fsdp = found["fsdp"]
    assert fsdp["gradients"] < 1e-6 and fsdp["losses"] < 1e-5 and fsdp["parameters"] < 1e-5
    assert fsdp["share"] == 0.5
    assert fsdp["full"] is True and fsdp["full parameters"] < 1e-5


def test_the_trainer_on_two_ranks_is_the_plain_loop_over_both_their_rows(found: dict[str, Any]) -> None:
    """And the loss never has all logits at a time there either."""
    trainer = found["trainer"]
    assert trainer["wrapped"] == "DistributedDataParallel" and trainer["falls"] and trainer["tokens"] and trainer["written"] == 3
    assert trainer["logits"] <= 3 and trainer["losses"] < 1e-5 and trainer["parameters"] < 1e-4


def test_rules_with_state_are_the_same_on_two_ranks_and_in_the_plain_loop(found: dict[str, Any]) -> None:
    rules = found["rules"]
    assert rules["equal on ranks"] and rules["opened"] and rules["some"] == 7
    assert rules["losses"] < 1e-5 and rules["parameters"] < 2e-3  # a reserve's gradients are as small as Adam's ε


@pytest.mark.parametrize("name", ["lora", "again", "passes", "kto", "full", "lion", "sgd"])
def test_two_ranks_with_a_part_each_are_one_process_with_all(both: tuple[Any, Any], name: str) -> None:
    """Adapters over codes under three rules, gone on with from a checkpoint, in several passes, on judged answers; dense weights themselves."""
    two, one = (found["cut"]["runs"][name] for found in both)
    assert two["around"] == "FSDPSharded" and len(two["losses"]) == (2 if name == "again" else 3)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5) and two["evals"] == pytest.approx(one["evals"], rel=1e-4)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4) and two["norms"]
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-5)
    assert two["saved"] == one["saved"]


def test_each_rank_holds_half_of_the_blocks(both: tuple[Any, Any]) -> None:
    """Of codes, adapters and dense weights alike; and half of what the optimizer keeps, but for its count of steps."""
    for name in ("lora", "full"):
        two, one = (found["cut"]["runs"][name] for found in both)
        assert one["bytes"][0] == 0 and sum(one["bytes"]) == 2 * two["bytes"][0] + two["bytes"][1] and two["bytes"][0] > 5000
        assert two["state"] / one["state"] == pytest.approx(0.5, abs=0.02)


def test_adapters_get_the_gradients_of_all_rows(both: tuple[Any, Any]) -> None:
    """Over weights in codes, of which some have an odd number of rows, so that they stay whole; over dense ones, and over what is no matrix."""
    found = both[0]["cut"]["gradients"] | both[0]["cut"]["places"]
    assert {"odd", "table", "feed_forward", "attention", "model"} < found.keys() and len(found) == 5 + sum(
        kind.over == "matrix" for kind in (cls() for cls in methods("adapters"))
    )
    assert {k: v for k, v in found.items() if v is None or not v < 1e-4} == {}
