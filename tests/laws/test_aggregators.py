"""Laws of aggregators: what one client, equal clients and any clients come to, in any order; what is sent; which bases stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finebits as fb
from finebits import registry
from finebits.adapters._frozen import Frozen
from finebits.federate.base import Aggregated, Sent, Server, cut, nbytes
from finebits.federate.hetlora import Tail, tail
from finebits.qtensor import QTensor

M, N, R = 17, 13, 3
MODULES = {"q_proj": (M, N), "up_proj": (19, M)}
NAMES = registry.names("federate")
every = pytest.mark.parametrize("name", NAMES)
EXACT = ["flora", "fedex_lora", "ffa_lora", "fed_sb"]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(module: str, name: str, seed: int, rank: int = R) -> dict[str, Tensor]:
    """All tensors of a client's adapter; those that are frozen are the same everywhere."""
    m, n = MODULES[module]
    sends, at = registry.load("federate", name).sends, 100 * list(MODULES).index(module)
    shapes = {"A": (rank, n), "B": (m, rank)} | ({"R": (rank, rank)} if "R" in sends else {})
    return {k: randn(*shape, seed=at + i + (1000 * seed if k in sends else 0)) for i, (k, shape) in enumerate(shapes.items())}


def sent(name: str, seed: int, examples: int = 1, rank: int = R, scale: float = 2.0) -> Sent:
    sends = registry.load("federate", name).sends
    return Sent({mod: {k: t for k, t in factors(mod, name, seed, rank).items() if k in sends} for mod in MODULES}, examples, scale)


def product(module: str, name: str, p: dict[str, Tensor], scale: float) -> Tensor:
    all_of = {k: t.double() for k, t in (factors(module, name, 0) | p).items()}
    return scale * (all_of["B"] @ all_of["R"] @ all_of["A"] if "R" in all_of else all_of["B"] @ all_of["A"])


def update(server: Server, name: str, scale: float = 2.0) -> dict[str, Tensor]:
    """What a server's model has over the base."""
    made = {}
    for mod, (m, n) in MODULES.items():
        own = product(mod, name, server.tensors[mod], scale) if server.tensors else torch.zeros(m, n, dtype=torch.float64)
        over = server.residual.get(mod)
        made[mod] = own if over is None else own + over["B"].double() @ over["A"].double()
    return made


def ideal(all_of: list[Sent], name: str) -> dict[str, Tensor]:
    total = sum(s.examples for s in all_of)
    means = {mod: [s.examples / total * product(mod, name, s.tensors[mod], s.scale) for s in all_of] for mod in MODULES}
    return {mod: torch.stack(each).sum(0) for mod, each in means.items()}


