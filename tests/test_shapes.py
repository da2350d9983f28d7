"""The checker of signatures that the tests run under checks."""

from __future__ import annotations

import os

import jaxtyping
import pytest
import torch

import finebits as fb
from finebits.losses import chunked_cross_entropy

pytestmark = pytest.mark.skipif(os.environ.get("FINEBITS_SHAPES") == "off", reason="shapes are not checked here")
STATES, WEIGHT, LABELS = torch.randn(2, 3, 4), torch.randn(7, 4), torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_a_dimension_has_one_size_in_a_call() -> None:
    chunked_cross_entropy(STATES, WEIGHT, LABELS, 2)
    for wrong in ((STATES, torch.randn(7, 5), LABELS), (STATES, WEIGHT, LABELS[:, :2]), (STATES[0], WEIGHT, LABELS)):
        with pytest.raises(jaxtyping.TypeCheckError):
            chunked_cross_entropy(*wrong, 2)
    chunked_cross_entropy(STATES[:, :2, :3], WEIGHT[:, :3], LABELS[:, :2], 2)  # and another in the next


def test_fields_of_dataclasses_have_types() -> None:
    assert fb.LoRA(rank=2, alpha=4).alpha == 4  # an int is a float
    with pytest.raises(jaxtyping.TypeCheckError):
        fb.LoRA(rank="two")  # type: ignore[arg-type]


@pytest.mark.usefixtures("unchecked")
def test_a_test_of_our_own_errors_does_without() -> None:
    with pytest.raises(TypeError, match="not supported between"):
        fb.LoRA(rank="two")  # type: ignore[arg-type]
