"""An encoder becomes a classifier: a stock folder, whose head is the best one over the encoder's states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import finebits as fb
from classifiers import encoder
from finebits.data.rows import DataError
from finebits.interop.fitted_head import fitted


def test_the_head_is_at_the_minimum_of_its_loss() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(60, 5) * torch.tensor([1.0, 3.0, 0.1, 1.0, 2.0]) + 1, torch.randint(0, 3, (60,))
    W, b = fitted(x, y, 3, 0.1)
    spread, mean = x.double().std(0), x.double().mean(0)
    w = (W * spread).requires_grad_()  # as it was fitted: over standardized states
    c = (b + W @ mean).requires_grad_()
    loss = F.cross_entropy((x.double() - mean) / spread @ w.mT + c, y) + 0.05 * w.square().sum()
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, [w, c])) < 1e-5


def test_an_encoder_becomes_a_stock_classifier(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

    folder = encoder(tmp_path / "m")
    BertModel.from_pretrained(folder).save_pretrained(folder)
    words = "now at noon free money".split() * 4
    rows: list[dict[str, Any]] = [{"text": f"{('meet', 'win')[i % 2]} {w}", "label": ("ham", "spam")[i % 2]} for i, w in enumerate(words)]
    made = fb.classifier(folder, rows, tmp_path / "c", max_length=16)
    model: Any = AutoModelForSequenceClassification.from_pretrained(made)
    tokenizer: Any = AutoTokenizer.from_pretrained(made)
    given = tokenizer([r["text"] for r in rows], return_tensors="pt", padding=True)
    found = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits.argmax(-1)
    assert [model.config.id2label[int(k)] for k in found] == [r["label"] for r in rows]
    with pytest.raises(ValueError, match="1 different"):
        fb.classifier(folder, rows[::2], tmp_path / "d")


def test_what_makes_no_classifier_is_told(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "m")
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}]
    with pytest.raises(DataError, match="holds 1 different label: give rows of two or more") as caught:
        fb.classifier(folder, rows, tmp_path / "c")
    assert caught.value.code == 4
    rows[0]["label"] = "y"
    for wrong in ({"max_length": 0}, {"penalty": -1.0}, {"penalty": float("nan")}):
        with pytest.raises(ValueError, match="max_length is at least 2 and penalty at least 0"):
            fb.classifier(folder, rows, tmp_path / "c", **wrong)
