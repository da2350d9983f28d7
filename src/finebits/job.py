"""The main job, verb by verb. Each verb reads the recipe and what earlier verbs wrote to output_dir; whatever holds a model runs in a process
of its own (finebits.run)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finebits.data.check import Check
from finebits.errors import Invalid, NoRun
from finebits.export.base import VerificationFailed
from finebits.files import ours, write_json, write_text
from finebits.interop import hub
from finebits.messages import explain
from finebits.plan.base import Plan
from finebits.progress import Progress
from finebits.recipe import Recipe
from finebits.recipe.rows import rows_of
from finebits.recipe.settings import Settings
from finebits.report.results import failed as failing
from finebits.report.text import evaluation_table
from finebits.run import grid, looking, several
from finebits.run.ahead import ahead, speed
from finebits.run.material import Material, gated, stored, tokenized
from finebits.run.plans import followed, priced, probed
from finebits.run.ready import ready, roomy
from finebits.run.results import evaluation, parts_of
from finebits.run.session import about, data, working
from finebits.run.source import Source, Subject
from finebits.run.stage import LORA16, QLORA, Stage, StageFailed, made_by, main_run, recorded, runs, work
from finebits.runfolder import (
    COMPARISON,
    DATA,
    EXPORT,
    EXPORTED,
    FULL,
    HEAD,
    MARKS,
    MODEL,
    PAGE,
    PLAN,
    PROBE,
    RECIPE,
    SCORES,
    STARTED,
    RunFolder,
)

if TYPE_CHECKING:
    from finebits.run.evaluating import Asked


def plan(recipe: Recipe, out: Path | None = None, pareto: int = 0, fast: bool = False, probe: bool = False) -> Plan:
    """Choose the bits; write the plan with its recipe, or beside a run that has its own. `pareto` also solves that many budgets from the
    smallest that fits upwards; `probe` trains the worst batches once and plans again with what was measured."""
    folder = RunFolder(recipe.output_dir)
    if out is not None:
        ours(out, MARKS[PLAN])
    else:
        folder.ours(PLAN, PROBE, RECIPE)
    measured = None
    if probe or (recipe.data.datasets and not fast):
        source = Source.of(recipe)
        material = tokenized(source)
        chosen = priced(recipe, (material.train, material.held), pareto)
        if probe:
            chosen, measured = probed(recipe, chosen, material, pareto)
        for line in ahead(recipe.settled(chosen), chosen, material, source.model.task).lines(speed(chosen.levers)):
            Progress("").say(line)
    else:
        Subject.of(recipe, config_only=True)  # which raises where the task is another
        chosen = priced(recipe, None, pareto, fast)
    chosen.save(out or folder.plan_path(chosen))
    if out is None and not folder.holds():
        write_text(folder / RECIPE, HEAD + recipe.to_yaml())
    if measured is not None and not folder.holds():
        write_json(folder / PROBE, measured)
    return chosen


def what_fits(recipe: Recipe, models: Sequence[str], fast: bool = False) -> list[Any]:
    """What each model could be within the recipe's budget and settings, the best buy first: rows of finebits.plan.compare."""
    from finebits.interop.planning import compare

    assert recipe.budget.memory is not None
    data = rows_of(recipe)[0] if recipe.data.datasets and not fast else None
    return compare(recipe.budget.memory, models, Settings.of(recipe), Progress("pricing"), fast, data)


def check(recipe: Recipe) -> Check:
    """The data gate over training and held-out rows. Writes data.json, where no run has its own; raises GateFailed (exit code 4)."""
    return _gated(Source.of(recipe), RunFolder(recipe.output_dir))[0]


def check_rows(recipe: Recipe) -> Check:
    """The data gate over rows alone, without a run: none is held out, and nothing is written. Raises GateFailed (exit code 4)."""
    return looking.checked(recipe)


def stats(recipe: Recipe) -> dict[str, Any]:
    """Figures of the training rows: lengths, what is trained, what cutting and packing would do, rows that say the same."""
    return looking.figures(recipe)


