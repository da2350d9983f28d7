"""Stages of a job: which there are, what each depends on, and the process that makes one."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from finebits import process
from finebits.errors import Failed
from finebits.meter import HUGE, MALLOC
from finebits.plan.base import Plan
from finebits.progress import Progress, elsewhere
from finebits.recipe import Recipe
from finebits.runfolder import EXPORT, FULL, RunFolder, digest

LORA16, QLORA = "lora16", "qlora"  # compared runs that do not follow the plan


class StageFailed(Failed):
    """A process of the job failed; its own message was shown."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Stage:
    """What one process of a job makes: the scores of the unquantized model (full), the start of a run, the tuned run, the exports, or a probe.
    `run` names the folder among the runs that it writes to. `measured` runs it under the allocator settings that make memory follow the
    arithmetic, at about twice the page faults.

    >>> Stage.read(Stage("start", "qera", measured=True).text).part
    'qera/start'
    """

    kind: Literal["full", "start", "tune", "export", "probe"]
    run: str
    measured: bool = False
    resume: bool = False  # of a tuned run: from its last checkpoint
    to: tuple[str, ...] = ()  # of an export: its targets,
    verify: bool = False  # are they loaded and compared,
    overwrite: bool = False  # and may they replace what others wrote?
    launch: tuple[str, ...] = ()  # words of accelerate, which starts the processes of a tuned run
    device: str = "cpu"  # that these train on
    requantize: dict[str, Any] | None = None  # how those that hold codes are rounded once more, as data
    runtimes: dict[str, str] = field(default_factory=dict)  # {what serves exports: the python of its environment}
    rows: int = 8  # held-out rows that verification looks at,
    tolerance: float = 1e-3  # and the largest difference of a logit at which an export passes
    importance: bool = False  # do columns count by their inputs where weights are rounded for GGUF?
    bases: dict[str, str] = field(default_factory=dict)  # {target: what its adapter calls its base}; else the folder where that lies

    @property
    def part(self) -> str:
        """Its name in the record of the folder."""
        return f"{self.run}/start" if self.kind == "start" else self.run

    @property
    def text(self) -> str:
        """As the process is told."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Stage:
        """The stage of a `text`."""
        fields = json.loads(text)
        return cls(**fields | {k: tuple(fields[k]) for k in ("to", "launch")})


def main_run(recipe: Recipe) -> str:
    """The name of the recipe's own run: how its adapter starts."""
    return "continued" if recipe.adapter.folder is not None else type(recipe.init_value()).__module__.rsplit(".", 1)[-1]


def runs(recipe: Recipe) -> list[str]:
    """The runs of a recipe, its own first."""
    return [main_run(recipe), *(c for c in recipe.evaluation.compare if c != main_run(recipe))]


def recorded(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a run's record holds it."""
    return json.loads(json.dumps(recipe.model_dump(mode="json")))


def made_by(recipe: Recipe, plan: Plan, rows: str) -> dict[str, str]:
    """Every part of the recipe's job, and a hash of all that it depends on."""
    sections = recorded(recipe)
    data = {k: sections["data"][k] for k in ("max_length", "assistant_only_loss")}
    evaluation = {k: v for k, v in sections["evaluation"].items() if k != "compare"}
    packed = [sections["data"]["packing"]] if recipe.data.packing else []
    parts = {FULL: digest(FULL, plan.hash, rows, data, evaluation)}
    for name in runs(recipe):
        parts[f"{name}/start"] = digest("start", name, parts[FULL])
        parts[name] = digest("tuned", parts[f"{name}/start"], sections["training"], sections["rules"], *packed)
    parts[EXPORT] = digest(EXPORT, parts[main_run(recipe)])
    return parts


def work(folder: RunFolder, stage: Stage) -> None:
    """Make a stage in a process of its own, or in as many as its words of accelerate say, and wait for it. A wish to stop (Ctrl-C, SIGTERM, a
    hang-up) reaches it too: it saves and stops."""
    Progress("").say(f"{stage.run}: in {'processes' if stage.launch else 'a process'} of its own")
    module, more = ("finebits.run.launch", [stage.device, *stage.launch]) if stage.launch else ("finebits.run", [])
    env = os.environ | ((MALLOC | (HUGE if stage.kind == "start" else {})) if stage.measured else {})
    with elsewhere():
        code = process.run(module, [str(folder), stage.text, *more], env, folder.handles)
    if code == process.INTERRUPTED or -code in process.STOPS:
        raise KeyboardInterrupt
    if code == -9:
        raise StageFailed(f"{stage.run} was killed by the system, most likely for want of memory", 5)
    if code:
        raise StageFailed(f"{stage.run} failed", code if code > 0 else 1)
