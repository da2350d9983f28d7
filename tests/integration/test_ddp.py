"""Plain DistributedDataParallel over a built model: two gloo ranks against one process."""

from __future__ import annotations

import json
from collections.abc import Callable


def test_two_ranks_train_like_one_process(plain: Callable[..., str]) -> None:
    found = json.loads(plain("integration/ranks.py", "ddp").splitlines()[-1])
    assert found["equal on ranks"] and found["base untouched"] and found["falls"]
    assert found["gradients"] < 1e-6 and found["losses"] < 1e-5 and found["parameters"] < 1e-5


def test_the_trainer_on_two_ranks_is_the_plain_loop_over_both_their_rows(plain: Callable[..., str]) -> None:
    """And the loss never has all logits at a time there either."""
    found = json.loads(plain("integration/ranks.py", "trainer").splitlines()[-1])
    assert found["wrapped"] == "DistributedDataParallel" and found["falls"] and found["tokens"] and found["written"] == 3
    assert found["logits"] <= 3 and found["losses"] < 1e-5 and found["parameters"] < 1e-4


def test_rules_with_state_are_the_same_on_two_ranks_and_in_the_plain_loop(plain: Callable[..., str]) -> None:
    found = json.loads(plain("integration/ranks.py", "rules").splitlines()[-1])
    assert found["equal on ranks"] and found["opened"] and found["some"] == 7
    assert found["losses"] < 1e-5 and found["parameters"] < 2e-3  # a reserve's gradients are as small as Adam's ε
