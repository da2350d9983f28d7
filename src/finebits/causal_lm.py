"""What follows the last hidden state of a causal language model: its states, its logits, its loss. Here and nowhere else.

    z = W h + b,    logits = a z    or    c tanh(a z / c)

W is the output head (dense or quantized, tied or its own), a what the model multiplies its logits by (Granite, Cohere, Falcon-H1), c what it
caps them at (Gemma-2, RecurrentGemma). No architecture is known by name. States are what the model's own forward hands to its head, whatever
it did to them before (a norm, a projection, a division); a and c are read off what its own forward makes of numbers that are laid in place of
W h + b; and its own loss of these numbers must be the next-token loss. A model that does anything else is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from finebits.build import Adapted
from finebits.errors import Invalid
from finebits.losses import IGNORED, chunked_cross_entropy, shaped

Batch = Mapping[str, Tensor]
INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


@dataclass(frozen=True, eq=False)
class Head:
    """The way from states to logits. `module` computes W h + b, whatever its class."""

    module: nn.Module
    scale: float = 1.0
    cap: float | None = None

    @property
    def frozen_product(self) -> bool:
        """Is it one product with a frozen matrix? Then the gradient of the states is found without autograd."""
        plain = type(self.module) is nn.Linear or (isinstance(self.module, Adapted) and not self.module.active)
        return plain and not any(p.requires_grad for p in self.module.parameters())

    @property
    def copies(self) -> int:
        """Float32 numbers a logit that are there at a time while the loss is computed."""
        return 4 if not self.frozen_product else 1 if self.cap is None else 2

    def __call__(self, states: Float[Tensor, "*b h"]) -> Float[Tensor, "*b v"]:
        """Logits in float32, multiplied in the head's own dtype; differentiable."""
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), states.dtype)
        return self.shape(self.module(states.to(dtype)).float())

    def shape(self, z: Tensor) -> Tensor:
        """Scale and cap; in place where no gradient is wanted."""
        return shaped(z, self.scale, self.cap)

    def loss(self, states: Float[Tensor, "b t h"], labels: Int[Tensor, "b t"], chunk: int = 256) -> Float[Tensor, ""]:
        """Sum over labelled positions of −log p(label), position i predicting label i + 1. Never more than `chunk` positions have logits.

        Gradients reach the states and whatever of the head is trained: through autograd, a chunk at a time, where something is."""
        if self.frozen_product:
            module: Any = self.module
            return chunked_cross_entropy(states, module.weight, labels, chunk, bias=module.bias, scale=self.scale, cap=self.cap)
        y = labels[:, 1:]
        keep = y != IGNORED
        flat, wanted = states[:, :-1][keep], y[keep]
        total = (flat * 0).sum().float()
        for h, word in zip(flat.split(chunk), wanted.split(chunk), strict=True):
            total = total + checkpoint(lambda h, word: F.cross_entropy(self(h), word, reduction="sum"), h, word, use_reentrant=False)
        return total


def next_token_loss(model: Any, batch: Batch, chunk: int = 256) -> Tensor:
    """Sum over labelled tokens of the next-token loss of a causal language model (its states, then its head chunk by chunk). Under
    DistributedDataParallel all of it is that wrapper's forward, which makes ready for the gradients of what it returns."""
    inner = unwrapped(model)
    if inner is model:
        return head(model).loss(states(model, batch), batch["labels"], chunk)
    own = inner.forward

    def loss(**given: Tensor) -> Tensor:
        with instead(inner, own):
            return next_token_loss(inner, given, chunk)

    with instead(inner, loss):
        return model(**batch)


def unwrapped(model: Any) -> Any:
    """The model in DistributedDataParallel, which holds it whole; any other is itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def labelled(batch: Batch) -> int:
    """How many positions of a batch carry a loss."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def states(model: Any, batch: Batch) -> Float[Tensor, "b t h"]:
    """What the model's own forward hands to its output head."""
    taken: list[Tensor] = []

    def take(h: Tensor) -> Tensor:
        taken.append(h)
        return h[..., :1]  # stands for logits, which nobody asked for

    with instead(model.get_output_embeddings(), take):
        model(**{k: batch[k] for k in INPUTS if k in batch}, use_cache=False)
    return taken[0]


