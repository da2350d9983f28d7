"""Laws of adapters over what is no matrix: feed-forward sublayers, attention, networks."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
import tiny_llama as tiny
from finebits import registry
from finebits.adapters.base import Adapter
from finebits.anatomy import found
from finebits.build import all_hosts, hosts
from finebits.carrier import Carrier, carriers
from finebits.errors import Invalid
from finebits.export._peft import portable
from finebits.export._safetensors import merged_entries
from finebits.qtensor import QTensor
from finebits.store import apply, read
from finebits.tasks import base as tasks
from variants import methods

ADAPTERS: list[Any] = [
    fb.MixLoRA(rank=3, alpha=6.0, experts=4),
    fb.Bottleneck(position="feed_forward", reduction=8, activation="gelu", scaling="channels", start="zero_up"),
    fb.BiAdaptFormer(units=5),
    fb.PromptTuning(tokens=5),
    fb.PrefixTuning(tokens=5),
    fb.PrefixTuning(tokens=5, hidden=7),
    fb.PTuning(tokens=5, hidden=7),
    fb.PTuning(tokens=5, hidden=7, encoder="lstm"),
]
every = pytest.mark.parametrize(
    "adapter", ADAPTERS, ids=lambda a: f"{type(a).__name__}-{getattr(a, 'hidden', '')}{getattr(a, 'encoder', '')}"
)


def build(adapter: Any, format: Any = None, dtype: str = "float32", **more: Any) -> Any:
    """A tiny Llama with the adapter wherever it may lie, every matrix in `format`."""
    model = tiny.fresh(dtype=getattr(torch, dtype), **more)
    plan = fb.Plan(
        dict.fromkeys(tiny.names(), fb.Spec(format)), over=dict.fromkeys(found(model, adapter.over), adapter), levers=fb.Levers(dtype)
    )
    return fb.build(model, plan)


def moved(model: Any, seed: int = 1) -> Any:
    """Tensors somewhere on the way."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, host in carriers(model):
            for p in host.p.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=gen))
    return model


def trained(model: Any) -> dict[str, nn.Parameter]:
    return {k: p for k, p in model.named_parameters() if p.requires_grad}


def loss(model: Any, batch: Any) -> Tensor:
    return tasks.of(model).loss(model, batch)


def gradients(model: Any, batch: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model, batch).backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def test_there_are_some() -> None:
    assert {a.over for a in ADAPTERS} == {"feed_forward", "attention", "model"}
    assert {type(a) for a in ADAPTERS} >= {cls for cls in methods("adapters") if cls().over not in ("matrix", "table")}


@every
def test_it_says_what_it_is_and_holds_what_it_says(adapter: Any) -> None:
    assert isinstance(adapter, Adapter) and adapter.form == "beside" and not hasattr(adapter, "merged")
    assert registry.from_json("adapters", registry.to_json(adapter)) == adapter
    model = build(adapter)
    places = found(model, adapter.over)
    assert dict(carriers(model)).keys() == places.keys() and not list(hosts(model))[0][1].active
    for name, host in carriers(model):
        shapes = adapter.shapes(*places[name])
        assert {k: tuple(t.shape) for k, t in host.tensors("default").items()} == shapes and host.size == places[name]
        assert adapter.size(*places[name]) + adapter.stored(*places[name]) == sum(math.prod(s) for s in shapes.values())
    assert sum(p.numel() for p in trained(model).values()) == sum(adapter.size(*s) for s in places.values())


@every
def test_the_seed_is_all_that_it_is_born_from(adapter: Any) -> None:
    first = {k: p.clone() for k, p in trained(build(adapter)).items()}
    torch.manual_seed(99)
    assert all(torch.equal(p, first[k]) and p.dtype == torch.float32 for k, p in trained(build(adapter)).items())


@every
def test_at_birth_it_changes_nothing_where_it_says_so(adapter: Any) -> None:
    same = torch.allclose(tiny.logits(build(adapter)), tiny.logits(tiny.fresh()), atol=1e-5)
    assert same == (adapter.over == "feed_forward" and getattr(adapter, "identity_at_birth", True))


@every
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_gradients_reach_every_parameter_and_the_packed_base_stays(adapter: Any, bits: int) -> None:
    model = moved(build(adapter, fb.NF(bits, block=32))).train()
    assert all(isinstance(host.weight, QTensor) for _, host in hosts(model))
    before = copy.deepcopy(model.state_dict())
    batch = tiny.batches()[0]
    grads = gradients(model, batch)
    assert grads.keys() == trained(model).keys() and all(g.abs().max() > 0 for g in grads.values())
    torch.optim.SGD(trained(model).values(), 0.1).step()
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])} == trained(model).keys()


@every
@pytest.mark.parametrize("bits", [16, 2])
def test_two_micro_batches_are_one(adapter: Any, bits: int) -> None:
    model, batch = moved(build(adapter, None if bits == 16 else fb.NF(bits, block=32))).train(), tiny.batches()[0]
    whole = gradients(model, batch)
    model.zero_grad()
    for rows in (slice(0, 1), slice(1, None)):
        loss(model, {k: v[rows] for k, v in batch.items()}).backward()
    for k, p in trained(model).items():
        assert float((p.grad - whole[k]).norm()) <= 2e-6 * float(whole[k].norm()), k


@every
@pytest.mark.parametrize("bits", [16, 3])
def test_checkpointing_changes_nothing(adapter: Any, bits: int) -> None:
    model, batch = moved(build(adapter, None if bits == 16 else fb.NF(bits, block=32))).train(), tiny.batches()[0]
    plain = gradients(model, batch)
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = gradients(model, batch)
    assert all(torch.allclose(plain[k], again[k], rtol=1e-4, atol=1e-4) for k in plain) and plain.keys() == again.keys()


