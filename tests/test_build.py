"""Plan + model -> adapted model."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
from finebits.build import Adapted, generator, needs
from finebits.plan.base import Plan, Spec
from finebits.qtensor import QTensor
from finebits.quantizers.gptq import GPTQ
from finebits.stats.gram import Gram

SPEC = Spec(format=fb.NF(4), adapter=fb.LoRA(rank=4, alpha=8.0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(32, 32), nn.Linear(32, 16, bias=False)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.q(x)[..., :16] * self.k(x)


def model(layers: int = 2) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(*[nn.Sequential(Block(), nn.Linear(16, 32)) for _ in range(layers)])


def plan(spec: Spec = SPEC, names: tuple[str, ...] = ("0.0.q", "0.0.k", "1.0.q"), **kw: Any) -> Plan:
    return Plan({name: spec for name in names}, **kw)


def test_keys_and_types_stay_and_only_the_adapters_are_trained() -> None:
    plain, built = model(), fb.build(model(), plan())
    assert all(isinstance(built.get_submodule(n), nn.Linear) for n in ("0.0.q", "1.0.q"))
    names, known = {n for n, _ in built.named_parameters()}, {n for n, _ in plain.named_parameters()}
    assert names - known == {f"{n}.p.default.{k}" for n in plan().modules for k in "AB"} and known <= names
    assert {n for n, p in built.named_parameters() if p.requires_grad} == names - known
    assert dict(fb.hosts(built)).keys() == plan().modules.keys()
    assert isinstance(built.get_submodule("0.0.q").weight, QTensor)
    for n in known - {f"{m}.weight" for m in plan().modules}:
        assert torch.equal(built.get_parameter(n), plain.get_parameter(n))


def test_state_dict_is_plain_tensors_and_goes_back() -> None:
    built, other = fb.build(model(), plan()), fb.build(model(), plan(seed=7))
    state = built.state_dict()
    assert "0.0.q.weight.codes" in state and "0.0.q.weight.scale" in state and "0.0.q.weight" not in state
    assert not any(isinstance(v, QTensor) for v in state.values())
    x = torch.randn(3, 32)
    with torch.no_grad():
        for name, p in built.named_parameters():
            if name.endswith(".B"):
                p.normal_()
    expected = built(x)
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_half_loaded() -> None:
    built = fb.build(model(), plan())
    before = built.get_submodule("0.0.q").weight.parts["codes"].clone()
    state = {k: v.clone() for k, v in built.state_dict().items()}
    lost = {k: v for k, v in state.items() if k != "0.0.q.weight.scale"}
    with pytest.raises(RuntimeError, match=r"0\.0\.q\.weight\.scale"):
        built.load_state_dict(lost)
    state["0.0.q.weight.codes"] = torch.zeros(32, 3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"0\.0\.q\.weight\.codes"):
        built.load_state_dict(state)
    assert torch.equal(built.get_submodule("0.0.q").weight.parts["codes"], before)
    state = built.state_dict() | {"0.0.q.weight.nonsense": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="nonsense"):
        built.load_state_dict(state)


def test_a_dense_state_is_not_taken_for_a_quantized_one() -> None:
    built = fb.build(model(), plan())
    with pytest.raises(RuntimeError, match="weight.codes"):
        built.load_state_dict(model().state_dict())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_with_nan_names_the_tensor(bad: float) -> None:
    broken = model()
    with torch.no_grad():
        broken.get_submodule("1.0.q").weight[3, 5] = bad
    with pytest.raises(ValueError, match=r"1\.0\.q\.weight holds (nan|inf) at \[3, 5\]"):
        fb.build(broken, plan())


def test_a_plan_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"7\.q.*another model"):
        fb.build(model(), plan(names=("0.0.q", "7.q")))
    with pytest.raises(TypeError, match="LayerNorm"):
        fb.build(model(), plan(names=("0.0.norm",)))


def test_a_refused_plan_leaves_the_model_as_it_was() -> None:
    whole = model()
    with pytest.raises(ValueError, match="another model"):
        fb.build(whole, plan(names=("0.0.q", "7.q")))
    assert not list(fb.hosts(whole))


def test_a_rank_that_does_not_fit_names_the_module() -> None:
    spec = Spec(format=fb.NF(4), adapter=fb.LoRA(rank=17), init=fb.LoftQ(steps=1))
    with pytest.raises(ValueError, match=r"0\.0\.k: LoftQ needs a rank of at most 16 for a 16x32 weight, and the adapter has 17"):
        fb.build(model(), plan(spec, ("0.0.k",)))


def test_a_missing_statistic_names_module_and_command() -> None:
    class Needy(fb.RTN):
        needs = frozenset({Gram})

        def __call__(self, W: Tensor, format: Any, stats: Any) -> QTensor:
            from finebits.stats.base import need

            need(stats, Gram, "Needy")
            return super().__call__(W, format, stats)

    one = plan(Spec(format=fb.NF(4), quantizer=Needy(), adapter=fb.LoRA()), ("0.0.q",))
    assert fb.needs(one) == {"0.0.q": frozenset({Gram})} and fb.needs(plan()) == {}
    with pytest.raises(ValueError, match=r"0\.0\.q.*Gram.*collect"):
        fb.build(model(), one)


def test_a_hooked_module_is_refused() -> None:
    hooked = model()
    lin = hooked.get_submodule("0.0.q")
    lin.forward = lambda x: x
    with pytest.raises(ValueError, match="hook"):
        fb.build(hooked, plan())


def test_a_parametrized_module_is_refused() -> None:
    odd = model()
    torch.nn.utils.parametrizations.orthogonal(odd.get_submodule("0.0.q"))
    with pytest.raises(TypeError, match="Parametrized"):
        fb.build(odd, plan())


def test_randomness_comes_from_seed_and_name() -> None:
    a, b, c = (fb.build(model(), plan(seed=s)) for s in (1, 1, 2))
    pick = lambda m, n="0.0.q": m.get_submodule(n).p["default"]["A"]  # noqa: E731
    assert torch.equal(pick(a), pick(b)) and not torch.equal(pick(a), pick(c))
    assert not torch.equal(pick(a), pick(a, "1.0.q"))
    draw = lambda n: torch.rand(1, generator=generator(3, n)).item()  # noqa: E731
    assert draw("x") == draw("x") != draw("y")


def test_weights_can_be_read_one_at_a_time_onto_a_meta_model() -> None:
    source = model()
    with torch.device("meta"):
        empty = nn.Linear(32, 32)
    host = nn.Sequential(empty)
    read: list[str] = []

    def one(name: str) -> Tensor:
        read.append(name)
        return source.get_submodule("0.0.q").weight

    built = fb.build(host, Plan({"0": SPEC}), read=one)
    assert read == ["0"] and built[0].weight.device.type == "cpu"
    assert torch.equal(built[0].weight.dequantize(), fb.quantize(source.get_submodule("0.0.q").weight.detach(), fb.NF(4)).dequantize())


def test_dtype_of_the_base_is_the_plans() -> None:
    built = fb.build(model().bfloat16(), plan(levers=fb.Levers(dtype="bfloat16")))
    host = built.get_submodule("0.0.q")
    assert host.weight.dtype == torch.bfloat16 and host.p["default"]["A"].dtype == torch.float32
    dense = fb.build(model(), plan(Spec(adapter=fb.LoRA()), levers=fb.Levers(dtype="bfloat16")))
    assert dense.get_submodule("0.0.q").weight.dtype == torch.bfloat16


def test_no_adapter_and_no_format_are_choices() -> None:
    x = torch.randn(4, 32)
    assert torch.equal(fb.build(model(), plan(Spec()))(x), model()(x))
    only = fb.build(model(), plan(Spec(format=fb.NF(4))))
    assert not [p for p in only.parameters() if p.requires_grad]


def test_progress_is_told() -> None:
    seen: list[tuple[int, int, str]] = []
    fb.build(model(), plan(), progress=lambda *a: seen.append(a))
    assert seen == [(1, 3, "0.0.q"), (2, 3, "0.0.k"), (3, 3, "1.0.q")]


def test_two_adapters_are_the_sum_of_their_updates() -> None:
    host: Adapted = fb.build(model(), plan()).get_submodule("0.0.q")
    x = torch.randn(5, 32)
    base = host(x)
    host.add("second", fb.Gated(rank=3, alpha=3.0), generator(0, "second"), {})
    with torch.no_grad():
        for p in host.p.parameters():
            p.normal_()
    both = host(x)
    host.active = ["default"]
    first = host(x)
    host.active = ["second"]
    second = host(x)
    host.active = []
    torch.testing.assert_close(host(x), base)
    torch.testing.assert_close(both - base, (first - base) + (second - base), rtol=1e-4, atol=1e-4)


def test_a_plan_is_json_both_ways_and_a_hash() -> None:
    p = plan(budget=100, memory={"weights": 5, "optimizer": 7})
    again = Plan.from_json(p.to_json())
    assert again == p and again.hash == p.hash and p.peak == 12
    assert plan(seed=1).hash != plan(seed=2).hash
    assert p.unquantized().modules["0.0.q"].format is None
    of_inputs = replace(p, modules={n: replace(s, quantizer=GPTQ()) for n, s in p.modules.items()})
    assert needs(of_inputs) and not needs(of_inputs.unquantized())
    assert p.with_start(fb.LoftQ()).modules["0.0.q"].init == fb.LoftQ()


def test_a_file_that_is_no_plan_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(ValueError, match="no plan at"):
        Plan.load(path)
    for text, match in (("{", "not JSON"), ("[]", "schema"), ('{"schema": "other/1"}', "other/1")):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            Plan.load(path)
    path.write_bytes(pickle.dumps({"schema": "finebits.plan/1"}))
    with pytest.raises(ValueError, match="binary"):
        Plan.load(path)
    path.write_text('{"schema": "finebits.plan/1", "modules": {"a": {"format": {"paper": "os"}}}}')
    with pytest.raises(ValueError, match="os"):
        Plan.load(path)
    plan().save(path)
    assert Plan.load(path) == plan()