def head(model: Any) -> Head:
    """How this model turns states into logits: looked up, or observed at the first call.

    Raises ValueError in one sentence where that is not a scale and a cap, or where the model's loss is not the next-token loss of its logits.
    """
    found = _seen.get(model)
    if found is None or found.module is not model.get_output_embeddings():
        found = _seen[model] = _observed(model)
    return found


_seen: WeakKeyDictionary[nn.Module, Head] = WeakKeyDictionary()


PROBE = (-300.0, -20.0, -3.0, -0.5, -1e-2, 0.0, 1e-2, 0.5, 3.0, 20.0, 300.0, 1e9)


def _observed(model: Any) -> Head:
    name, module = type(model).__name__, model.get_output_embeddings()
    if module is None:
        raise Invalid(f"{name} has no output head: only causal language models are planned for")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise Invalid(
            f"config.json asks {name} for the loss of its routers (output_router_logits), which is not trained here: set it to false"
        )
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    words, width = module.weight.shape
    z = torch.tensor(PROBE, device=device).repeat(-(-3 * words // len(PROBE)))[: 3 * words].view(1, 3, words)
    labels = torch.arange(3, device=device)[None] % words
    given = torch.zeros(1, 3, width, device=module.weight.device)
    unknown = f"{name} does something between its last hidden state and its logits that is neither a scale nor a cap"
    try:
        with torch.no_grad():
            logits, _ = _after(model, module, given, z, labels)
            small, loss = _after(model, module, given, z.clamp(-1, 1), labels)
    except Exception as e:  # a forward that is written in another way fails in its own way
        raise Invalid(f"{unknown} ({type(e).__name__}: {(str(e).splitlines() or ['no reason given'])[0]})") from e
    if logits.shape != z.shape:
        raise Invalid(f"{unknown}: {words} numbers a token became {logits.shape[-1]}")
    found = Head(module, _slope(z, logits, 3.0))
    if not torch.allclose(found.shape(z.clone()), logits, rtol=1e-4):
        found = Head(module, _slope(z, small, 1e-2), float(logits.abs().max()))
        if not torch.allclose(found.shape(z.clone()), logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
            raise Invalid(f"{unknown}: numbers from {z.min():g} to {z.max():g} became {logits.min():.4g} to {logits.max():.4g}")
    wanted = F.cross_entropy(small[0, :-1], labels[0, 1:])
    if loss is None or not torch.allclose(loss.float(), wanted, rtol=1e-3):
        said = "none" if loss is None else f"{float(loss):.4f}, where {float(wanted):.4f} was expected"
        raise Invalid(f"the loss of {name} is not the next-token loss of its logits ({said}): it cannot be trained here")
    return found


def _slope(z: Tensor, y: Tensor, at: float) -> float:
    return float(y.flatten()[PROBE.index(at) % z.numel()] / z.flatten()[PROBE.index(at) % z.numel()])


class _Given(tuple):
    """The output of a backbone that did not run: final states, and nothing else."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def _after(model: Any, module: nn.Module, given: Tensor, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """(logits, loss) that the model's own forward makes of z in place of W h + b; neither its backbone, which is whatever holds the input
    embeddings, nor its head runs."""
    entrance = model.get_input_embeddings()
    parts = next(k for k, m in model.named_modules() if m is entrance).split(".")
    with contextlib.ExitStack() as all:
        for i in range(1, len(parts)):
            all.enter_context(instead(model.get_submodule(".".join(parts[:i])), lambda *a, **k: _Given((given,))))
        all.enter_context(instead(module, lambda h: z.clone()))
        out = model(input_ids=torch.zeros_like(labels), labels=labels, use_cache=False)
    return out.logits.float(), out.loss


@contextlib.contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for a while; one that was laid over the class's own comes back."""
    own = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own  # type: ignore[method-assign]
