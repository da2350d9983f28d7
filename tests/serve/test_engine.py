"""The engine without HTTP: rows of different adapters in one pass, the pool that holds them, and who is let in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_folders import alone, factors, lora, merged

import finebits as fb
import tiny_llama as tiny
from finebits.errors import Invalid
from finebits.interop.quantizer import format_for
from finebits.interop.serving import Reader, based, served
from finebits.kernels.cpu import adapters as cpu
from finebits.kernels.laid import Group, Groups
from finebits.merging.base import Factors
from finebits.serve.engine import Base, Engine, Limits
from finebits.serve.grouped import add, lay, pages_of, reference
from finebits.serve.grouped import factors as factors_of
from finebits.serve.pages import Pool, spans
from finebits.serve.prefixes import Block
from finebits.serve.requests import Busy, Request, Sampling, peak, sampled

RANKS = {"a": 4, "b": 7, "c": 33}
MIB = 1 << 20


class Asked(Request):
    """A request that keeps what it is told."""

    def __init__(self, prompt: list[int], adapter: int | None = None, **sampling: Any) -> None:
        super().__init__(prompt, Sampling(**sampling), adapter, self._token, self._end)
        self.ids: list[int] = []
        self.tokens: list[Any] = []
        self.ends: list[tuple[str, str]] = []

    def _token(self, token: Any) -> bool:
        self.ids.append(token.id)
        self.tokens.append(token)
        return False

    def _end(self, reason: str, error: str) -> None:
        self.ends.append((reason, error))

    @property
    def reason(self) -> str:
        assert len(self.ends) < 2, "a request ends once"
        return self.ends[0][0] if self.ends else ""

    @property
    def error(self) -> str:
        return self.ends[0][1]


def run(engine: Engine) -> None:
    while engine.busy:
        engine.step()


@pytest.fixture(scope="module")
def base() -> Base:
    return based(tiny.fresh())


@pytest.fixture
def engine(base: Base) -> Iterator[Engine]:
    engine = Engine(base, Limits(4 * MIB))
    yield engine
    engine.stop()


def prompts(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 128) for _ in range(draw.randrange(1, longest))] for _ in range(count)]


def test_answers_are_those_of_the_request_alone(engine: Engine) -> None:
    """Three adapters of ranks 4 to 33 and the base, ragged prompts, arriving between steps in any order."""
    held = {name: factors(rank, seed) for seed, (name, rank) in enumerate(RANKS.items())}
    numbers: dict[str, int | None] = {name: engine.register(lambda f=f: f) for name, f in held.items()} | {"": None}
    draw, asked = random.Random(0), []
    for prompt in prompts(24, 1):
        name = draw.choice(list(numbers))
        asked.append((name, Asked(prompt, numbers[name], max_tokens=draw.randrange(1, 14))))
        engine.submit(asked[-1][1])
        for _ in range(draw.randrange(3)):
            engine.step()
    run(engine)
    stock = {name: merged(held.get(name)) for name in numbers}
    for name, request in asked:
        assert request.ids == alone(stock[name], request.prompt, request.sampling.max_tokens) and request.reason == "length"
    assert {o for o in engine.pool.held() if not isinstance(o, Block)} <= {numbers[n] for n in held} and engine.adapters.loads == 3
    assert {r.ids[0] for _, r in asked} != {asked[0][1].ids[0]}


@pytest.mark.parametrize("form", ["nf4-b32", "int8-b32"])
def test_packed_bases_are_served_as_they_are(tmp_path: Path, form: str) -> None:
    tiny.worded(tmp_path / "llama")
    lora(tmp_path / "a", 5, 1)
    it = served(tmp_path / "llama", format_for(form))
    engine = Engine(it.base, Limits(2 * MIB))
    folder = tmp_path / "a"
    number = engine.register(Reader(it, 64).marked(folder))
    both = [Asked(p, n, max_tokens=8) for p in prompts(3, 2) for n in (number, None)]
    for request in both:
        engine.submit(request)
    run(engine)
    engine.stop()
    plan = fb.Plan({n: fb.Spec(format_for(form)) for n in tiny.names()}, model=str(tmp_path / "llama"))
    packed, _ = fb.load_planned(plan)
    over = fb.load_peft(folder, fb.load_planned(plan)[0])
    for request in both:
        assert request.ids == alone(over if request.adapter else packed, request.prompt, 8)


def test_a_saved_run_is_its_base_and_its_adapter(tmp_path: Path) -> None:
    """And adapters that other runs trained over the very same base lie beside it."""
    tiny.worded(tmp_path / "llama")
    plan = fb.Plan({n: fb.Spec(fb.NF(4, block=32), adapter=fb.LoRA(rank=4)) for n in tiny.names()}, model=str(tmp_path / "llama"))
    stock = {}
    for seed, name in enumerate(("run", "other"), 1):
        model, _ = fb.load_planned(plan)
        with torch.no_grad():
            for i, (_, host) in enumerate(fb.hosts(model)):
                host.tensors("default")["B"].copy_(
                    0.3 * torch.randn(host.weight.shape[0], 4, generator=torch.Generator().manual_seed(seed + 9 * i))
                )
        fb.save(model, tmp_path / name)
        stock[name] = model
    it = served(tmp_path / "run")
    assert it.own is not None and len(it.own) == len(tiny.names())
    engine, own = Engine(it.base, Limits(2 * MIB)), it.own
    numbers = {"run": engine.register(lambda: own, pinned=True), "other": engine.register(Reader(it, 64).marked(tmp_path / "other"))}
    asked = [(name, Asked(p, numbers.get(name), max_tokens=6)) for p in prompts(2, 7) for name in ("run", "other", "base")]
    for _, request in asked:
        engine.submit(request)
    run(engine)
    engine.stop()
    for _, host in fb.hosts(base := fb.load_planned(plan)[0]):
        host.active = []
    for name, request in asked:
        assert request.ids == alone(stock.get(name, base), request.prompt, 6)


def test_windows_and_grouped_heads() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1)
    make = MistralConfig(vocab_size=128, sliding_window=5, initializer_range=0.15, **sizes)  # type: ignore[arg-type]
    model = MistralForCausalLM(make).eval()
    stock = MistralForCausalLM(make).eval()
    stock.load_state_dict(model.state_dict())
    engine = Engine(based(model), Limits(4 * MIB))
    asked = [Asked(p, max_tokens=9) for p in prompts(5, 3, 20)]
    for request in asked:
        engine.submit(request)
    run(engine)
    engine.stop()
    assert [r.ids for r in asked] == [alone(stock, r.prompt, 9) for r in asked]


def test_a_model_with_other_memory_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    with pytest.raises(Invalid, match="attention interface"):
        based(MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1)).eval())


@pytest.mark.parametrize("body", ["native", "torch"])
def test_grouped_products_equal_the_row_by_row_reference(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    if body == "torch":
        monkeypatch.setenv("FINEBITS_KERNELS", "reference")
    elif cpu.available() is not None:
        pytest.skip("the CPU kernels are not compiled")
    pool, gen = Pool(40, 200), torch.Generator().manual_seed(0)
    own = [{"q": Factors(torch.randn(45, r, generator=gen), torch.randn(r, 37, generator=gen), 0.5 * r)} for r in (1, 4, 11, 6)]
    laid = [lay(f, pool, i) for i, f in enumerate(own)]
    assert [len(r.pages) for r in laid] == [pages_of(f, 200) for f in own]
    for f, r in zip(own, laid, strict=True):
        back = factors_of(r.at["q"])
        assert torch.equal(back.A, f["q"].A) and torch.equal(back.B, f["q"].B) and r.at["q"].rank == f["q"].rank
    x, y = torch.randn(21, 37, generator=gen), torch.randn(21, 45, generator=gen)
    groups = Groups([Group(0, 2, laid[0]), Group(2, 3, None), Group(3, 8, laid[1]), Group(8, 9, laid[2]), Group(9, 21, laid[3])])
    expected = reference(x, y, groups, "q")
    assert torch.equal(reference(x, y, groups, "other"), y)
    add(x, y, groups, "q")
    assert torch.allclose(y, expected, atol=2e-5) and torch.equal(y[2], expected[2])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 10)), min_size=1, max_size=8), st.integers(10, 40))
@settings(max_examples=25, deadline=None)
def test_vectors_never_cross_a_page_and_never_overlap(vectors: list[tuple[int, int]], elements: int) -> None:
    found, count = spans(vectors, elements)
    taken = set[tuple[int, int]]()
    for (rows, length), bundle in zip(vectors, found, strict=True):
        assert sum(s.rows for s in bundle) == rows
        for page, offset, n in bundle:
            places = {(page, offset + i) for i in range(n * length)}
            assert offset + n * length <= elements and page < count and not places & taken
            taken |= places


def test_pages_are_conserved_whatever_happens(base: Base) -> None:
    """Submissions, aborts, loads, evictions and unloads at random: each page is free or of one owner, and at rest all are free or resident."""
    engine, draw = Engine(base, Limits(MIB // 2, max_queue=1000, max_batch=5)), random.Random(4)
    numbers, asked = [engine.register(lambda r=r: factors(r, r)) for r in (2, 8, 16, 32, 40, 64)], []
    for i in range(70):
        if draw.random() < 0.7:
            asked.append(Asked(prompts(1, i)[0], draw.choice([*numbers, None]), max_tokens=draw.randrange(1, 20)))
            engine.submit(asked[-1])
        if draw.random() < 0.2 and asked:
            engine.abort(draw.choice(asked))
        if i == 45:
            engine.unregister(numbers.pop(2))
        engine.step()
        held = engine.pool.held()
        assert sum(held.values()) + engine.pool.free == engine.pool.count
        assert {o for o in held if not isinstance(o, (int, Block))} <= set(engine.running)
    run(engine)
    assert all(r.reason in ("length", "abort") and not r.error for r in asked) and engine.adapters.evictions > 0
    assert set(engine.pool.held()) <= {*numbers, *engine.prefixes.idle()} and len(engine.adapters.entries) == len(numbers)
    with pytest.raises(RuntimeError, match="given back twice"):
        engine.pool.give([engine.pool._free[0]])
    engine.stop()


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), min_size=1, max_size=7))
@settings(max_examples=25, deadline=None)
def test_the_peak_is_what_comes(rows: list[tuple[int, int]]) -> None:
    pages, most = (lambda tokens: -(-tokens // 16)), 0
    for step in range(1, 51):
        most = max(most, sum(pages(kept + step) for kept, left in rows if left >= step))
    assert peak(rows, pages) == most <= sum(pages(kept + left) for kept, left in rows)


def test_the_least_recently_used_leaves_and_the_pinned_stays(base: Base) -> None:
    one = pages_of(factors(32, 0), Engine(base, Limits(MIB)).pool.elements)
    engine = Engine(base, Limits(int((3 * one + 6) * 1024 * 4)))
    assert engine.pool.elements == 1024
    numbers = [engine.register(lambda i=i: factors(32, i), pinned=i == 0) for i in range(4)]

    def ask(i: int) -> list[bool]:
        engine.submit(request := Asked([5, 6], numbers[i], max_tokens=2))
        run(engine)
        assert request.reason == "length"
        return [engine.adapters.entries[n].state == "resident" for n in numbers]

    assert [ask(i) for i in (0, 1, 2)][-1] == [True, True, True, False]
    assert ask(1) == [True, True, True, False] and engine.adapters.loads == 3
    assert ask(3) == [True, True, False, True] and engine.adapters.evictions == 1
    engine.stop()


def test_a_full_queue_and_what_never_fits_are_refused_at_once(base: Base) -> None:
    engine = Engine(base, Limits(MIB // 4, max_queue=2))
    for _ in range(2):
        engine.submit(Asked([5], max_tokens=4))
    with pytest.raises(Busy, match="2 requests wait already") as refused:
        engine.submit(Asked([5], max_tokens=4))
    assert refused.value.wait >= 1
    with pytest.raises(Invalid, match="prompt is empty"):
        engine.submit(Asked([]))
    with pytest.raises(Invalid, match="the pool has 64"):
        engine.submit(Asked([5] * 400, max_tokens=200))
    with pytest.raises(Invalid, match="room for 2048 together"):
        engine.submit(Asked([5] * 2000, max_tokens=100))
    large = engine.register(lambda: factors(64, 0))
    run(engine)
    request = Asked([5], large, max_tokens=4)
    engine.submit(request)
    run(engine)
    assert request.reason == "refused" and "larger --budget" in request.error
    with pytest.raises(Invalid, match="larger --budget"):  # known from then on
        engine.submit(Asked([5], large))
    engine.stop()


def test_an_adapter_that_breaks_takes_nobody_along(engine: Engine) -> None:
    """One that cannot be read, and one whose numbers overflow: the rows beside it are what they are alone, and so are those after."""

    def missing() -> dict[str, Factors]:
        raise FileNotFoundError("gone")

    huge = {n: Factors(1e20 * f.B, 1e20 * f.A, f.s) for n, f in factors(4, 0).items()}
    bad, over = engine.register(missing), engine.register(lambda: huge)
    prompt = prompts(1, 9)[0]
    asked = [Asked(prompt, n, max_tokens=6) for n in (None, bad, over, None)]
    for request in asked:
        engine.submit(request)
    run(engine)
    engine.submit(last := Asked(prompt, max_tokens=6))
    run(engine)
    assert "cannot be read (FileNotFoundError: gone)" in asked[1].error and "NaN or Inf" in asked[2].error
    assert asked[0].ids == asked[3].ids == last.ids == alone(tiny.fresh(), prompt, 6)


def test_a_request_that_cannot_begin_or_be_told_takes_nobody_along(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = engine.register(lambda: factors(4, 0)), engine.register(lambda: factors(4, 1))
    admit = engine.adapters.admit

    def admitted(entry: Any, running: Any) -> Any:
        if entry.number == first:
            raise MemoryError("no room")
        return admit(entry, running)

    monkeypatch.setattr(engine.adapters, "admit", admitted)
    prompt = prompts(1, 9)[0]
    asked = [Asked(prompt, n, max_tokens=4) for n in (first, second, None)]
    asked[2].end = lambda reason, error: 1 / 0  # type: ignore[assignment, return-value]
    for request in asked:
        engine.submit(request)
    run(engine)
    assert asked[0].reason == "error" and "could not begin (MemoryError: no room)" in asked[0].error
    assert asked[1].reason == "length" and len(asked[2].ids) == 4 and not engine.adapters.entries[first].uses


def test_seeds_stops_and_logprobs(engine: Engine) -> None:
    prompt = prompts(1, 5)[0]
    drawn = [Asked(prompt, max_tokens=12, temperature=1.5, top_p=0.9, seed=seed, logprobs=3) for seed in (1, 2, 1)]
    greedy = Asked(prompt, max_tokens=12, logprobs=0)
    engine.submit(drawn[0])
    run(engine)  # alone, and then among others
    for request in (*drawn[1:], greedy):
        engine.submit(request)
    run(engine)
    assert drawn[0].ids == drawn[2].ids != drawn[1].ids
    stop = Asked(prompt, max_tokens=12, stops=frozenset({greedy.ids[3]}))
    engine.submit(stop)
    run(engine)
    first = greedy.ids.index(greedy.ids[3])
    assert stop.ids == greedy.ids[:first] and stop.reason == "stop"
    with torch.no_grad():
        logs = tiny.fresh()(input_ids=torch.tensor([[*prompt, *greedy.ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(1)
    assert [t.logprob for t in greedy.tokens] == pytest.approx([float(row[i]) for row, i in zip(logs, greedy.ids, strict=True)], abs=1e-4)
    assert not greedy.tokens[0].top and len(drawn[0].tokens[0].top) == 3


def test_top_p_keeps_the_least_set_that_holds_it() -> None:
    logits, gen = torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), torch.Generator().manual_seed(0)
    ids = lambda p: {sampled(logits, Sampling(temperature=1.0, top_p=p), gen) for _ in range(200)}  # noqa: E731
    assert ids(0.5) == {0} and ids(0.6) == {0, 1} and ids(0.8) == {0, 1} and ids(1.0) == {0, 1, 2, 3}
