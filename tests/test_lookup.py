"""Embeddings in codes: what is looked up, what a tied head makes of the same codes, and what a model with them is beside one with the dense
table."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import finebits as fb
from finebits import store
from finebits.errors import Invalid, WrongType
from finebits.evaluate.exact import float32
from finebits.evaluate.heldout import head_of
from finebits.export._safetensors import base_entries, coded_entries, merged_entries
from finebits.lookup import Lookup, Tied, put, rounded
from finebits.losses import cross_entropy
from finebits.qtensor import QTensor, dense
from finebits.tasks.causal_lm import head
from tiny_llama import batches, fresh
from tiny_llama import plan as tiny_plan

FORMATS = (
    fb.Int(8, 32, scale="fp16"),
    fb.Int(6, 32, scale="fp16"),
    fb.NF(4, 32, scale="bf16"),
    fb.NF(3, 32),
    fb.Int(4, 32, False),
    fb.Int(4, block="tensor"),
)
NAME = "model.embed_tokens"


def planned(table: Any = FORMATS[2], **more: Any) -> Any:
    """A plan of the tiny Llama with its table in codes."""
    made = tiny_plan(**more)
    return replace(made, modules={NAME: fb.Spec(table), **made.modules})


def pair(table: Any = FORMATS[2], **more: Any) -> tuple[Any, Any]:
    """A built model with a packed table, and the same with the dense table that these codes are."""
    one = fb.build(fresh(tie_word_embeddings=True), planned(table, **more))
    two = fb.build(fresh(tie_word_embeddings=True), tiny_plan(**more))
    two.model.embed_tokens.weight.data = one.model.embed_tokens.weight.dequantize()
    return one, two


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_rows_are_those_of_the_dense_table(format: Any, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINEBITS_KERNELS", kernels)
    W = torch.randn(37, 70)
    for dtype in (torch.float32, torch.bfloat16):
        q = rounded(W, fb.Spec(format), dtype)
        assert isinstance(q, QTensor) and torch.equal(dense(q), dense(fb.quantize(W, format), dtype))  # some rows at a time, or all
        for ids in (torch.tensor([[0, 36], [5, 5]]), torch.tensor(3), torch.empty(2, 0, dtype=torch.long)):
            assert torch.equal(F.embedding(ids, q), F.embedding(ids, dense(q)))


def test_rows_that_nobody_asks_for_are_not_read() -> None:
    q = rounded(torch.randn(40, 64), fb.Spec(fb.NF(4)), torch.float32)
    wanted = F.embedding(torch.tensor([3, 7]), q)
    others = torch.ones(40, dtype=torch.bool)
    others[[3, 7]] = False
    q.parts["scale"][others] = torch.nan
    assert torch.equal(F.embedding(torch.tensor([3, 7]), q), wanted)


def test_under_fake_tensors() -> None:
    q, mode = rounded(torch.randn(40, 64), fb.Spec(fb.NF(3)), torch.float32), FakeTensorMode()
    with mode:
        found = F.embedding(mode.from_tensor(torch.tensor([[1, 2, 3]])), mode.from_tensor(q))
    assert found.shape == (1, 3, 64) and found.dtype is torch.float32


@pytest.mark.parametrize("format", FORMATS[:5], ids=str)
def test_the_loss_of_a_packed_head_is_that_of_the_dense_one(format: Any) -> None:
    """A table of more rows than are multiplied at a time; loss and the gradient of the states, with and without a cap."""
    q, y = rounded(0.3 * torch.randn(1100, 64), fb.Spec(format), torch.float32), torch.randint(0, 1100, (9,))
    for more in ({}, {"scale": 0.5, "cap": 3.0}):
        states = torch.randn(9, 64)
        found = []
        for W in (q, dense(q)):
            h = states.clone().requires_grad_()
            loss = cross_entropy(h, W, y, 4, **more)
            loss.backward()
            found.append((loss.detach(), h.grad))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS[:4], ids=str)
def test_a_model_trains_over_it_as_over_the_dense_table(format: Any) -> None:
    """Losses of four steps and every gradient of the first; and there is one table."""
    one, two = pair(format)
    assert one.lm_head.weight is one.model.embed_tokens.weight and isinstance(one.lm_head, Tied) and isinstance(one.lm_head, nn.Linear)
    assert isinstance(one.model.embed_tokens, Lookup) and one.model.embed_tokens.weight.nbytes == 128 * format.storage_bits(1, 64) // 8
    losses = []
    for model in (one, two):
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
        trained = [p for p in model.parameters() if p.requires_grad]
        losses.append(fb.train(model, [[b] for b in batches() + batches()], torch.optim.SGD(trained, lr=0.1), total=4))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][3] < losses[0][1]
    batch = batches()[0]
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits for m in (one, two))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_scored_in_float32_as_its_dense_table() -> None:
    plans = [replace(p, levers=replace(p.levers, dtype="bfloat16")) for p in (planned(), tiny_plan())]
    one, two = (fb.build(fresh(dtype=torch.bfloat16, tie_word_embeddings=True), p) for p in plans)
    two.model.embed_tokens.weight.data = one.model.embed_tokens.weight.dequantize()
    ids, states = batches()[0]["input_ids"], torch.randn(5, 64)
    with torch.no_grad(), float32(one), float32(two):
        torch.testing.assert_close(one(input_ids=ids).logits, two(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head_of(head(one))(states), head_of(head(two))(states), rtol=1e-5, atol=1e-5)
    assert one.lm_head.weight.dtype is torch.bfloat16


def test_a_class_that_scales_its_rows_goes_on_doing_it() -> None:
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    words, ids = gemma.Gemma3TextScaledWordEmbedding(16, 64, 0, embed_scale=8.0), torch.tensor([[1, 5, 0]])
    q = rounded(words.weight, fb.Spec(fb.NF(4)), torch.float32)
    put(nn.Sequential(words), words, q)
    assert isinstance(words, Lookup) and isinstance(words, gemma.Gemma3TextScaledWordEmbedding)
    assert torch.equal(words(ids), 8.0 * dense(q)[ids])
    again = copy.deepcopy(words)
    assert torch.equal(again(ids), words(ids)) and again.weight is not words.weight


def test_state_dicts_hold_one_table_of_plain_parts() -> None:
    one, _ = pair()
    state = one.state_dict()
    assert {k for k in state if k.startswith((NAME, "lm_head"))} == {f"{NAME}.weight.codes", f"{NAME}.weight.scale"}
    again = fb.build(fresh(seed=1, tie_word_embeddings=True), planned())
    again.load_state_dict(state)
    twin = copy.deepcopy(again)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    assert all(torch.equal(v, state[k]) for k, v in twin.state_dict().items())
    again.to(torch.bfloat16)
    assert again.lm_head.weight is again.model.embed_tokens.weight and again.lm_head.weight.dtype is torch.bfloat16
    del state[f"{NAME}.weight.codes"]
    with pytest.raises(RuntimeError, match="model.embed_tokens.weight.codes"):
        again.load_state_dict(state)
    assert {f"{NAME}.weight", "lm_head.weight"} <= set(one._ddp_params_and_buffers_to_ignore)


def test_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    one, _ = pair(FORMATS[1])
    fb.save(one, tmp_path / "saved")
    with torch.device("meta"):
        blank = fresh(tie_word_embeddings=True)
    held = dict(fresh(tie_word_embeddings=True).named_parameters())
    for name, p in list(blank.named_parameters()):
        if "norm" in name:
            blank.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(held[name].data)
    for model in (
        store.apply(fresh(seed=2, tie_word_embeddings=True), store.read(tmp_path / "saved")),
        store.apply(blank, store.read(tmp_path / "saved")),
    ):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert all(torch.equal(v, one.state_dict()[k]) for k, v in model.state_dict().items() if "norm" not in k and "inv_freq" not in k)
    no_hosts = replace(store.read(tmp_path / "saved"), hosts={}, weights={NAME: store.read(tmp_path / "saved").weights[NAME]})
    with pytest.raises(Invalid, match="table .128, 64. of embeddings, and the model has none such"):
        store.apply(nn.ModuleDict({"model": nn.ModuleDict({"embed_tokens": nn.Embedding(64, 64)})}), no_hosts)


def test_exported_dense_where_a_layout_knows_no_table() -> None:
    one, two = pair(format=None, init=fb.Zeros())
    for entries in (base_entries, merged_entries, lambda m, d: coded_entries(m, d, lambda q: {"weight": dense(q)})):
        ours, theirs = entries(one, torch.float32), entries(two, torch.float32)
        assert ours.keys() == theirs.keys() and "lm_head.weight" not in ours
        assert all(torch.equal(ours[k].value(), theirs[k].value()) for k in ours)


def test_gguf_holds_it_where_its_blocks_do() -> None:
    from finebits.export.gguf import pieces

    linears = dict(format=fb.Int(4, 32, scale="fp16"), init=fb.Zeros())
    kinds = {f: pieces(fb.build(fresh(tie_word_embeddings=True), planned(f, **linears)), "llama") for f in (FORMATS[0], FORMATS[2])}
    assert [made["token_embd.weight"].kind for made in kinds.values()] == ["Q8_0", "F32"]
    assert all("output.weight" not in made and made["blk.0.attn_q.weight"].kind == "Q4_0" for made in kinds.values())


def test_what_cannot_be_a_table() -> None:
    with pytest.raises(WrongType, match="adapters go over nn.Linear; 0 is a LayerNorm"):
        fb.build(nn.Sequential(nn.LayerNorm(64)), fb.Plan({"0": fb.Spec(fb.NF(4))}))
    with pytest.raises(Invalid, match="0: a quantized table of embeddings is not adapted"):
        fb.build(nn.Sequential(nn.Embedding(8, 64)), fb.Plan({"0": fb.Spec(fb.NF(4), adapter=fb.LoRA())}))
    words, other = nn.Embedding(8, 64), nn.Bilinear(2, 2, 2)
    other.weight = words.weight  # type: ignore[assignment]
    with pytest.raises(Invalid, match="a Bilinear is tied to the embeddings"):
        fb.build(nn.Sequential(words, other), fb.Plan({"0": fb.Spec(fb.NF(4))}))
    with torch.no_grad():
        words.weight[3, 5] = torch.nan
    with pytest.raises(Invalid, match="0: "):
        fb.build(nn.Sequential(words), fb.Plan({"0": fb.Spec(fb.NF(4))}))
    with pytest.raises(Exception, match="max_norm would write into it"):
        F.embedding(torch.tensor([1]), fb.quantize(torch.randn(8, 64), fb.NF(4)), None, 1.0)
