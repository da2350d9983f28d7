"""Folders of PEFT whose tensors are none of an adapter: one sentence, where the base alone would answer, or nothing but NaN."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import finebits as fb

FILE = "adapter_model.safetensors"
A = "base_model.model.0.lora_A.weight"


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    over: Any = get_peft_model(net(), LoraConfig(r=2, lora_alpha=8, target_modules=["0"]))  # pyright: ignore[reportArgumentType]
    over.save_pretrained(tmp_path)
    return tmp_path


def nothing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {}


def codes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: (100 * t).to(torch.int8) for k, t in tensors.items()}


def infinite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {A: tensors[A].index_fill(0, torch.tensor([1]), torch.inf)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (nothing, "the file of a LORA adapter holds no tensor: the copy is not complete"),
        (codes, r"lora_[AB].weight holds codes \(int8\), whose scales are not there"),
        (infinite, rf"{A} holds inf at .1, 0.: a weight with NaN or Inf gives no number back"),
    ],
)
def test_tensors_that_are_none_of_an_adapter(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str) -> None:
    save_file(change(load_file(folder / FILE)), folder / FILE, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=says):
        fb.load_peft(folder, net())


def test_a_scale_that_is_not_said(folder: Path) -> None:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": None}))
    with pytest.raises(ValueError, match="lora_alpha is 'None' in adapter_config.json, and it is to be a number"):
        fb.load_peft(folder, net())
