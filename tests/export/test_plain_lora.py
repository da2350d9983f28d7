"""Every adapter that is a product is a plain LoRA to stock PEFT, of the rank that its update has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import finebits as fb
import tiny_llama as tiny
from finebits.build import all_hosts
from finebits.evaluate.exact import float32
from finebits.interop.peft import export, stock
from variants import methods

PRODUCTS = [cls for cls in methods("adapters") if cls().form == "product"]
RANKS = {"GraLoRA": 8, "Restarted": 16}  # of four: those of four blocks of two, and three more that are finished


def exported(model: Any, folder: Path) -> tuple[int, float]:
    """(rank, largest difference of a logit to stock PEFT's)."""
    with float32(model):
        wanted = tiny.logits(model)
    export(model, folder, "adapter")
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["peft_type"] == "LORA" and said["lora_alpha"] == said["r"] and said["init_lora_weights"] is True
    return said["r"], float((tiny.logits(stock(folder, "adapter")) - wanted).abs().max())


@pytest.mark.parametrize("cls", PRODUCTS, ids=lambda cls: cls.__name__)
def test_it_is_a_lora_of_its_rank(cls: Any, tmp_path: Path) -> None:
    model = tiny.tuned(tiny.plan(replace(cls(), rank=4), init=fb.Zeros()))
    rank, difference = exported(model, tmp_path / "x")
    assert rank == RANKS.get(cls.__name__, 4) and difference < 1e-4


def test_what_a_start_took_out_of_codes_doubles_the_rank(tmp_path: Path) -> None:
    """A base that is quantized already stays as it is, and what the start moved lies beside it: 2r."""
    bare = fb.build(tiny.fresh(), fb.Plan({n: fb.Spec(fb.NF(4, block=32)) for n in tiny.names()}))
    model = tiny.tuned(tiny.plan(fb.LoRA(rank=3), fb.NF(4, block=32), fb.PiSSA()), bare)
    rank, difference = exported(model, tmp_path / "x")
    assert rank == 6 and difference < 1e-4


@pytest.mark.parametrize("cls", [fb.Gated, fb.S2LoRA], ids=lambda cls: cls.__name__)
def test_closed_gates_are_no_rank(cls: Any, tmp_path: Path) -> None:
    model = tiny.tuned(tiny.plan(replace(cls(), rank=5), init=fb.Zeros()))
    for i, (_, host) in enumerate(all_hosts(model)):
        host.tensors("default")["gate"].data[: 2 + i % 3] = 0
    rank, difference = exported(model, tmp_path / "x")
    assert rank == 3 and difference < 1e-4  # of the module that has most
