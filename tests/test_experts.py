"""Experts that a model holds in one tensor: each of their matrices is planned, quantized, adapted and exported by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F

import finebits as fb
from architectures import MORE, batch, folder, held, settings, step
from finebits.build import Adapted, hosts
from finebits.calibrate.whole_model import collect
from finebits.experts import apart, tensors
from finebits.export._safetensors import describe_model, merged_entries, model_files
from finebits.export.base import CannotHold, check_plan
from finebits.interop.checkpoint import Tensors
from finebits.interop.hf import load, load_planned, processor_of
from finebits.interop.peft import export, verify
from finebits.interop.planning import plan_model
from finebits.interop.pricing import Calibration
from finebits.plan.base import Plan

pytestmark = [pytest.mark.filterwarnings("ignore")]
KINDS = ["mixtral", "qwen3_moe", "gpt_oss"]
DOWN = "model.layers.0.mlp.experts.down_proj"


def logits(model: Any) -> torch.Tensor:
    b = batch()
    with torch.no_grad():
        return model.eval()(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits[b["attention_mask"] == 1]


def planned(path: Path, kind: str, format: Any = None, **more: Any) -> Plan:
    folder(path, kind, MORE[kind] | more.pop("config", {}))
    return plan_model(path, None, None, settings(formats=(format,), **{"target_modules": "all-linear"} | more))


def trained(plan: Plan, steps: int = 2) -> Any:
    model, _ = load_planned(plan)
    optimizer = torch.optim.SGD([p for p in model.train().parameters() if p.requires_grad], 1.0)
    losses = []
    for _ in range(steps):
        losses.append(float(step(model, batch())))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    return model


def stock(place: Path) -> Any:
    """The exported folder as transformers and peft load it."""
    from transformers import AutoModelForCausalLM

    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32), place)


class Routed(torch.nn.Module):
    """Mixtral's experts as a model calls them, with what is chosen given."""

    def __init__(self, experts: int, width: int = 16, inner: int = 24) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        super().__init__()
        torch.manual_seed(0)
        config = MixtralConfig(hidden_size=width, intermediate_size=inner, num_local_experts=experts, experts_implementation="eager")
        self.experts = MixtralExperts(config)
        for p in self.experts.parameters():
            torch.nn.init.normal_(p, std=0.3)

    def forward(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return self.experts(x, chosen, torch.full(chosen.shape, 1.0 / chosen.shape[1]))


def test_one_expert_for_all_tokens_is_a_feed_forward_of_two_linears() -> None:
    model, x = Routed(1), torch.randn(5, 16)
    apart(model.experts)
    up, down = (torch.nn.Linear(n, m, bias=False) for m, n in ((48, 16), (16, 24)))
    up.weight.data, down.weight.data = model.experts.gate_up_proj[0].weight.data.clone(), model.experts.down_proj[0].weight.data.clone()
    adapter, ours = (
        fb.LoRA(rank=3),
        fb.build(model, fb.Plan({f"experts.{n}.0": fb.Spec(fb.NF(4, 16), adapter=fb.LoRA(rank=3)) for n in ("gate_up_proj", "down_proj")})),
    )
    plain = fb.build(
        torch.nn.ModuleDict({"up": up, "down": down}), fb.Plan({n: fb.Spec(fb.NF(4, 16), adapter=adapter) for n in ("up", "down")})
    )
    for one, other in ((plain["up"], ours.experts.gate_up_proj[0]), (plain["down"], ours.experts.down_proj[0])):
        for k, t in one.tensors("default").items():
            t.data = torch.randn(t.shape)
            other.tensors("default")[k].data = t.data.clone()
    g, u = plain["up"](x).chunk(2, -1)
    torch.testing.assert_close(ours(x, torch.zeros(5, 1, dtype=torch.long)), plain["down"](F.silu(g) * u))


@pytest.mark.parametrize("format", [None, fb.NF(4, 16), fb.Int(3, 16), fb.NF(2, 16)], ids=str)
def test_only_those_that_tokens_are_sent_to_are_trained(format: Any) -> None:
    model = Routed(5)
    apart(model.experts)
    names = [name for layers in tensors(model).values() for name in layers]
    model = fb.build(model, fb.Plan({n: fb.Spec(format, adapter=fb.LoRA(rank=2)) for n in names})).train()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {f"{n}.p.default.{k}" for n in names for k in "AB"}
    for _, host in hosts(model):
        torch.nn.init.normal_(host.p["default"]["B"])
    x, chosen = torch.randn(6, 16, requires_grad=True), torch.tensor([[1, 3], [3, 1], [1, 3], [3, 1], [1, 3], [1, 3]])
    model(x, chosen).square().sum().backward()
    moved = {n.split(".p.")[0] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {n for n in names if n.endswith((".1", ".3"))} and x.grad is not None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # zeros, which ranks and rules may count on
    with torch.no_grad():
        merged = Routed(5)
        for n in ("gate_up_proj", "down_proj"):
            W = torch.stack([h.stack().weight for h in getattr(model.experts, n)])
            getattr(merged.experts, n).data = W
        torch.testing.assert_close(model(x, chosen), merged(x, chosen), rtol=1e-4, atol=1e-5)


def test_one_expert_is_dense_at_a_time() -> None:
    E, m, n = 16, 128, 256
    model = Routed(E, width=m, inner=n)
    apart(model.experts)
    fb.build(model, fb.Plan({name: fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=2)) for layers in tensors(model).values() for name in layers}))
    x, chosen = torch.randn(E, m, requires_grad=True), torch.arange(E)[:, None]
    assert held(lambda: model.train()(x, chosen).sum().backward()) < E * m * n * 4 / 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", [None, fb.NF(3, 16)], ids=str)
