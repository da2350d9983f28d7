"""Input embeddings that stay in host memory: a row a token is read there, and only those rows go to the device.

The module keeps its class's own forward (some scale their rows); its weight becomes a buffer, so that it is named and saved as before and the
first parameter of the model is one on the device, which is what libraries take for the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits.errors import Invalid


class OnHost(nn.Embedding):
    """What is laid over the class of an embedding module: `.to()` moves where its rows go, and not the rows. Made by `stay`."""

    there: Tensor  # empty; it goes where the rest of the model goes

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.to(self.weight.device)).to(self.there.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.there = fn(self.there)
        return super()._apply(lambda t: t.to(self.there.dtype) if t.is_floating_point() else t, recurse)


def looked_up(model: Any) -> nn.Embedding | None:
    """The input embeddings of a transformers model where they are only looked up: None where the output head multiplies by the same tensor,
    which is then needed on the device.

    >>> from types import SimpleNamespace as Model
    >>> words, head = torch.nn.Embedding(5, 2), torch.nn.Linear(2, 5)
    >>> looked_up(Model(get_input_embeddings=lambda: words, get_output_embeddings=lambda: head)) is words
    True
    >>> head.weight = words.weight  # tied
    >>> looked_up(Model(get_input_embeddings=lambda: words, get_output_embeddings=lambda: head)) is None
    True
    """
    entrance, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is getattr(entrance, "weight", None)
    return entrance if isinstance(entrance, nn.Embedding) and not tied else None


def stay(model: nn.Module) -> nn.Module:
    """From here on the input embeddings of `model` stay on the device where they are, frozen, whatever the model is moved to.

    Raises ValueError where they are more than looked up.

    >>> class Model(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.words = torch.nn.Embedding(5, 2)
    ...     get_input_embeddings = lambda self: self.words
    ...     get_output_embeddings = lambda self: None
    >>> model = stay(Model())
    >>> isinstance(model.words, OnHost), list(model.parameters()), list(model.state_dict())
    (True, [], ['words.weight'])
    """
    entrance = looked_up(model)
    if entrance is None:
        raise Invalid("the embeddings are to stay in host memory, and this model's output head is the same tensor: plan again")
    if isinstance(entrance, OnHost):
        return model
    weight = cast(Tensor, entrance._parameters.pop("weight")).detach()
    entrance.register_buffer("weight", weight)
    entrance.__class__ = type(type(entrance).__name__, (OnHost, type(entrance)), {})
    cast(OnHost, entrance).there = torch.empty(0, dtype=weight.dtype, device=weight.device)
    (name,) = [f"{k}.weight" for k, m in model.named_modules() if m is entrance]
    ignored = list(dict.fromkeys([*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), name]))
    model._ddp_params_and_buffers_to_ignore = ignored  # pyright: ignore[reportArgumentType]  # DDP wants all it watches on one device
    return model
