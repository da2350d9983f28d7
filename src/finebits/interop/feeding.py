"""Rows for the trainer's loader, and the order that it takes them in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from datasets import Dataset, Features, List, Value
from pyarrow import compute
from torch.utils.data import Sampler

from finebits.train import order


class Order(Sampler[int]):
    """Row numbers in the order of finebits.train.order, a new one each epoch."""

    def __init__(self, lengths: Sequence[int], per_batch: int, seed: int, together: int = 1) -> None:
        self.lengths, self.per_batch, self.seed, self.epoch, self.together = lengths, per_batch, seed, 0, together

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        for batch in order(self.lengths, self.per_batch, self.seed + self.epoch, together=self.together):
            yield from batch

    def __len__(self) -> int:
        return len(self.lengths)


class FixedOrder(Sampler[int]):
    """Row numbers in an order that was chosen elsewhere."""

    def __init__(self, rows: Sequence[int]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def dataset(examples: Iterable[Mapping[str, Sequence[int]]]) -> Dataset:
    """Rows of tokens (input_ids, labels), or packs of such (segments too), as a data set: four bytes a number, where lists of integers
    take eight times that."""
    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for e in examples:
        if "segments" in e:
            columns.setdefault("segments", [])
        for k, values in columns.items():
            values.append(numpy.asarray(e[k], dtype=numpy.int32))
    numbers = Features({k: List(Value("int32")) for k in columns})
    return Dataset.from_dict(columns, features=numbers)


class Rows(torch.utils.data.Dataset[Any]):
    """Rows as they are, for a loader."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def lengths_of(rows: Any) -> list[int]:
    """Tokens of every row."""
    if isinstance(rows, Dataset):
        return compute.call_function("list_value_length", [rows.data.column("input_ids")]).to_pylist()
    return [len(rows[i]["input_ids"]) for i in range(len(rows))]
