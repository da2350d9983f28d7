"""What PEFT says of trained tokens before a row: how many there are, in one tensor of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from finebits.adapters.base import Params
from finebits.errors import Invalid
from finebits.peft_forms.base import Form

NAME = "prompt_embeddings"
READS = frozenset({"num_virtual_tokens"})
IDLE = frozenset(  # sizes of the model, how it began, and what it was trained through
    "token_dim num_transformer_submodules num_attention_heads num_layers prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path "
    "tokenizer_kwargs encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout prefix_projection "
    "init_weights".split()
)


def of_network(settings: Mapping[str, Any], common: Params, width: int) -> tuple[int, Tensor]:
    """(how many tokens, their tensor), each of `width` numbers. Raises ValueError where the tensor is missing or of another shape.

    >>> of_network({"num_virtual_tokens": 2}, {NAME: torch.ones(2, 4)}, 3)
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: prompt_embeddings is (2, 4), and settings and model ask for (2, 3): the folder was made for another model
    """
    tokens, t = int(settings["num_virtual_tokens"]), common.get(NAME)
    if t is None or tuple(t.shape) != (tokens, width):
        has = "not in the file" if t is None else str(tuple(t.shape))
        raise Invalid(f"{NAME} is {has}, and settings and model ask for {(tokens, width)}: the folder was made for another model")
    return tokens, t


class OfNetwork(Form):
    """A form with that tensor and nothing by module. Abstract."""

    parts: ClassVar[tuple[str, ...]] = ()
    common: ClassVar[tuple[str, ...]] = (NAME,)
    reads: ClassVar[frozenset[str]] = READS
    idle: ClassVar[frozenset[str]] = IDLE
    starts: ClassVar[tuple[str, tuple[Any, ...]]] = "", ()
    dropout: ClassVar[str] = ""
