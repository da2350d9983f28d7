"""Block by block: the same model as build makes, statistics of what the built blocks give, and refinements that move adapters alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import finebits as fb
import tiny_llama
from finebits.build import hosts
from finebits.calibrate.blockwise import blocks_of, measure
from finebits.qtensor import QTensor
from finebits.refine._family import descend
from finebits.refine.base import Matching
from finebits.stats.gram import Gram
from finebits.stream import Flow


def run(model: Any, batch: Any) -> torch.Tensor:
    return model.base_model(input_ids=batch["input_ids"], use_cache=False)[0]


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    gen = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, 128, (2, 24), generator=gen)} for _ in range(count)]


def plan(init: Any = None, **more: Any) -> fb.Plan:
    return tiny_llama.plan(**{"format": fb.NF(2, block=32), "init": init or fb.QERA()} | more)


def same(a: Any, b: Any) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def test_without_data_a_sweep_is_build() -> None:
    made = plan(fb.LoftQ(steps=1))
    swept = fb.sweep(tiny_llama.fresh(), made, batches(), run)
    built = fb.build(tiny_llama.fresh(), made)
    assert same(swept, built)
    trained = lambda model: [n for n, p in model.named_parameters() if p.requires_grad]  # noqa: E731
    assert trained(swept) == trained(built) and len(trained(built)) == 2 * len(made.modules)
    assert swept.finebits.plan == made
    ignored = swept._ddp_params_and_buffers_to_ignore
    assert len(ignored) == len(set(ignored)) == len(made.modules)


def test_unquantized_inputs_are_those_of_collect() -> None:
    made = plan()
    stats = fb.collect(tiny_llama.fresh(), batches(), lambda m, b: run(m, b).sum(), fb.needs(made))
    swept = fb.sweep(tiny_llama.fresh(), made, batches(), run, inputs="unquantized")
    built = fb.build(tiny_llama.fresh(), made, stats)
    for (name, a), (_, b) in zip(hosts(swept), hosts(built), strict=True):
        torch.testing.assert_close(a.weight.dequantize(), b.weight.dequantize())
        x = torch.randn(5, a.in_features)
        torch.testing.assert_close(a(x), b(x), rtol=1e-3, atol=1e-3, msg=name)


def test_built_inputs_are_what_the_built_blocks_give() -> None:
    made, model = plan(), tiny_llama.fresh()
    swept = fb.sweep(model, made, batches(), run)
    blocks = blocks_of(swept, made.modules)
    half = tiny_llama.fresh()
    half.model.layers[0] = swept.model.layers[0]
    flow = Flow(half, blocks, batches(), run)
    states = flow.entered()
    flow.walk(states, blocks[0])
    name = f"{blocks[1]}.self_attn.q_proj"
    first = swept.get_submodule(name)
    seen = measure(flow, blocks[1], states, {name: frozenset({Gram})}, lambda i: None)
    again = fb.build(tiny_llama.fresh(), replace(made, modules={name: made.modules[name]}), seen).get_submodule(name)
    torch.testing.assert_close(again.weight.dequantize(), first.weight.dequantize())
    product = lambda host: host.p["default"]["B"] @ host.p["default"]["A"]  # noqa: E731
    torch.testing.assert_close(product(again), product(first), rtol=1e-3, atol=1e-4)


def test_the_pass_that_records_computes_nothing() -> None:
    model = tiny_llama.fresh()
    for name in tiny_llama.names():
        model.get_submodule(name).weight = torch.nn.Parameter(torch.empty(1, device="meta"))
    entered = Flow(model, ["model.layers.0", "model.layers.1"], batches(), run).entered()
    assert torch.equal(entered[0], model.get_input_embeddings()(batches()[0]["input_ids"]))
    assert "forward" not in vars(model.model.layers[0])


def divergence(model: Any) -> float:
    """KL from the unquantized model on other text."""
    gen = torch.Generator().manual_seed(9)
    ids = torch.randint(3, 128, (8, 24), generator=gen)
    with torch.no_grad():
        log_q, log_p = (m(input_ids=ids).logits.log_softmax(-1) for m in (model, tiny_llama.fresh()))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(
    "refine", [(fb.ApiQ(epochs=3, lr=5e-3),), (fb.LREC(epochs=3, lr=5e-3),), (fb.RILQ(epochs=3, lr=5e-3, truth=0.0),)], ids=str
)
def test_refining_moves_adapters_alone_and_helps_on_other_text(refine: tuple) -> None:
    text, made = batches(24), plan(fb.Zeros(), format=fb.NF(3, block=32), adapter=fb.LoRA(32, 32.0))
    plain = fb.sweep(tiny_llama.fresh(), made, text, run)
    told: dict[str, list[float]] = {}
    model = tiny_llama.fresh()
    refined = fb.sweep(model, made, text, run, refine=refine, head=model.lm_head, watch=told.__setitem__)
    assert all(losses[-1] < losses[0] for losses in told.values())
    assert set(refined.finebits.refined) == set(told) and all(last < first for first, last in refined.finebits.refined.values())
    assert divergence(refined) < 0.98 * divergence(plain)
    assert [n for n, p in refined.named_parameters() if p.requires_grad] == [n for n, p in plain.named_parameters() if p.requires_grad]
    assert all(p.grad is None for p in refined.parameters())
    first = {k: v for k, v in plain.state_dict().items() if "layers.0" in k and ".p." not in k}
    assert all(torch.equal(v, refined.state_dict()[k]) for k, v in first.items()), "codes and scales stay as they are"
    assert all(isinstance(h.weight, QTensor) for _, h in hosts(refined))


def test_errors_say_what_to_do() -> None:
    with pytest.raises(ValueError, match="give stats=collect"):
        fb.sweep(tiny_llama.fresh(), plan(fb.LQLoRA(weighting="fisher")), batches(), run)
    with pytest.raises(ValueError, match="no head came"):
        fb.sweep(tiny_llama.fresh(), plan(fb.LoftQ(steps=1)), batches(), run, refine=(fb.RILQ(),))
    with pytest.raises(ValueError, match="no nn.ModuleList"):
        blocks_of(tiny_llama.fresh(), ["lm_head"])
    with pytest.raises(ValueError, match="epochs above 0"):
        fb.ApiQ(epochs=0)
    with pytest.raises(ValueError, match="none came"):
        fb.sweep(tiny_llama.fresh(), plan(), [], run)


def test_a_refinement_that_loses_is_undone() -> None:
    told: dict[str, list[float]] = {}
    text, made = batches(2), plan(fb.LoftQ(steps=1), format=fb.NF(4, block=32))
    refined = fb.sweep(tiny_llama.fresh(), made, text, run, refine=(fb.ApiQ(epochs=2, lr=100.0),), watch=told.__setitem__).state_dict()
    plain = fb.sweep(tiny_llama.fresh(), made, text, run).state_dict()
    undone = [all(torch.equal(v, plain[k]) for k, v in refined.items() if k.startswith(block)) for block in told]
    assert any(undone)


@pytest.mark.parametrize(("epochs", "lr", "kept"), [(2, 5.0, True), (1, 100.0, False)])
def test_a_refinement_is_judged_by_where_it_ends(epochs: int, lr: float, kept: bool) -> None:
    x = torch.nn.Parameter(torch.zeros(1))
    task = Matching(ours=lambda i: x, theirs=lambda i: x, tensors=[x], batches=10)
    losses = descend(task, lambda i: (x - 1).square().sum(), epochs, lr)
    assert max(losses[10 * (epochs - 1) :]) > losses[0]  # rates fall: what is lost on the way may be won back
    assert (x.item() != 0) == kept and (not kept or (x.item() - 1) ** 2 < losses[0])
