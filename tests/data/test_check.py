from __future__ import annotations

import hashlib
import json

import pytest

from finebits.data.check import GateFailed, check, require
from finebits.data.rows import shaped
from finebits.data.tokens import tokenize
from finebits.losses import IGNORED

GOOD = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there you are"}]
NEVER_ENDS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def chats(*conversations):
    return shaped(enumerate(({"messages": turns} for turns in conversations), 1), "d.jsonl")


def found(checked):
    return {(p.kind, p.level): (p.lines, p.message) for p in checked.problems}


def test_a_good_data_set_passes(smollm2_tokenizer):
    checked = check(chats(GOOD, GOOD), smollm2_tokenizer, 512)
    assert checked.ok and checked.truncated == 0 and checked.turns == (2, 2)
    assert {p.level for p in checked.problems} == {"info"} and checked.problems[0].kind == "pad_is_eos"
    require(checked)
    examples = tokenize(chats(GOOD, GOOD), smollm2_tokenizer, 512)
    assert checked.tokens == sum(len(e.input_ids) for e in examples)
    assert checked.trained_tokens == sum(label != IGNORED for e in examples for label in e.labels)


def test_roles_in_the_wrong_order_close_the_gate(smollm2_tokenizer):
    user, answer = GOOD
    checked = check(chats(GOOD, [user], [user, user, answer], [user, answer, user], [user, answer, user]), smollm2_tokenizer, 512)
    assert not checked.ok and checked.rows == 5 and len(checked.lengths) == 1
    assert [(p.message, p.lines) for p in checked.problems if p.kind == "roles"] == [
        ("1 row holds no assistant turn", (2,)),
        ("1 row holds two user turns in a row", (3,)),
        ("2 rows end with a user turn", (4, 5)),
    ]
    with pytest.raises(GateFailed, match=r"d\.jsonl does not pass the data gate: .*2 rows end with a user turn \(lines 4, 5\)") as caught:
        require(checked)
    assert caught.value.code == 4 and caught.value.check is checked


def test_a_data_set_without_one_good_row_is_still_told_about(smollm2_tokenizer):
    checked = check(chats(GOOD[:1]), smollm2_tokenizer, 512)
    assert not checked.ok and checked.quantile(0.5) == 0 and checked.histogram() == [] and checked.preview == ()
    assert "1 row holds no assistant turn" in checked.text() and " ok " not in checked.text()


def test_rows_with_nothing_to_train_close_the_gate(smollm2_tokenizer):
    checked = check(shaped([(1, {"text": "fine text"}), (3, {"text": ""})], "d.jsonl"), smollm2_tokenizer, 512)
    assert found(checked)["no_trained_token", "fail"] == ((3,), "1 row without any trained token")
    assert ("end_of_turn", "fail") not in found(checked)


def test_an_end_of_turn_that_is_not_trained_closes_the_gate(smollm2_tokenizer, monkeypatch):
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", NEVER_ENDS)
    checked = check(chats(GOOD, GOOD), smollm2_tokenizer, 512)
    assert found(checked)["end_of_turn", "fail"][0] == (1, 2) and checked.turns == (0, 2)
    with pytest.raises(GateFailed, match="the model would never stop"):
        require(checked)


def test_a_template_that_cannot_be_masked_closes_the_gate(smollm2_tokenizer, monkeypatch):
    monkeypatch.setattr(smollm2_tokenizer, "chat_template", "{{ messages[-1].content }}")
    checked = check(chats(GOOD, GOOD), smollm2_tokenizer, 512)
    lines, message = found(checked)["template", "fail"]
    assert lines == (1, 2) and message.startswith("2 rows cannot be masked: the chat template has no generation prompt")


def test_truncation_warns_and_closes_the_gate_when_nothing_trained_is_left(smollm2_tokenizer):
    longer = [GOOD[0], {"role": "assistant", "content": "one two three four five six seven eight nine"}]
    buried = [{"role": "user", "content": "word " * 50}, GOOD[1]]
    length = len(tokenize(chats(GOOD), smollm2_tokenizer, 512)[0].input_ids)
    checked = check(chats(GOOD, longer), smollm2_tokenizer, length)
    # The ten trained tokens of the longer row are nine words and the end; four of them fit, as in the good row.
    assert checked.ok and checked.truncated == 1
    lines, message = found(checked)["truncated", "warn"]
    assert lines == (2,) and message == f"truncated at {length}: 50.0% (1 row loses 50% of the trained tokens)"
    checked = check(chats(GOOD, longer, buried), smollm2_tokenizer, length)
    assert found(checked)["truncated_away", "fail"] == ((3,), f"1 row with no trained token left at {length} tokens")
    assert found(checked)["truncated", "warn"][0] == (2,) and not checked.ok and checked.truncated == 2


def test_doubled_bos_and_empty_answers_warn(smollm2_tokenizer):
    checked = check(
        shaped([(1, {"text": "<|im_start|><|im_start|>user"}), (2, {"text": "<|im_start|>user"})], "d.jsonl"), smollm2_tokenizer, 512
    )
    assert found(checked)["double_bos", "warn"] == ((1,), "1 row with two BOS tokens") and checked.ok
    checked = check(chats(GOOD, [GOOD[0], {"role": "assistant", "content": " "}]), smollm2_tokenizer, 512)
    assert found(checked)["empty_answer", "warn"] == ((2,), "1 row holds an empty answer") and checked.ok


def test_json_follows_the_schema_and_its_sums_agree(smollm2_tokenizer):
    rows = chats(GOOD, GOOD + GOOD, GOOD[:1])
    data = json.loads(json.dumps(check(rows, smollm2_tokenizer, 40).to_json()))
    assert (
        data["schema"] == "finebits.data/1"
        and data["ok"] is False
        and (data["path"], data["format"], data["rows"]) == ("d.jsonl", "messages", 3)
    )
    assert sum(count for _, count in data["lengths"]["histogram"]) == 2
    assert data["lengths"]["histogram"][-1][0] >= data["lengths"]["max"] > data["lengths"]["p50"] - 1 and data["truncated"] == 1
    assert data["template_sha"] == hashlib.sha256(smollm2_tokenizer.chat_template.encode()).hexdigest()
    assert {tuple(p) for p in data["problems"]} == {("kind", "level", "lines", "message", "fix")}
    first = data["preview"][0]
    assert first["line"] == 1 and [t for t, trained in first["pieces"] if trained] == ["there you are<|im_end|>"]
    assert "".join(t for t, _ in first["pieces"]) == smollm2_tokenizer.apply_chat_template(GOOD, tokenize=False)


def test_text_marks_what_is_trained_and_lets_no_row_steer_the_terminal(smollm2_tokenizer):
    rows = chats([{"role": "user", "content": "\x1b[2Jhi"}, {"role": "assistant", "content": "there\nyou are"}], GOOD[:1])
    plain, coloured = (check(rows, smollm2_tokenizer, 512).text(colour) for colour in (False, True))
    assert "[[there\n   you are<|im_end|>]]" in plain and "\x1b" not in plain and "\\x1b[2Jhi" in plain
    assert "\x1b[32mthere\x1b[0m\n   \x1b[32myou are<|im_end|>\x1b[0m" in coloured and "\x1b[2J" not in coloured and "[[" not in coloured
    lines = plain.splitlines()
    assert lines[0].startswith(' format     messages (detected: key "messages" in 2/2 rows')
    assert any(line.startswith(" fail       1 row holds no assistant turn") and "line 2" in line and "fix: " in line for line in lines)
    assert any(line.split() == ["ok", "end-of-turn", "token", "trained", "1/1"] for line in lines)
