"""What every process of a job has at hand."""

from __future__ import annotations

import gc
import json
import logging
import time
from typing import Any

from finebits import runfolder
from finebits.process import first
from finebits.progress import Progress
from finebits.recipe import Recipe
from finebits.run.material import Material
from finebits.run.source import Subject
from finebits.run.stage import Stage, main_run
from finebits.runfolder import RunFolder


class Part:
    """The recipe, the plan, rows to train on, held-out batches, and a meter that was started before any model existed."""

    def __init__(self, folder: RunFolder, stage: Stage) -> None:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel package that nothing here uses
        import datasets  # noqa: F401  # imported before the baseline is taken, like all that a run needs
        import numpy  # noqa: F401
        import torch
        import trl  # noqa: F401

        from finebits.interop import feeding, trainer  # noqa: F401
        from finebits.interop.hf import checked_folder
        from finebits.meter import Meter
        from finebits.plan.base import Plan

        self.folder, self.name = folder, stage.run
        self.run = self.folder.run(stage.run)
        self.run.mkdir(parents=True, exist_ok=True)
        self.plan = Plan.load(self.folder / runfolder.PLAN)
        self.recipe = Recipe.load(self.folder / runfolder.RECIPE).settled(self.plan)
        self.model_folder = checked_folder(self.plan)
        subject = Subject(self.model_folder)
        self.task, self.processor = subject.task, subject.processor
        self.material = Material.load(self.folder)
        size = self.recipe.evaluation.per_device_eval_batch_size
        self.batches = self.material.batches(self.task, self.processor, size, self.plan.levers.rounding)
        self.units = self.material.units(self.recipe.data)
        self.examples = feeding.dataset(vars(e) for e in self.units) if stage.kind in ("tune", "probe") else None
        gc.collect()
        warm()
        device = self.plan.levers.device
        self.meter = Meter(device if device == "cpu" or torch.cuda.is_available() else "cpu", self.note)  # loading says that there is none
        self.progress = Progress(stage.run, quiet=not first())

    @property
    def own(self) -> bool:
        """Is this the run that follows the plan as it is?"""
        return self.name == main_run(self.recipe)

    def phase(self, name: str) -> None:
        """Say what comes next, and note it as an event."""
        quiet = not first()
        self.progress = Progress(f"{self.name}: {name}", quiet, baseline=self.meter.baseline or 0, budget=self.plan.budget)
        self.note(event="phase", name=name, **({} if self.meter.baseline is None else {"baseline": self.meter.baseline}))

    def note(self, **event: Any) -> None:
        """One more line of the run's events; the first process alone writes."""
        if first():
            with (self.run / runfolder.EVENTS).open("a", encoding="utf-8") as f:
                f.write(json.dumps({"t": time.time(), **event}) + "\n")

    def scores(self, model: Any, file: str, what: str) -> None:
        """Score a model on the held-out rows against the full-precision model's states."""
        from finebits.evaluate.heldout import score
        from finebits.run import scores
        from finebits.train import sound

        self.phase(what)
        made = score(model, self.batches, self.teacher(model), chunk=self.plan.levers.loss_chunk)
        sound("the loss", f"{self.name}, {what}", [made.loss])
        scores.write(self.run / file, made)
        kl = "" if made.kl is None else f", KL {made.kl.sum() / made.tokens.sum():.4f}"
        self.progress.say(f"{self.name}: {what}: loss {made.loss:.4f}{kl}")

    def teacher(self, model: Any) -> Any:
        """The full-precision model's final states, from its own part, with its head: that of `model`, or read again where the plan has
        quantized it. None where the recipe leaves it out."""
        from finebits.evaluate.heldout import Teacher, head_of
        from finebits.interop.hf import dense_head

        if not self.recipe.evaluation.full_precision:
            return None
        return Teacher(head_of(dense_head(model, self.model_folder)), self.folder.run(runfolder.FULL) / runfolder.STATES, self.task)

    def room(self, phase: str) -> int | None:
        """Bytes of the budget that a phase leaves; None where there is no budget."""
        return None if self.plan.budget is None else max(self.plan.budget - self.plan.rows.get(phase, 0), 0)

    def samples(self, model: Any) -> list[str]:
        """What the model answers to the prompts."""
        from finebits.interop.tokenizer import stops_of
        from finebits.meter import trim

        trim()  # the room is what the plan leaves, not what scoring has freed and the process still holds
        stops = stops_of(self.model_folder, self.processor) if model.can_generate() else []
        return self.task.answers(model, self.material.prompts, self.processor, stops, self.room("eval"))


def plan_for(part: Part) -> Any:
    """The plan of this run: the recipe's own, the same bits started at zero, or the same adapters over unquantized weights."""
    from finebits.init.loftq import LoftQ
    from finebits.init.zeros import Zeros

    if part.own:
        return part.plan
    starts = {"zeros": Zeros(), "loftq": LoftQ()}
    return part.plan.with_start(starts[part.name]) if part.name in starts else part.plan.unquantized()


def warm() -> None:
    """Make the math library allocate what it keeps for good, so that it counts as the process and not as the run."""
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(64, 64, dtype=dtype, requires_grad=True)
        torch.nn.functional.linear(x, x).sum().backward()