def error(made: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    return max(float((made[mod] - wanted[mod]).norm() / wanted[mod].norm()) for mod in MODULES)


def run(name: str, all_of: list[Sent], server: Server | None = None) -> Aggregated:
    return registry.load("federate", name)()(server or Server(sent(name, 0).tensors), all_of)


@every
def test_one_client_is_the_identity(name: str) -> None:
    one = sent(name, 1, examples=3)
    made = run(name, [one]).server
    assert error(update(made, name), ideal([one], name)) < 1e-6
    if made.tensors:
        assert all(torch.equal(t, one.tensors[mod][k]) for mod in MODULES for k, t in made.tensors[mod].items())


@every
def test_equal_clients_are_the_identity(name: str) -> None:
    made = run(name, [sent(name, 1, examples=n) for n in (1, 5, 2)]).server
    assert error(update(made, name), ideal([sent(name, 1)], name)) < 1e-6


@pytest.mark.parametrize("name", EXACT)
def test_the_mean_of_products_is_exact(name: str) -> None:
    all_of = [sent(name, seed, examples=n) for seed, n in ((1, 10), (2, 1), (3, 4), (4, 7))]
    assert error(update(run(name, all_of).server, name), ideal(all_of, name)) < 1e-6
    both = ["fedavg", sent("fedavg", 1)]
    factors_alone = [sent("fedavg", seed, examples=n) for seed, n in ((1, 10), (2, 1), (3, 4))]
    assert error(update(run(both[0], factors_alone).server, "fedavg"), ideal(factors_alone, "fedavg")) > 1e-2  # type: ignore[arg-type]


def test_the_mean_of_r_is_the_mean_update_over_rounds_with_clients_missing() -> None:
    server = Server(sent("fed_sb", 0).tensors)
    for number, there in enumerate(([1, 2, 3], [2, 3], [4])):
        all_of = [sent("fed_sb", 10 * number + seed, examples=seed) for seed in there]
        server = run("fed_sb", all_of, server).server
        assert error(update(server, "fed_sb"), ideal(all_of, "fed_sb")) < 1e-6  # of this round's clients alone


@every
def test_neither_order_nor_the_unit_of_weights_matters(name: str) -> None:
    all_of = [sent(name, seed, examples=n) for seed, n in ((1, 10), (2, 1), (3, 4))]
    made = update(run(name, all_of).server, name)
    assert error(update(run(name, all_of[::-1]).server, name), made) < 1e-6
    assert error(update(run(name, [s._replace(examples=6 * s.examples) for s in all_of]).server, name), made) < 1e-6


@every
def test_bytes_are_those_of_the_paper(name: str) -> None:
    ks, b = 4, 4
    all_of = [sent(name, seed) for seed in range(1, ks + 1)]
    ends = sum(m + n for m, n in MODULES.values())
    up = {"ffa_lora": R * sum(m for m, _ in MODULES.values()), "fed_sb": R * R * len(MODULES)}.get(name, R * ends)
    down = {"flora": ks * R * ends, "fedex_lora": ks * R * ends}.get(name, up)
    assert {nbytes(s.tensors) for s in all_of} == {b * up}
    assert nbytes(run(name, all_of).down) == b * down


def test_r_costs_the_same_however_many_clients_there_are() -> None:
    assert {nbytes(run("fed_sb", [sent("fed_sb", s) for s in range(1, k + 1)]).down) for k in (2, 20)} == {4 * R * R * len(MODULES)}


def test_flora_stacks_ranks_and_scales() -> None:
    all_of = [sent("flora", seed, n, rank, scale) for seed, n, rank, scale in ((1, 5, 4, 2.0), (2, 1, 2, 0.5), (3, 3, 1, 8.0))]
    made = run("flora", all_of)
    assert made.server.tensors == {} and error(update(made.server, "flora"), ideal(all_of, "flora")) < 1e-6
    assert nbytes(made.down) == 4 * 7 * sum(m + n for m, n in MODULES.values())
    again = run("flora", all_of, made.server).server  # what was there stays, and no term has more rank than its matrix
    assert error(update(again, "flora"), {mod: 2 * t for mod, t in ideal(all_of, "flora").items()}) < 1e-5
    assert all(p["A"].shape[0] <= min(MODULES[mod]) for mod, p in again.residual.items())


def test_a_capped_stack_loses_the_smallest_triples() -> None:
    all_of = [sent("flora", seed) for seed in (1, 2, 3)]
    made = fb.FLoRA(cap=2)(Server({}), all_of).server
    for mod, wanted in ideal(all_of, "flora").items():
        lost = torch.linalg.svdvals(wanted)[2:].square().sum().sqrt()
        torch.testing.assert_close((update(made, "flora")[mod] - wanted).norm(), lost, rtol=1e-4, atol=1e-6)


def test_a_shorter_residual_is_nearer_than_none() -> None:
    all_of = [sent("fedex_lora", seed, n) for seed, n in ((1, 2), (2, 1), (3, 1))]
    wanted = ideal(all_of, "fedex_lora")
    errors = [
        error(update(run_.server, "fedex_lora"), wanted)
        for run_ in (run("fedavg", all_of), *(fb.FedExLoRA(rank=r)(Server({}), all_of) for r in (1, 3)))
    ]
    assert errors[0] > errors[1] > errors[2] > 1e-6
    ends = sum(m + n for m, n in MODULES.values())
    assert nbytes(fb.FedExLoRA(rank=1)(Server({}), all_of).down) == 4 * (R + 1) * ends


def test_the_correction_of_fair_helps_the_more_the_less_it_is_held() -> None:
    all_of = [sent("lora_fair", seed, n) for seed, n in ((1, 2), (2, 1), (3, 1), (4, 1))]
    wanted = ideal(all_of, "lora_fair")
    errors = [error(update(fb.LoRAFAIR(weight=w)(Server({}), all_of).server, "lora_fair"), wanted) for w in (1e9, 1.0, 0.01, 1e-9)]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1]
    averaged, held = run("fedavg", all_of).server.tensors, fb.LoRAFAIR(weight=1e9)(Server({}), all_of).server.tensors
    for mod in MODULES:
        torch.testing.assert_close(held[mod]["B"], averaged[mod]["B"])
        A, B = averaged[mod]["A"].double(), averaged[mod]["B"].double()
        ridge = 0.01 * A.square().sum() / R
        normal = A @ A.mT + ridge * torch.eye(R, dtype=A.dtype)  # dense, of the whole matrix
        dense = B + (wanted[mod] / 2.0 - B @ A) @ A.mT @ torch.linalg.inv(normal)
        made = fb.LoRAFAIR()(Server({}), all_of).server.tensors[mod]["B"]
        torch.testing.assert_close(made.double(), dense, rtol=1e-5, atol=1e-6)


