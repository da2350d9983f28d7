"""The keys of the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from finebits import registry
from finebits.recipe.keys.base import Section, Written

if TYPE_CHECKING:  # no checker lists a folder
    Form = str
else:
    Form = Literal["auto", *registry.names("data.forms")]


class Dataset(Section):
    """One file of rows."""

    path: Written = Field(
        min_length=1,
        description="A .jsonl, .json or .txt file; relative paths start at the current folder. In every path ~ and $NAME are written out.",
    )
    format: Form = Field(
        default="auto",
        description="The form of a row, by its name in finebits list --shape data.forms; auto looks and says what it decided.",
    )


class HeldOut(Section):
    """Rows that are never trained on."""

    path: Written = Field(min_length=1, description="A file of rows in the form of the training rows.")


class Data(Section):
    """What is learned from."""

    datasets: list[Dataset] = Field(default=[], description="Files of training rows, in this order.")
    held_out: HeldOut | None = Field(default=None, description="A file of rows to evaluate on; null splits them off the training rows.")
    test_split_size: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="The share of the rows to hold out where held_out is null; null takes 0.02, but at least 20 rows, or a quarter of few.",
    )
    max_length: int = Field(default=1024, ge=2, description="Tokens of a row; longer rows are cut, and data check says how many.")
    assistant_only_loss: bool = Field(default=True, description="Learn the assistant's turns alone; false learns every token.")
    made_by: str | None = Field(default=None, description="The command that writes these rows, said where they are not there.")
