"""Can a model train on packs? What its class says, asked before anything is planned; and what it does, tried on two rows before the first step.

A row of a pack must come out as it does alone. Positions that begin anew and the mask that transformers makes of them see to that in every model
of attention; a state that is handed from token to token (recurrence, convolution), positions that are counted by the model itself, and prompts
that stand before the first row alone do not.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from finebits.data.packing import Pack
from finebits.errors import Invalid
from finebits.evaluate.heldout import evaluating
from finebits.tasks.base import Task

FEW = 12  # tokens of a row that is tried
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}  # of the largest state
INSTEAD = "leave data.packing out"


class Unpackable(Invalid):
    """A model, or what is trained of it, lets the rows of a pack see each other."""

    code = 2


def packable(model: Any, adapter: Any) -> None:
    """Raises Unpackable where a model (perhaps without values) says that it cannot.

    >>> from transformers import MambaConfig, MambaForCausalLM
    >>> model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2))
    >>> packable(model, adapter=None)
    Traceback (most recent call last):
        ...
    finebits.interop.packed.Unpackable: data.packing needs attention alone, and MambaForCausalLM hands a state from token to token, across the
    rows of a pack: leave data.packing out
    """
    from finebits.tasks import base as tasks
    from finebits.tasks.causal_lm import CausalLM

    name = type(model).__name__
    if not isinstance(tasks.of(model), CausalLM):
        raise Unpackable(f"data.packing is for causal language models, and {name} is none: {INSTEAD}")
    if any(getattr(m, "_is_stateful", False) for m in model.modules()):
        raise Unpackable(
            f"data.packing needs attention alone, and {name} hands a state from token to token, across the rows of a pack: {INSTEAD}"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise Unpackable(f"data.packing begins positions anew with every row, and {name} counts them itself: {INSTEAD}")
    if getattr(adapter, "over", "") == "model":
        raise Unpackable(f"{type(adapter).__name__} stands before the first row of a pack, where the others do not see it: {INSTEAD}")


def try_packs(task: Task, model: Any, processor: Any, packs: Sequence[Mapping[str, Sequence[int]]]) -> None:
    """Raises Unpackable unless two short rows of these packs come out of this very model in a pack as they do alone. Nothing is
    tried where no pack holds two rows."""
    pack = next((p for p in packs if len(p["segments"]) > 1), None)
    if pack is None:
        return
    cut, at = list[list[int]](), 0
    for n in list(pack["segments"])[:2]:
        cut.append(list(pack["input_ids"][at : at + min(n, FEW)]))
        at += n
    one, two = cut
    learned = lambda ids: vars(Pack(ids, ids, [len(ids)]))  # noqa: E731
    device = next(model.parameters()).device
    with evaluating(model):
        states = [
            task.states(model, {k: v.to(device) for k, v in task.batch([p], processor).items()})[0].float()
            for p in (vars(Pack(one + two, one + two, [len(one), len(two)])), learned(one), learned(two))
        ]
    together, alone = states[0], torch.cat(states[1:])
    off = float((together - alone).abs().max() / alone.abs().max().clamp_min(1e-30))
    if not off <= CLOSE.get(next(model.parameters()).dtype, 6e-2):
        raise Unpackable(
            f"{type(model).__name__} gives the rows of a pack other states than it gives them alone (by {off:.1%} of the largest), so that "
            f"one sees the other: {INSTEAD}"
        )
