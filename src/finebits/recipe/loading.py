"""A recipe from a file or a text, with overrides laid over it; every mistake is reported at its line, all of them at once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finebits import registry
from finebits.recipe.keys.adapter import Adapter
from finebits.recipe.methods import Named
from finebits.recipe.mistakes import explain, suggest
from finebits.recipe.overrides import lay
from finebits.recipe.schema import sections
from finebits.recipe.source import Dumper, Keypath, Problem, RecipeError, Source, Tree, dotted


class Recipe(Named):
    """A whole recipe. `Recipe.load` reads one from a file; its parts are plain values."""

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe at `path` with `overrides` ("training.learning_rate=1e-4") laid over it.

        Raises RecipeError with every mistake found.

        >>> Recipe.load("/nowhere.yaml")
        Traceback (most recent call last):
            ...
        finebits.recipe.source.RecipeError: there is no recipe at /nowhere.yaml
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (FileNotFoundError, NotADirectoryError):
            raise RecipeError([Problem(f"there is no recipe at {path}")]) from None
        except IsADirectoryError:
            raise RecipeError([Problem(f"{path} is a folder, and a recipe is a YAML file")]) from None
        except UnicodeDecodeError:
            raise RecipeError([Problem(f"{path} is not text in UTF-8, so it is no recipe")]) from None
        except OSError as e:
            raise RecipeError([Problem(f"the recipe {str(path)[:80]} cannot be read ({e.strerror})")]) from None
        return cls.parse(text, str(path), overrides)

    @classmethod
    def parse(cls, text: str, name: str = "recipe", overrides: Sequence[str] = (), where: str = "command line") -> Recipe:
        """The same from a text; in messages `name` stands for the file, and `where` for the place that overrides were written at.

        >>> recipe = Recipe.parse("model: {model_name_or_path: m}", overrides=["rank=8", "budget.memory=400MiB"])
        >>> recipe.adapter.rank, recipe.budget.total, recipe.data.max_length
        (8, 419430400, 1024)
        >>> Recipe.parse("model: {model_name_or_path: m, model_revison: main}")
        Traceback (most recent call last):
            ...
        finebits.recipe.source.RecipeError: recipe:1:32   model.model_revison is not a known key
             1 | model: {model_name_or_path: m, model_revison: main}
               |                                ^^^^^^^^^^^^^ did you mean model_revision?
        """
        tree = Tree.read(Source(name, text))
        tree.data = {k: v for k, v in tree.data.items() if not (v is None and k in sections())}  # all its keys are commented out
        for override in overrides:
            lay(tree, override, where)
        if tree.problems:
            raise RecipeError(tree.problems)
        try:
            recipe = cls.model_validate(tree.data)
        except ValidationError as e:
            raise RecipeError(explain(e, tree)) from None
        problems = [problem for path, check in recipe.checks() for problem in _try(path, check, tree)]
        if problems:
            raise RecipeError(problems)
        return recipe.shipped()

    def to_yaml(self) -> str:
        """Every key with its value; `Recipe.parse` gives the same recipe back.

        >>> recipe = Recipe.parse("model: {model_name_or_path: m}")
        >>> Recipe.parse(recipe.to_yaml()) == recipe
        True
        """
        return yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=140)


def _try(path: Keypath, check: Callable[[], Any], tree: Tree) -> list[Problem]:
    """The problem, if any, of one method value."""
    try:
        check()
    except ValueError as e:
        key = getattr(e, "key", None)
        if path == ("adapter",) and key == "paper":
            return []  # reported at adapter.paper
        if path == ("adapter",) and key == "scaling" and (*path, key) not in tree.keys:
            key = "use_rslora"
        spellings = [s for s in ({"rank": ["rank", "r"], "alpha": ["alpha", "lora_alpha"]}.get(str(key)) or [key])]
        place = next((tree.keys[(*path, s)] for s in spellings if s is not None and (*path, s) in tree.keys), None)
        if path == ("adapter",) and place is not None and "has no setting" in str(e) and key not in Adapter.model_fields:
            return [Problem(f"adapter.{key} is not a known key", place, suggest((*path, str(key)), _settings(tree)))]
        if path[:2] in (("quantization", "overrides"), ("quantization", "locks")):
            place = place or tree.keys.get(path)
        return [Problem(f"{dotted(path)}: {e}", place or tree.at(path) or tree.keys.get(path))]
    return []


def _settings(tree: Tree) -> list[str]:
    """The settings of the adapter that a recipe names."""
    paper = tree.data.get("adapter", {}).get("paper", Adapter.model_fields["paper"].default)
    return list(inspect.signature(registry.load("adapters", paper)).parameters)
