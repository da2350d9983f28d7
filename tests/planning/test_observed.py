"""What is seen of a model's blocks does not depend on whether shapes were asked for before."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import finebits as fb
from architectures import MORE, folder
from finebits.interop import observed, tally
from finebits.interop.selecting import meta, targets

KINDS = ("llama", "gpt_oss", *(pytest.param(kind, marks=pytest.mark.every) for kind in ("deepseek_v3", "mamba", "mpt", "rwkv")))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_that_are_known_are_those_that_torch_gives(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = meta(folder(tmp_path / "m", kind, MORE[kind]))
    monkeypatch.setattr(observed, "LEAST", (8,))

    def look() -> object:
        monkeypatch.setattr(observed, "_seen", {})
        return observed.observed(shell, targets(shell, "all-linear"), fb.LoRA(rank=4), torch.float32, 32, 0.1)

    told = look()
    monkeypatch.setattr(tally, "_made", lambda func, args, kwargs: func(*args, **kwargs))
    assert told == look()
