"""The keys of the model and of what the job may take."""

from __future__ import annotations

import typing
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from finebits import sizes
from finebits.errors import Invalid
from finebits.plan import budget as budgets
from finebits.recipe import values
from finebits.recipe.keys.base import Section, Written


class Model(Section):
    """Which model."""

    model_name_or_path: Written = Field(
        min_length=1,
        description="A local folder in Hugging Face form, a hub id, a .gguf file, or package:NAME for the one .gguf file or model folder "
        "inside an installed Python package.",
    )
    model_revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id; null takes the newest.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="What is computed in; auto is bfloat16 where the device computes in it, else float32."
    )
    attn_implementation: Literal["auto", "sdpa", "eager"] = Field(
        default="auto", description="The attention of transformers; auto leaves it the choice."
    )


Lever = Literal["micro_batch", "checkpointing", "loss_chunk", "optim", "head", "embeddings"]


def _levers(value: Any) -> Any:
    """ "all" is every lever; a list of a file is a tuple here."""
    return typing.get_args(Lever) if value in ("all", ["all"]) else tuple(value) if isinstance(value, list) else value


class Budget(Section):
    """What the job may take."""

    memory: Annotated[str | int | None, BeforeValidator(values.budget)] = Field(
        default=None,
        description='What every phase of the job may take above the bare process: "400MiB", "8GiB", "6 GB", bytes; or an average number of '
        'bits of a linear weight, scales included ("3.1 bits"), the same plan on every machine; or a share of what the job would take with one '
        'format for all matrices ("80% of nf4"; bf16 is 16 bits). null sets no limit.',
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="cpu",
        description="Where the model is trained, and whose memory is meant; auto is a CUDA device where torch sees one, else the CPU.",
    )
    reserve: Annotated[str, AfterValidator(values.share)] = Field(
        default="5%", description='Kept back from memory: a share ("5%") or a size ("300MiB").'
    )
    serve_memory: Annotated[str | int | None, AfterValidator(values.size)] = Field(
        default=None,
        description="A second budget, for the tuned model as it is saved: weights, embeddings, head and adapters; null sets no limit.",
    )
    serve_adapters: int = Field(
        default=0, ge=0, description="Adapters that a server holds at once beside the tuned model: their pages count in serve_memory."
    )
    serve_rank: int | None = Field(default=None, ge=1, description="Their rank; null is that of the run's own adapter.")
    serve_tokens: int = Field(
        default=0, ge=0, description="Tokens of requests whose keys and values a server holds at once: their pages count in serve_memory."
    )
    levers: Annotated[tuple[Lever, ...], BeforeValidator(_levers, json_schema_input_type=Literal["all"] | list[Lever])] = Field(
        default=(),
        description="What the plan may change to leave more memory for bits: micro_batch (the effective batch stays), checkpointing, "
        "loss_chunk, optim (Adam's state in 8 bits, on CUDA), head (an output head of its own in 8 bits), embeddings (on CUDA those that are no "
        "head stay in host memory), or all; what training says is where it begins.",
    )

    @property
    def total(self) -> int | None:
        """`memory` in bytes, where it is stated in bytes.

        >>> Budget(memory="400MiB").total, Budget(memory="3.1 bits").total
        (419430400, None)
        """
        stated = budgets.read(self.memory)
        return stated if isinstance(stated, int) else None

    @property
    def usable(self) -> int | None:
        """`memory` less `reserve`, in bytes: what a plan may spend.

        >>> Budget(memory="100MiB", reserve="5%").usable >> 20, Budget(memory="100MiB", reserve="10MiB").usable >> 20
        (95, 90)
        """
        return None if self.total is None else self.total - sizes.share(self.reserve, self.total)

    @property
    def reserve_share(self) -> float:
        """`reserve` as a share of `memory`, from 0 to 1; 0 where there is no limit.

        >>> Budget(memory="100MiB", reserve="10MiB").reserve_share, Budget().reserve_share
        (0.1, 0.0)
        """
        if self.memory is None:
            return 0.0
        if self.total is None:
            return sizes.share(self.reserve, 1 << 40) / (1 << 40)
        assert self.usable is not None
        return 1 - self.usable / self.total

    @model_validator(mode="after")
    def _something_is_left(self) -> Budget:
        if self.memory is not None and self.total is None and not (self.reserve.strip().endswith("%") or self.reserve.strip() == "0"):
            raise Invalid(f"reserve is {self.reserve} and memory is {self.memory}, which is no size: write reserve as a share, such as 5%")
        self.usable
        return self
