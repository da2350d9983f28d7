"""The keys of the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from finebits.optim import base as optimizers
from finebits.recipe import values
from finebits.recipe.keys.base import Section

if TYPE_CHECKING:  # no checker lists a folder
    Optimizer = str
else:
    Optimizer = Literal[*optimizers.known()]


class Training(Section):
    """The names of transformers.TrainingArguments and trl.SFTConfig."""

    num_train_epochs: float = Field(default=1.0, gt=0, description="Passes over the training rows.")
    max_steps: int = Field(default=-1, ge=-1, description="Optimizer steps; if above 0 it decides instead of num_train_epochs.")
    learning_rate: float = Field(default=2e-4, gt=0, description="The highest learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = Field(default="linear", description="How the learning rate moves after the warm-up.")
    warmup_steps: float = Field(default=0.0, ge=0, description="Steps of linear warm-up; below 1, a share of all steps.")
    per_device_train_batch_size: int = Field(default=1, ge=1, description="Rows of one forward and backward pass on one device.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Passes whose gradients make one optimizer step.")
    gradient_checkpointing: bool = Field(
        default=True, description="Keep a block's input alone and compute the block again in the backward pass."
    )
    max_grad_norm: float = Field(default=1.0, ge=0, description="Longer gradients are cut to this norm; 0 leaves them.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of the adapters.")
    optim: Annotated[Optimizer | dict[str, Any], AfterValidator(values.optimizer)] = Field(
        default="adamw_torch",
        description="The optimizer, by its name in finebits list --shape optim or by transformers' name, which is the one that is kept, or a "
        "mapping {paper: galore, …}.",
    )
    logging_steps: int = Field(default=10, ge=1, description="Steps between two lines of progress.")
    save_steps: int = Field(default=100, ge=1, description="Steps between two checkpoints.")
    seed: int = Field(default=42, ge=0, lt=2**32, description="Of the adapters' start, the order of the rows, and dropout.")
    report_to: str | list[str] = Field(
        default="none", description="Trackers of transformers: none, trackio, tensorboard, wandb, or a list."
    )
    loss_chunk: int = Field(default=256, ge=1, description="Tokens whose logits are held at a time when the loss is computed.")
