"""Embeddings that stay in host memory: what that saves, when a plan does it, and a model that runs so.

No second device is needed: moving is tried with torch's meta device, and under fake tensors, which refuse to mix two devices.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import finebits as fb
from finebits.host_embeddings import OnHost, looked_up, stay
from finebits.interop.hf import load_planned, moved
from finebits.interop.planning import Settings, plan_model
from finebits.plan import memory
from finebits.plan.base import Plan
from finebits.plan.footprint import Footprint
from finebits.plan.levers import PULLS, in_words, variants
from finebits.plan.solve import again
from finebits.tasks.causal_lm import CausalLM
from tiny_llama import batches, fresh, tuned
from tiny_llama import plan as tiny_plan

HERE = Path(__file__).parent.parent
LLAMA, TIED = HERE.parent / "recipes" / "configs" / "llama-3.1-8b", HERE / "data" / "configs" / "llama-3.2-3b"
GIB = 2**30


def settings(**more: Any) -> Settings:
    given: dict[str, Any] = dict(device="cuda", dtype="bfloat16", max_length=2048, per_device_train_batch_size=1, loss_chunk=256)
    given |= dict(formats=tuple(fb.NF(b, 64, "bf16") for b in (2, 3, 4, 8)), adapter=fb.LoRA(rank=16), gradient_accumulation_steps=16)
    return Settings(**given | dict(reserve=0.05, levers=PULLS) | more)


@pytest.fixture(scope="module")
def llama() -> Plan:
    """Llama-3.1-8B in 8 GiB, from its config alone; the phases beside training, whose arithmetic this is, are left out."""
    return plan_model(LLAMA, "8GiB", None, settings(left_out=("full", "samples", "export", "verify")), fast=True)


def test_published_arithmetic_of_an_8b_model_in_8_gib(llama: Plan) -> None:
    """3.10 GiB beside the linears, .8125 GiB a bit, 1.05 of the sum: 5.56 bits. Every term is found again or its difference is explained."""
    published = {"adapters": 0.16, "gradients": 0.16, "optimizer": 0.08, "head": 0.49, "embeddings": 0.0}
    published |= {"block inputs": 0.50, "recompute": 0.62, "loss chunk": 0.24, "runtime": 0.85}
    beside = sum(published.values())
    weights = sum(c["shape"][0] * c["shape"][1] for c in llama.costs.values() if not c.get("head"))
    each = weights / 8 / GIB
    assert beside == pytest.approx(3.10) and each == pytest.approx(0.8125, rel=1e-4)
    assert (8 / 1.05 - beside) / each == pytest.approx(5.56, abs=0.005)
    ours = {k: v / GIB for k, v in llama.memory.items() if k != "linear weights"}
    same = ("adapters", "gradients", "optimizer", "head", "embeddings", "block inputs", "runtime")
    assert {k: ours[k] for k in same} == pytest.approx({k: published[k] for k in same}, abs=0.008)
    # a chunk of logits and a block that is computed again never exist at one time: the larger of the two counts
    assert "loss chunk" not in ours
    footprint = Footprint.of(llama)
    chunk = (
        memory.moments(footprint.geometry, 0, footprint.trained, footprint.work(replace(llama.levers, loss_chunk=256)))["loss"][
            "loss chunk"
        ]
        / GIB
    )
    assert chunk == pytest.approx(published["loss chunk"], abs=0.03)
    # the block again: gate, up, product and activation with their gradients, the mask of attention, one dense weight
    again = ours["one block"] + ours["masks and positions"] + ours["dense scratch"]
    assert again == pytest.approx(0.625, abs=0.001) and again - published["recompute"] == pytest.approx(0.005, abs=0.001)
    # what is left of 8 GiB: 95 % of it here, 1 / 1.05 there
    left = 8 * 0.95 - sum(ours.values())
    moved = {"loss chunk": 0.24, "recompute": -(again - 0.62), "reserve": 8 * 0.95 - 8 / 1.05, "norms": -ours["norms and other"]}
    moved |= {k: published[k] - ours[k] for k in same}
    assert left - (8 / 1.05 - beside) == pytest.approx(sum(moved.values()), abs=1e-6)
    assert left / each == pytest.approx(5.83, abs=0.01)
    chosen = 8 * llama.memory["linear weights"] / weights
    assert left / each - 0.03 < chosen <= left / each  # what the planner makes of it: a matrix of 8 bits more would not fit


def test_it_is_pulled_where_it_buys_bits(llama: Plan) -> None:
    assert llama.levers.embeddings == "cpu" and "embeddings on the CPU" in in_words(llama.levers)
    assert llama.memory["embeddings"] == 0 and llama.host == {"embeddings": 128256 * 4096 * 2}
    assert "1002 MiB of embeddings stay in host memory" in llama.summary()
    assert again(Plan.from_json(llama.to_json())).to_json() == llama.to_json()
    roomy = again(llama, budget=40 * GIB)
    assert roomy.levers.embeddings == "device" and roomy.host == {} and roomy.memory["embeddings"] == 128256 * 4096 * 2
    without = plan_model(LLAMA, "8GiB", None, settings(levers=tuple(p for p in PULLS if p != "embeddings")), fast=True)
    assert without.host == {} and without.solver["loss"] > 1.5 * llama.solver["loss"]


def test_on_a_cpu_there_is_nothing_to_gain() -> None:
    given = settings(device="cpu")
    made = plan_model(LLAMA, "12GiB", None, given, fast=True)
    assert made.levers.embeddings == "device" and made.host == {} and made.memory["embeddings"] > 0
    assert {v.embeddings for _, v in variants(made.levers, PULLS)} == {"device"}
    assert memory.hosted(Footprint.of(made).geometry, replace(made.levers, embeddings="cpu")) == 0


def test_what_a_head_multiplies_by_is_on_the_device_once() -> None:
    made = plan_model(TIED, "4GiB", None, settings(), fast=True)
    footprint = Footprint.of(made)
    g = footprint.geometry
    assert (g.head, g.lookup) == (0, 0) and made.memory["embeddings"] == 2 * g.embeddings and made.levers.embeddings == "device"
    forced = memory.terms(g, 0, footprint.trained, footprint.work(replace(made.levers, embeddings="cpu")))
    assert forced["embeddings"] == 2 * g.embeddings
    with pytest.raises(ValueError, match="this model's output head is the same tensor"):
        stay(fresh(tie_word_embeddings=True))


def test_phases_around_training(llama: Plan) -> None:
    footprint, held = Footprint.of(llama), llama.host["embeddings"]
    work = [footprint.work(replace(llama.levers, embeddings=e)) for e in ("device", "cpu")]
    rows = [memory.phases(footprint.geometry, 0, footprint.dense, footprint.trained, w) for w in work]
    assert {k: rows[0][k] - rows[1][k] for k in rows[0]} == {
        "full": 0,
        "load": held,
        "eval": held,
        "save": held,
        "export": held,
        "verify": held,
    }


def hosted_plan(**more: Any) -> Plan:
    made = tiny_plan(**more)
    return replace(made, levers=replace(made.levers, embeddings="cpu"))


def test_everything_else_moves() -> None:
    model = moved(tuned(hosted_plan(), fresh(tie_word_embeddings=False)), hosted_plan(), "meta")
    entrance = model.get_input_embeddings()
    assert isinstance(entrance, OnHost) and isinstance(entrance, nn.Embedding) and looked_up(model) is entrance and stay(model) is model
    assert entrance.weight.device.type == "cpu" and model.device.type == "meta"  # what libraries take for the model's device
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {k for k, t in held.items() if t.device.type != "meta"} == {"model.embed_tokens.weight"}
    assert "model.embed_tokens.weight" in model._ddp_params_and_buffers_to_ignore
    assert entrance(torch.tensor([[1, 2]])).device.type == "meta"
    stays = moved(tuned(tiny_plan(), fresh(tie_word_embeddings=False)), tiny_plan(), "meta")
    assert stays.get_input_embeddings().weight.device.type == "meta"  # no lever, nothing stays
    assert type(moved(fresh(), hosted_plan(), "cpu").get_input_embeddings()) is nn.Embedding


@pytest.mark.parametrize("hosted", [True, False])
def test_no_two_devices_meet(hosted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward under checkpoints with fake tensors: every operation on tensors of two devices raises."""
    given = hosted_plan(format=None, init=fb.Zeros())
    model = moved(tuned(given, fresh(tie_word_embeddings=False)), given, "meta")
    if not hosted:
        model.get_input_embeddings().__class__ = nn.Embedding
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # it does not know the meta device
    mode = FakeTensorMode()
    for module in model.modules():
        if isinstance(module, OnHost):
            module.there = mode.from_tensor(module.there)
        for held in (module._parameters, module._buffers):
            for k, t in held.items():
                if t is not None:
                    fake = mode.from_tensor(t.data)
                    held[k] = nn.Parameter(fake, requires_grad=t.requires_grad) if held is module._parameters else fake
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    model.train()

    def step() -> None:
        ids = torch.zeros(2, 9, dtype=torch.long, device="meta")
        states = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)[0]
        model.get_output_embeddings()(states).sum().backward()

    with mode:
        if not hosted:
            with pytest.raises(RuntimeError, match="at least two devices, meta and cpu"):
                step()
            return
        step()
    assert {p.grad.device.type for p in model.parameters() if p.requires_grad and p.grad is not None} == {"meta"}


