"""A teacher scored on its own states: the same loss as by a pass of its own, no divergence."""

from __future__ import annotations

import numpy as np
import pytest

from finebits.evaluate.heldout import own, score, teacher
from tiny_llama import batches, fresh


def test_own_scores_are_those_of_a_pass() -> None:
    import torch

    model, rows = fresh(), batches()
    made = teacher(model, rows, dtype=torch.float32)
    held, passed = own(made, rows, chunk=5), score(model, rows, made, chunk=7)
    assert held.nll == pytest.approx(passed.nll, rel=1e-5) and np.array_equal(held.tokens, passed.tokens)
    assert held.kl is not None and held.kl == pytest.approx(np.zeros(6), abs=1e-9) and np.array_equal(held.agree, held.tokens)
