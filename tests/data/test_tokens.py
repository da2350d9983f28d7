from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from finebits.data.rows import DataError, Rows, shaped
from finebits.data.tokens import Example, TemplateError, to_batch, tokenize
from finebits.losses import IGNORED

END = "<|im_end|>"


def chat(*contents: str, system: str | None = None) -> dict[str, object]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system is not None else []) + turns}


def rows(*records: dict[str, object]) -> Rows:
    return shaped(enumerate(records, 1), "d.jsonl")


def trained_runs(example: Example, tokenizer) -> list[str]:
    """The text of each run of labelled tokens."""
    runs: list[list[int]] = []
    for i, label in enumerate(example.labels):
        if label != IGNORED:
            assert label == example.input_ids[i]
            if i == 0 or example.labels[i - 1] == IGNORED:
                runs.append([])
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs]


def test_exactly_the_answers_and_their_ends_are_trained(smollm2_tokenizer):
    one = chat("hi", "there", "What is π?", "About 3.14159 …\n\nSee <b>Euler</b>.", "thanks", "Bye 👋", system="Be brief.")
    example = tokenize(rows(one), smollm2_tokenizer, 512)[0]
    assert trained_runs(example, smollm2_tokenizer) == [f"there{END}", f"About 3.14159 …\n\nSee <b>Euler</b>.{END}", f"Bye 👋{END}"]
    assert smollm2_tokenizer.decode(example.input_ids) == smollm2_tokenizer.apply_chat_template(one["messages"], tokenize=False)
    assert (example.line, example.truncated) == (1, 0)


def test_the_default_system_prompt_is_seen_and_not_trained(smollm2_tokenizer):
    example = tokenize(rows(chat("hi", "there")), smollm2_tokenizer, 512)[0]
    assert "AI assistant named SmolLM" in smollm2_tokenizer.decode(example.input_ids)
    assert trained_runs(example, smollm2_tokenizer) == [f"there{END}"]


def test_random_conversations_with_awkward_borders(smollm2_tokenizer):
    """White space at the ends, empty answers: the labelled text is still the answer, and what stands before it is, token for token,
    what the model is given when it is asked for that answer."""
    rng = random.Random(0)
    bits = ["\n", "\n\n", "    ", " ", "\t", "x", "7", "def f():", "é", "assistant", "\r\n", "漢字", "."]
    for _ in range(60):
        contents = ["".join(rng.choices(bits, k=rng.randrange(6))) for _ in range(2 * rng.randrange(1, 4))]
        record = chat(*contents, system=rng.choice([None, "S"]))
        example = tokenize(rows(record), smollm2_tokenizer, 4096)[0]
        assert trained_runs(example, smollm2_tokenizer) == [answer + END for answer in contents[1::2]]
        first = next(i for i, label in enumerate(example.labels) if label != IGNORED)
        turns = record["messages"]
        asked = turns[: len(turns) - len(contents) + 1]
        prompt = smollm2_tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True)["input_ids"]
        assert example.input_ids[:first] == prompt


def test_an_indented_answer_begins_with_a_token_of_its_own(smollm2_tokenizer):
    # In running text the template's newline and the indent are one token.
    joined = smollm2_tokenizer("assistant\n    return x", add_special_tokens=False)["input_ids"]
    example = tokenize(rows(chat("hi", "    return x")), smollm2_tokenizer, 512)[0]
    assert trained_runs(example, smollm2_tokenizer) == [f"    return x{END}"]
    assert joined[-3:] not in [example.input_ids[i : i + 3] for i in range(len(example.input_ids))]


def test_loss_on_everything_but_the_first_token(smollm2_tokenizer):
    example = tokenize(rows(chat("hi", "there")), smollm2_tokenizer, 512, assistant_only_loss=False)[0]
    assert example.labels == [IGNORED, *example.input_ids[1:]]


def test_text_rows_end_with_a_trained_eos(smollm2_tokenizer):
    example = tokenize(rows({"text": "Hello, world"}), smollm2_tokenizer, 512)[0]
    assert smollm2_tokenizer.decode(example.input_ids) == f"Hello, world{END}"
    assert example.labels == [IGNORED, *example.input_ids[1:]]
    assert example.labels[-1] == smollm2_tokenizer.eos_token_id


def test_truncation_counts_what_is_lost(smollm2_tokenizer):
    whole = tokenize(rows(chat("hi", "there you are")), smollm2_tokenizer, 512)[0]
    cut = tokenize(rows(chat("hi", "there you are")), smollm2_tokenizer, len(whole.input_ids) - 4)[0]
    assert (cut.input_ids, cut.labels, cut.truncated) == (whole.input_ids[:-4], whole.labels[:-4], 4)
    with pytest.raises(DataError, match="max_length must be at least 2 tokens"):
        tokenize(rows(chat("hi", "there")), smollm2_tokenizer, 1)


# Like SmolLM2's, except that: there is no generation prompt (CHATML); nothing ends a turn (OPEN); a system turn is refused (STRICT).
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OPEN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns please') }}{% endif %}" + CHATML + PROMPT


@pytest.mark.parametrize(
    ("template", "record", "says"),
    [
        (CHATML, chat("a", "b"), "no generation prompt, so nothing says where the answer in turn 2 begins"),
        (STRICT, chat("a", "b", system="s"), "does not render turn 2 (user): no system turns please"),
        (CHATML + PROMPT, {"messages": [{"role": "assistant", "content": "b"}]}, "turn 1 is the assistant's"),
    ],
)
def test_a_template_that_hides_the_answer_is_an_error_naming_the_turn(smollm2_tokenizer, monkeypatch, template, record, says):
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", template)
    with pytest.raises(TemplateError) as caught:
        tokenize(rows(record), smollm2_tokenizer, 512)
    assert says in str(caught.value) and caught.value.code == 4


def test_templates_of_other_shapes(smollm2_tokenizer, monkeypatch):
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", LLAMA2)
    assert trained_runs(tokenize(rows(chat("a", "b", "c", "d")), smollm2_tokenizer, 512)[0], smollm2_tokenizer) == [f" b{END}", f" d{END}"]
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", OPEN)
    assert trained_runs(tokenize(rows(chat("a", "b", "c", "d")), smollm2_tokenizer, 512)[0], smollm2_tokenizer) == ["b\n", "d\n"]


def test_a_tokenizer_without_template_or_eos_is_an_error():
    base = SimpleNamespace(chat_template=None, eos_token_id=None)
    with pytest.raises(DataError, match="has no chat template: use an instruct model"):
        tokenize(rows(chat("a", "b")), base, 512)
    with pytest.raises(DataError, match="has no EOS token"):
        tokenize(rows({"text": "a"}), base, 512)


def test_a_batch_masks_by_length_even_if_padding_is_a_trained_token():
    batch = to_batch([Example([5, 2], [IGNORED, 2], 1), Example([7, 8, 2, 2], [IGNORED, 8, 2, 2], 2)], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 2, 2, 2], [7, 8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 2, IGNORED, IGNORED], [IGNORED, 8, 2, 2]]
    assert {t.dtype for t in batch.values()} == {torch.int64}
    with pytest.raises(ValueError, match="at least one example"):
        to_batch([], 0)
