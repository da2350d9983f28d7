"""What a job's model is tuned for."""

from __future__ import annotations

from finebits.recipe import Recipe
from finebits.tasks import base as tasks
from finebits.tasks.base import Task


def task_of(recipe: Recipe) -> Task:
    """The task of the recipe's model. Raises WrongTask where the recipe names another."""
    from finebits.interop.checkpoint import config_of
    from finebits.interop.hf import folder_of

    config = config_of(folder_of(recipe.model.model_name_or_path, recipe.model.model_revision, config_only=True))
    tasks.agree(recipe.task, config)
    return tasks.of(config)
