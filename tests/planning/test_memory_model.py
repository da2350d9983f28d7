"""The memory model against what torch really allocates, and what each of its levers does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import finebits as fb
from finebits import kernels, registry
from finebits.build import build
from finebits.calibrate.blockwise import Shelf, blocks_of, gradients
from finebits.interop.planning import Settings, plan_model
from finebits.kernels import cpu
from finebits.kernels.cpu import buffers, products
from finebits.plan import cost, memory
from finebits.plan.levers import Levers, Workload
from finebits.plan.seen import Batch, Curve
from finebits.stream import Flow
from finebits.tasks.causal_lm import CausalLM, head, states
from tiny_llama import geometry_of, llama_config
from variants import variants

FORMAT = fb.NF(4, block=32)
GEOMETRY = geometry_of(llama_config(32, 4096, 14336, 32, 8, 128256))[1]
TRAINED = memory.Trained(41_943_040, 0, 16)
LEVERS: dict[str, Any] = dict(
    dtype="bfloat16",
    device="cuda",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    max_length=2048,
    gradient_checkpointing=True,
    loss_chunk=256,
)


def llama(dtype: str, attention: str, layers: int = 4) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4)
    config = LlamaConfig(vocab_size=2048, **sizes, tie_word_embeddings=True, attn_implementation=attention)  # type: ignore[arg-type]
    return LlamaForCausalLM(config).to(getattr(torch, dtype))


def allocated(model: Any, levers: Levers) -> int:
    """The most bytes that a second training step holds above the model."""
    b, t = levers.per_device_train_batch_size, levers.max_length
    if levers.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # the name that is coming
        enable({"use_reentrant": False})
    model.train()
    ids = torch.randint(3, 2048, (b, t))
    mask = torch.ones_like(ids)
    mask[0, -5:] = 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=False)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        for _ in range(2):
            CausalLM().loss(model, {"input_ids": ids, "attention_mask": mask, "labels": ids}, levers.loss_chunk).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return most(found)


def most(found: Any) -> int:
    """The most bytes that were held at a time while a profile was made."""
    held = highest = 0
    for e in sorted((e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += e.nbytes()
        highest = max(highest, held)
    return highest


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    ("adapter", "dtype", "attention", "checkpointing", "chunk"),
    [
        (fb.LoRA(rank=8), "bfloat16", "sdpa", True, 16),
        (fb.LoRA(rank=8), "bfloat16", "sdpa", False, 16),
        (fb.LoRA(rank=8), "float32", "sdpa", True, 256),
        (fb.LoRA(rank=8), "float32", "eager", False, 16),
        (fb.RandLoRA(basis=16), "bfloat16", "sdpa", True, 16),  # whose bases are there once, and are cast by every host
        (fb.PaCA(rank=8), "bfloat16", "sdpa", False, 16),
    ],
    ids=str,
)
def test_terms_are_what_torch_allocates(
    adapter: Any, dtype: str, attention: str, checkpointing: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels.chosen("linear", torch.device("cpu"), 4) is not cpu:
        pytest.skip("the terms are those of the native kernels, which were not compiled here or are switched off")
    monkeypatch.setattr(buffers, "_kept", {})  # a panel that an earlier test left would not be allocated again
    model = llama(dtype, attention, 2 if isinstance(adapter, fb.RandLoRA) else 4)  # whose sums of bases take most of its time
    shapes, g = geometry_of(model.config, adapter, dtype, 128, attention)
    plan = fb.Plan({n: fb.Spec(format=FORMAT, adapter=adapter) for n in shapes}, levers=fb.Levers(dtype=dtype))
    build(model, plan)
    more = dict(device="cpu", dtype=dtype, max_length=128, gradient_checkpointing=checkpointing, loss_chunk=chunk, runtime=0)
    w = work(**more, attn_implementation=attention)
    adapters = [(adapter, shape) for shape in shapes.values()]
    trained = memory.Trained(*cost.together(adapters), adapter.rank, cost.again(adapters))
    found = memory.terms(g, 0, trained, w)
    there = ["embeddings", "head", "norms and other", "adapters", "frozen factors"]
    if products.most_tokens(getattr(torch, dtype)) == math.inf:
        there.append("dense scratch")  # the library's own product takes it outside torch's allocator
    planned = sum(found.values()) - sum(found[k] for k in there)
    assert planned == pytest.approx(allocated(model, w.levers), rel=0.1)


def work(**more: Any) -> Workload:
    return Workload.of(LEVERS | more)


def peak(g: memory.Geometry = GEOMETRY, trained: memory.Trained = TRAINED, **levers: Any) -> int:
    return sum(memory.terms(g, 0, trained, work(**levers)).values())


@pytest.mark.parametrize(
    "change",
    [
        dict(per_device_train_batch_size=2),
        dict(max_length=1024),
        dict(optim="adamw_bnb_8bit"),
        dict(batches={"4": {"worst": [[512, 700]], "widths": 3}}),
        dict(runtime=2**20),
    ],
    ids=str,
)
def test_what_saves_memory(change: dict[str, Any]) -> None:
    assert peak(**change) < peak()


@pytest.mark.parametrize("change", [dict(gradient_checkpointing=False), dict(dtype="float32")], ids=str)
def test_what_takes_memory(change: dict[str, Any]) -> None:
    assert peak(**change) > peak()


def test_scores_and_dropout_take_memory() -> None:
    config = llama_config(2, 64, 96, 4, 2, 128)
    plain = geometry_of(config)[1]
    assert peak(geometry_of(config, attention="eager")[1]) > peak(plain) + 4 * 4 * 2 * 2048**2  # scores of 4 rows and 4 heads, twice
    _, dropped = geometry_of(config, dropout=0.1)
    more = dropped.observed.kept(Batch(4, 2048, 0)) - plain.observed.kept(Batch(4, 2048, 0))
    assert more >= 2 * 4 * 2048 * (6 * 64 + 96) * 3  # what adapters are fed, in 16 bits, and where it was dropped


@pytest.mark.parametrize("name", registry.names("adapters"))
def test_every_adapter_is_seen(name: str) -> None:
    adapter: Any = next(variants(registry.load("adapters", name), rank=(4,), gated=(True,)))
    adapter = replace(adapter, heads=(4, 2)) if hasattr(adapter, "heads") else adapter  # which planning fills in
    seen = geometry_of(llama_config(2, 64, 96, 4, 2, 128), adapter, longest=32)[1].observed
    held = seen.kept(Batch(2, 32, 0))
    if adapter.over != "matrix":
        assert seen.rank == 0 and held > 0  # how much: test_over.py
        return
    wanted = 4 if name == "s2ft" else 14  # o and down of two blocks
    assert seen.adapted == wanted and seen.rank == adapter.rank and held > 2 * 32 * 14 * 4 * 2  # their inner values, and more


def test_what_was_seen_of_two_lengths_bounds_all_between() -> None:
    """The larger of a moment that grows with t and of one that grows with t²."""
    true = lambda b, t: b * max(1000 * t, 9 * t * t)  # noqa: E731
    curve = Curve((8, 32, 256, 1024), *(tuple(true(b, t) / (b * t) for t in (8, 32, 256, 1024)) for b in (1, 2)))
    for b in (1, 2, 3, 8):
        assert all(0 <= curve(Batch(b, t, 0)) - true(b, t) <= 1 for t in curve.tokens)
        assert all(curve(Batch(b, t, 0)) >= true(b, t) for t in range(1, 2048, 37))
    written = json.loads(json.dumps(GEOMETRY.to_json()))
    assert written == GEOMETRY.to_json() and memory.Geometry.of(written) == GEOMETRY


def test_the_loss_is_a_moment_of_its_own() -> None:
    chunks = [memory.moments(GEOMETRY, 0, TRAINED, work(loss_chunk=n)) for n in (256, 8192)]
    assert chunks[0]["loss"]["loss chunk"] < chunks[1]["loss"]["loss chunk"] and peak(loss_chunk=8192) > peak() == peak(loss_chunk=64)


def test_gradients_are_there_at_the_loss_where_they_are_added_up() -> None:
    one, many = (memory.moments(GEOMETRY, 0, TRAINED, work(gradient_accumulation_steps=n)) for n in (1, 4))
    assert "gradients" not in one["loss"] and many["loss"]["gradients"] == 4 * TRAINED.trained


def test_counted_batches_never_exceed_the_rows() -> None:
    counted = {"4": {"worst": [[1024, 10**6], [4096, 50]], "widths": 2}}
    sizes = lambda **more: [batch[:4] for batch in memory.batches(work(**more))]  # noqa: E731
    assert sizes(batches=counted) == [(4, 1024, 4096, 2), (4, 2048, 50, 2)]
    assert sizes(device="cpu", max_length=65) == [(4, 128, 512, 2)]
    assert sizes(batches={"2": counted["4"]}) == [(4, 2048, 8192, 4)]  # counted for another micro-batch
    each = [peak(loss_chunk=8192, batches={"4": {"worst": [p], "widths": 2}}) for p in counted["4"]["worst"]]  # type: ignore[index]
    assert peak(loss_chunk=8192, batches=counted) == max(each)


def test_the_optimizer_has_no_state_before_its_first_step() -> None:
    """A run takes its widest batch first: what is met in the first step alone is met without moments, and those are made when it ends."""
    met = [(64, 9), (32, 5), (32, 7)]
    assert memory.worst(met, first=1) == {(32, 7, 2): 2, (64, 9, 1): 0}
    assert memory.worst([(64, 9), (64, 9)], first=1) == {(64, 9, 1): 1}
    assert memory.worst([(32, 5), (64, 9)], first=2) == {(64, 9, 2): 1}
    first, later = memory.batches(work(batches={"4": {"worst": [[64, 9, 1, 1], [64, 9, 1]], "widths": 1}}))
    one, other = (memory.moments(GEOMETRY, 0, TRAINED, work(), batch) for batch in (first, later))
    assert one["loss"]["optimizer"] == 0 < one["step"]["optimizer"] and one["step"] == other["step"]
    assert {k: v for k, v in one["loss"].items() if k != "optimizer"} == {k: v for k, v in other["loss"].items() if k != "optimizer"}


def test_every_width_of_a_batch_leaves_code_behind() -> None:
    few, many = ({"device": "cpu", "batches": {"4": {"worst": [[64, 9]], "widths": n}}} for n in (1, 4))
    assert peak(**many) - peak(**few) == 3 * memory.PER_WIDTH
    assert memory.runtime(work(runtime=7), 4) == 7
    probed = work(device="cpu", runtime=50 * 2**20, batches={"4": {"worst": [[320, 9, 1], [64, 9, 3]], "widths": 3}})
    assert memory.runtime(probed) == 50 * 2**20 == memory.runtime(probed, 1) + 2 * memory.PER_WIDTH


def test_code_that_is_not_there_yet_is_not_counted() -> None:
    """A run takes its widest batch first: then the library has met one width alone."""
    met = [(320, 271), (192, 70), (192, 72), (128, 47), (192, 38), (256, 163)]
    assert memory.worst(met) == {(256, 163, 4): 5, (320, 271, 1): 0}
    assert memory.worst([*met, *met]) == {(320, 271, 4): 6}  # in the second epoch all of it is there
    assert memory.worst([(64, 5), (64, 9), (64, 9)]) == {(64, 9, 1): 2}
    first, last = ({"4": {"worst": [[320, 271, n]], "widths": 4}} for n in (1, 4))
    both = {"4": {"worst": [[319, 163, 4], [320, 271, 1]], "widths": 4}}
    assert peak(device="cpu", batches=first) < peak(device="cpu", batches=both) < peak(device="cpu", batches=last)
    many = [(64 * (1 + i % 7), (i * 7919) % 4096) for i in range(100_000)]
    assert len(memory.worst(many)) < 40


def test_frozen_factors_are_held() -> None:
    xs = fb.LoRAXS(rank=64)
    assert xs.stored(4096, 14336) == 64 * (4096 + 14336) and fb.LoRA().stored(4096, 14336) == 0
    less = memory.Trained(64**2, 0, 64)
    more = replace(less, frozen=64 * (4096 + 14336))
    assert peak(trained=more) - peak(trained=less) >= 4 * more.frozen
    assert memory.terms(GEOMETRY, 0, more, work())["frozen factors"] == 4 * more.frozen


def test_published_arithmetic_of_a_65b_model_in_48_gib() -> None:
    """QLoRA's headline: NF4 with double quantization at 4.127 bits, 65B, rank 64, one row of 512 tokens at a time, on one card of 48 GB. Its
    optimizer's state may leave the card; here it has 8 bits."""
    hidden, wide, layers = 8192, 22016, 80
    linears = layers * (4 * hidden**2 + 3 * hidden * wide)
    _, g = geometry_of(llama_config(layers, hidden, wide, 64, 64, 32000), fb.LoRA(rank=64), longest=512)
    adapters = 64 * layers * (4 * 2 * hidden + 3 * (hidden + wide))
    levers = dict(max_length=512, per_device_train_batch_size=1, optim="adamw_bnb_8bit")
    assert 44e9 < linears * 4.127 / 8 + peak(g, memory.Trained(adapters, 0, 64), **levers) < 48e9


