"""Plain DistributedDataParallel over a built model: two gloo ranks against one process."""

from __future__ import annotations

import json
from collections.abc import Callable


def test_two_ranks_train_like_one_process(plain: Callable[..., str]) -> None:
    found = json.loads(plain("integration/ranks.py", "ddp").splitlines()[-1])
    assert found["equal on ranks"] and found["base untouched"] and found["falls"]
    assert found["gradients"] < 1e-6 and found["losses"] < 1e-5 and found["parameters"] < 1e-5
