"""A model that is cut among two gloo ranks (FSDP2) trains as one process with all their rows; what cannot be cut is refused before a plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")

from safetensors.torch import load_file

import finebits as fb
from finebits.errors import Invalid
from finebits.plan.base import Plan, Spec
from finebits.recipe import Recipe
from finebits.run import several
from training.cut_ranks import run
from variants import methods

ROOT = Path(__file__).parents[2]
START = (
    "import sys; from finebits.interop.launching import launch; sys.exit(launch(sys.argv[2:], 'cpu', sys.argv[1:2], 'training.cut_ranks'))"
)
WORDS = ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "2"]


def ran(*command: str) -> str:
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "FINEBITS_SHAPES": "off"}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=600)
    assert not done.returncode, done.stderr[-4000:]
    return done.stderr


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Two gloo ranks of two rows, and one process of four."""
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    ran("-c", START, str(two), *WORDS)
    return json.loads((two / "found.json").read_text()), run(one, 4)


@pytest.mark.parametrize("name", ["lora", "again", "passes", "kto", "full", "lion", "sgd"])
def test_two_ranks_with_a_part_each_are_one_process_with_all(both: tuple[Any, Any], name: str) -> None:
    """Adapters over codes under three rules, gone on with from a checkpoint, in several passes, on judged answers; dense weights themselves."""
    two, one = both[0]["runs"][name], both[1][name]
    assert two["around"] == "FSDPSharded" and len(two["losses"]) == (2 if name == "again" else 3)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5) and two["evals"] == pytest.approx(one["evals"], rel=1e-4)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-4) and two["norms"]
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-5)
    assert two["saved"] == one["saved"]


def test_each_rank_holds_half_of_the_blocks(both: tuple[Any, Any]) -> None:
    """Of codes, adapters and dense weights alike; and half of what the optimizer keeps, but for its count of steps."""
    for name in ("lora", "full"):
        two, one = both[0]["runs"][name], both[1][name]
        assert one["bytes"][0] == 0 and sum(one["bytes"]) == 2 * two["bytes"][0] + two["bytes"][1] and two["bytes"][0] > 5000
        assert two["state"] / one["state"] == pytest.approx(0.5, abs=0.02)


def test_adapters_get_the_gradients_of_all_rows(both: tuple[Any, Any]) -> None:
    """Over weights in codes, of which some have an odd number of rows, so that they stay whole; over dense ones, and over what is no matrix."""
    found = both[0]["gradients"] | both[0]["places"]
    assert {"odd", "table", "feed_forward", "attention", "model"} < found.keys() and len(found) == 5 + sum(
        kind.over == "matrix" for kind in (cls() for cls in methods("adapters"))
    )
    assert {k: v for k, v in found.items() if v is None or not v < 1e-4} == {}


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