SWEPT = {
    "sweep": (fb.GPTQ(), [], "sweep"),
    "block": (fb.RTN(), [fb.ApiQ(epochs=1)], "collect"),
    "sweep and block": (fb.GPTQ(), [fb.ApiQ(epochs=1)], "sweep"),
    "block with scales": (fb.RTN(), [fb.ApiQ(epochs=1, scales=1e-3)], "collect"),
    "block with clipping": (fb.RTN(), [fb.ApiQ(epochs=1, clip=1e-3)], "collect"),
    "block with weights": (fb.RTN(), [fb.EfficientQAT(epochs=1)], "collect"),
    "model": (fb.RTN(), [fb.LREC(epochs=1)], "collect"),
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("sweep", "float32"),
        pytest.param("block", "bfloat16", marks=pytest.mark.every),  # "sweep and block" stands for it
        ("sweep and block", "bfloat16"),
        ("block with scales", "float32"),
        ("block with clipping", "float32"),
        ("block with weights", "float32"),
        ("model", "float32"),
    ],
)
def test_a_start_that_goes_through_the_blocks(kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch allocates while a small Llama is swept and refined, against the phase `start` of its plan less the process."""
    if kernels.chosen("linear", torch.device("cpu"), 4) is not cpu:
        pytest.skip("the terms are those of the native kernels, which were not compiled here or are switched off")
    monkeypatch.setattr(buffers, "_kept", {})
    quantizer, refine, calibration = SWEPT[kind]
    format = fb.Int(4, block=32) if "weights" in kind else FORMAT
    model, adapter = llama(dtype, "sdpa"), fb.LoRA(rank=8)
    tokens = 64 if dtype == "bfloat16" else 128  # many processors take a hundred times as long for a product in bfloat16
    shapes, g = geometry_of(model.config, adapter, dtype, tokens)
    specs = {n: fb.Spec(format, quantizer, adapter) for n in shapes}
    weights = {n: model.get_submodule(n).weight.data for n in shapes}
    for n, W in weights.items():
        model.get_submodule(n).weight = torch.nn.Parameter(torch.empty_like(W, device="meta"), requires_grad=False)
    ids = torch.randint(3, 2048, (3, 4, tokens), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]
    plan = fb.Plan(specs, levers=fb.Levers(dtype=dtype))
    read = lambda n: weights[n].clone()  # noqa: E731
    inputs = "built" if calibration == "sweep" else "unquantized"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        fb.sweep(model, plan, batches, states, inputs=inputs, refine=refine, head=head(model), read=read)
    w = work(device="cpu", dtype=dtype, max_length=tokens, calibration=calibration, calibration_rows=12)
    w = replace(w, start=replace(w.start, refine=tuple(refine)))
    trained = memory.Trained(sum(adapter.size(m, n) for m, n in shapes.values()), 0, 8)
    statistics = [cost.statistics_bytes(quantizer.needs, m, n) for name, (m, n) in shapes.items() if ".0." in name]
    dense = sum(m * n for m, n in shapes.values()) * w.levers.width
    stored = sum(format.storage_bits(m, n) // 8 for m, n in shapes.values()) + 4 * trained.trained
    scales = sum(cost.scales(format, *s) for n, s in shapes.items() if ".0." in n)
    planned = stored + memory.starting(g, dense, trained, w, memory.Swept(sum(statistics), max(statistics), scales=scales))
    assert 0.75 * planned < most(found) < 1.05 * planned


def test_gradients_that_come_back_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch allocates while gradients of a small Llama are gathered, against the moment of the phase `start` that is this."""
    monkeypatch.setattr(buffers, "_kept", {})
    model = llama("float32", "sdpa")
    shapes, g = geometry_of(model.config, fb.LoRA(rank=1), "float32", 128)
    blocks, weights = blocks_of(model.requires_grad_(False)), {n: p.data for n, p in model.named_parameters()}
    for n in shapes:
        model.get_submodule(n).weight = torch.nn.Parameter(torch.empty_like(weights[f"{n}.weight"], device="meta"), requires_grad=False)
    ids = torch.randint(3, 2048, (4, 1, 128), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i.clone()} for i in ids]
    wanted = dict.fromkeys(shapes, fb.LoRAGA().needs)
    shelf = Shelf()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        flow = Flow(model, blocks, batches, CausalLM().loss)
        for seen in gradients(flow, wanted, lambda i: batches[i]["attention_mask"].bool(), lambda n: weights[n].clone()):
            shelf.add(seen)
    assert set(shelf) == set(shapes)
    w = work(device="cpu", dtype="float32", max_length=128, calibration_rows=4, loss_chunk=128, per_device_train_batch_size=1)
    sizes = [cost.statistics_bytes(fb.LoRAGA().needs, m, n) for name, (m, n) in shapes.items() if ".0." in name]
    dense = sum(m * n for m, n in shapes.values()) * 4
    planned = memory.returning(g, dense, memory.Trained(), w, memory.Swept(sum(sizes), max(sizes), True))
    assert 0.7 * planned < most(found) < 1.05 * planned


