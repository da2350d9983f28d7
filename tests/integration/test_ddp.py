"""Built models on two gloo ranks against one process: DistributedDataParallel, fully_shard, and our trainer. One pair of ranks for all."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def found(plain: Callable[..., str]) -> dict[str, Any]:
    return json.loads(plain("integration/ranks.py", "fsdp", "ddp", "places", "trainer", "rules").splitlines()[-1])


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
