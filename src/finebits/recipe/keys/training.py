"""The keys of the training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from finebits.errors import Invalid
from finebits.optim import base as optimizers
from finebits.recipe import values
from finebits.recipe.keys.base import Method, Section

if TYPE_CHECKING:  # no checker lists a folder
    Optimizer = str
else:
    Optimizer = Literal[*optimizers.known()]

Often = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)]  # steps, or a share of all steps of a run

EFFECTIVE = 16  # rows of a step where the size of a pass is auto and nobody says


class Training(Section):
    """The names of transformers.TrainingArguments and trl.SFTConfig."""

    num_train_epochs: float = Field(default=1.0, gt=0, description="Passes over the training rows.")
    max_steps: int = Field(default=-1, ge=-1, description="Optimizer steps; if above 0 it decides instead of num_train_epochs.")
    learning_rate: float = Field(default=2e-4, gt=0, description="The highest learning rate.")
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
        "reduce_lr_on_plateau",
        "greedy",
    ] = Field(default="linear", description="How the learning rate moves after the warm-up; the last two follow the held-out loss.")
    lr_scheduler_kwargs: dict[str, Any] = Field(default={}, description="Settings of that scheduler, such as {min_lr: 1e-6}.")
    warmup_steps: float = Field(default=0.0, ge=0, description="Steps of linear warm-up; below 1, a share of all steps.")
    per_device_train_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=1,
        description="Rows of one forward and backward pass on one device; auto is the largest part of effective_batch_size that budget.memory "
        "holds without more than 5 % of loss in the bits.",
    )
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, description="Passes whose gradients make one optimizer step; set by effective_batch_size, where that is given."
    )
    effective_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Rows of one optimizer step of one process: per_device_train_batch_size × gradient_accumulation_steps, which it sets; null "
        "is what these two say, and 16 where the first is auto.",
    )
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
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="β₁ of optimizers of Adam's kind.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="β₂ of optimizers of Adam's kind.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="ε of optimizers of Adam's kind.")
    loss: Method | None = Field(
        default=None,
        description="What answers that were liked more and less teach: a name of finebits list --shape objectives or a mapping {paper: dpo, "
        "beta: 0.1}; null is the task's own loss. Of a pair both answers are rows of a batch.",
    )
    label_smoothing_factor: float = Field(
        default=0.0, ge=0, lt=1, description="The share of a label that is spread over all outputs, while training."
    )
    neftune_noise_alpha: float | None = Field(
        default=None, gt=0, description="NEFTune: noise of α/√(tokens × width) on the embeddings of training rows; null adds none."
    )
    eval_strategy: Literal["no", "steps", "epoch"] = Field(default="no", description="When the held-out loss is taken while training.")
    eval_steps: Often = Field(default=100, description="Steps between two evaluations; below 1, a share of all steps.")
    eval_on_start: bool = Field(default=False, description="Evaluate before the first step too.")
    metric_for_best_model: Literal["loss", "accuracy", "margin"] = Field(
        default="loss", description="What the best checkpoint is best in; accuracy and margin are those of preferences."
    )
    load_best_model_at_end: bool = Field(default=False, description="End with the checkpoint that did best when it was evaluated.")
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Stop after so many evaluations in turn without a gain; null never does."
    )
    early_stopping_threshold: float = Field(default=0.0, ge=0, description="The least that counts as a gain.")
    logging_steps: Often = Field(default=10, description="Steps between two lines of progress; below 1, a share of all steps.")
    save_strategy: Literal["no", "steps", "epoch", "best"] = Field(
        default="steps",
        description="When checkpoints are written; best is after every evaluation, and keeps the best beside the last. One is when it is "
        "interrupted.",
    )
    save_steps: Often = Field(default=100, description="Steps between two checkpoints; below 1, a share of all steps.")
    save_total_limit: int = Field(
        default=1, ge=1, description="The last checkpoints that stay, beside the best where it is loaded or save_strategy is best."
    )
    seed: int = Field(default=42, ge=0, lt=2**32, description="Of the adapters' start, the order of the rows, and dropout.")
    report_to: str | list[str] = Field(
        default="none",
        description="Trackers of transformers: none, trackio, tensorboard, wandb, or a list. TensorBoard's files lie in checkpoints/runs of "
        "every run, or where TENSORBOARD_LOGGING_DIR says.",
    )
    loss_chunk: int = Field(default=256, ge=1, description="Tokens whose logits are held at a time when the loss is computed.")

    @property
    def begins(self) -> tuple[int, int]:
        """(rows of a pass, passes of a step) where a plan begins: auto begins with a whole step in one pass.

        >>> Training(per_device_train_batch_size="auto").begins, Training(per_device_train_batch_size=2, effective_batch_size=8).begins
        ((16, 1), (2, 4))
        """
        size, whole = self.per_device_train_batch_size, self.effective_batch_size
        if size == "auto":
            return whole or EFFECTIVE, 1
        return size, self.gradient_accumulation_steps if whole is None else whole // size

    @model_validator(mode="after")
    def _a_step_is_of_whole_passes(self) -> Training:
        size, passes, whole = self.per_device_train_batch_size, self.gradient_accumulation_steps, self.effective_batch_size
        if size == "auto" and passes > 1:
            raise Invalid(
                f"per_device_train_batch_size is auto, which sets gradient_accumulation_steps too, and that is {passes}: leave it out (or 1), "
                "and say effective_batch_size"
            )
        if size != "auto" and whole is not None and (whole % size or passes not in (1, whole // size)):
            raise Invalid(
                f"effective_batch_size is {whole}, and per_device_train_batch_size × gradient_accumulation_steps is {size} × {passes}: make "
                "the first a multiple of per_device_train_batch_size, and leave gradient_accumulation_steps out"
            )
        return self

    @model_validator(mode="after")
    def _what_is_evaluated(self) -> Training:
        never = self.eval_strategy == "no"
        needs = {
            "load_best_model_at_end": self.load_best_model_at_end,
            "early_stopping_patience": self.early_stopping_patience is not None,
            "save_strategy: best": self.save_strategy == "best",
            f"lr_scheduler_type: {self.lr_scheduler_type}": self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
        }
        if never and (asks := next((k for k, asked in needs.items() if asked), None)):
            raise Invalid(f"{asks} looks at the held-out loss while training, and eval_strategy is no: set it to steps or epoch")
        if self.load_best_model_at_end and self.save_strategy != "best":
            every = {"steps": (self.eval_steps, self.save_steps), "epoch": (1, 1)}
            if self.save_strategy != self.eval_strategy or len({*every[self.eval_strategy]}) > 1:
                raise Invalid(
                    "load_best_model_at_end needs a checkpoint of every evaluation: set save_strategy to best, or save as often as is evaluated "
                    "(save_strategy and save_steps as eval_strategy and eval_steps)"
                )
        if self.metric_for_best_model != "loss" and self.loss is None:
            raise Invalid(
                f"metric_for_best_model is {self.metric_for_best_model}, which only preferences have: set loss, or take loss as metric"
            )
        if self.loss is not None and self.label_smoothing_factor:
            raise Invalid(
                "label_smoothing_factor is of labels, and loss compares whole answers: set label_smoothing of dpo, or leave it out"
            )
        said = sorted(k for k in ("adam_beta1", "adam_beta2", "adam_epsilon") if getattr(self, k) != type(self).model_fields[k].default)
        if said and not values.adaptive(self.optim):
            raise Invalid(f"{said[0]} is a setting of Adam, and this optim does not read it: leave it out, or take adamw")
        return self
