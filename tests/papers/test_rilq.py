"""RILQ: its own objective, against double precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import finebits as fb
from finebits.refine.base import Matching


def test_the_loss_is_half_the_states_and_half_the_text() -> None:
    """0.5·MSE(h, ĥ) + 0.5·CE of the next word, and its gradient, over the positions that count."""
    ours, theirs = nn.Parameter(torch.randn(2, 7, 12)), torch.randn(2, 7, 12)
    H, words = torch.randn(30, 12), torch.randint(0, 30, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    task = Matching(
        lambda i: ours,
        lambda i: theirs,
        [ours],
        1,
        lambda i: mask,
        lambda h: h @ H.mT,
        lambda i, states: (states[:, :-1][mask[:, 1:]], words[:, 1:][mask[:, 1:]]),
    )
    h, t = ours.detach().double().requires_grad_(), theirs.double()
    rows = [(b, j) for b in range(2) for j in range(7) if mask[b, j]]
    square = sum((h[b, j] - t[b, j]).square().sum() for b, j in rows) / (12 * len(rows))
    follow = [(b, j) for b in range(2) for j in range(6) if mask[b, j + 1]]
    logits = h @ H.double().mT
    text = sum(logits[b, j].logsumexp(0) - logits[b, j, words[b, j + 1]] for b, j in follow) / len(follow)
    (0.5 * square + 0.5 * text).backward()  # type: ignore[union-attr]
    for truth, wanted in ((0.5, 0.5 * square + 0.5 * text), (0.0, square), (1.0, text)):
        value = fb.RILQ(truth=truth, chunk=4)._loss(task, 0)
        assert float(value.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)  # type: ignore[union-attr]
    fb.RILQ(chunk=4)._loss(task, 0).backward()
    torch.testing.assert_close(ours.grad.double(), h.grad, rtol=1e-4, atol=1e-6)


def test_it_needs_the_text_or_is_told_to_do_without() -> None:
    p = nn.Parameter(torch.randn(1, 3, 4))
    task = Matching(lambda i: p, lambda i: torch.zeros(1, 3, 4), [p], 1)
    with pytest.raises(ValueError, match="use truth=0"):
        fb.RILQ()(task)
    losses = fb.RILQ(epochs=20, lr=0.1, truth=0.0)(task)
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ValueError, match="from 0 to 1"):
        fb.RILQ(truth=1.5)