def both(**more: Any) -> tuple[Any, Any]:
    """A tuned model, and the same with its embeddings kept."""
    one, two = (tuned(tiny_plan(**more), fresh(tie_word_embeddings=False)) for _ in range(2))
    return one, stay(two)


def test_losses_gradients_and_words_are_the_same() -> None:
    from finebits.evaluate.generate import greedy

    one, two = both()
    grads = []
    for model in (one, two):
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.train()
        loss = CausalLM().loss(model, batches()[0], 4)
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        model.eval()
    assert len(grads[0]) > 28 and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert greedy(one, [[5, 6, 7]], 6, [2]) == greedy(two, [[5, 6, 7]], 6, [2])
    state = one.state_dict()
    assert state.keys() == two.state_dict().keys() and all(torch.equal(v, two.state_dict()[k]) for k, v in state.items())


def test_saved_loaded_and_exported(tmp_path: Path) -> None:
    from finebits import store
    from finebits.export._safetensors import merged_entries

    one, two = both()
    fb.save(two, tmp_path / "saved")
    back = stay(store.apply(fresh(tie_word_embeddings=False), store.read(tmp_path / "saved")))
    ids = batches()[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(back(input_ids=ids).logits, one(input_ids=ids).logits)
    ours, theirs = (merged_entries(m, torch.float32) for m in (two, one))
    assert ours.keys() == theirs.keys() and "model.embed_tokens.weight" in ours
    two.save_pretrained(tmp_path / "stock")  # as a stock Trainer's checkpoints do
    two.load_state_dict(one.state_dict())


def test_trained_and_resumed(small_untied: Path, tmp_path: Path) -> None:
    from finebits.interop.hf import tokenizer_of
    from finebits.interop.trainer import trainer

    made = plan_model(small_untied, None, None, settings(device="cpu", dtype="float32", levers=(), reserve=0.0, adapter=fb.LoRA(rank=4)))
    tokenizer, rows = (
        tokenizer_of(small_untied),
        [{"input_ids": list(range(3 + i, 15 + i)), "labels": list(range(3 + i, 15 + i))} for i in range(12)],
    )

    def run(folder: str, keep: bool, resume: str | None = None) -> list[float]:
        model, _ = load_planned(made)
        losses: list[float] = []
        watch = lambda e: losses.append(e["loss"]) if e["event"] == "step" else None  # noqa: E731
        given = dict(
            max_steps=4, per_device_train_batch_size=2, save_strategy="steps", save_steps=2, learning_rate=1e-2, gradient_checkpointing=True
        )
        engine = trainer(stay(model) if keep else model, tokenizer, rows, tmp_path / folder, given, watch=watch)
        engine.train(resume_from_checkpoint=resume)
        return losses

    plain, kept = run("a", False), run("b", True)
    assert plain == kept and len(kept) == 4
    assert run("c", True, str(tmp_path / "b" / "checkpoint-2")) == kept[2:]


def test_rows_that_a_model_scales_are_scaled_where_they_lie() -> None:
    """Gemma multiplies its rows by a number that is a buffer: it must not part from them."""
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    entrance = gemma.Gemma3TextScaledWordEmbedding(16, 8, 0, embed_scale=8**0.5)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens, self.lm_head = entrance, nn.Linear(8, 16, bias=False)

        def get_input_embeddings(self) -> nn.Module:
            return self.embed_tokens

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

    ids = torch.tensor([[1, 5]])
    wanted = entrance(ids).detach()
    model = stay(Model())
    assert torch.equal(entrance(ids), wanted)
    model.to("meta")
    assert entrance.embed_scale.device.type == entrance.weight.device.type == "cpu" and entrance(ids).device.type == "meta"
    model.to(torch.bfloat16)
    assert entrance.weight.dtype == torch.bfloat16 and entrance.weight.device.type == "cpu"
