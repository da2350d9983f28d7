"""The main job, verb by verb. Each verb reads the recipe and what earlier verbs wrote to output_dir; whatever holds a model runs in a process
of its own (finebits.run)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finebits.data.check import Check
from finebits.errors import Invalid
from finebits.files import ours, write_json, write_text
from finebits.plan.base import Plan
from finebits.progress import Progress
from finebits.recipe import Recipe
from finebits.recipe.rows import rows_of
from finebits.recipe.settings import Settings
from finebits.report.text import evaluation_table
from finebits.run.material import Material, gated, stored, tokenized
from finebits.run.plans import followed, priced, probed
from finebits.run.results import evaluation, parts_of
from finebits.run.source import Source, Subject
from finebits.run.stage import LORA16, QLORA, Stage, StageFailed, made_by, main_run, recorded, runs, work
from finebits.runfolder import DATA, EXPORT, EXPORTED, FULL, HEAD, MARKS, MODEL, PAGE, PLAN, PROBE, RECIPE, SCORES, STARTED, RunFolder

TUNED = "tuned"  # what a run's own adapter is called where it is served beside others


def plan(recipe: Recipe, out: Path | None = None, pareto: int = 0, fast: bool = False, probe: bool = False) -> Plan:
    """Choose the bits; write the plan, beside a run that has its own. `pareto` also solves that many budgets from the smallest that fits
    upwards; `probe` trains the worst batches once and plans again with what was measured."""
    folder = RunFolder(recipe.output_dir)
    if out is not None:
        ours(out, MARKS[PLAN])
    else:
        folder.ours(PLAN, PROBE)
    measured = None
    if probe:
        material = tokenized(Source.of(recipe))
        chosen, measured = probed(recipe, priced(recipe, (material.train, material.held), pareto), material, pareto)
    elif recipe.data.datasets and not fast:
        chosen = priced(recipe, Source.of(recipe).rows, pareto)
    else:
        Subject.of(recipe, config_only=True)  # which raises where the task is another
        chosen = priced(recipe, None, pareto, fast)
    chosen.save(out or folder.plan_path(chosen))
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
) -> None:
    """The whole way: gate, plan, every start, every run, evaluation, export, verification, page. `max_steps` cuts the runs short. A run that is
    in the folder is gone on with (`resume`), also further than it was to go, or cleared away (`overwrite`), or set aside if it is finished;
    else the folder is refused."""
    begun = time.monotonic()
    folder, say = RunFolder(recipe.output_dir), Progress("").say
    if max_steps is not None:
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"max_steps": max_steps})})
    with folder.locked():
        source = Source.of(recipe)
        model, data_hash = source.model, source.hash
        if not folder.claim(recorded(recipe), data_hash, resume, overwrite):
            say(f"{folder} holds this run, finished: nothing is left to do")
            return
        gate, material = _gated(source, folder)
        del source
        if QLORA in recipe.evaluation.compare:
            from finebits.interop import peers

            peers.check(model.task)
        chosen = followed(recipe, model, material, plan_path, folder / PLAN if resume else None)
        settled = recipe.settled(chosen)
        say(chosen.summary().replace("\n", "\n "))
        if overwrite and not dry_run:
            folder.clear()
        elif not resume and not dry_run and folder.holds():
            say(f"the finished run that was in {folder} is in {folder.set_aside()} now")
        if not (dry_run and folder.holds()):
            write_text(folder / RECIPE, HEAD + recipe.to_yaml())
            write_json(folder / DATA, gate.to_json())
            chosen.save(folder / PLAN)
        if dry_run:
            return
        material.save(folder)
        parts = made_by(settled, chosen, data_hash)
        folder.begin(recorded(recipe), data_hash, chosen, parts)

        own, failed = main_run(settled), dict[str, StageFailed]()

        def make(stage: Stage) -> None:
            """Make a part that is not there. A comparison that fails costs nothing but itself."""
            made_of = parts[stage.part]
            if folder.has(stage.part, made_of) or stage.run in failed:
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
        if recipe.evaluation.full_precision:
            make(Stage("full", FULL, measured=True))
        for name in left:
            if name != LORA16:
                make(Stage("start", name, measured=name == own))
        if left:
            say(evaluation_table(evaluation(settled, folder, parts, model.task)).replace("\n", "\n "))
            say(f"starts measured after {clock(time.monotonic() - begun)}")
        for name in left:
            make(Stage("tune", name, measured=name == own, resume=resume))
        if recipe.export.to:
            _export(settled, folder, parts, tuple(recipe.export.to), recipe.export.verify, overwrite)
        say(evaluation_table(evaluation(settled, folder, parts, model.task)).replace("\n", "\n "))
        say(f"all of it after {clock(time.monotonic() - begun)}")
        say(f"wrote {report(folder.path)}")
        for e in failed.values():
            raise StageFailed(f"{e}; all else is there, and --resume tries it again", e.code)
        folder.finish()


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60} min {int(seconds) % 60} s" if seconds >= 60 else f"{seconds:.0f} s"


def evaluate(recipe: Recipe) -> dict[str, Any]:
    """evaluation.json from the scores that the runs left, with intervals and paired differences."""
    folder = RunFolder(recipe.output_dir)
    with folder.locked():
        source = Source.of(recipe)
        parts = parts_of(recipe, folder, source.hash)
        return evaluation(recipe.settled(Plan.load(folder / PLAN)), folder, parts, source.model.task)


def export(recipe: Recipe, to: Sequence[str] | None = None, verify: bool | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the targets of the recipe's own run, rounded once more where the recipe says so (export.requantize), and compare what the stock
    libraries load with what was trained, or rounded. A target's folder that holds another's files is replaced only with `overwrite`."""
    folder = RunFolder(recipe.output_dir)
    with folder.locked():
        source = Source.of(recipe)
        parts = parts_of(recipe, folder, source.hash)  # before anything is written into another's folder
        stored(source, folder)
        settled = recipe.settled(Plan.load(folder / PLAN))
        return _export(settled, folder, parts, tuple(to or recipe.export.to), recipe.export.verify if verify is None else verify, overwrite)


