"""Prompt tuning (arXiv:2104.08691v2), prefix tuning (arXiv:2101.00190v1) and P-tuning (arXiv:2103.10385v2), with stock PEFT as the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import finebits as fb
import tiny_llama as tiny
from finebits.anatomy import found
from finebits.carrier import carriers
from finebits.settle import settle
from finebits.store import apply, read

pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported")  # peft's own, of its generate
TEXT = (17, 5, 99, 3, 64)


def build(adapter: Any, model: Any = None) -> Any:
    model = tiny.fresh() if model is None else model
    over = dict.fromkeys(found(model, adapter.over), adapter)
    return fb.build(model, fb.Plan({}, over=over, levers=fb.Levers(dtype="float32")))


def tensors(model: Any) -> dict[str, torch.nn.Parameter]:
    return dict(next(host for _, host in carriers(model)).p["default"].items())


def ids() -> Tensor:
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(5))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def test_the_published_counts() -> None:
    """Llama-3.2-3B: 28 layers, 1024 numbers in a layer's keys, hidden 3072."""
    assert fb.PrefixTuning(tokens=200).size(28 * 1024, 3072) == 11_468_800
    assert fb.PrefixTuning(tokens=50).size(28 * 1024, 3072) == 2_867_200
    assert fb.PromptTuning(tokens=200).size(128_256, 3072) == 614_400
    assert fb.PTuning(tokens=20, hidden=16).size(1, 8) == 20 * 8 + 16 * 8 + 16 + 16 * 16 + 16 + 8 * 16 + 8
    lstm = torch.nn.LSTM(8, 16, 2, bidirectional=True)
    head = 32 * 32 + 32 + 32 * 8 + 8
    assert fb.PTuning(tokens=20, hidden=16, encoder="lstm").size(1, 8) == 20 * 8 + sum(p.numel() for p in lstm.parameters()) + head


@pytest.mark.parametrize("kind", [fb.PromptTuning, fb.PrefixTuning])
@pytest.mark.parametrize("fresh", [tiny.fresh, gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_from_a_text_the_model_behaves_as_after_it(kind: Any, fresh: Any, attention: str) -> None:
    """With grouped heads and with rotary or learned positions."""
    plain, model = fresh(), fresh()
    model.set_attn_implementation(attention)
    model = build(kind(tokens=5, ids=TEXT), model)
    with torch.no_grad():
        wanted = plain(input_ids=torch.cat([torch.tensor(TEXT).expand(2, -1), ids()], 1)).logits[:, 5:]
        torch.testing.assert_close(model(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(input_ids=ids()).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_text_is_repeated_or_cut_to_the_prompt() -> None:
    rows = tiny.fresh().get_input_embeddings().weight
    assert torch.equal(tensors(build(fb.PromptTuning(tokens=7, ids=TEXT)))["prompt"], rows[[*TEXT, *TEXT[:2]]])
    drawn = tensors(build(fb.PromptTuning(tokens=4)))["prompt"]
    assert all((row == rows).all(1).any() for row in drawn)  # of the vocabulary


def test_a_zero_prefix_weakens_every_head_by_what_it_takes_of_the_softmax() -> None:
    """A zero key has logit 0: outputs are those of before times Z / (Z + v)."""
    model = build(fb.PrefixTuning(tokens=6, start="zero"))
    attention = model.model.layers[0].self_attn
    seen: list[Tensor] = []
    attention.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids())
        plain = tiny.fresh(attn_implementation="eager")
        plain.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        x = plain.model.layers[0].input_layernorm(plain.model.embed_tokens(ids()))
        q, k = plain.model.layers[0].self_attn.q_proj(x), plain.model.layers[0].self_attn.k_proj(x)
        plain(input_ids=ids())
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        size = attention.head_dim
        cos, sin = plain.model.rotary_emb(x, torch.arange(9)[None])
        q, k = apply_rotary_pos_emb(q.view(2, 9, -1, size).transpose(1, 2), k.view(2, 9, -1, size).transpose(1, 2), cos, sin)
        scores = q @ k.repeat_interleave(2, 1).mT * attention.scaling
        Z = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).exp().sum(-1)  # (b, heads, t)
    share = (Z / (Z + 6)).transpose(1, 2).repeat_interleave(size, 2)
    torch.testing.assert_close(seen[0], seen[1] * share, rtol=1e-4, atol=1e-5)


def peft_of(config: Any, model: Any) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("fresh", [tiny.fresh, gpt2])
def test_prompt_tuning_is_pefts(fresh: Any) -> None:
    from peft import PromptTuningConfig

    theirs, ours = peft_of(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), fresh()), build(fb.PromptTuning(5), fresh())
    tensors(ours)["prompt"].data.copy_(theirs.prompt_encoder["default"].embedding.weight)
    same(ours, theirs)


@pytest.mark.parametrize("fresh", [tiny.fresh, gpt2])
def test_prefix_tuning_is_pefts(fresh: Any) -> None:
    from peft import PrefixTuningConfig

    theirs, ours = peft_of(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), fresh()), build(fb.PrefixTuning(5), fresh())
    table = theirs.prompt_encoder["default"].embedding.weight
    assert table.shape == tensors(ours)["prefix"].shape
    tensors(ours)["prefix"].data.copy_(table)
    same(ours, theirs)