def convert(recipe: Recipe, to: str, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the training rows in another form. Raises Occupied (exit code 2) where there is a file, but for `overwrite`."""
    return looking.convert(recipe, to, out, overwrite)


def split(recipe: Recipe, share: float | None = None, folder: Path | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the records of the training rows in two parts that share nothing. Raises Occupied (exit code 2) as `convert` does."""
    return looking.split(recipe, share, folder, overwrite)


def _gated(source: Source, folder: RunFolder) -> tuple[Check, Material]:
    def saw(checked: Check) -> None:
        folder.ours(DATA)
        if not folder.holds():
            write_json(folder / DATA, checked.to_json())

    return gated(source, saw)


def train(
    recipe: Recipe,
    plan_path: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
    max_steps: int | None = None,
    overwrite: bool = False,
    launch: Sequence[str] = (),
    like: Sequence[Path] = (),
) -> None:
    """The whole way: gate, plan, every start, every run, evaluation, export, verification, page. `max_steps` cuts the runs short; `launch` are
    words of accelerate, which then starts the processes that train. A run that is
    in the folder is gone on with (`resume`), also further than it was to go, or cleared away (`overwrite`), or set aside if it is finished;
    else the folder is refused. The unquantized model's scores and the starts of runs are taken over from the output folders of `like` that
    hold just these."""
    from finebits.interop.arguments import check_arguments

    begun = time.time()
    check_arguments(recipe.training.model_dump())
    if launch:
        several.check(recipe, launch)
    folder, say = RunFolder(recipe.output_dir), Progress("").say
    ready(recipe)
    if recipe.export.push_to_hub:
        hub.check(recipe.export.to, recipe.export.hub_model_id, recipe.export.verify)
    if max_steps is not None:
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": max_steps})})
    with folder.locked():
        source = Source.of(recipe)
        model, data_hash = source.model, source.hash
        if not folder.claim(recorded(recipe), data_hash, resume, overwrite):
            say(f"{folder} holds this run, finished: nothing is left to do")
            return
        gate, material = _gated(source, folder)
        read = data(source)
        del source
        if QLORA in recipe.evaluation.compare:
            from finebits.interop import peers

            peers.check(model.task)
        chosen = followed(recipe, model, material, plan_path, folder / PLAN if resume else None)
        settled = recipe.settled(chosen)
        if launch:
            several.check(settled, launch, chosen)
        if gate.packed is not None:
            say(gate.packing)
        say(chosen.summary().replace("\n", "\n "))
        if launch and (told := several.held(chosen, launch)):
            say(told)
        if not resume:  # which has written some of it
            roomy(settled, chosen)
        if overwrite and not dry_run:
            folder.clear()
        elif not resume and not dry_run and folder.holds():
            say(f"the finished run that was in {folder} is in {folder.set_aside()} now")
        if not (dry_run and folder.holds()):
            write_text(folder / RECIPE, HEAD + recipe.to_yaml())
            write_json(folder / DATA, gate.to_json())
            chosen.save(folder / PLAN)
        if dry_run:
            for line in ahead(settled, chosen, material, model.task).lines(speed(chosen.levers)):
                say(line)
            return
        material.save(folder)
        parts = made_by(settled, chosen, data_hash)
        folder.begin(recorded(recipe), data_hash, chosen, parts, about(recipe, model, read, chosen) | {"template_sha": gate.template_sha})
        with working(folder, begun, main_run(settled)):
            _made(settled, chosen, folder, parts, model, begun, resume, overwrite, launch, like)
        say(f"wrote {report(folder.path)}")


def _made(
    settled: Recipe,
    chosen: Plan,
    folder: RunFolder,
    parts: dict[str, str],
    model: Subject,
    begun: float,
    resume: bool,
    overwrite: bool,
    launch: Sequence[str],
    like: Sequence[Path],
) -> None:
    """Make every part that is not there, and what is told of them."""
    own, failed, say = main_run(settled), dict[str, StageFailed](), Progress("").say

    def make(stage: Stage) -> None:
        """Make a part that is not there. A comparison that fails costs nothing but itself."""
        made_of = parts[stage.part]
        if folder.has(stage.part, made_of) or stage.run in failed:
            return
        if stage.kind in ("full", "start") and any(folder.adopt(RunFolder(other), stage.part, made_of) for other in like):
            say(f"{stage.part}: taken over from another run, which made the same")
            return
        try:
            work(folder, stage)
        except StageFailed as e:
            if stage.run in (own, FULL):
                raise
            failed[stage.run] = e
            say(f"{e}; the job goes on without it")
        else:
            folder.done(stage.part, made_of)

    left = [name for name in runs(settled) if not folder.has(name, parts[name])]
    if settled.evaluation.full_precision:
        make(Stage("full", FULL, measured=True))
    for name in left:
        if name != LORA16:
            make(Stage("start", name, measured=name == own))
    if left:
        say(evaluation_table(evaluation(settled, folder, parts, model.task)).replace("\n", "\n "))
        say(f"starts measured after {clock(time.time() - begun)}")
    for name in left:
        make(Stage("tune", name, measured=name == own, resume=resume, launch=tuple(launch), device=chosen.levers.device))
    exported = _export(settled, folder, parts, tuple(settled.export.to), None, overwrite) if settled.export.to else {"targets": []}
    say(evaluation_table(evaluation(settled, folder, parts, model.task)).replace("\n", "\n "))
    say(f"all of it after {clock(time.time() - begun)}")
    for e in failed.values():
        say(f"wrote {report(folder.path)}")
        raise StageFailed(f"{e}; all else is there, and --resume tries it again", e.code)
    if wrong := failing(exported):
        raise VerificationFailed(f"{', '.join(wrong)}: not the model that was trained; {folder / EXPORTED} has the figures", exported)
    folder.finish()


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60} min {int(seconds) % 60} s" if seconds >= 60 else f"{seconds:.0f} s"


