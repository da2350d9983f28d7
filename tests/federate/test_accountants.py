"""The accountant, clipping and noise beside those of the libraries that others use, where these are: make verify-flower."""

from __future__ import annotations

import math

import pytest
import torch

import finebits as fb
from finebits.federate._privacy import ORDERS, Privacy, clipped, epsilon, noise_for, private
from finebits.federate.base import Server

CASES = [(0.8, 1, 1e-5, 1.0), (1.12, 100, 1e-5, 0.01), (1.2, 10, 1e-3, 0.5), (5.0, 10, 1e-3, 0.25), (10.0, 100, 1e-5, 1.0)]


@pytest.mark.parametrize(("noise", "rounds", "delta", "q"), CASES)
def test_epsilon_is_that_of_dp_accounting(noise: float, rounds: int, delta: float, q: float) -> None:
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is in an environment of its own: make verify-flower")
    from dp_accounting import rdp  # pyright: ignore[reportMissingImports]

    theirs = rdp.RdpAccountant([*ORDERS], dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    theirs.compose(dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(noise)), rounds)
    assert epsilon(noise, rounds, delta, q) == pytest.approx(theirs.get_epsilon(delta), rel=1e-6)


def test_the_noise_of_an_epsilon_is_enough_by_dp_accounting_too() -> None:
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is in an environment of its own: make verify-flower")
    from dp_accounting import rdp  # pyright: ignore[reportMissingImports]

    for wanted in (1.0, 3.0, 8.0):
        theirs = rdp.RdpAccountant([*ORDERS], dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
        theirs.compose(dp.PoissonSampledDpEvent(0.5, dp.GaussianDpEvent(noise_for(wanted, 10, 1e-3, 0.5))), 10)
        assert 0.98 * wanted < theirs.get_epsilon(1e-3) <= wanted * (1 + 1e-9)


def test_clipping_and_noise_are_of_the_size_of_flowers() -> None:
    theirs = pytest.importorskip("flwr.supercore.differential_privacy", reason="Flower is in an environment of its own: make verify-flower")
    gen = torch.Generator().manual_seed(0)
    start, sent = ({"q": {"A": torch.randn(3, 5, generator=gen), "B": torch.randn(4, 3, generator=gen)}} for _ in range(2))
    arrays = [t.double().numpy().copy() for t in sent["q"].values()]
    theirs.compute_clip_model_update(arrays, [t.double().numpy() for t in start["q"].values()], 0.5)
    update, norm = clipped(start, sent, 0.5)
    assert norm > 0.5
    for made, array, before in zip(update["q"].values(), arrays, start["q"].values(), strict=True):
        torch.testing.assert_close(made, torch.from_numpy(array) - before.double())
    assert Privacy(0.5, 1.2, q=0.5).std(clients=20) == pytest.approx(theirs.compute_stdv(1.2, 0.5, 10))  # 10 of 20 are expected


def test_noise_on_what_is_averaged_grows_in_the_product_as_its_square_only_where_both_factors_are_sent() -> None:
    """E‖noise in s·B A‖² after a private round where nobody sent anything, over many modules: σ²·m·‖A‖² of FFA-LoRA and σ²·r² of Fed-SB
    over orthonormal factors grow with σ²; ξ_B A + B ξ_A + ξ_B ξ_A of both factors has σ⁴·m·n·r beside."""
    m, n, r, clients, modules = 40, 30, 4, 4, 60
    gen = torch.Generator().manual_seed(0)
    A, B = torch.randn(r, n, generator=gen), torch.randn(m, r, generator=gen)
    U, V = (torch.linalg.qr(torch.randn(side, r, generator=gen)).Q for side in (m, n))
    sums = {"ffa_lora": {"B": B}, "fed_sb": {"R": torch.zeros(r, r)}, "fedavg": {"A": A, "B": B}}
    of = {"ffa_lora": lambda p: p["B"] @ A, "fed_sb": lambda p: U @ p["R"] @ V.mT, "fedavg": lambda p: p["B"] @ p["A"]}
    aggregators = {"ffa_lora": fb.FFALoRA(), "fed_sb": fb.FedSB(), "fedavg": fb.FedAvg()}

    def squared(name: str, sigma: float) -> float:
        server = Server({str(i): sums[name] for i in range(modules)})
        privacy = Privacy(clip=0.5, noise=sigma * clients / 0.5)
        assert privacy.std(clients) == pytest.approx(sigma)
        made = private(aggregators[name], server, [], privacy, clients, torch.Generator().manual_seed(1)).server.tensors
        before = of[name](sums[name])
        return sum(float((of[name](p) - before).double().square().sum()) for p in made.values()) / modules

    wanted = {
        "ffa_lora": lambda s: s**2 * m * float(A.square().sum()),
        "fed_sb": lambda s: s**2 * r**2,
        "fedavg": lambda s: s**2 * (m * float(A.square().sum()) + n * float(B.square().sum())) + s**4 * m * n * r,
    }
    for name, law in wanted.items():
        for sigma in (0.1, 2.0):
            assert squared(name, sigma) == pytest.approx(law(sigma), rel=0.1), (name, sigma)
    grown = {name: math.log2(squared(name, 8.0) / squared(name, 4.0)) for name in wanted}
    assert grown["ffa_lora"] == pytest.approx(2, abs=0.01) and grown["fed_sb"] == pytest.approx(2, abs=0.01)
    assert grown["fedavg"] > 3.5
