"""Rounds: deterministic by seed, resumed to the bit, with clients that stay away; rows dealt by kind; privacy of clients."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import finebits as fb
from finebits import registry
from finebits.federate._privacy import Privacy, clipped, epsilon, noise_for, private
from finebits.federate._rounds import Federation, Round, load, rounds, save
from finebits.federate._skew import dirichlet
from finebits.federate.base import Sent, Server, cut

M, N, R = 12, 10, 4


def tensors(seed: int = 0, rank: int = R) -> dict[str, dict[str, torch.Tensor]]:
    gen = torch.Generator().manual_seed(seed)
    return {"q_proj": {"A": torch.randn(rank, N, generator=gen), "B": torch.randn(M, rank, generator=gen)}}


def whole() -> dict[str, torch.Tensor]:
    return tensors()["q_proj"] | {"R": torch.eye(R)}


def local(federation: Federation, before: Round, client: int) -> Sent:
    """A client whose training is noise of its own around its start."""
    rank = before.ranks[client]
    start = federation.start(before.server, rank) or {"q_proj": {"A": torch.zeros(rank, N), "B": torch.zeros(M, rank)}}
    gen = federation.gen("client", before.number + 1, client)
    moved = {name: {k: t + 0.1 * torch.randn(t.shape, generator=gen) for k, t in p.items()} for name, p in start.items()}
    return Sent(federation.aggregator.kept(start, moved), examples=client + 1, scale=2.0)


def same(a: Round, b: Round) -> bool:
    parts = [(a.server.tensors, b.server.tensors), (a.server.residual, b.server.residual)]
    return a[0] == b[0] and a[2:] == b[2:] and all(
        x.keys() == y.keys() and all(torch.equal(t, y[name][k]) for name, p in x.items() for k, t in p.items()) for x, y in parts
    )  # fmt: skip


@pytest.mark.parametrize("aggregator", [fb.FedAvg(), fb.FLoRA(), fb.FedExLoRA(), fb.HetLoRA(share=0.5)], ids=lambda a: type(a).__name__)
def test_rounds_resume_to_the_bit(aggregator, tmp_path: Path) -> None:
    ranks = (4, 2, 4) if aggregator.ranks else (4, 4, 4)
    federation, begun = Federation(aggregator, clients=3, seed=5, dropout=0.3), Round(0, Server(tensors()), ranks)
    through = list(rounds(federation, local, begun, 5))
    for now in rounds(federation, local, begun, 2):
        save(now, tmp_path / "rounds", loss=0.5)
    read, said = load(tmp_path / "rounds") or (None, None)
    assert read is not None and said is not None and same(read, through[1]) and said["loss"] == 0.5
    assert len(list((tmp_path / "rounds").iterdir())) == 2  # the rounds before are gone
    again = list(rounds(federation, local, read, 5))
    assert all(same(a, b) for a, b in zip(again, through[2:], strict=True))
    assert not same(again[-1], list(rounds(federation._replace(seed=6), local, begun, 5))[-1])
    (tmp_path / "rounds" / "2-round.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="begin anew"):
        load(tmp_path / "rounds")
    assert load(tmp_path) is None


def test_clients_stay_away_and_the_others_count_among_themselves() -> None:
    federation = Federation(fb.FedAvg(), clients=40, seed=1, fraction=0.5, dropout=0.2)
    there = [federation.participants(n) for n in range(1, 201)]
    assert sum(map(len, there)) / (40 * 200) == pytest.approx(0.4, abs=0.02) and len({tuple(t) for t in there}) > 150
    nobody = Round(3, Server(tensors()), (R, R))
    assert Federation(fb.FedAvg(), clients=2).aggregate(nobody, {}).server is nobody.server
    alone = Sent(tensors(1), 7)
    made = Federation(fb.FedAvg(), clients=2).aggregate(nobody, {1: alone})
    assert made.sent == (1,) and all(torch.equal(t, alone.tensors["q_proj"][k]) for k, t in made.server.tensors["q_proj"].items())


@pytest.mark.parametrize("name", registry.names("federate"))
def test_bytes_of_a_round_are_those_of_the_papers_whoever_takes_part(name: str) -> None:
    """Up from those who sent something, down to every client; where ranks may differ, of each its own (and for FLoRA the stack of all)."""
    aggregator = registry.load("federate", name)()
    ranks = (4, 2, 1, 3, 2) if aggregator.ranks else (R,) * 5
    begun = Round(0, Server({"q_proj": {k: t for k, t in whole().items() if k in aggregator.sends}}), ranks)
    there = {k: Sent(cut(begun.server.tensors, ranks[k]), 1) for k in (0, 2, 3)}
    now = Federation(aggregator, clients=5).aggregate(begun, there)
    took, ends = sum(ranks[k] for k in there), M + N
    papers = {
        "ffa_lora": (R * M * 3, R * M * 5),
        "fed_sb": (R * R * 3, R * R * 5),
        "flora": (took * ends, took * ends * 5),
        "fedex_lora": (3 * R * ends, 3 * R * ends * 5),
        "hetlora": (took * ends, sum(ranks) * ends),
    }
    assert (now.up, now.down) == tuple(4 * n for n in papers.get(name, (3 * R * ends, 5 * R * ends)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fraction": 0.0}, "fraction above 0"),
        ({"dropout": 1.0}, "below 1"),
        ({"clients": 0}, "at least one"),
        ({"privacy": Privacy(0.0, 1.0)}, "clip"),
    ],
)
def test_numbers_that_make_no_rounds(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Federation(fb.FedAvg(), clients=2)._replace(**change).checked((R, R))


def test_small_alpha_gives_clients_of_few_kinds() -> None:
    kinds = [i % 5 for i in range(500)]
    for alpha, most in ((0.05, 1.0), (1000.0, 0.0)):
        dealt = dirichlet(kinds, 10, alpha, seed=3)
        assert sorted(sum(dealt, [])) == list(range(500)) and all(dealt) and dealt == dirichlet(kinds, 10, alpha, seed=3)
        shares = [np.bincount([kinds[r] for r in rows], minlength=5) / len(rows) for rows in dealt]
        concentrated = np.mean([s.max() for s in shares])
        assert concentrated > 0.7 if most else concentrated < 0.3
    for clients, alpha in ((501, 1.0), (0, 1.0), (5, 0.0)):
        with pytest.raises(ValueError):
            dirichlet(kinds, clients, alpha, 0)


def test_the_accountant_gives_published_values() -> None:
    """60 epochs of MNIST at noise 1.12 and batches of 256: the 2.92 of TensorFlow Privacy's tutorial, by its conversion; and the tighter one."""
    from finebits.federate._privacy import ORDERS, rdp

    classic = min(14062 * rdp(a, 1.12, 256 / 60000) + math.log(1e5) / (a - 1) for a in ORDERS)
    assert classic == pytest.approx(2.92, abs=0.01)
    assert epsilon(1.12, 14062, 1e-5, 256 / 60000) == pytest.approx(2.52, abs=0.01)
    assert epsilon(1.0, 1000, 1e-5, 0.01) == pytest.approx(2.11, abs=0.01)
    assert epsilon(10.0, 100, 1e-5) == pytest.approx(4.75, abs=0.01)
    assert epsilon(0.0, 1, 1e-5) == math.inf
    assert [noise_for(e, 10, 1e-5) for e in (1, 3, 8)] == sorted([noise_for(e, 10, 1e-5) for e in (1, 3, 8)], reverse=True)
    assert epsilon(2.0, 5, 1e-5, 0.1) < epsilon(2.0, 10, 1e-5, 0.1) < epsilon(2.0, 10, 1e-5, 0.5) < epsilon(2.0, 10, 1e-5)


