"""Packs: as few as best fit makes, and every row as it is alone, its loss and its gradients."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import finebits as fb
import tiny_llama
from finebits.data.arrays import Example, Tokens
from finebits.data.packing import Packs, batch, best_fit
from finebits.errors import Invalid
from finebits.interop.packed import Unpackable, packable, try_packs
from finebits.losses import IGNORED
from finebits.tasks import base as tasks
from finebits.tasks.causal_lm import CausalLM


class Pads:
    pad_token_id, eos_token_id = 0, 2


def rows_of(lengths, seed=0, vocabulary=128):
    draw = random.Random(seed)
    made = []
    for i, n in enumerate(lengths, 1):
        ids = [draw.randrange(3, vocabulary) for _ in range(n)]
        labels = [id if draw.random() < 0.6 else IGNORED for id in ids]
        made.append(Example(ids, labels, i, path="d.jsonl"))
    return Tokens.of(made, max(lengths), True)


def model_of(name, attention="sdpa"):
    import transformers as t

    torch.manual_seed(0)
    sizes = dict(vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    sizes |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    configs = {
        "llama": lambda: t.LlamaConfig(**sizes),
        "gpt2": lambda: t.GPT2Config(
            vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0
        ),
        "mistral": lambda: t.MistralConfig(**sizes, sliding_window=4),
        "gemma3": lambda: t.Gemma3TextConfig(**sizes, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
        "phi": lambda: t.PhiConfig(**sizes),
    }
    config = configs[name]()
    config._attn_implementation = attention
    return t.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("seed", range(6))
def test_packs_hold_every_row_once_and_are_few(seed):
    draw = random.Random(seed)
    lengths = [draw.randrange(1, 20) for _ in range(draw.randrange(1, 60))]
    packs = best_fit(lengths, 20)
    assert sorted(itertools.chain(*packs)) == list(range(len(lengths)))
    assert all(sum(lengths[r] for r in pack) <= 20 for pack in packs)
    least = -(-sum(lengths) // 20)
    assert len(packs) <= 11 / 9 * least + 4
    assert all(
        sum(lengths[r] for r in a) + min(lengths[r] for r in b) > 20 for a, b in itertools.combinations(packs, 2)
    )  # no pack was left needlessly


def test_best_fit_of_a_few_is_the_best_there_is():
    assert best_fit([5, 5, 4, 3, 2, 1], 10) == [[0, 1], [2, 3, 4, 5]]
    assert best_fit([], 10) == [] and best_fit([10, 10], 10) == [[0], [1]]
    with pytest.raises(Invalid, match="row 2 has 11 tokens, and a pack holds 10"):
        best_fit([1, 11], 10)


def test_many_rows_are_packed_at_once():
    draw = random.Random(0)
    packs = best_fit([draw.randrange(1, 2000) for _ in range(50_000)], 2048)
    assert len(packs) < 26_000


CASES = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("gpt2", "sdpa"),
    ("mistral", "sdpa"),
    ("mistral", "eager"),
    ("gemma3", "eager"),
    ("phi", "sdpa"),
]


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_losses_and_gradients_are_those_of_the_rows_alone(name, attention):
    model, task = model_of(name, attention), CausalLM(128)
    tokens = rows_of([9, 1, 3, 7, 12, 2, 5])
    packs = Packs.of(tokens, 16)
    assert len(packs) == 3 and max(len(p) for p in packs.rows) > 1

    def gradients(loss):
        loss.backward()
        found = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    alone = [task.loss(model, task.batch([vars(e)], Pads)) for e in tokens]
    packed = task.batch([vars(packs[i]) for i in range(len(packs))], Pads, 8)  # with padding on the right
    assert "attention_mask" not in packed and packed["input_ids"].shape == (3, 16)
    one = {k: v[:1] for k, v in packed.items()}
    for i, pack in enumerate(packs.rows):
        own = {k: v[i : i + 1] for k, v in packed.items()}
        for row in pack:  # the loss of one row of the pack: all other labels are left out
            only, at = own["labels"].clone(), sum(tokens.lengths[r] for r in pack[: pack.index(row)])
            only[:, :at] = IGNORED
            only[:, at + tokens.lengths[row] :] = IGNORED
            assert torch.allclose(task.loss(model, own | {"labels": only}), alone[row], rtol=1e-5, atol=1e-5)
    assert tasks.labelled(one, task) == packs.labelled[0]
    wanted, got = gradients(sum(alone)), gradients(task.loss(model, packed))
    assert wanted.keys() == got.keys()
    for k in wanted:
        assert torch.allclose(wanted[k], got[k], rtol=1e-4, atol=1e-5 * float(wanted[k].abs().max()) + 1e-7), k


def test_the_first_token_of_a_row_is_not_learned_from_another():
    tokens = Tokens.of([Example([5, 6], [5, 6], 1), Example([7, 8], [7, 8], 2)], 4, False)
    packs = Packs.of(tokens, 4)
    assert packs[0].labels == [IGNORED, 6, IGNORED, 8] and packs.labelled == [2] == [sum(tokens.labelled)]
    made = batch([vars(packs[0])], 0)
    assert made["position_ids"].tolist() == [[0, 1, 0, 1]]


def test_models_that_cannot_are_refused_in_a_sentence():
    import transformers as t

    small = dict(vocab_size=16, hidden_size=8, num_hidden_layers=1)
    for config, says in [
        (t.MambaConfig(**small, state_size=2), "MambaForCausalLM hands a state from token to token"),
        (t.BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2), "BloomForCausalLM counts them itself"),
    ]:
        with torch.device("meta"):
            model = t.AutoModelForCausalLM.from_config(config)
        with pytest.raises(Unpackable, match=says) as caught:
            packable(model, fb.LoRA())
        assert caught.value.code == 2
    packable(model_of("llama"), fb.LoRA())


def test_a_model_that_leaks_is_found_by_trying(monkeypatch):
    model, task = model_of("llama"), CausalLM(128)
    packs = [vars(p) for p in Packs.of(rows_of([6, 7]), 16)]
    try_packs(task, model, Pads, packs)
    own = CausalLM.states
    leak = lambda self, model, batch: own(self, model, {k: v for k, v in batch.items() if k != "position_ids"})  # noqa: E731
    monkeypatch.setattr(CausalLM, "states", leak)
    with pytest.raises(Unpackable, match="gives the rows of a pack other states than it gives them alone"):
        try_packs(task, model, Pads, packs)
    try_packs(task, model, Pads, [vars(p) for p in Packs.of(rows_of([6]), 16)])  # nothing to see


def test_a_trainer_on_packs_makes_the_steps_of_the_rows(tmp_path):
    from finebits.interop.trainer import dataset, trainer

    tokens = rows_of([5, 9, 4, 7])
    settings = {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}

    def trained(units, size):
        model = tiny_llama.fresh()
        engine = trainer(model, Pads, dataset(vars(e) for e in units), tmp_path, settings | {"per_device_train_batch_size": size})
        engine.processing_class = None
        engine.train()
        return {k: p.detach() for k, p in model.named_parameters()}

    packs = Packs.of(tokens, 16)
    assert len(packs) == 2
    rows, packed = trained(tokens, 4), trained(packs, 2)
    for k in rows:
        assert torch.allclose(rows[k], packed[k], atol=1e-5), k