def test_plans_price_the_start_that_they_make() -> None:
    config = Path(__file__).parent.parent.parent / "recipes" / "configs" / "llama-3.1-8b"
    given: dict[str, Any] = dict(
        formats=(fb.NF(4, 64, "bf16"),),
        max_length=1024,
        dtype="bfloat16",
        init=fb.Zeros(),
        per_device_train_batch_size=2,
        calibration_rows=16,
    )
    rows = lambda **more: plan_model(config, None, None, Settings(**given | more), fast=True).rows  # noqa: E731
    plain, refined = rows(), rows(refine=(fb.ApiQ(),))
    assert "start" not in plain and "start" not in rows(calibration="sweep")  # nothing that needs statistics: nothing is swept
    same = plain.keys() - {"load", "eval"}  # what works on one matrix is not there once more after a start; code of its widths is
    assert refined["eval"] >= plain["eval"]
    assert refined["start"] > plain["load"] > refined["load"] and {k: refined[k] for k in same} == {k: plain[k] for k in same}
    few, many = (rows(refine=(fb.ApiQ(),), calibration_rows=n)["start"] for n in (8, 16))
    # the states of so many rows wait in a file; code of one width more is there where bfloat16 is multiplied as it is
    assert 0 <= many - few < 8 * 1024 * 4096 * 2
    logits = rows(refine=(fb.RILQ(chunk=2048),))["start"] - rows(refine=(fb.RILQ(truth=0.0),))["start"]
    assert logits > 2**30
    swept, collected = (rows(calibration=kind, quantizer=fb.GPTQ())["start"] for kind in ("sweep", "collect"))
    assert min(swept, collected) > plain["load"] + 4 * 14336**2  # one block's at a time either way
