"""What of a trainer's arguments is looked at before anything that takes long: schedules and trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from finebits.errors import WrongUse


def check_arguments(training: Mapping[str, Any]) -> None:
    """Raises WrongUse where the schedule lacks a setting or does not know one, or a tracker is not installed or unknown.

    >>> check_arguments({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 0.5}, "report_to": "none"})
    """
    check_schedule(training["lr_scheduler_type"], training["lr_scheduler_kwargs"])
    check_trackers(training["report_to"])


def check_schedule(name: str, settings: Mapping[str, Any]) -> None:
    """Raises WrongUse where transformers cannot make the schedule of these settings."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=10, scheduler_specific_kwargs=dict(settings))
    except (TypeError, ValueError) as e:
        raise WrongUse(f"training.lr_scheduler_kwargs of {name} are {dict(settings)}, and no such schedule can be made: {e}") from None


def check_trackers(report_to: str | list[str]) -> None:
    """Raises WrongUse where transformers does not know a tracker, or the tracker's library is not there.

    >>> check_trackers(["none"])
    >>> check_trackers("wandv")
    Traceback (most recent call last):
        ...
    finebits.errors.WrongUse: training.report_to names wandv, which transformers does not know: did you mean wandb?
    """
    import difflib

    from transformers.integrations import integration_utils

    known = integration_utils.INTEGRATION_TO_CALLBACK
    names = [report_to] if isinstance(report_to, str) else report_to
    for name in names:
        if name in ("none", "all"):
            continue
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise WrongUse(
                f"training.report_to names {name}, which transformers does not know: "
                + (f"did you mean {near[0]}?" if near else f"it knows {', '.join(sorted(known))}")
            )
        there = getattr(integration_utils, f"is_{name}_available", None)
        found = there() if there is not None else importlib.util.find_spec(name) is not None
        if not found:
            raise WrongUse(f"training.report_to names {name}, which is not installed: pip install {name}, or set report_to to none")