def _export(recipe: Recipe, folder: RunFolder, parts: dict[str, str], to: tuple[str, ...], verify: bool, overwrite: bool) -> dict[str, Any]:
    from finebits.export import base as exports

    main = main_run(recipe)
    if not folder.has(main, parts[main]):
        raise Invalid(f"{folder} holds no trained model yet: run finebits train first")
    how = recipe.requantize_value()
    exports.check_all(Plan.load(folder / PLAN), to, how)
    others = []
    if folder.has(EXPORT, parts[EXPORT]):  # targets of the same model that were written before
        others = [t for t in json.loads((folder / EXPORTED).read_text())["targets"] if t["name"] not in to]
    anew = None if how is None else how.to_json()
    work(folder, Stage("export", EXPORT, measured=True, to=to, verify=verify, overwrite=overwrite, requantize=anew))
    exported = json.loads((folder / EXPORTED).read_text())
    exported["targets"] = others + exported["targets"]
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


def served(
    what: str,
    adapters: Path | None = None,
    keys: Path | None = None,
    limits: Any = None,
    max_rank: int = 128,
    format: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Any:
    """The application that answers for a run, a folder that `save` wrote or a model, and for every adapter in a folder of them. Raises
    ValueError for all that is wrong before anything listens; adapters that cannot be served are said and left out."""
    from finebits.interop.quantizer import format_for
    from finebits.interop.serving import Reader
    from finebits.interop.serving import served as loaded
    from finebits.serve.engine import Engine, Limits
    from finebits.serve.http import Served, app
    from finebits.serve.tenants import Tenants

    tenants, place = Tenants.read(keys), Path(what)
    if adapters is not None and not adapters.is_dir():
        raise Invalid(f"there is no folder of adapters at {adapters}: give the folder whose folders are adapters")
    if (place / RECIPE).is_file():
        place = RunFolder(place).run(main_run(Recipe.load(place / RECIPE))) / MODEL
        if not place.is_dir():
            raise Invalid(f"{what} holds no trained model yet: run finebits train first")
    it = loaded(place if place.exists() else what, format_for(format))
    name = Path(what).resolve().name if Path(what).exists() else what.removeprefix("package:")
    read, engine = Reader(it, max_rank), Engine(it.base, limits or Limits())
    own = it.own
    if own is not None:
        tenants.give(TUNED, engine.register(lambda: own, pinned=True))
    for folder in sorted(p for p in adapters.iterdir() if p.is_dir() and not p.name.startswith(".")) if adapters is not None else ():
        if folder.name in (TUNED, name):
            raise Invalid(f"{folder} has the name of what is served itself: rename it")
        try:
            tenants.give(folder.name, engine.register(read.marked(folder)))
        except (Invalid, OSError) as e:
            say(f"{folder.name} is not served: {e}")
    return app(Served(name, engine, it.tokenizer, it.stops, tenants, adapters, read.marked))


def report(folder: Path, out: Path | None = None) -> Path:
    """One page of all that the folder holds."""
    from finebits.report.page import run_page

    folder = Path(folder)
    if not (folder / PLAN).exists():
        raise Invalid(f"{folder} holds no {PLAN}, so it is no run of finebits: give the output_dir of a recipe")
    out = out or folder / PAGE
    ours(out, MARKS[PAGE])
    write_text(out, run_page(folder))
    return out
