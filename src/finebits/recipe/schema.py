"""Every key of a recipe: its sections, and what can be asked of them.

Sections only group; the keys inside are transformers', TRL's and PEFT's own names where these exist.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, BaseModel, Field, model_validator

from finebits import registry
from finebits.errors import Invalid
from finebits.optim import base as optimizers
from finebits.recipe.keys.adapter import Adapter
from finebits.recipe.keys.base import Method, Section, Written
from finebits.recipe.keys.data import Data
from finebits.recipe.keys.federation import Federation
from finebits.recipe.keys.model import Budget, Model
from finebits.recipe.keys.quantization import Quantization
from finebits.recipe.keys.results import Evaluation, Export
from finebits.recipe.keys.training import Training
from finebits.recipe.source import Keypath

if TYPE_CHECKING:  # no checker lists a folder
    Task = str
else:
    Task = Literal["auto", *registry.names("tasks")]


class Keys(Section):
    """Every key of a recipe."""

    recipe: Literal[1] = Field(default=1, description="Version of this layout.")
    task: Task = Field(
        default="auto",
        description="What the model is tuned for, a name of finebits list --shape tasks; auto is what its architecture is for.",
    )
    model: Model = Field(description="Which model.")
    budget: Budget = Field(default=Budget(), description="What the job may take.")
    data: Data = Field(default=Data(), description="What is learned from.")
    quantization: Quantization = Field(default=Quantization(), description="What the planner may choose from.")
    adapter: Adapter = Field(default=Adapter(), description="What is trained over the frozen weights.")
    training: Training = Field(default=Training(), description="How it is trained, in the names of transformers and TRL.")
    rules: list[Method] = Field(
        default=[], description="Training rules: names of finebits list --shape rules, or mappings {paper: adalora, …}."
    )
    federation: Federation = Field(default=Federation(), description="Rounds of clients who keep their rows.")
    evaluation: Evaluation = Field(default=Evaluation(), description="What is measured on the held-out rows.")
    export: Export = Field(default=Export(), description="What is written for others to load.")
    output_dir: Written = Field(default="runs/default", min_length=1, description="The folder that everything is written to.")

    @model_validator(mode="after")
    def _answers_are_not_packed(self) -> Keys:
        if self.data.packing and self.training.loss is not None:
            raise Invalid(
                "data.packing packs rows whose tokens are learned, and training.loss compares whole answers: leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _a_batch_is_fitted_to_bytes(self) -> Keys:
        if self.training.per_device_train_batch_size == "auto" and self.budget.total is None:
            raise Invalid(
                "training.per_device_train_batch_size is auto, which fits it to the memory that there is, and budget.memory "
                f"{'sets no limit' if self.budget.memory is None else f'({self.budget.memory}) is no size'}: give a size, such as 8GiB, or a "
                "number of rows"
            )
        return self

    @model_validator(mode="after")
    def _an_optimizer_has_its_device(self) -> Keys:
        entry = self.training.optim
        name = entry if isinstance(entry, str) else entry.get("paper")
        try:
            devices = (optimizers.named(entry) if isinstance(entry, str) else registry.from_json("optim", entry)).devices
        except (ValueError, TypeError):  # what is wrong with the entry is said elsewhere
            return self
        if len(devices) == 1 and self.budget.device not in devices:
            (only,) = devices
            raise Invalid(
                f"training.optim is {name}, which works on {only.upper()} alone, and budget.device is {self.budget.device}: take "
                f"adamw, or say {only}"
            )
        return self


def sections() -> dict[str, type[Section]]:
    """{name: section}, in order.

    >>> [*sections()][:4]
    ['model', 'budget', 'data', 'quantization']
    """
    return {k: f.annotation for k, f in Keys.model_fields.items() if isinstance(f.annotation, type) and issubclass(f.annotation, Section)}


def spelled(section: type[BaseModel]) -> dict[str, list[str]]:
    """{key: its accepted spellings} of a section.

    >>> spelled(Adapter)["rank"]
    ['rank', 'r']
    """
    aliases = {name: field.validation_alias for name, field in section.model_fields.items()}
    return {name: [str(c) for c in a.choices] if isinstance(a, AliasChoices) else [name] for name, a in aliases.items()}


def spellings(section: type[BaseModel]) -> list[str]:
    """Every accepted spelling of a section's keys.

    >>> spellings(Data)[:2], "lora_alpha" in spellings(Adapter)
    (['datasets', 'held_out'], True)
    """
    return [one for known in spelled(section).values() for one in known]


@functools.cache
def leaves() -> dict[str, tuple[str, ...]]:
    """{key: the sections that have it}, in every accepted spelling.

    >>> leaves()["max_length"], leaves()["r"]
    (('data',), ('adapter',))
    """
    by_key: dict[str, tuple[str, ...]] = {}
    for name, section in sections().items():
        for key in spellings(section):
            by_key[key] = (*by_key.get(key, ()), name)
    return by_key


def default(path: Keypath) -> Any:
    """What the value at `path` is where a recipe does not say; None for a section, within another one too.

    >>> default(("data", "max_length")), default(("data",)) is None
    (1024, True)
    """
    section = sections().get(str(path[0]))
    field = section.model_fields.get(str(path[1])) if section and len(path) == 2 else None
    value = copy.deepcopy(field.default) if field and not field.is_required() else None
    return None if isinstance(value, Section) else value
