"""Beginnings that requests share: computed once, for requests of one adapter alone, and gone when room is needed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_folders import alone, factors, merged

import tiny_llama as tiny
from finebits.errors import Failed
from finebits.interop.serving import based
from finebits.serve.engine import Base, Engine, Limits
from finebits.serve.pages import Pool
from finebits.serve.prefixes import Prefixes
from finebits.serve.requests import Request, Sampling

MIB = 1 << 20
SYSTEM = [random.Random(3).randrange(3, 128) for _ in range(37)]  # two blocks of 16, and five tokens


@pytest.fixture(scope="module")
def base() -> Base:
    return based(tiny.fresh())


@pytest.fixture
def engine(base: Base) -> Iterator[Engine]:
    engine = Engine(base, Limits(4 * MIB))
    yield engine
    engine.stop()


def ask(engine: Engine, prompt: list[int], adapter: int | None = None, tokens: int = 6) -> list[int]:
    ids: list[int] = []
    engine.submit(Request(prompt, Sampling(max_tokens=tokens), adapter, lambda token: ids.append(token.id)))
    return ids


def run(engine: Engine) -> None:
    while engine.busy:
        engine.step()


def test_what_begins_alike_is_computed_once_and_answered_as_alone(engine: Engine) -> None:
    own = factors(5, 1)
    number, stock = engine.register(lambda: own), {True: merged(own), False: merged(None)}
    rest = [[9, 8], [7], [6, 5, 4, 3], [3] * 20, []]
    for adapter in (number, None):
        first = ask(engine, [*SYSTEM, 11], adapter)
        run(engine)
        before = engine.prefixes.hits
        answers = [ask(engine, [*SYSTEM, *more], adapter, 20) for more in rest]
        run(engine)
        assert engine.prefixes.hits == before + 2 * len(rest)
        assert first == alone(stock[adapter is not None], [*SYSTEM, 11], 6)
        assert answers == [alone(stock[adapter is not None], [*SYSTEM, *more], 20) for more in rest]


def test_two_that_come_together_end_with_one_copy(engine: Engine) -> None:
    answers = [ask(engine, [*SYSTEM, 4], tokens=9) for _ in range(2)]
    engine.step()
    assert engine.running[0].shared == engine.running[1].shared and len(engine.prefixes.blocks) == 2
    assert engine.pool.count - engine.pool.free == len(engine.base.layers) * (2 + 2)  # two that are shared, and the block of each
    run(engine)
    assert answers[0] == answers[1] == alone(tiny.fresh(), [*SYSTEM, 4], 9)


def test_a_prompt_of_whole_blocks_leaves_a_token_to_compute(engine: Engine) -> None:
    for _ in range(2):
        answer = ask(engine, SYSTEM[:32])
        run(engine)
        assert answer == alone(tiny.fresh(), SYSTEM[:32], 6)
    assert engine.prefixes.hits == 1


def test_windows_see_the_end_of_what_was_kept() -> None:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes: Any = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1)
    make = MistralConfig(vocab_size=128, sliding_window=5, initializer_range=0.15, **sizes)
    model, stock = MistralForCausalLM(make).eval(), MistralForCausalLM(make).eval()
    stock.load_state_dict(model.state_dict())
    engine = Engine(based(model), Limits(4 * MIB))
    for more in ([4], [5, 6, 7]):
        answer = ask(engine, [*SYSTEM, *SYSTEM, *more])
        run(engine)
        assert answer == alone(stock, [*SYSTEM, *SYSTEM, *more], 6)
    assert engine.prefixes.hits > 0
    engine.stop()


def test_another_version_of_an_adapter_begins_with_nothing(engine: Engine) -> None:
    """Unloaded and loaded under the same name it has another number, and nothing of the first is left."""
    answers = []
    for seed in (1, 2):
        own = factors(6, seed)
        number = engine.register(lambda own=own: own)
        answers.append(ask(engine, [*SYSTEM, 5], number))
        run(engine)
        assert engine.prefixes.hits == 0 and answers[-1] == alone(merged(own), [*SYSTEM, 5], 6)
        engine.unregister(number)
        assert not engine.prefixes.blocks and engine.pool.free == engine.pool.count


def test_what_was_used_twice_outlasts_what_was_used_once() -> None:
    pool = Pool(4, 8)
    prefixes = Prefixes(pool, 2, itertools.count(1))
    shared, _ = prefixes.keep(None, [], [1, 2], pool.take(1, "a"))
    prefixes.release([shared])
    prefixes.release(prefixes.found(None, [1, 2, 3]))
    once = [prefixes.keep(None, [], [9, i], pool.take(1, "b"))[0] for i in range(2)]
    after, _ = prefixes.keep(None, [once[1]], [5, 5], pool.take(1, "b"))
    prefixes.release([*once, after])
    assert sorted(prefixes.idle(), key=lambda b: b.age) == [after, *once, shared]
    with pytest.raises(Failed, match="nobody's"):
        prefixes.evict(once[0])
        pool.pass_on(once[0].pages, "c")


@given(st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 1), min_size=1, max_size=9)), max_size=12))
@settings(max_examples=40, deadline=None)
def test_what_is_found_is_the_longest_beginning_of_the_same_adapter(asked: list[tuple[int, list[int]]]) -> None:
    pool, seen = Pool(200, 8), set[tuple[int, tuple[int, ...]]]()
    prefixes = Prefixes(pool, 2, itertools.count(1))
    for adapter, prompt in asked:
        chain = prefixes.found(adapter, prompt)
        most = (len(prompt) - 1) // 2
        assert len(chain) == next((n for n in range(most, 0, -1) if (adapter, tuple(prompt[: 2 * n])) in seen), 0)
        for i in range(len(chain), len(prompt) // 2):
            chain.append(prefixes.keep(adapter, chain, prompt[2 * i : 2 * i + 2], pool.take(1, "row"))[0])
            seen.add((adapter, tuple(prompt[: 2 * i + 2])))
        prefixes.release(chain)
    assert not any(b.uses for b in prefixes.blocks.values()) and pool.count - pool.free == len(prefixes.blocks)
    for adapter in range(3):
        prefixes.forget(adapter)
    assert pool.free == pool.count