def test_no_client_moves_the_mean_further_than_its_clip() -> None:
    start, far = tensors(), tensors(1)
    u, norm = clipped(start, far, 0.5)
    assert norm > 0.5 and math.sqrt(sum(float(t.square().sum()) for p in u.values() for t in p.values())) <= 0.5 * (1 + 1e-6)
    assert clipped(start, start, 0.5)[1] == 0.0
    both = [
        private(fb.FedAvg(), Server(start), [Sent(t, 10**6)], Privacy(0.5, 0.0), 4, torch.Generator()).server.tensors for t in (start, far)
    ]
    moved = math.sqrt(sum(float((both[1]["q_proj"][k] - both[0]["q_proj"][k]).double().square().sum()) for k in ("A", "B")))
    assert moved == pytest.approx(0.5 / 4, rel=1e-5)  # whatever it says of its examples
    empty = private(fb.FedAvg(), Server(start), [], Privacy(1.0, 1.0), 4, torch.Generator().manual_seed(0)).server.tensors
    assert not torch.equal(empty["q_proj"]["A"], start["q_proj"]["A"])  # noise comes also where nobody does


def test_noise_is_of_the_size_that_is_accounted_for() -> None:
    start = {"q_proj": {"B": torch.zeros(200, 100)}}
    made = private(fb.FFALoRA(), Server(start), [], Privacy(clip=2.0, noise=1.5, q=0.5), 8, torch.Generator().manual_seed(0))
    assert made.server.tensors["q_proj"]["B"].std().item() == pytest.approx(1.5 * 2.0 / (0.5 * 8), rel=0.03)


@pytest.mark.parametrize("aggregator", [fb.FLoRA(), fb.FedExLoRA(), fb.LoRAFAIR(), fb.HetLoRA()], ids=lambda a: type(a).__name__)
def test_what_gives_away_more_than_a_mean_is_refused(aggregator) -> None:
    with pytest.raises(ValueError, match="take fedavg, ffa_lora or fed_sb"):
        Federation(aggregator, 2, privacy=Privacy(1.0, 1.0)).checked((R, R))