def test_hetlora_weighs_by_norms_and_fills_with_zeros() -> None:
    start = Server(sent("hetlora", 0, rank=4).tensors)
    all_of = [sent("hetlora", seed, examples=seed, rank=rank) for seed, rank in ((1, 4), (2, 2))]
    norms = torch.stack([torch.stack([(p["B"] @ p["A"]).norm() for p in s.tensors.values()]).norm() for s in all_of])
    weights = norms / norms.sum()
    made = run("hetlora", all_of, start).server.tensors["q_proj"]
    A = [s.tensors["q_proj"]["A"] for s in all_of]
    torch.testing.assert_close(made["A"], weights[0] * A[0] + weights[1] * torch.cat([A[1], torch.zeros(2, N)]))


def test_hetlora_prunes_what_training_has_made_smaller_and_nothing_else() -> None:
    method = fb.HetLoRA(share=0.5)
    start, smaller = sent("hetlora", 0, rank=4).tensors, sent("hetlora", 1, rank=4).tensors
    smaller = {mod: {"A": p["A"] * 1e-3, "B": p["B"]} for mod, p in smaller.items()}
    assert {len(p["A"]) for p in method.kept(start, smaller).values()} == {2}
    assert method.kept(smaller, start) is start
    assert fb.HetLoRA(share=1.0).rules() == () and isinstance(method.rules()[0], Tail)
    zero = {"A": torch.ones(4, 1, requires_grad=True), "B": torch.zeros(1, 4, requires_grad=True)}
    tail(zero, 0.5).backward()
    assert zero["B"].grad is not None and zero["B"].grad.isfinite().all()


def test_the_adapters_train_what_is_sent() -> None:
    for name in NAMES:
        aggregator = registry.load("federate", name)
        adapter = registry.load("adapters", aggregator.adapter)()
        assert set(aggregator.sends) == set(adapter.shapes(M, N)) - adapter.frozen


@pytest.mark.parametrize("name", ["flora", "fedex_lora"])
def test_a_quantized_base_keeps_its_codes_under_a_residual(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, M, bias=False))
    fb.build(model, fb.Plan({"0": fb.Spec(fb.Int(4, block=16), adapter=fb.LoRA(rank=R, alpha=2.0 * R))}))
    host: Any = model[0]
    assert isinstance(host.weight, QTensor)
    codes, base = {k: t.clone() for k, t in host.weight.parts.items()}, host.weight.dequantize()
    all_of = [s._replace(tensors={"0": s.tensors["q_proj"]}) for s in (sent(name, 1), sent(name, 2))]
    server = registry.load("federate", name)()(Server({}), all_of).server
    over = server.residual["0"]
    rank = over["A"].shape[0]
    host.add("rounds", Frozen(fb.LoRA(rank=rank, alpha=rank)), torch.Generator(), over)
    own = {k: torch.zeros_like(t) for k, t in host.tensors("default").items()} | dict(server.tensors.get("0", {}))
    with torch.no_grad():
        for k, t in own.items():
            host.p["default"][k].copy_(t)
    mean = torch.stack([2.0 * s.tensors["0"]["B"] @ s.tensors["0"]["A"] for s in all_of]).mean(0)
    torch.testing.assert_close(host.stack().weight.detach(), base + mean, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(host.weight.parts[k], t) for k, t in codes.items())


def test_bad_replies_are_named() -> None:
    good = sent("fedavg", 1)
    spoiled = {mod: {k: t * float("nan") for k, t in p.items()} for mod, p in good.tensors.items()}
    cases = {
        "nothing to aggregate": [],
        "at least 1 is wanted": [good._replace(examples=0)],
        "other modules": [good, good._replace(tensors={"q_proj": good.tensors["q_proj"]})],
        "averages A and B, and client 1": [good, sent("ffa_lora", 1)],
        "different ranks are for": [good, sent("fedavg", 1, rank=2)],
        "not finite": [good, good._replace(tensors=spoiled)],
        "scales s of": [good, good._replace(scale=1.0)],
    }
    for words, all_of in cases.items():
        with pytest.raises(ValueError, match=words):
            run("fedavg", all_of)
    assert cut(good.tensors, R).keys() == good.tensors.keys()
    for wrong in (lambda: fb.FLoRA(cap=0), lambda: fb.FedExLoRA(rank=0), lambda: fb.LoRAFAIR(weight=0.0), lambda: fb.HetLoRA(share=0.0)):
        with pytest.raises(ValueError):
            wrong()
    assert replace(fb.FLoRA(), cap=3).cap == 3
