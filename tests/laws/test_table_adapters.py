"""Laws of adapters over tables of embeddings."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finebits as fb
import tiny_llama as tiny
from finebits.adapters.base import Base, Looks, Params
from finebits.build import hosts
from finebits.carrier import Carrier, Following, Table, looks, tables
from finebits.errors import Invalid
from finebits.evaluate.exact import float32
from finebits.export._safetensors import merged_entries
from finebits.qtensor import QTensor, dense
from finebits.store import apply, read
from finebits.tasks import base as tasks
from variants import methods, variants

NAME, RANK, V, N = "model.embed_tokens", 4, 12, 20
ALL = [
    a
    for cls in methods("adapters")
    if cls().form != "codes"
    for a in variants(cls, rank=(RANK,), indices=((7, 2),), block=(4,), reduction=(2,))
]
LOOKING = list(dict.fromkeys(a for a in ALL if isinstance(a, Looks) and a.form != "beside"))
every = pytest.mark.parametrize("adapter", LOOKING, ids=str)
few = pytest.mark.parametrize(
    "adapter", [fb.LoRA(rank=3), fb.Gated(rank=3), fb.VeRA(rank=3), fb.TrainableTokens((9, 3))], ids=lambda a: type(a).__name__
)


def moved(adapter: Any, base: Base) -> Params:
    gen = torch.Generator().manual_seed(1)
    p = adapter.buffers(base, gen) | adapter.params(base, gen, {})
    return {k: t + 0.3 * torch.randn(t.shape, generator=gen) if t.is_floating_point() else t for k, t in p.items()}


def build(adapter: Any, format: Any = None, tied: bool = True, follows: bool = False, dtype: str = "float32") -> Any:
    """A tiny Llama with the adapter over its words, in `format`, and a LoRA over every matrix."""
    specs = dict.fromkeys(tiny.names(), fb.Spec(fb.NF(4, block=32), adapter=fb.LoRA(rank=2)))
    specs = specs if format is None else {NAME: fb.Spec(format)} | specs
    plan = fb.Plan(specs, over={NAME: adapter}, tied=follows, levers=fb.Levers(dtype))
    return tiny.tuned(plan, tiny.fresh(tie_word_embeddings=tied, dtype=getattr(torch, dtype)))


def test_there_are_some_and_the_others_say_so() -> None:
    assert {fb.LoRA, fb.LoRAFA, fb.Gated, fb.VeRA, fb.LoRAXS, fb.BlockLoRA, fb.TrainableTokens} <= {type(a) for a in LOOKING}
    for adapter in (a for a in ALL if a not in LOOKING):
        with pytest.raises(Invalid, match=f"^{type(adapter).__name__} cannot lie over a table of embeddings.*take lora$"):
            looks(adapter)


@every
@pytest.mark.parametrize("format", [None, fb.NF(4, block=20)], ids=["dense", "nf4"])
def test_rows_are_rows_of_what_is_merged_and_so_are_their_gradients(adapter: Any, format: Any) -> None:
    W: Any = torch.randn(V, N)
    W = W if format is None else fb.quantize(W, format)
    ids, g = torch.tensor([[7, 2, 2], [0, V - 1, 7]]), torch.randn(2, 3, N)
    p = moved(adapter, Base(W))
    leaves = {k: p[k].requires_grad_() for k in p if k not in adapter.frozen}
    got = adapter.rows(p, ids, F.embedding(ids, W))
    wanted = F.embedding(ids, adapter.merged(p, W))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(y, [*leaves.values()], g, allow_unused=True) for y in (got, wanted))
    for k, a, b in zip(leaves, ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=k)


def test_a_class_of_tables_does_to_its_rows_what_it_did() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 3 * super().forward(input)

    words = Scaled(5, 4)
    host = Carrier.over(words, "table")
    start = {"A": torch.ones(1, 4), "B": torch.ones(5, 1)}
    host.add("default", fb.LoRA(rank=1, alpha=1), torch.Generator(), start)
    assert host is words and isinstance(words, Scaled) and isinstance(words, Table)
    torch.testing.assert_close(words(torch.tensor([2])), 3 * (words.weight[2:3] + 1))
    assert type(host.off()) is Scaled


@few
@pytest.mark.parametrize("format", [None, fb.Int(8, block=32)], ids=["dense", "int8"])
@pytest.mark.parametrize("follows", [False, True])
def test_copied_saved_loaded_and_merged(adapter: Any, format: Any, follows: bool, tmp_path: Path) -> None:
    model = build(adapter, format, follows=follows)
    logits = tiny.logits(model)
    assert torch.equal(tiny.logits(copy.deepcopy(model)), logits)
    fb.save(model, tmp_path / "saved")
    again = apply(tiny.fresh(tie_word_embeddings=True), read(tmp_path / "saved"))
    assert torch.equal(tiny.logits(again), logits) and again.finebits.plan == model.finebits.plan
    follows = follows or adapter.over == "table"
    assert isinstance(again.lm_head, Following) == isinstance(model.lm_head, Following) == follows
    state = {k: v.clone() for k, v in model.state_dict().items()}
    other = build(adapter, format, follows=follows)
    assert other.load_state_dict(state).missing_keys == [] and torch.equal(tiny.logits(other), logits)
    entries = {k: e.value() for k, e in merged_entries(model, torch.float32).items()}
    assert ("lm_head.weight" in entries) != follows
    plain = tiny.fresh(tie_word_embeddings=follows)
    plain.load_state_dict(entries, strict=False)
    torch.testing.assert_close(tiny.logits(plain), logits, rtol=0, atol=1e-4)


@few
def test_gradients_reach_the_adapters_alone_through_both_ends(adapter: Any) -> None:
    """Against the gradient of the same loss where lookup and head share one merged table."""
    model, batch = build(adapter, follows=True).train(), tiny.batches()[0]
    before = copy.deepcopy(model.state_dict())
    tasks.of(model).loss(model, batch).backward()
    host = tables(model)[NAME]
    p = {k: t.detach().clone().requires_grad_(t.requires_grad) for k, t in host.tensors("default").items()}
    W = host.kinds["default"].merged(p, host.weight)  # type: ignore[attr-defined]
    plain = tiny.fresh(tie_word_embeddings=True)
    for name, own in hosts(model):
        plain.get_submodule(name).weight.data = dense(own.stack(torch.float32).weight).detach()
    plain.model.embed_tokens.weight.data = W.detach().clone()
    plain.requires_grad_(False)
    plain.lm_head.weight.requires_grad_(True)
    tasks.of(plain).loss(plain, batch).backward()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    trained = {k: t for k, t in p.items() if t.requires_grad}
    wanted = torch.autograd.grad(W, [*trained.values()], plain.lm_head.weight.grad)
    for k, g in zip(trained, wanted, strict=True):
        torch.testing.assert_close(host.p["default"][k].grad, g, rtol=1e-3, atol=1e-3, msg=k)  # type: ignore[index]
    torch.optim.SGD([q for q in model.parameters() if q.requires_grad], 0.1).step()
    trained_names = {k for k, q in model.named_parameters() if q.requires_grad}
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])} == trained_names


@few
@pytest.mark.parametrize("format", [None, fb.NF(4, block=32)], ids=["dense", "nf4"])
def test_at_birth_it_changes_nothing(adapter: Any, format: Any) -> None:
    specs = {} if format is None else {NAME: fb.Spec(format)}
    bare = fb.build(tiny.fresh(tie_word_embeddings=True), fb.Plan(specs))
    model = fb.build(tiny.fresh(tie_word_embeddings=True), fb.Plan(specs, over={NAME: adapter}, tied=True))
    assert isinstance(model.lm_head, Following) and isinstance(model.lm_head.weight, QTensor) == (format is not None)
    torch.testing.assert_close(tiny.logits(model), tiny.logits(bare), rtol=0, atol=1e-5)


@few
def test_in_low_precision_it_stays_near_and_float32_is_what_was_trained(adapter: Any) -> None:
    wide, low = build(adapter, follows=True), build(adapter, follows=True, dtype="bfloat16")
    got = tiny.logits(low)
    assert got.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in low.parameters() if p.requires_grad)
    torch.testing.assert_close(got.float().softmax(-1), tiny.logits(wide).softmax(-1), rtol=0, atol=0.15)
    with float32(low):
        exact = tiny.logits(low)
    entries = {k: e.value() for k, e in merged_entries(low, torch.float32).items()}
    plain = tiny.fresh(tie_word_embeddings=True)
    plain.load_state_dict(entries, strict=False)
    torch.testing.assert_close(exact, tiny.logits(plain), rtol=0, atol=1e-3)
    assert torch.equal(tiny.logits(low), got)  # and all is as it was


def test_what_is_refused() -> None:
    with pytest.raises(Invalid, match="HiRA cannot lie over a table of embeddings"):
        build(fb.HiRA(rank=2))
    with pytest.raises(Invalid, match="word 128 is to be trained, and the table of embeddings has those from 0 to 127"):
        build(fb.TrainableTokens((128,)))
    with pytest.raises(Invalid, match="it names none"):
        build(fb.TrainableTokens())
    with pytest.raises(Invalid, match="each once"):
        fb.TrainableTokens((3, 3))
    words = nn.Embedding(5, 4, max_norm=1.0)
    with pytest.raises(Invalid, match="changes its rows"):
        fb.build(nn.Sequential(words), fb.Plan({}, over={"0": fb.LoRA(rank=2)}))
