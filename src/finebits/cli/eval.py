"""Score models: a run again, or anything on any rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finebits.cli._recipe import File, a_folder, a_model, a_recipe, read, some_rows
from finebits.cli._screen import Screen

if TYPE_CHECKING:
    from finebits.recipe import Recipe

ORDER = 40
Several = list[str] | None


def evaluate(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|RECIPE|MODEL [SECTION.KEY=VALUE]",
            help="A run's folder or its recipe (then values to lay over it), or a model, an export, or a folder of PEFT.",
            show_default=False,
        ),
    ] = None,
    recipe: File = None,
    data: Annotated[Path | None, typer.Option(metavar="FILE", help="Rows to score; else those that the run held out.")] = None,
    adapter: Annotated[Several, typer.Option(metavar="FOLDER", help="A folder of PEFT over the model; may be repeated.")] = None,
    also: Annotated[Several, typer.Option(metavar="MODEL", help="Another model, export or folder of PEFT on the same rows.")] = None,
    against: Annotated[str | None, typer.Option(metavar="RUN", help="Another run, row by row.", show_default=False)] = None,
    exports: Annotated[bool, typer.Option("--exports/--no-exports", help="Score the run's exports too.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="So many rows, questions, or rows of a task.", show_default=False)] = None,
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens of a row; else the run's, or 1024.", show_default=False)] = None,
    forgetting: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|python", help="A text of another kind, before and after; python: its language reference.", show_default=False
        ),
    ] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Let the models answer the rows, and compare with the references.")] = False,
    match: Annotated[str, typer.Option(metavar="HOW", help="exact, contains, number (the last), or regex:PATTERN.")] = "exact",
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION", help="Your function of (rows, answers) that gives each 0 to 1; it is run.", show_default=False
        ),
    ] = None,
    suite: Annotated[Several, typer.Option(metavar="NAME", help="spam, spam:FILE, or a task of reasoning-gym (gsm_symbolic).")] = None,
    tasks: Annotated[str | None, typer.Option(metavar="NAME,...", help="Tasks of lm-eval.", show_default=False)] = None,
    tasks_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            help="Its task files are read instead of lm-eval's own; Python that they name is run.",
            show_default=False,
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 4,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the figures go; else into the run's evaluations.")] = None,
) -> None:
    """Loss, perplexity, KL and agreement; own answers; tasks. Of a run as it is, or of any model on any rows.

    A run's recipe alone shows the run's own table again. All else is measured anew, row by row, and written beside that table.
    """
    screen: Screen = context.obj
    words = list(words or [])
    what = None if recipe is not None or not words else words[0]
    a_recipe(recipe, what)
    a_model(what, against, *(also or ()))
    a_folder(*(adapter or ()))
    some_rows(data)
    named: Recipe | None = None
    if what is None or what.endswith((".yaml", ".yml")):
        named = read(words, recipe)
        what = str(recipe or what)
    elif len(words) > 1:
        raise typer.BadParameter(f"{words[1]}: values are laid over a recipe, and {what} is none; --data names other rows")
    listed = tuple(name for name in (tasks or "").split(",") if name)
    more = (data, adapter, also, against, limit, forgetting, generate, suite, listed, out)
    with screen.working():
        from finebits import job
        from finebits.run.evaluating import Asked

        if named is not None and not any(more) and job.same_rows(named):
            return _again(screen, named)
        asked = Asked(
            data,
            tuple(adapter or ()),
            tuple(also or ()),
            against,
            exports,
            limit,
            max_length,
            forgetting,
            generate,
            match,
            judge,
            tuple(suite or ()),
            listed,
            tasks_folder,
            max_new_tokens,
            batch,
            out,
        )
        if named is not None:
            what = named.output_dir
        result, path = job.measure(str(what), asked, named if named is not None and not job.same_rows(named) else None)

    def human() -> str:
        from finebits.report.text import columns, measured_anew

        written = "" if path is None else f"\n wrote {path}"
        return measured_anew(result, screen.colour, columns()) + written

    screen.show(result, human, "" if path is None else str(path), "finebits.evaluation/1")


def _again(screen: Screen, recipe: Recipe) -> None:
    """The run's own table, from the scores that it left."""
    from finebits import job
    from finebits.runfolder import EVALUATION

    evaluation = job.evaluate(recipe)

    def human() -> str:
        from finebits.report.text import columns, evaluation_table

        return evaluation_table(evaluation, screen.colour, columns())

    screen.show(evaluation, human, str(Path(recipe.output_dir) / EVALUATION), "finebits.evaluation/1")