def test_saved_and_exported(kind: str, format: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = trained(planned(tmp_path / "model", kind, format))
    wanted = logits(model)
    fb.save(model, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")[0]), wanted)
    for to in ("adapter", "peft"):
        export(model, tmp_path / to, to, processor_of(tmp_path / "model"))
        torch.testing.assert_close(logits(stock(tmp_path / to)), wanted, rtol=0, atol=1e-4)
    assert verify(tmp_path / "peft", "peft", model, [batch()], tolerance=1e-4)["verdict"] == "same"
    said = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert sorted(said["target_parameters"]) == ["experts.down_proj", "experts.gate_up_proj"]
    again = fb.load_peft(tmp_path / "peft", str(tmp_path / "peft" / "base"))
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-4)
    describe_model(model, tmp_path / "merged", torch.float32)
    for path, file in model_files(merged_entries(model, torch.float32)).items():
        file.write(tmp_path / "merged" / path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(whole), wanted, rtol=0, atol=1e-4)
    one = Tensors(tmp_path / "merged")[f"{DOWN}.3.weight"]  # of a file that has them in one tensor
    torch.testing.assert_close(one, dict(hosts(model))[f"{DOWN}.3"].stack().weight.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_trained_over_experts_computes_the_same_here_and_back(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder(tmp_path / "model", kind, MORE[kind])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "layers.1.mlp.experts.down_proj"],
        rank_pattern={"experts.down_proj": 2},
    )
    theirs = peft.get_peft_model(base, config).train()
    optimizer = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        theirs(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path / "theirs")
    wanted = logits(theirs)
    model = fb.load_peft(tmp_path / "theirs", str(tmp_path / "model"))
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-4)
    ranks = {name.rpartition(".")[0]: host.kinds["default"].rank for name, host in hosts(model)}
    assert ranks["model.layers.1.mlp.experts.down_proj"] == 2 and ranks["model.layers.1.mlp.experts.gate_up_proj"] == 3
    assert DOWN not in ranks
    export(model, tmp_path / "ours", "peft")
    torch.testing.assert_close(logits(stock(tmp_path / "ours")), wanted, rtol=0, atol=1e-4)
    over = fb.load_peft(tmp_path / "theirs", AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    torch.testing.assert_close(logits(over), wanted, rtol=0, atol=1e-4)


def test_experts_are_given_bits_of_their_own(tmp_path: Path) -> None:
    folder(tmp_path, "mixtral", {})
    offered = tuple(fb.NF(b, 16) for b in (2, 3, 4))
    plan = plan_model(tmp_path, "4.5 bits", None, settings(formats=offered, target_modules=["gate_up_proj", "down_proj"], ranks=(2, 4)))
    assert len({s.format for n, s in plan.modules.items() if n.startswith(DOWN[:-9])}) > 1
    whole = plan_model(tmp_path, "5.2 bits", None, settings(formats=offered, target_modules=["gate_up_proj"]))
    assert len(whole.modules) == 8 and {s.adapter for s in whole.modules.values()} == {fb.LoRA(rank=2, alpha=4.0)}
    sizes = {n: math_bytes(whole, n) for n in whole.modules}
    assert whole.memory["linear weights"] == sum(sizes.values())


def math_bytes(plan: Plan, name: str) -> int:
    format = plan.modules[name].format
    assert format is not None
    return format.storage_bits(*plan.costs[name]["shape"]) // 8


@pytest.mark.parametrize(
    ("adapter", "more", "to", "said"),
    [
        (fb.DoRA(rank=2), {}, "peft", "over experts PEFT has LoRA alone, and this is DoRA; targets that can: adapter, merged"),
        (fb.LoRA(rank=2), {"dropout": 0.1}, "peft", "over experts PEFT has no dropout, and here it is 0.1"),
        (fb.LoRA(rank=2), {"rank_pattern": {"experts.down_proj.1": 4}}, "peft", "down_proj.1: PEFT has one adapter for all experts"),
        (fb.LoRA(rank=2), {"formats": (fb.Int(4, 16, scale="fp16"),)}, "gptq", r"files of this model have .* as \(4, 96, 32\)"),
    ],
)
def test_one_sentence_while_planning(adapter: Any, more: dict[str, Any], to: str, said: str, tmp_path: Path) -> None:
    folder(tmp_path, "mixtral", {})
    plan = plan_model(tmp_path, None, None, settings(**{"target_modules": ["gate_up_proj", "down_proj"], "adapter": adapter} | more))
    with pytest.raises(CannotHold, match=said) as e:
        check_plan(plan, [to])
    assert "\n" not in str(e.value)


def test_an_expert_that_no_token_met_is_as_an_average_token_of_the_others() -> None:
    model = Routed(3)
    apart(model.experts)
    x, chosen = torch.randn(4, 16), torch.tensor([[0], [2], [2], [2]])
    names = [f"experts.gate_up_proj.{e}" for e in range(3)]
    seen = collect(model, [x], lambda m, x: m(x, chosen).square().sum(), dict.fromkeys(names, frozenset({fb.Gram})))
    torch.testing.assert_close(seen[names[2]][fb.Gram].value(), x[1:].T @ x[1:] / 3)
    torch.testing.assert_close(seen[names[1]][fb.Gram].value(), x.T @ x / 4)
    assert [seen[n][fb.Gram].tokens for n in names] == [1, 1, 3]


def test_nats_count_the_tokens_that_an_expert_meets(tmp_path: Path) -> None:
    """½ Σ (∂L_t/∂W)² D², summed over tokens and divided by labels: what a matrix of all tokens is priced by."""
    folder(tmp_path, "mixtral", {})
    rows = [{"text": "a " * 12}, {"text": "a " * 7}]
    plan = plan_model(
        tmp_path, None, rows, settings(formats=(fb.NF(2, 16),), objective="fisher", target_modules=["gate_up_proj", "down_proj", "q_proj"])
    )
    calibration = Calibration(tmp_path, fb_rows(rows), plan.workload)
    needs = {n: frozenset({fb.FisherDiag}) for n in plan.modules}
    share, tensors = dict[str, float](), Tensors(tmp_path)
    for seen in calibration.statistics(needs, drawn=True):
        for name, stats in seen.items():
            W, F_ = tensors[f"{name}.weight"].float(), stats[fb.FisherDiag]
            D = W - fb.quantize(W, fb.NF(2, 16)).dequantize()
            lost = 0.5 * float((F_.value() * D.square()).sum()) * F_.tokens / calibration.labels
            assert plan.costs[name]["menu"][0]["loss"] == pytest.approx(lost, rel=1e-3, abs=1e-9)
            share[name] = F_.tokens
    assert sum(share[f"{DOWN}.{e}"] for e in range(4)) <= 2 * share["model.layers.0.self_attn.q_proj"] + 4
    assert isinstance(load_planned(plan)[0].get_submodule(f"{DOWN}.0"), Adapted)


def fb_rows(rows: list[dict[str, str]]) -> Any:
    return rows
