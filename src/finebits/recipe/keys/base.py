"""What every section of a recipe is."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

from finebits.recipe import values

Method = str | dict[str, Any]


class Section(BaseModel):
    """Keys that belong together; a key that is not listed is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


Written = Annotated[str, AfterValidator(values.path)]  # of a file or a folder
