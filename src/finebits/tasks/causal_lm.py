"""Causal language models: every token is predicted from those before it.

States are what the model's own forward hands to its output head, whatever it did to them before (a norm, a projection, a division); logits are

    z = W h + b,    logits = a z    or    c tanh(a z / c)

with a what the model multiplies its logits by (Granite, Cohere, Falcon-H1) and c what it caps them at (Gemma-2, RecurrentGemma). No
architecture is known by name: a and c are read off what its own forward makes of numbers that are laid in place of W h + b; and its own loss of
these numbers must be the next-token loss. A model that does anything else is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from finebits.data import packing
from finebits.data.arrays import Example, Tokens
from finebits.data.check import Check, check
from finebits.data.rows import Rows
from finebits.data.tokens import pad_of, to_batch, tokenize
from finebits.errors import Invalid
from finebits.evaluate.generate import greedy
from finebits.losses import IGNORED
from finebits.tasks import _categories as categories
from finebits.tasks._head import Head, instead
from finebits.tasks.base import Ask, Batch, Numbers, Prompt

INPUTS = ("input_ids", "attention_mask", "position_ids", "token_type_ids")


@dataclass(frozen=True)
class CausalLM:
    """Position i of a row of tokens predicts token i + 1; `words` are those that the model knows.

    >>> CausalLM().targets(torch.tensor([[5, 7, -100]]))
    tensor([[   7, -100]])
    """

    words: int = 0
    auto: ClassVar[str] = "AutoModelForCausalLM"
    ending: ClassVar[str] = ""  # what no other task is for
    peft: ClassVar[str | None] = "CAUSAL_LM"
    pipeline: ClassVar[str] = "text-generation"
    unit: ClassVar[str] = "tokens"
    measures: ClassVar[tuple[str, ...]] = ("perplexity",)

    @classmethod
    def of(cls, config: Any) -> CausalLM:
        text = getattr(config, "get_text_config", lambda: None)()
        return cls(int(getattr(text, "vocab_size", 0)))

    def processor(self, folder: Path, tokenizer: Callable[[Path], Any]) -> Any:
        return tokenizer(folder)

    def check(self, rows: Rows, processor: Any, max_length: int, assistant_only_loss: bool, limits: Ask) -> Check:
        return check(rows, processor, max_length, assistant_only_loss, limits())

    def examples(self, rows: Any, processor: Any, max_length: int, assistant_only_loss: bool) -> Tokens:
        return tokenize(rows, processor, max_length, assistant_only_loss)

    def require(self, tokens: Tokens, processor: Any, limits: Ask) -> None:
        limits().require(tokens, processor)

    def longest(self, max_length: int) -> int:
        return max_length

    def input_bytes(self) -> int:
        return 0

    def tokens(self, numbers: int) -> int:
        return numbers

    def batch(self, rows: Sequence[Numbers], processor: Any, multiple: int = 1) -> dict[str, Tensor]:
        if rows and "segments" in rows[0]:
            return packing.batch(rows, pad_of(processor), multiple)
        return to_batch([Example(list(r["input_ids"]), list(r["labels"]), "") for r in rows], pad_of(processor), multiple)

    def inputs(self, batch: Batch) -> int:
        mask = batch.get("attention_mask")
        return batch["input_ids"].numel() if mask is None else int(mask.sum())  # packs have none, and are nearly full

    def blank(self, rows: int, tokens: int) -> dict[str, Tensor]:
        return {k: torch.empty(rows, tokens, dtype=torch.int64, device="meta") for k in ("input_ids", "attention_mask")}

    def head(self, model: Any) -> Head:
        return head(model)

    def states(self, model: Any, batch: Batch) -> Float[Tensor, "b t h"]:
        return states(model, batch)

    def places(self, states: Tensor) -> Tensor:
        return states[:, :-1]

    def targets(self, labels: Tensor) -> Tensor:
        return labels[:, 1:]

    def inside(self, batch: Batch) -> Tensor | None:
        return batch["attention_mask"].bool()

    def outside(self, batch: Batch) -> Tensor | None:
        return batch["attention_mask"].bool()

    def learned(self, batch: Batch, states: Tensor) -> tuple[Tensor, Tensor]:
        """Every word of the text, whoever said it."""
        tokens = batch["input_ids"].to(states.device)[:, 1:]
        counts = batch["attention_mask"].to(states.device)[:, 1:].bool()
        return states[:, :-1][counts], tokens[counts]

    def outputs(self) -> int:
        return self.words

    def loss(self, model: Any, batch: Batch, chunk: int = 256, smoothing: float = 0.0) -> Tensor:
        return categories.loss(self, model, batch, chunk, smoothing)

    def drawn(self, generator: torch.Generator) -> Callable[..., Tensor]:
        return categories.drawn(self, generator)

    def score(self, outputs: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        return categories.score(outputs, labels, teacher)

    def size(self, batches: Sequence[Batch], processor: Any) -> int:
        """Bytes of the text."""
        rows = [y[y != IGNORED].tolist() for b in batches for y in self.targets(b["labels"])]
        return sum(len(processor.decode(row, skip_special_tokens=True).encode()) for row in rows)

    def prompts(self, rows: Rows, processor: Any, count: int, longest: int | None = None) -> list[Prompt]:
        """All but the last answer of the first conversations that are short enough."""
        prompts = []
        for row in (r for r in rows if r.messages):
            if len(prompts) == count:
                break
            turns = list(row.messages or ())
            last = max(i for i, m in enumerate(turns) if m["role"] == "assistant")
            encoded = processor.apply_chat_template(
                turns[:last], add_generation_prompt=True, tokenize=True, return_dict=True, **row.template_kwargs
            )
            if longest is None or len(encoded["input_ids"]) <= longest:
                prompts.append(Prompt(turns[last - 1]["content"] if last else "", turns[last]["content"], list(encoded["input_ids"])))
        return prompts

    def answers(self, model: Any, prompts: Sequence[Prompt], processor: Any, stops: Sequence[int], room: int | None) -> list[str]:
        continuations = greedy(model, [p.given for p in prompts], NEW_TOKENS, stops, room)
        return [processor.decode(m, skip_special_tokens=True) for m in continuations]


NEW_TOKENS = 48  # of a sample


def states(model: Any, batch: Batch) -> Float[Tensor, "b t h"]:
    """What the model's own forward hands to its output head."""
    captured: list[Tensor] = []

    def take(h: Tensor) -> Tensor:
        captured.append(h)
        return h[..., :1]  # stands for logits, which nobody asked for

    with instead(model.get_output_embeddings(), take):
        model(**{k: batch[k] for k in INPUTS if k in batch}, use_cache=False)
    return captured[0]