def sweep(
    base: Recipe, cells: Sequence[grid.Cell], load: Callable[[list[str]], Recipe], limit: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Train a recipe in every cell of a grid, at most `limit` of them now: one that is there, finished, is kept, one that was stopped is gone on
    with, one that fails is a row of the table. Plans and starts that two cells have in common are made once. `load` makes a recipe of
    overrides. Writes sweep.json after every cell."""
    place, named = Path(base.output_dir) / grid.FOLDER, grid.recipes(base, cells, load)
    ours(place / grid.RECORD, grid.SCHEMA)
    say, said, trained = Progress("").say, dict[str, str](), 0
    for i, (name, recipe) in enumerate(named.items()):
        folder, goes_on = RunFolder(recipe.output_dir), grid.same(recipe)
        if (goes_on and folder.record()["finished"] and not overwrite) or (limit is not None and trained >= limit):
            continue
        trained += 1
        say(f"cell {i + 1} of {len(named)}: {name}")
        before = [r for n, r in named.items() if n != name and grid.same(r)]
        resume = goes_on and not overwrite
        try:
            plan = None if resume else grid.plan_of(recipe, before)
            train(recipe, plan, resume, overwrite=overwrite, like=[Path(r.output_dir) for r in before])
        except Exception as e:  # the others are worth as much as before
            said[name] = explain(e).text
            say(f"{name} failed: {said[name]}")
        write_json(place / grid.RECORD, grid.table(named, cells, said))
    result = grid.table(named, cells, said)
    write_json(place / grid.RECORD, result)
    return result


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """evaluation.json from the scores that the runs left, with intervals and paired differences."""
    folder = RunFolder(recipe.output_dir)
    with folder.locked():
        source = Source.of(recipe)
        parts = parts_of(recipe, folder, source.hash)
        return evaluation(recipe.settled(Plan.load(folder / PLAN)), folder, parts, source.model.task)


def measure(what: str, asked: Asked, recipe: Recipe | None = None) -> tuple[dict[str, Any], Path | None]:
    """(what `finebits eval` measures anew, where it was written): of a run, a model, an export; on the rows that `recipe` holds out, where that
    is given and `asked` names no file."""
    from finebits.run.evaluating import evaluate as anew

    return anew(what, asked, rows_of(recipe)[1] if recipe is not None and asked.data is None else None)


def same_rows(recipe: Recipe) -> bool:
    """Are the rows that a recipe holds out those that the run in its folder is scored on?"""
    return RunFolder(recipe.output_dir).record().get("data") in (None, Source.of(recipe).hash)


def export(recipe: Recipe, to: Sequence[str] | None = None, verify: bool | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the targets of the recipe's own run, rounded once more where the recipe says so (export.requantize), and compare what the stock
    libraries load with what was trained, or rounded. A target's folder that holds another's files is replaced only with `overwrite`. Runtimes
    that serve a target are asked in the environments that the recipe names; where `verify` is said here, also in those that lie in this folder.
    Gives export.json; what is another model has the verdict "fail" there.
    """
    begun, folder = time.time(), RunFolder(recipe.output_dir)
    with folder.locked():
        source = Source.of(recipe)
        parts = parts_of(recipe, folder, source.hash)  # before anything is written into another's folder
        stored(source, folder)
        settled = recipe.settled(Plan.load(folder / PLAN))
        with working(folder, begun):
            return _export(settled, folder, parts, tuple(to or recipe.export.to), verify, overwrite)


def _export(
    recipe: Recipe, folder: RunFolder, parts: dict[str, str], to: tuple[str, ...], verify: bool | None, overwrite: bool
) -> dict[str, Any]:
    from finebits.export import base as exports
    from finebits.interop.runtimes.base import found

    main = main_run(recipe)
    if not folder.has(main, parts[main]):
        raise Invalid(f"{folder} holds no trained model yet: run finebits train first")
    how = recipe.requantize_value()
    exports.check_all(Plan.load(folder / PLAN), to, how)
    others = []
    if folder.has(EXPORT, parts[EXPORT]):  # targets of the same model that were written before
        others = [t for t in json.loads((folder / EXPORTED).read_text(encoding="utf-8"))["targets"] if t["name"] not in to]
    anew = None if how is None else how.to_json()
    checked = recipe.export.verify if verify is None else verify
    pythons = found(recipe.export.runtimes.model_dump(), beside=verify is True) if checked else {}
    named = hub.check(to, recipe.export.hub_model_id, checked) if recipe.export.push_to_hub else {}
    bases = {target: hub.base_name(target, name) for target, name in named.items()}
    stage = Stage(
        "export",
        EXPORT,
        measured=True,
        to=to,
        verify=checked,
        overwrite=overwrite,
        requantize=anew,
        runtimes=pythons,
        rows=recipe.export.rows,
        tolerance=recipe.export.tolerance,
        importance=recipe.export.importance,
        bases=bases,
    )
    work(folder, stage)
    exported = json.loads((folder / EXPORTED).read_text(encoding="utf-8"))
    exported["targets"] = others + exported["targets"]
    write_json(folder / EXPORTED, exported)
    folder.done(EXPORT, parts[EXPORT])
    for row in exported["targets"]:
        if row["name"] in named and failing({"targets": [row]}):
            Progress("").say(f"{row['name']}: not pushed, since it is not the model that was trained")
        elif row["name"] in named:
            row["hub"] = hub.push(Path(row["path"]), row["name"], named[row["name"]], recipe.export.hub_private_repo)
            Progress("").say(f"{row['name']}: pushed to {row['hub']['url']}")
            write_json(folder / EXPORTED, exported)
            folder.done(EXPORT, parts[EXPORT])
    return exported


def recover(
    tuned: Path,
    out: Path,
    pruned: str | None = None,
    model: str | None = None,
    score: bool = True,
    formats: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the adapter that a run (or PEFT) trained on a pruned model as one of the whole model. A run's is scored on its held-out rows, over
    the whole model as it is and in each of these number formats."""
    from finebits.interop.recovering import recover as write
    from finebits.run import recovered

    if not (tuned / RECIPE).exists():
        if formats:
            raise Invalid(
                f"{tuned} is no output_dir of a run, so there are no held-out rows to score a quantized model on: leave --quantize out"
            )
        return recovered.told(write(tuned, out, pruned=pruned, model=model, overwrite=overwrite), out, [])
    folder = RunFolder(tuned)
    with folder.locked():
        run = folder.run(main_run(Recipe.load(folder / RECIPE)))
        if not (run / SCORES).exists():
            raise Invalid(f"{folder} holds no trained model yet: run finebits train first")
        manifest = write(run / MODEL, out, start=run / STARTED, pruned=pruned, model=model, overwrite=overwrite)
        losses = recovered.losses(folder, run, out, formats) if score else []
    return recovered.told(manifest, out, losses)


def report(folder: Path, out: Path | None = None) -> Path:
    """One page of all that the folder holds."""
    from finebits.report.page import run_page

    folder = _shown(folder)
    return _written(out or folder / PAGE, run_page(folder))


def compare(folders: Sequence[Path], out: Path | None = None) -> Path:
    """One page of several runs; where nothing else is said, in the folder that holds them all."""
    from finebits.report.compare import page

    shown = page([_shown(folder) for folder in folders])
    return _written(out or Path(os.path.commonpath([Path(f).resolve() for f in folders])) / COMPARISON, shown)


def _shown(folder: Path) -> Path:
    if not (folder / PLAN).exists():
        raise NoRun.of(folder)
    return folder


def _written(out: Path, page: str) -> Path:
    ours(out, MARKS[PAGE])
    write_text(out, page)
    return out
