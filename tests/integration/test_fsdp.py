"""fully_shard over a built model: two gloo ranks, each with half of the packed weights, against one process."""

from __future__ import annotations

import json
from collections.abc import Callable


def test_two_ranks_train_like_one_process_and_give_the_whole_state(plain: Callable[..., str]) -> None:
    found = json.loads(plain("integration/ranks.py", "fsdp").splitlines()[-1])
    assert found["gradients"] < 1e-6 and found["losses"] < 1e-5 and found["parameters"] < 1e-5
    assert found["share"] == 0.5
    assert found["full"] is True and found["full parameters"] < 1e-5