def test_a_prefix_through_a_layer_is_pefts() -> None:
    from peft import PrefixTuningConfig

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=7)
    theirs, ours = peft_of(config, gpt2()), build(fb.PrefixTuning(5, hidden=7), gpt2())
    encoder, p = theirs.prompt_encoder["default"], tensors(ours)
    down, _, up = encoder.transform
    copied = {"embeddings": encoder.embedding.weight, "down": down.weight, "down_bias": down.bias, "up": up.weight, "up_bias": up.bias}
    for k, t in copied.items():
        p[k].data.copy_(t)
    same(ours, theirs)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_is_pefts(encoder: Any) -> None:
    from peft import PromptEncoderConfig

    kinds = {"mlp": "MLP", "lstm": "LSTM"}
    config = PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_hidden_size=7,
        encoder_reparameterization_type=kinds[encoder],
        encoder_num_layers=2,
        encoder_dropout=0.0,
    )
    theirs, ours = peft_of(config, tiny.fresh()), build(fb.PTuning(5, hidden=7, encoder=encoder))
    source, p = theirs.prompt_encoder["default"], tensors(ours)
    copied = {"embeddings": source.embedding.weight}
    for i, linear in enumerate((m for m in source.mlp_head if isinstance(m, torch.nn.Linear)), 1):
        copied |= {f"W{i}": linear.weight, f"b{i}": linear.bias}
    for layer in range(2) if encoder == "lstm" else ():
        for way, end in (("forward", ""), ("back", "_reverse")):
            for part in ("ih", "hh"):
                copied[f"{way}{layer}_{part}"] = getattr(source.lstm_head, f"weight_{part}_l{layer}{end}")
                copied[f"{way}{layer}_{part}_bias"] = getattr(source.lstm_head, f"bias_{part}_l{layer}{end}")
    assert copied.keys() == p.keys() and sum(t.numel() for t in copied.values()) == sum(t.numel() for t in p.values())
    for k, t in copied.items():
        p[k].data.copy_(t)
    same(ours, theirs)


def same(ours: Any, theirs: Any) -> None:
    """Equal logits, of rows with padding too, and equal continuations."""
    mask = torch.ones_like(ids())
    mask[1, -3:] = 0
    with torch.no_grad():
        wanted = theirs(input_ids=ids(), attention_mask=mask).logits[:, -9:]
        got = ours(input_ids=ids(), attention_mask=mask).logits
        torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-4)
    long: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    given = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
    assert torch.equal(ours.generate(**given, **long), theirs.generate(**given, **long))


@pytest.mark.parametrize("adapter", [fb.PTuning(5, hidden=7), fb.PTuning(5, hidden=7, encoder="lstm"), fb.PrefixTuning(5, hidden=7)])
def test_what_a_trained_model_needs_is_its_prompt_alone(adapter: Any, tmp_path: Path) -> None:
    model = build(adapter)
    logits, before = tiny.logits(model), sum(p.numel() for p in tensors(model).values())
    fb.save(model, tmp_path / "whole")
    assert {k for k, p in apply(tiny.fresh(), read(tmp_path / "whole")).named_parameters() if p.requires_grad} == {
        f"model.p.default.{k}" for k in tensors(model)
    }  # to go on with
    settle(model)
    numbers = 5 * 64 if isinstance(adapter, fb.PTuning) else 5 * 2 * 2 * 32
    assert sum(p.numel() for p in tensors(model).values()) == numbers < before
    torch.testing.assert_close(tiny.logits(model), logits, rtol=1e-5, atol=1e-5)
    fb.save(model, tmp_path / "prompt")
    assert sum(t.numel() for t in read(tmp_path / "prompt").adapter["model"]["default"].values()) == numbers
    assert torch.equal(tiny.logits(apply(tiny.fresh(), read(tmp_path / "prompt"))), tiny.logits(model))


def test_a_prefix_where_it_would_be_forgotten_is_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model = MistralForCausalLM(MistralConfig(vocab_size=32, sliding_window=8, **sizes))  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="MistralModel has a window of 8 tokens, behind which a prefix would be forgotten: take prompt_tuning"
    ):
        build(fb.PrefixTuning(), model)
    assert build(fb.PromptTuning(tokens=3), model) is model


def test_settings_without_meaning_are_refused() -> None:
    for wrong, message in (
        (lambda: fb.PromptTuning(tokens=0), "tokens >= 1"),
        (lambda: fb.PromptTuning(ids=()), "name some"),
        (lambda: fb.PrefixTuning(tokens=3, ids=(1, 2)), "as many as tokens"),
        (lambda: fb.PrefixTuning(hidden=-1), "hidden >= 0"),
        (lambda: fb.PTuning(hidden=0), "hidden >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_virtual_tokens_take_positions_from_rows(tmp_path: Any) -> None:
    """Of 64 learned positions 5 are the prompt's; no row is padded past the others."""
    gpt2().save_pretrained(tmp_path)
    how: dict[str, Any] = dict(candidates=[fb.NF(4, 32)], objective="weight", fast=True, dtype="float32")
    said = "puts 5 tokens before every row of up to 60, and GPT2LMHeadModel has 64 positions: set data.max_length to 59 at most"
    with pytest.raises(ValueError, match=f"PromptTuning {said}"):
        fb.plan_model(tmp_path, "6 bits", adapter=fb.PromptTuning(tokens=5), max_length=60, **how)
    levers = fb.plan_model(tmp_path, "6 bits", adapter=fb.PromptTuning(tokens=5), max_length=59, **how).levers
    assert (levers.positions, levers.padded(59)) == (59, 59)
    assert fb.plan_model(tmp_path, "6 bits", max_length=1024, **how).modules, "a longer row is the data gate's"


def test_an_answer_ends_where_the_prompt_leaves_no_positions() -> None:
    from finebits.evaluate.generate import continued

    (made,) = continued(build(fb.PromptTuning(tokens=5), gpt2()), [[7] * 50], 48, [])
    assert len(made.ids) == 64 - 5 - 50
