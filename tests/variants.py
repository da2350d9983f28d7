"""What the laws loop over: every method of a folder, in every variant that its fields allow."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from finebits import registry
from finebits.formats.base import STORES, Format
from finebits.quantizers.base import Quantizer
from finebits.stats.base import Statistic

BLOCKS = (16, 21, 64, 4096)


def methods(shape: str) -> list[type]:
    """The classes of one folder. An empty folder is an error: its laws would pass by having nothing to say."""
    found = [registry.load(shape, name) for name in registry.names(shape)]
    if not found:
        raise LookupError(f"finebits/{shape} holds no method, so its laws test nothing")
    return found


def variants(cls: type, **fixed: Sequence[Any]) -> Iterator[Any]:
    """Every combination of the finite fields of a method (widths, scale stores, booleans, literals); the others keep their default.

    `fixed` gives the values of a field by name, and is ignored where the method has no such field.
    """
    hints = typing.get_type_hints(cls)
    choices: dict[str, Sequence[Any]] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if field.name in fixed:
            choices[field.name] = fixed[field.name]
        elif field.name == "bits" and hasattr(cls, "widths"):
            choices[field.name] = cls.widths
        elif field.name == "scale" and issubclass(cls, Format):
            choices[field.name] = tuple(STORES)
        elif hint is bool:
            choices[field.name] = (False, True)
        elif typing.get_origin(hint) is typing.Literal:
            choices[field.name] = typing.get_args(hint)
    for values in itertools.product(*choices.values()):
        yield cls(**dict(zip(choices, values, strict=True)))


def formats(block: Sequence[int] = (64,), **fixed: Sequence[Any]) -> list[Format]:
    """Every format with a code a column, in every variant. The others have their laws beside their paper (tests/papers/test_vq.py)."""
    found = [f for cls in methods("formats") for f in variants(cls, block=block, **fixed)]
    return [f for f in found if type(f).row_codes is Format.row_codes]


def quantizers() -> list[Quantizer]:
    """Every quantizer in every variant; those that iterate do so a few times."""
    return [q for cls in methods("quantizers") for q in variants(cls, steps=(10,))]


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """Every combination, for `parametrize`. Those without which some two values of two axes would not meet are always run, and the others where
    `every` test is. A value that is a tuple stands for several arguments."""
    left = list(itertools.product(*(range(len(axis)) for axis in axes)))
    pairs = lambda c: {(i, c[i], j, c[j]) for i, j in itertools.combinations(range(len(c)), 2)}  # noqa: E731
    chosen, met = set[tuple[int, ...]](), set[tuple[int, ...]]()
    while best := max(left, key=lambda c: len(pairs(c) - met), default=None):
        if pairs(best) <= met:
            break
        chosen.add(best)
        met |= pairs(best)
        left.remove(best)
    made = []
    for c in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[k] for axis, k in zip(axes, c, strict=True)]
        flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
        made.append(pytest.param(*flat, marks=[] if c in chosen else pytest.mark.every))
    return made


def stats_of(X: torch.Tensor, G: torch.Tensor, wanted: Sequence[type[Statistic]] | frozenset[type[Statistic]]) -> dict:
    """Statistics of inputs X (t, n) and output gradients G (t, m)."""
    found = {S: S() for S in wanted}
    for S, s in found.items():
        s.add(X, G if S.backward else None)
    return found