@every
def test_in_low_precision_it_stays_near(adapter: Any) -> None:
    wide, low = moved(build(adapter)), moved(build(adapter, dtype="bfloat16"))
    got = tiny.logits(low)
    assert got.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in trained(low).values())
    torch.testing.assert_close(got.float().softmax(-1), tiny.logits(wide).softmax(-1), rtol=0, atol=0.15)
    assert all(g.isfinite().all() for g in gradients(low.train(), tiny.batches()[0]).values())


@every
def test_it_can_be_copied_saved_and_loaded(adapter: Any, tmp_path: Path) -> None:
    model = moved(build(adapter, fb.NF(3, block=32)))
    twin, logits = copy.deepcopy(model), tiny.logits(model)
    assert torch.equal(tiny.logits(twin), logits)
    moved(twin, 7)
    assert not torch.equal(tiny.logits(twin), logits) and torch.equal(tiny.logits(model), logits)
    fb.save(model, tmp_path / "saved")
    again = apply(tiny.fresh(), read(tmp_path / "saved"))
    assert torch.equal(tiny.logits(again), logits) and trained(again).keys() == trained(model).keys()
    assert fb.Plan.from_json(model.finebits.plan.to_json()) == model.finebits.plan == again.finebits.plan
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert not any(twin.load_state_dict(state)) and torch.equal(tiny.logits(twin), logits)
    (tmp_path / "saved" / "adapter.safetensors").unlink()
    with pytest.raises(Invalid, match=r"adapter\.safetensors"):
        read(tmp_path / "saved")


@every
def test_generation_is_the_same_with_a_cache_and_beside_padding(adapter: Any) -> None:
    model, ids = moved(build(adapter)), torch.randint(3, 128, (2, 6))
    long = {"max_new_tokens": 5, "do_sample": False}
    made = model.generate(ids, **long)
    assert torch.equal(model.generate(ids, use_cache=False, **long), made)
    ahead, mask = torch.zeros(2, 3, dtype=ids.dtype), torch.ones_like(ids)
    padded = model.generate(torch.cat([ahead, ids], 1), attention_mask=torch.cat([ahead, mask], 1), **long)
    assert torch.equal(padded[:, 3:], made)
    with torch.no_grad():
        out = model(input_ids=ids[:, :4])
        more = model(input_ids=ids[:, 4:], past_key_values=out.past_key_values)
        whole = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    torch.testing.assert_close(torch.cat([out.logits, more.logits], 1), whole.logits, rtol=1e-4, atol=1e-4)
    assert whole.logits.shape[:2] == ids.shape and all(h.shape[:2] == ids.shape for h in whole.hidden_states)


@every
def test_padding_at_the_end_changes_no_loss(adapter: Any) -> None:
    model, batch = moved(build(adapter)), tiny.batches()[0]
    wider = {k: nn.functional.pad(v, (0, 4), value=-100 if k == "labels" else 0) for k, v in batch.items()}
    torch.testing.assert_close(loss(model, wider), loss(model, batch), rtol=1e-5, atol=1e-4)


@every
def test_off_it_leaves_the_model(adapter: Any) -> None:
    model = moved(build(adapter))
    for _, host in list(carriers(model)):
        with pytest.raises(Invalid, match="there is an adapter over it already"):
            host.add("other", adapter, torch.Generator())
        host.active = []
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.fresh()))
    for _, host in list(carriers(model)):
        host.off()
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.fresh())) and not trained(model) and not list(carriers(model))
    assert all(not isinstance(m, Carrier) and not m._forward_pre_hooks for m in model.modules())


@every
def test_it_exports_as_no_weight(adapter: Any) -> None:
    model = build(adapter)
    with pytest.raises(Invalid, match=f"{type(adapter).__name__} cannot be exported as plain LoRA because it depends on its input"):
        portable(model)
    with pytest.raises(Invalid, match=f"{type(adapter).__name__} depends on its input and cannot be merged"):
        merged_entries(model, torch.float32)


@every
def test_a_place_that_is_none_is_refused(adapter: Any) -> None:
    spec = fb.Spec(adapter=adapter)
    with pytest.raises(Invalid, match="lies over no matrix"):
        fb.build(tiny.fresh(), fb.Plan({tiny.names()[0]: spec}))
    with pytest.raises(Invalid, match=r"nowhere, and the model has no such module"):
        fb.build(tiny.fresh(), fb.Plan({}, over={"nowhere": adapter}))
    with pytest.raises(Invalid, match=r"^lm_head: a Linear is no"):
        fb.build(tiny.fresh(), fb.Plan({}, over={"lm_head": adapter}))
    if not adapter.drops:
        with pytest.raises(Invalid, match="dropout of the inputs has no meaning"):
            fb.build(
                tiny.fresh(), fb.Plan({}, over=dict.fromkeys(found(tiny.fresh(), adapter.over), adapter), levers=fb.Levers(dropout=0.1))
            )
    with pytest.raises(Invalid, match="lies over matrices"):
        fb.build(tiny.fresh(), fb.Plan({}, over={"model": fb.LoRA()}))


@every
def test_it_learns(adapter: Any) -> None:
    model, batch = build(adapter, fb.NF(4, block=32)), tiny.batches()[0]
    losses = fb.train(model, [[batch]] * 12, torch.optim.AdamW(trained(model).values(), 0.03), total=12)
    assert losses[-1] < losses[0] - 0.02
    assert all(isinstance(host, Carrier) or not host.active for _, host in all_hosts(model))
