"""Tokenizer, config and rows that do not fit each other are found before anything is planned: one sentence and the code for usage (2) or
data (4)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import chatty
import finebits as fb
from finebits.data.check import check
from finebits.data.rows import gathered, shaped
from finebits.data.split import split
from finebits.evaluate.generate import continued
from finebits.init.zeros import Zeros
from finebits.interop.planning import Settings
from finebits.interop.tokenizer import generating, limits_of, seats, stops_of, tokenizer_of

SETTINGS: dict[str, Any] = {"formats": (fb.NF(4, block=32),), "init": Zeros(), "objective": "weight", "dtype": "float32", "max_length": 64}


def found(folder: Path, rows: Any = None, length: int = 64) -> dict[str, Any]:
    tokenizer = tokenizer_of(folder)
    checked = check(rows or chatty.rows(), tokenizer, length, limits=limits_of(folder, tokenizer))
    return {p.kind: p for p in checked.problems}


def plan(folder: Path, rows: Any = None, **more: Any) -> Any:
    return fb.plan_model(folder, None, rows or chatty.rows(), Settings(**SETTINGS | more))


def edited(folder: Path, name: str, **keys: Any) -> Path:
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | keys))
    return folder


def test_a_padding_token_of_the_tokenizer_alone_gives_way(tmp_path):
    """meta-llama/llama-cookbook#189: [PAD] was added, and its id is the size of the vocabulary."""
    words = chatty.tokenizer()
    words.add_special_tokens({"pad_token": "[PAD]"})
    folder = chatty.model(tmp_path / "m", words, vocab_size=words.pad_token_id)
    tokenizer = tokenizer_of(folder)
    assert tokenizer.pad_token == "<|b|>" and "the padding token [PAD] has no embedding: <|b|> pads" in found(folder)["pad_token"].message
    plan(folder)


def test_tokens_without_an_embedding_close_the_gate(tmp_path):
    words = chatty.tokenizer()
    words.add_tokens(["<new>"])
    folder = chatty.model(tmp_path / "m", words, vocab_size=len(words) - 1)
    rows = chatty.rows(3)
    assert "no_embedding" not in found(folder, rows)
    rows[1]["messages"][0]["content"] = "a <new> one"
    problem = found(folder, rows)["no_embedding"]
    assert problem.level == "fail" and problem.lines == (2,) and "<new> (id 261)" in problem.message
    with pytest.raises(
        ValueError, match=r"the given data:2: <new> \(id 261\) has no embedding: the model embeds the ids 0 to 260"
    ) as caught:
        plan(folder, rows)
    assert caught.value.code == 4


@pytest.mark.parametrize(
    ("file", "keys", "says"),
    [
        ("config.json", {"pad_token_id": 264}, "config.json has the pad_token_id 264, and the model embeds the ids 0 to 263"),
        ("config.json", {"eos_token_id": [4, 300]}, "the eos_token_id 300"),
        (
            "config.json",
            {"bos_token_id": "<s>"},
            "config.json is no config of a model that transformers knows (Validation error for field 'bos_token_id'",
        ),
        ("generation_config.json", {"bos_token_id": "<s>"}, "the bos_token_id '<s>', and an id is a whole number"),
        ("generation_config.json", {"eos_token_id": [4, 264]}, "generation_config.json has the eos_token_id 264"),
        ("generation_config.json", {"pad_token_id": 32000}, "generation_config.json has the pad_token_id 32,000"),
    ],
)
def test_ids_of_the_config_outside_of_the_vocabulary(tmp_path, file, keys, says):
    folder = edited(chatty.model(tmp_path / "m"), file, **keys)
    for rows in (None, chatty.rows()):
        with pytest.raises(ValueError) as caught:
            fb.plan_model(folder, None, rows, Settings(**SETTINGS))
        assert says in str(caught.value) and caught.value.code == 2


def test_a_negative_id_says_that_there_is_none(tmp_path):
    folder = edited(chatty.model(tmp_path / "m"), "generation_config.json", pad_token_id=-1)
    assert limits_of(folder, tokenizer_of(folder)).ids == 264


def test_an_end_token_without_an_embedding(tmp_path):
    words = chatty.tokenizer()
    words.add_special_tokens({"eos_token": "<end>"})
    folder = chatty.model(tmp_path / "m", words, vocab_size=words.eos_token_id)
    with pytest.raises(ValueError, match=r"ends texts with <end> \(id 261\), and the model embeds the ids 0 to 260") as caught:
        tokenizer_of(folder)
    assert caught.value.code == 2


def test_a_tokenizer_that_cannot_be_loaded(tmp_path):
    folder = chatty.model(tmp_path / "m")
    for content in ("{", None):
        (folder / "tokenizer.json").unlink() if content is None else (folder / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="the tokenizer of .* cannot be loaded .*tokenizer.json") as caught:
            plan(folder)
        assert caught.value.code == 2 and "\n" not in str(caught.value)


