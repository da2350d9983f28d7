"""A whole job whose model is cut among two gloo ranks (FSDP2); what cannot be cut is refused before a plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

from safetensors.torch import load_file

import finebits as fb
from finebits.errors import Invalid
from finebits.plan.base import Plan, Spec
from finebits.recipe import Recipe
from finebits.run import several
from training.ranked import WORDS

ROOT = Path(__file__).parents[2]


def ran(*command: str) -> str:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FINEBITS_SHAPES": "off"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr[-4000:]
    return done.stderr


@pytest.mark.parametrize("steps", [4, pytest.param(2, marks=pytest.mark.every)])
def test_a_whole_job_goes_through_two_ranks(tmp_path: Path, steps: int) -> None:
    """Planned, started, trained, perhaps stopped and gone on with, and exported: losses and the exported adapter are those of one process."""
    said = ran("-m", "training.cut_job", str(tmp_path), str(steps), *WORDS)
    assert "each of 2 processes is predicted to hold" in said

    def losses(name: str) -> list[float]:
        lines = (tmp_path / name / "runs" / "zeros" / "events.jsonl").read_text().splitlines()
        return [e["loss"] for e in map(json.loads, lines) if e["event"] == "step"]

    assert losses("two") == pytest.approx(losses("one"), rel=1e-5) and len(losses("two")) == 4
    one, two = (load_file(tmp_path / name / "export" / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(float((one[k] - two[k]).norm() / one[k].norm()) < 1e-3 for k in one)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["finished"]


@pytest.mark.parametrize(
    ("wanted", "words", "said"),
    [
        (["rules=[lisa]", "adapter.paper=full"], WORDS[3:], "LISA changes which weights have gradients"),
        (["optim=galore", "adapter.paper=full"], WORDS, "the optimizer galore looks at whole tensors"),
        (["optim=sm3"], WORDS, "the optimizer sm3"),
        (["rules=[relora]", "adapter.paper=restarted"], WORDS, "ReLoRA looks at whole tensors"),
        (["adapter.paper=full", "candidates=[int8-b64-fp16]"], WORDS, "one whole matrix at a time"),
        (["adapter.paper=full", "model.dtype=bfloat16"], WORDS, "set model.dtype to float32"),
        (["optim={paper: galore, layerwise: true}", "adapter.paper=full", "max_grad_norm=0"], WORDS[3:], "cannot be averaged"),
        (["evaluation.compare=[qlora]"], WORDS[3:], "is trained in one process"),
    ],
)
def test_what_processes_cannot_do_together_is_said_before_a_plan(wanted: Sequence[str], words: Sequence[str], said: str) -> None:
    recipe = Recipe.parse(
        "model: {model_name_or_path: m}", overrides=[*wanted, *([] if "compare" in wanted[0] else ["evaluation.compare=[]"])]
    )
    with pytest.raises(Invalid, match=said):
        several.check(recipe, words)


def test_what_a_plan_has_chosen_is_looked_at_too() -> None:
    recipe = Recipe.parse("model: {model_name_or_path: m}", overrides=["adapter.paper=full", "evaluation.compare=[]"])
    several.check(recipe, WORDS)
    several.check(recipe, WORDS, Plan({"a": Spec(adapter=fb.Full())}))
    with pytest.raises(Invalid, match="one whole matrix at a time"):
        several.check(recipe, WORDS, Plan({"a": Spec(fb.Int(8), adapter=fb.Full())}))
    with pytest.raises(Invalid, match="set model.dtype to float32"):
        several.check(recipe, WORDS, Plan({"a": Spec(adapter=fb.Full())}, levers=fb.Levers(dtype="bfloat16")))
