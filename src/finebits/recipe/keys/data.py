"""The keys of the rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from finebits import registry
from finebits.recipe.keys.base import Section, Written

if TYPE_CHECKING:  # no checker lists a folder
    Form = str
else:
    Form = Literal["auto", *registry.names("data.forms")]


PLACE = (
    "A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, .md, also .gz), a folder or a pattern of such files, or a hub id; relative "
    "paths start at the current folder. In every path ~ and $NAME are written out."
)
SPLIT = "The split of a folder or a hub id; null is train where there are splits."
NAME = "The configuration of a hub id or of a folder in its form."
PATTERNS = "Patterns of files inside a folder or a hub id."


def _patterns(value: Any) -> Any:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_patterns, json_schema_input_type=str | list[str])]


class Dataset(Section):
    """Rows of one place."""

    path: Written = Field(min_length=1, description=PLACE)
    name: str | None = Field(default=None, description=NAME)
    split: str | None = Field(default=None, description=SPLIT)
    data_files: Patterns = Field(default=(), description=PATTERNS)
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id; null takes the newest.")
    format: Form = Field(
        default="auto",
        description="The form of a row, by its name in finebits list --shape data.forms; auto looks and says what it decided.",
    )
    fraction: float | None = Field(
        default=None, gt=0, le=1, description="The share of its rows to take, drawn by training.seed; null takes all."
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Its share of all training rows, beside the weights of the others: as many rows are drawn by training.seed as go without "
        "taking one twice. null for all data sets takes all rows.",
    )


class HeldOut(Section):
    """Rows that are never trained on."""

    path: Written = Field(min_length=1, description=PLACE + " In the form of the training rows.")
    name: str | None = Field(default=None, description=NAME)
    split: str | None = Field(default=None, description=SPLIT)
    data_files: Patterns = Field(default=(), description=PATTERNS)


class Data(Section):
    """What is learned from."""

    datasets: list[Dataset] = Field(default=[], description="Training rows, in this order.")
    held_out: HeldOut | None = Field(default=None, description="Rows to evaluate on; null splits them off the training rows.")
    test_split_size: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="The share of the rows to hold out where held_out is null, or how many (from 1 on); null takes 0.02, but at least 20 rows, "
        "or a quarter of few.",
    )
    max_length: int = Field(default=1024, ge=2, description="Tokens of a row; longer rows are cut, and data check says how many.")
    assistant_only_loss: bool = Field(default=True, description="Learn the assistant's turns alone; false learns every token.")
    made_by: str | None = Field(default=None, description="The command that writes these rows, said where they are not there.")
    packing: bool = Field(
        default=False,
        description="Train on packs of rows of up to max_length tokens, best fit, in which no row sees another; scoring and calibration stay "
        "row by row. per_device_train_batch_size counts packs.",
    )
    drop_incomplete: bool = Field(
        default=False, description="Leave out conversations that end without an answer or hold none; false has data check refuse them."
    )