def head(model: Any) -> Head:
    """How this model turns states into logits: looked up, or observed at the first call.

    Raises ValueError in one sentence where that is not a scale and a cap, or where the model's loss is not the next-token loss of its logits.
    """
    cached = _seen.get(model)
    if cached is None or cached.module is not model.get_output_embeddings():
        cached = _seen[model] = _observed(model)
    return cached


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
    vocabulary, width = module.weight.shape
    z = torch.tensor(PROBE, device=device).repeat(-(-3 * vocabulary // len(PROBE)))[: 3 * vocabulary].view(1, 3, vocabulary)
    labels = torch.arange(3, device=device)[None] % vocabulary
    hidden = torch.zeros(1, 3, width, device=module.weight.device)
    unknown = f"{name} does something between its last hidden state and its logits that is neither a scale nor a cap"
    try:
        with torch.no_grad():
            logits, _ = _after(model, module, hidden, z, labels)
            small, loss = _after(model, module, hidden, z.clamp(-1, 1), labels)
    except Exception as e:  # a forward that is written in another way fails in its own way
        raise Invalid(f"{unknown} ({type(e).__name__}: {(str(e).splitlines() or ['no reason given'])[0]})") from e
    if logits.shape != z.shape:
        raise Invalid(f"{unknown}: {vocabulary} numbers a token became {logits.shape[-1]}")
    head = Head(module, _slope(z, logits, 3.0))
    if not torch.allclose(head.shape(z.clone()), logits, rtol=1e-4):
        head = Head(module, _slope(z, small, 1e-2), float(logits.abs().max()))
        if not torch.allclose(head.shape(z.clone()), logits, rtol=1e-3, atol=1e-4 * float(logits.abs().max())):
            raise Invalid(f"{unknown}: numbers from {z.min():g} to {z.max():g} became {logits.min():.4g} to {logits.max():.4g}")
    wanted = F.cross_entropy(small[0, :-1], labels[0, 1:])
    if loss is None or not torch.allclose(loss.float(), wanted, rtol=1e-3):
        got = "none" if loss is None else f"{float(loss):.4f}, where {float(wanted):.4f} was expected"
        raise Invalid(f"the loss of {name} is not the next-token loss of its logits ({got}): it cannot be trained here")
    return head


def _slope(z: Tensor, y: Tensor, at: float) -> float:
    return float(y.flatten()[PROBE.index(at) % z.numel()] / z.flatten()[PROBE.index(at) % z.numel()])


class _BackboneOutput(tuple):
    """The output of a backbone that did not run: final states, and nothing else."""

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None


def _after(model: Any, module: nn.Module, hidden: Tensor, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """(logits, loss) that the model's own forward makes of z in place of W h + b; neither its backbone, which is whatever holds the input
    embeddings, nor its head runs."""
    entrance = model.get_input_embeddings()
    parts = next(k for k, m in model.named_modules() if m is entrance).split(".")
    with contextlib.ExitStack() as all:
        for i in range(1, len(parts)):
            all.enter_context(instead(model.get_submodule(".".join(parts[:i])), lambda *a, **k: _BackboneOutput((hidden,))))
        all.enter_context(instead(module, lambda h: z.clone()))
        out = model(input_ids=torch.zeros_like(labels), labels=labels, use_cache=False)
    return out.logits.float(), out.loss
