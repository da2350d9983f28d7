"""Heads that do more than multiply: what is trained is the stock model's loss, a chunk of logits at a time.

Public reports of the kind: a fused loss that left the head's bias out (linkedin/Liger-Kernel issue 82), a chunked loss that a soft cap switched
off (huggingface/trl issue 5575).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import finebits as fb
from finebits.interop.selecting import Mistake, known_head
from finebits.tasks.base import labelled
from finebits.tasks.causal_lm import CausalLM, head, states
from tiny_llama import batches

SIZES: dict[str, Any] = dict(
    vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KINDS = {
    "Phi": {},
    "Gemma2": dict(final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "Cohere": dict(logit_scale=0.3),
    "Granite": dict(logits_scaling=5.0),
}


def model_of(kind: str, **more: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | KINDS[kind] | more)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, 1.0)
    return model


class Largest(TorchDispatchMode):
    """The most rows that a tensor as wide as the vocabulary had, the head's own transposed aside."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        if isinstance(out, Tensor) and out.shape[-1:] == (SIZES["vocab_size"],) and out.shape[0] != SIZES["hidden_size"]:
            self.rows = max(self.rows, out.numel() // SIZES["vocab_size"])
        return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_loss_and_gradients_of_states_and_head(kind: str, trained: bool) -> None:
    model, batch = model_of(kind), batches(rows=3)[0]
    stock = model(**batch).loss
    wanted = torch.autograd.grad(stock, list(model.parameters()))
    last = model.get_output_embeddings()
    last.requires_grad_(trained)
    with Largest() as seen:
        loss = CausalLM().loss(model, batch, 4) / labelled(batch, CausalLM())
        loss.backward()
    assert seen.rows <= 4
    torch.testing.assert_close(loss, stock, rtol=1e-4, atol=1e-5)
    for (name, p), g in zip(model.named_parameters(), wanted, strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainer_trains_it(kind: str, tmp_path: Path) -> None:
    from finebits.interop.trainer import trainer

    model, batch = model_of(kind), batches(rows=3)[0]
    stock = float(model(**batch).loss.detach())
    plan = fb.Plan({"model.layers.0.self_attn.q_proj": fb.Spec(adapter=fb.LoRA(rank=2))}, levers=fb.Levers(dtype="float32"))
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    engine = trainer(fb.build(model, plan), _tokenizer(), rows, tmp_path, {"max_steps": 1, "gradient_checkpointing": False})
    with Largest() as seen:
        assert float(engine.compute_loss(model.eval(), dict(batch)).detach()) == pytest.approx(stock, rel=1e-4)
    assert seen.rows <= labelled(batch, CausalLM())


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="a", pad_token="a")


@pytest.mark.parametrize(("kind", "scale", "cap"), [("Phi", 1, None), ("Gemma2", 1, 2), ("Cohere", 0.3, None), ("Granite", 0.2, None)])
def test_scale_and_cap_are_read_off_the_model(kind: str, scale: float, cap: float | None) -> None:
    model, batch = model_of(kind), batches(rows=3)[0]
    found = head(model)
    assert found.scale == pytest.approx(scale, rel=1e-4) and found.cap == (None if cap is None else pytest.approx(cap, rel=1e-4))
    batch = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(found(states(model, batch)), model(**batch).logits)


def test_a_head_of_another_kind_is_refused_in_one_sentence() -> None:
    model = model_of("Phi")
    forward = model.forward

    def bent(*args: Any, **more: Any) -> Any:
        out = forward(*args, **more)
        out.logits = out.logits.sin()
        return out

    model.forward = bent
    with pytest.raises(Mistake, match="neither a scale nor a cap"):
        known_head(model)


def test_a_loss_of_another_kind_is_refused_in_one_sentence() -> None:
    model = model_of("Phi")
    model.loss_function = lambda logits, labels, vocab_size, **more: logits.square().mean()
    with pytest.raises(Mistake, match="the loss of PhiForCausalLM is not the next-token loss"):
        known_head(model)
