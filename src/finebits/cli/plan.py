"""Choose the bits of every matrix of one model, or compare models within one amount of memory."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from finebits.cli._recipe import File, Words, read
from finebits.cli._screen import Screen

ORDER = 10


def plan(
    context: typer.Context,
    words: Words = None,
    recipe: File = None,
    out: Annotated[
        Path | None, typer.Option(help="Where to write the plan; output_dir/plan.json if not given.", show_default=False)
    ] = None,
    pareto: Annotated[
        int | None, typer.Option(min=0, help="Also solve this many budgets (24), for the curve of memory against loss.", show_default=False)
    ] = None,
    fast: Annotated[bool, typer.Option("--fast", help="From the model's config alone, without its weights.")] = False,
    objective: Annotated[
        str | None, typer.Option(help="weight, output, fisher or kl; else the recipe's quantization.objective.", show_default=False)
    ] = None,
    lock: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYER=FORMAT", help="A module (or the end of its name, or a pattern with *) and its format, or dense."),
    ] = None,
    serve_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="A second budget: what the tuned model may take as it is saved.", show_default=False)
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Train the worst batches once, and plan with the memory that they took.")] = False,
    what_fits: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Compare models within this budget instead: name them in place of a recipe.", show_default=False),
    ] = None,
) -> None:
    """Choose the bits of every matrix for the budget. Nothing is trained."""
    screen: Screen = context.obj
    if what_fits is not None:
        one = {"--objective": objective, "--lock": lock, "--serve-budget": serve_budget, "--probe": probe, "--out": out, "--pareto": pareto}
        named = [word for word, value in one.items() if value]
        if named:
            raise typer.BadParameter(f"--what-fits compares models and {named[0]} is about one of them: leave one of the two out")
        return _what_fits(screen, what_fits, words or [], recipe, fast)
    if probe and fast:
        raise typer.BadParameter("--probe trains the model and --fast does not read it: choose one")
    more = [f"quantization.objective={objective}"] if objective is not None else []
    more += [f"budget.serve_memory={serve_budget}"] if serve_budget is not None else []
    r = read(words, recipe, [*more, *(_lock(text) for text in lock or [])])

    with screen.working():
        from finebits import job

        planned = job.plan(r, out, 24 if pareto is None else pareto, fast, probe)
    from finebits.runfolder import RunFolder

    path = out or RunFolder(r.output_dir).plan_path(planned)

    def human() -> str:
        from finebits.report.tables import pareto_table
        from finebits.report.text import plan_summary

        curve = f"\n{pareto_table(planned).text(screen.colour)}" if pareto else ""
        return f"{plan_summary(planned, screen.colour)}{curve}\nwrote {path}{_next(r.output_dir, path, fast)}"

    screen.show(planned.to_json(), human, str(path))


def _next(folder: str, path: Path, fast: bool) -> str:
    """What to do with a plan that lies beside its recipe; one from typical errors alone is made again by the run."""
    from finebits.runfolder import PLAN

    if path != Path(folder, PLAN):
        return ""
    return f"\nNext: finebits train {shlex.quote(folder)}" + ("" if fast else f" --plan {shlex.quote(str(path))}")


def _lock(text: str) -> str:
    """LAYER=FORMAT as an override of the recipe."""
    layer, sign, format = text.partition("=")
    if not (layer and sign and format):
        raise typer.BadParameter(f"a lock is written LAYER=FORMAT, such as down_proj=nf4-b64 or layers.0.*=dense, and {text!r} came")
    return f"quantization.locks.{layer}={'null' if format == 'dense' else format}"


def _what_fits(screen: Screen, budget: str, words: list[str], file: Path | None, fast: bool) -> None:
    from dataclasses import asdict

    from finebits.recipe import Recipe

    models, more = [w for w in words if "=" not in w], [w for w in words if "=" in w]
    if not models:
        raise typer.BadParameter("--what-fits wants the models to compare: folders, hub ids, .gguf files or package:NAME")
    changes = [*more, f"budget.memory={json.dumps(budget)}", f"model.model_name_or_path={json.dumps(models[0])}"]
    r = Recipe.load(file, changes) if file is not None else Recipe.parse("recipe: 1", "command line", changes)

    with screen.working():
        from finebits import job

        offers = job.what_fits(r, models, fast)

    def human() -> str:
        from finebits.plan.compare import verdict
        from finebits.recipe.settings import device
        from finebits.report.text import buys_table

        return buys_table(offers, verdict(offers), r.budget.total or 0, device(r), screen.colour)

    best = [o.model for o in offers if o.effective is not None][:1]
    screen.code = 0 if best else 3
    screen.show([asdict(o) for o in offers], human, "".join(best), "finebits.what_fits/1")
    if screen.code:
        raise typer.Exit(screen.code)