def test_no_chat_template(tmp_path):
    folder = chatty.model(tmp_path / "m", chatty.tokenizer(chat=None))
    with pytest.raises(ValueError, match="has no chat template: use an instruct model, or text rows") as caught:
        plan(folder)
    assert caught.value.code == 4


def test_rows_longer_than_the_positions(tmp_path):
    """Learned positions end; rotary ones only were not trained further."""
    rows = chatty.rows(3)
    rows[2]["messages"][0]["content"] = "x" * 40
    rope = chatty.model(tmp_path / "rope", max_position_embeddings=64)
    assert (found(rope, rows, 80)["far_positions"].level, found(rope, rows, 80)["far_positions"].lines) == ("warn", (3,))
    from transformers import OPTConfig, OPTForCausalLM

    learned = tmp_path / "learned"
    sizes = {"vocab_size": 264, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    config = OPTConfig(**sizes, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=4)
    OPTForCausalLM(config).save_pretrained(learned)
    chatty.tokenizer().save_pretrained(learned)
    problem = found(learned, rows, 80)["positions"]
    assert (problem.level, problem.lines, problem.fix) == ("fail", (3,), "set max_length to 64 at most")
    assert "positions" not in found(learned, rows, 64)
    with pytest.raises(
        ValueError, match="the given data:3: the row has 69 tokens, and the model has 64 positions: set max_length to 64"
    ) as caught:
        plan(learned, rows, max_length=90)
    assert caught.value.code == 4


def test_a_turn_that_ends_where_generation_does_not(tmp_path):
    folder = chatty.model(tmp_path / "m", chatty.tokenizer(eos="</s>"), eos_token_id=2)
    problem = found(folder)["never_stops"]
    assert problem.level == "warn" and "<|b|> (id 4), and generation stops at </s> (id 2)" in problem.message and len(problem.lines) == 8
    tokenizer = tokenizer_of(folder)
    assert stops_of(folder, tokenizer) == [2, 4]  # samples and exports end there all the same
    edited(folder, "generation_config.json", eos_token_id=[2, 4, 7], temperature=0.6, do_sample=True)
    assert stops_of(folder, tokenizer) == [2, 4, 7] and "never_stops" not in found(folder)
    from transformers import AutoModelForCausalLM

    model = generating(AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(folder).config), folder, tokenizer)
    assert model.generation_config.eos_token_id == [2, 4, 7] and model.generation_config.temperature == 0.6


def test_at_least_twenty_rows_are_held_out_where_there_are_enough():
    sizes = {n: len(split(shaped(enumerate(chatty.rows(n), 1), "d.jsonl"))[1]) for n in (1, 2, 4, 8, 40, 80, 99, 500, 1000, 3000)}
    assert sizes == {1: 0, 2: 1, 4: 1, 8: 2, 40: 10, 80: 20, 99: 24, 500: 20, 1000: 20, 3000: 60}
    train, held = split(shaped(enumerate(chatty.rows(100), 1), "d.jsonl"), 0.1)
    assert len(held) == 10 and len(train) == 90 and not {r.line for r in train} & {r.line for r in held}


def test_places_for_padding_are_no_positions(tmp_path):
    """RoBERTa counts from behind its padding token: of 20 positions 18 are there for a row."""
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RobertaForSequenceClassification(RobertaConfig(**sizes, max_position_embeddings=20, pad_token_id=1)).eval()
    model.save_pretrained(tmp_path)
    assert seats(tmp_path) == (18, True)
    model(torch.full((1, 18), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 19), 5))


def test_answers_end_where_positions_do():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=12)).eval()
    (made,) = continued(model, [[5] * 9], 48, [])
    assert len(made.ids) == 3 and not made.stopped
    with pytest.raises(ValueError, match="a prompt has no tokens, so there is nothing to go on from"):
        continued(model, [[5], []], 4, [])
    with pytest.raises(ValueError, match="a prompt has 12 tokens, and the model has 12 positions for it and its answer"):
        continued(model, [[5] * 12, [5]], 48, [])


def test_samples_are_of_prompts_that_fit(tmp_path):
    """A question far longer than rows may be is not asked, however the rows are cut."""
    from finebits.tasks.causal_lm import CausalLM

    rows = chatty.rows(3)
    rows[0]["messages"][0]["content"] = "x" * 400
    made = CausalLM().prompts(gathered(rows), chatty.tokenizer(), 2, longest=64)
    assert len(made) == 2 and max(len(p.given) for p in made) <= 64
    assert len(CausalLM().prompts(gathered(rows), chatty.tokenizer(), 1)[0].given) > 64
