"""Tasks of the package lm-eval on a model that is loaded here, through its own HFLM, and what each of their rows scored, so that two models are
compared row by row. Nothing is fetched but what a task itself names: a folder of tasks over local files needs no network.

A task file may name Python functions of its folder, which lm-eval imports: only folders that the user names are read.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finebits.errors import Invalid

INSTALL = "pip install lm_eval"


def check(tasks: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's manager of tasks, before any model is loaded. Raises Invalid where the package, the folder or a task is not there."""
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise Invalid(f"--tasks runs tasks of the package lm-eval, which is not installed here: {INSTALL}") from e
    if folder is not None and not folder.is_dir():
        raise Invalid(f"--tasks-folder is {folder}, and there is no such folder: give one that holds lm-eval's task files (NAME.yaml)")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager: Any = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    for name in tasks:
        if name not in manager.all_tasks:
            there = ", ".join(sorted(manager.all_tasks)[:8]) if folder is not None else "lm-eval ls tasks shows them"
            raise Invalid(f"there is no task {name}{f' in {folder}' if folder is not None else ''} ({there or 'there is none at all'})")
    return manager


def rows(
    manager: Any,
    tasks: Sequence[str],
    model: Any,
    processor: Any,
    limit: int | None = None,
    batch: int = 4,
    chat: bool = False,
    max_length: int | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """{task: {metric: what each of its rows scored}} of a transformers model. Metrics that are no number of a row (of a corpus) are left out."""
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    device = str(next(p.device for p in model.parameters()))
    theirs = HFLM(pretrained=model, tokenizer=processor, backend="causal", batch_size=batch, device=device, max_length=max_length)
    made: Any = simple_evaluate(
        theirs,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=chat,
        verbosity="ERROR",
    )
    return {task: metrics(samples) for task, samples in made["samples"].items()}


def metrics(samples: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """By metric what every row scored, in the order of the rows; of rows that went through several filters, each filter by its name.

    >>> made = metrics([{"doc_id": 1, "metrics": ["acc"], "acc": 0.0}, {"doc_id": 0, "metrics": ["acc"], "acc": 1.0}])
    >>> made["acc"]
    array([1., 0.])
    """
    filters = dict.fromkeys(str(s.get("filter", "none")) for s in samples)
    found: dict[str, np.ndarray] = {}
    for name in filters:
        of = sorted((s for s in samples if str(s.get("filter", "none")) == name), key=lambda s: s["doc_id"])
        for metric in of[0]["metrics"]:
            if all(isinstance(s.get(metric), int | float) for s in of):
                label = metric if len(filters) == 1 else f"{metric} ({name})"
                found[label] = np.array([float(s[metric]) for s in of])
    return found
