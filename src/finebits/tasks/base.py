"""What a task is: what makes work on a model this kind of work.

Whatever depends on the kind lies in the task's file. All others (planner, trainer, scorer, exporter) know what every model has: states (p, h)
at the places where something is learned, the labels (p,) that are learned there, and the outputs (p, k) that a head makes of the states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from finebits import registry
from finebits.data.arrays import Tokens
from finebits.data.check import Check
from finebits.data.limits import Limits
from finebits.data.rows import Rows
from finebits.errors import Invalid
from finebits.losses import IGNORED
from finebits.tasks._head import Head

Batch = Mapping[str, Tensor]
Numbers = Mapping[str, Sequence[int]]  # a row of `Tokens`: input_ids and labels
Ask = Callable[[], Limits]  # for what the model can take


@dataclass(frozen=True)
class Prompt:
    """What a person looks at: what is asked, what the row answers, and the numbers that the model is given."""

    text: str
    reference: str
    given: Any


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass of what a model's config says of its kind of work; holds no tensors."""

    auto: ClassVar[str]  # the class of transformers that reads such a model
    ending: ClassVar[str]  # how the names of the architectures end that are of this kind
    peft: ClassVar[str | None]  # what PEFT calls it; None: nothing that PEFT would treat otherwise
    pipeline: ClassVar[str]  # what the hub calls it
    unit: ClassVar[str]  # what its labels are, in words
    measures: ClassVar[tuple[str, ...]]  # what is shown of its scores beside the loss, KL and agreement

    @classmethod
    def of(cls, config: Any) -> Task: ...  # of transformers' config of a model

    # rows
    def processor(self, folder: Path, tokenizer: Callable[[Path], Any]) -> Any: ...  # what makes numbers of rows
    def check(self, rows: Rows, processor: Any, max_length: int, assistant_only_loss: bool, limits: Ask) -> Check: ...
    def examples(self, rows: Any, processor: Any, max_length: int, assistant_only_loss: bool) -> Tokens: ...  # rows may be such already
    def require(self, tokens: Tokens, processor: Any, limits: Ask) -> None: ...  # raises DataError at the first that the model cannot take
    def longest(self, max_length: int) -> int: ...  # tokens that blocks see of a row, where so many are asked for
    def tokens(self, numbers: int) -> int: ...  # and of one of so many numbers
    def batch(self, rows: Sequence[Numbers], processor: Any, multiple: int = 1) -> dict[str, Tensor]: ...
    def inputs(self, batch: Batch) -> int: ...  # tokens of a batch that are no padding
    def input_bytes(self) -> int: ...  # of a row beside its tokens
    def blank(self, rows: int, tokens: int) -> dict[str, Tensor]: ...  # a batch without values

    # the model
    def head(self, model: Any) -> Head: ...
    def states(self, model: Any, batch: Batch) -> Tensor: ...  # what the model hands to its head
    def places(self, states: Tensor) -> Tensor: ...  # the states that labels may stand at, (*b, h)
    def targets(self, labels: Tensor) -> Tensor: ...  # the labels that may stand there, (*b,)
    def inside(self, batch: Batch) -> Tensor | None: ...  # which of the states of blocks are no padding, None: all
    def outside(self, batch: Batch) -> Tensor | None: ...  # which of the final ones are not
    def learned(self, batch: Batch, states: Tensor) -> tuple[Tensor, Tensor]: ...  # (states, labels) of all that calibration shows
    def outputs(self) -> int: ...  # numbers that the head makes of a state

    # what is made of it
    # summed over labels, which are smoothed; a chunk of outputs at a time
    def loss(self, model: Any, batch: Batch, chunk: int = 256, smoothing: float = 0.0) -> Tensor: ...
    def drawn(self, generator: torch.Generator) -> Callable[..., Tensor]: ...  # the loss for labels that the model draws itself
    def score(self, outputs: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor: ...  # rows of `SCORES`, for each place
    def size(self, batches: Sequence[Batch], processor: Any) -> int: ...  # of what is learned, whatever it was cut into
    # of the first rows that have one of at most `longest` numbers (None: any), cut to that where a row's beginning is as good
    def prompts(self, rows: Rows, processor: Any, count: int, longest: int | None = None) -> list[Prompt]: ...
    def answers(self, model: Any, prompts: Sequence[Prompt], processor: Any, stops: Sequence[int], room: int | None) -> list[str]: ...


SCORES = ("nll", "right", "kl", "agree")  # what `score` gives for a place; the last two where there is a teacher


def of(model: Any) -> Task:
    """The task of a transformers model or config, which its architecture tells; one that has none is a causal language model.

    >>> from types import SimpleNamespace as Config
    >>> type(of(Config(architectures=["LlamaForCausalLM"], vocab_size=32))).__name__, type(of(torch.nn.Linear(2, 2))).__name__
    ('CausalLM', 'CausalLM')
    """
    config = getattr(model, "config", model)
    named = [type(model).__name__] if config is not model else getattr(config, "architectures", None) or [""]
    kinds = [registry.load("tasks", name) for name in registry.names("tasks")]
    kind: Any = max((k for k in kinds if named[0].endswith(k.ending)), key=lambda k: len(k.ending))
    return kind.of(config)


class WrongTask(Invalid):
    """A recipe's task is not what its model is made for.

    >>> from types import SimpleNamespace as Config
    >>> agree("classification", Config(architectures=["LlamaForCausalLM"], vocab_size=32))
    Traceback (most recent call last):
        ...
    finebits.tasks.base.WrongTask: task is classification, and the model (LlamaForCausalLM) is one for causal_lm: take task: causal_lm,
    or a model with a head for classification
    """

    code = 2


def agree(wanted: str, config: Any) -> None:
    """Raises WrongTask where a recipe asks for another task than the one its model is made for; "auto" asks for none."""
    actual = registry.to_json(of(config))["paper"]
    if wanted not in ("auto", actual):
        architecture = (getattr(config, "architectures", None) or [type(config).__name__])[0]
        raise WrongTask(
            f"task is {wanted}, and the model ({architecture}) is one for {actual}: take task: {actual}, or a model with a head for {wanted}"
        )


def picked(task: Task, states: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """States (p, h), label and row of every place that has a label.

    >>> from finebits.tasks.causal_lm import CausalLM
    >>> states, y, row = picked(CausalLM(), torch.arange(6.0).view(1, 3, 2), {"labels": torch.tensor([[5, -100, 7]])})
    >>> states, y, row  # the second token predicts the third
    (tensor([[2., 3.]]), tensor([7]), tensor([0]))
    """
    y = task.targets(batch["labels"]).to(states.device)
    keep = y != IGNORED
    return task.places(states)[keep], y[keep], keep.nonzero()[:, 0]


def labelled(batch: Batch, task: Task) -> int:
    """How many labels a batch has.

    >>> from finebits.tasks.causal_lm import CausalLM
    >>> labelled({"labels": torch.tensor([[5, -100, 7]])}, CausalLM())  # what nothing stands before is not predicted
    1
    """
    return int((task.targets(batch["labels"]) != IGNORED).sum())
