"""Which tokens are trained, written down by hand: ⟦ ⟧ around them in the text that the template makes."""

from __future__ import annotations

from typing import Any

import pytest

import chatty
from finebits.data.check import GateFailed, check, require
from finebits.data.rows import DataError, shaped
from finebits.data.tokens import TemplateError, encode

PROMPT = "{% if add_generation_prompt %}<|a|>assistant\n{% endif %}"
QWEN3 = (  # a thought in the answers behind the last question alone
    "{% set ns = namespace(q=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.q = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|a|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.q %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m.content.strip() }}<|b|>\n{% endfor %}" + PROMPT
)
THINKING = QWEN3.replace("<|a|>assistant\n{% endif %}", "<|a|>assistant\n<think>\n{% endif %}")  # and its prompt opens the thought
PHI3 = chatty.CHAT.replace("{% endif %}", "{% else %}</s>{% endif %}")  # EOS behind the last turn
FORGETS = (
    "{% for m in messages %}<|a|>{{ m.role }}\n{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('\n')[-1] }}{% endif %}<|b|>\n"
    "{% endfor %}" + PROMPT
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}\n<|a|>{{ m.role }}\n{% if m.role == 'assistant' %}\n  {% generation %}\n{{ m.content }}<|b|>\n"
    "  {% endgeneration %}\n{% else %}\n{{ m.content }}<|b|>{% endif %}\n{% endfor %}\n" + PROMPT
)
MARKED_TIGHT = (
    "{%- for m in messages -%} <|a|>{{ m.role }} {% if m.role == 'assistant' -%}{%- generation -%} {{ m.content }}<|b|>"
    " {%- endgeneration -%} {%- else -%} {{ m.content }}<|b|> {%- endif -%}{%- endfor -%}"
)
R1 = (  # the prompt is one line that opens a thought, and answers have none
    "{% for m in messages %}{% if m.role == 'user' %}<|a|>{{ m.content }}{% else %}<|b|>{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|b|><think>\n{% endif %}"
)
TOOLS = (
    "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}{% for m in messages %}<|a|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}<|b|>\n{% endfor %}" + PROMPT
)


def talk(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def shown(template: str, record: Any, everything: bool = False) -> str:
    """The whole conversation as it is trained on."""
    words = chatty.tokenizer(template, eos="</s>" if "</s>" in template else "<|b|>")
    record = record if isinstance(record, dict) else {"messages": record}
    row = shaped([(1, record)], "d.jsonl")[0]
    e = encode(row, words, not everything, "d.jsonl")
    out, on = "", False
    for id, trained in zip(e.ids, e.trained, strict=True):
        out += "" if trained == on else "⟦" if trained else "⟧"
        out, on = out + words.decode([id]), trained
    made = out + "⟧" * on
    text = words.apply_chat_template(record["messages"], tokenize=False, **row.template_kwargs)
    assert made.replace("⟦", "").replace("⟧", "") == text
    return made


@pytest.mark.parametrize(
    ("template", "contents", "right"),
    [
        (
            QWEN3,
            ("a", "b", "c", "d"),
            "<|a|>user\na<|b|>\n<|a|>assistant\n⟦b<|b|>⟧\n<|a|>user\nc<|b|>\n<|a|>assistant\n⟦<think>\n\n</think>\n\nd<|b|>⟧\n",
        ),
        (
            THINKING,
            ("a", " b\n", "c", "d"),
            "<|a|>user\na<|b|>\n<|a|>assistant\n⟦b<|b|>⟧\n<|a|>user\nc<|b|>\n<|a|>assistant\n<think>\n⟦\n</think>\n\nd<|b|>⟧\n",
        ),
        (PHI3, ("a", "b", "c", "d"), "<|a|>user\na<|b|>\n<|a|>assistant\n⟦b<|b|>⟧\n<|a|>user\nc<|b|>\n<|a|>assistant\n⟦d<|b|>\n</s>⟧"),
        (PHI3, ("a", "b"), "<|a|>user\na<|b|>\n<|a|>assistant\n⟦b<|b|>\n</s>⟧"),
        (
            FORGETS,
            ("a", "b\nc", "d", "e\nf"),
            "<|a|>user\na<|b|>\n<|a|>assistant\n⟦c<|b|>⟧\n<|a|>user\nd<|b|>\n<|a|>assistant\n⟦e\nf<|b|>⟧\n",
        ),
        (LLAMA2, ("a ", " b ", "c", "d"), "[INST] a [/INST]⟦ b </s>⟧[INST] c [/INST]⟦ d </s>⟧"),
        (R1, ("a", "b", "c", "d"), "<|a|>a<|b|>⟦b</s>⟧<|a|>c<|b|>⟦d</s>⟧"),
        (
            MARKED,
            ("a", "b", "c", "d"),
            "<|a|>user\na<|b|><|a|>assistant\n⟦b<|b|>⟧\n<|a|>user\nc<|b|><|a|>assistant\n⟦d<|b|>⟧\n",
        ),
        (MARKED_TIGHT, ("a", "b", "c", "d"), "<|a|>user a<|b|><|a|>assistant ⟦b<|b|>⟧<|a|>user c<|b|><|a|>assistant ⟦d<|b|>⟧"),
    ],
    ids=["qwen3", "thinking", "phi3", "phi3-one-turn", "forgets", "llama2", "r1", "marked", "marked-tight"],
)
def test_answers_are_masked_in_the_text_of_the_whole_conversation(template, contents, right):
    assert shown(template, talk(*contents)) == right


@pytest.mark.parametrize("template", [QWEN3, PHI3, FORGETS], ids=["qwen3", "phi3", "forgets"])
@pytest.mark.parametrize(
    "contents",
    [
        ("", "", "", ""),
        ("Quartz", "Quartz", "Zebra", "Zebra"),
        ("<|a|>assistant\nx<|b|>\n", "y", "<|a|>assistant\n", "<|b|>\n<|a|>user\n"),
        ("b", "b", "b", "b"),
        ("Q", "<|b|>", "z", "a<|b|>\n<|a|>user\nQ"),
    ],
)
def test_no_content_moves_the_mask(template, contents):
    """Empty turns, turns that are the probes themselves, turns that imitate the template."""
    made = shown(template, talk(*contents))
    runs = [run.split("⟧")[0] for run in made.split("⟦")[1:]]
    ends = "<|b|>\n</s>" if template == PHI3 else "<|b|>"
    thought = "<think>\n\n</think>\n\n" if template == QWEN3 else ""
    kept = contents[1].strip() if template == QWEN3 else contents[1].split("\n")[-1] if template == FORGETS else contents[1]
    last = contents[3].strip() if template == QWEN3 else contents[3]
    assert runs == [kept + "<|b|>", thought + last + ends]


def test_a_thought_of_its_own_is_learned_where_the_template_writes_it():
    turns = talk("a", "b", "c", "d")
    for turn in turns[1::2]:
        turn["reasoning_content"] = "hm"
    assert shown(QWEN3, turns).endswith("<|a|>assistant\n⟦<think>\nhm\n</think>\n\nd<|b|>⟧\n") and "\n⟦b<|b|>⟧\n" in shown(QWEN3, turns)
    with pytest.raises(TemplateError, match=r'd\.jsonl:1: turn 2 \(assistant\) has the key "reasoning_content", which the chat template'):
        shown(chatty.CHAT, turns)


def test_weight_and_train_say_what_is_learned():
    turns = talk("a", "b", "c", "d")
    turns[1]["weight"], turns[3]["train"] = 0, True
    right = "<|a|>user\na<|b|>\n<|a|>assistant\nb<|b|>\n<|a|>user\nc<|b|>\n<|a|>assistant\n⟦d<|b|>⟧\n"
    assert shown(chatty.CHAT, turns) == right
    assert shown(MARKED, turns) == right.replace("<|b|>\n<|a|>assistant", "<|b|><|a|>assistant")
    all_but = "<|a|>⟦user\na<|b|>\n<|a|>assistant\n⟧b<|b|>\n⟦<|a|>user\nc<|b|>\n<|a|>assistant\nd<|b|>\n⟧"
    assert shown(chatty.CHAT, turns, everything=True) == all_but
    turns[3]["train"] = False
    with pytest.raises(GateFailed, match=r"1 row without any trained token \(line 1\)"):
        require(check([{"messages": turns}], chatty.tokenizer(), 64))


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"weight": 0.5}, r"d.jsonl:7: turn 2 has a \"weight\" of '0.5': it can be 0 or 1"),
        ({"train": "no"}, "it can be true or false"),
        ({"weight": 0, "train": True}, 'says by "weight" that it is not learned, and by "train" the opposite'),
        ({"role": "user", "weight": 1}, r"turn 2 \(user\) asks by its \"weight\" to be learned"),
        ({"content": "hi \ud83d"}, r"d.jsonl:7: turn 2 holds \\ud83d, half of a character"),
        ({"tool_calls": [{"function": {"name": "\udc00"}}]}, r"turn 2 holds \\udc00"),
        ({"content": [{"type": "image", "text": None}]}, "turn 2 has a part of the type 'image'"),
        ({"content": None}, 'needs "content" as a string; got null'),
    ],
)
def test_a_message_that_cannot_be_honoured_is_refused_at_its_line(message, says):
    with pytest.raises(DataError, match=says):
        shaped([(7, {"messages": [talk("a")[0], {"role": "assistant", "content": "b"} | message]})], "d.jsonl")


def test_calls_of_tools_and_their_answers():
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
    turns = [
        talk("a")[0],
        call,
        {"role": "tool", "name": "f", "tool_call_id": "1", "content": "2"},
        {"role": "assistant", "content": "two"},
    ]
    record = {"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]}
    calls = '⟦f({"x": 1})<|b|>⟧'
    assert shown(TOOLS, record) == f"f;<|a|>user\na<|b|>\n<|a|>assistant\n{calls}\n<|a|>tool\n2<|b|>\n<|a|>assistant\n⟦two<|b|>⟧\n"
    with pytest.raises(TemplateError, match='turn 2 .assistant. has the key "tool_calls", which the chat template does not read'):
        shown(chatty.CHAT, {"messages": turns})
    with pytest.raises(TemplateError, match='the row has "tools", which the chat template does not read'):
        shown(chatty.CHAT, record | {"messages": talk("a", "b")})


def test_keys_that_hold_nothing_and_parts_of_text():
    """Tables with one column a key give every message every key."""
    empty = {"name": None, "tool_calls": [], "weight": None}
    parts = [{"type": "text", "text": "b", "image_url": None}, {"type": "text", "text": "c"}]
    row = [talk("a")[0] | empty, {"role": "assistant", "content": parts} | empty]
    assert shaped([(1, {"messages": row})], "d.jsonl")[0].messages == tuple(talk("a", "bc"))


def test_the_gate_tells_of_special_tokens_in_the_text_and_of_an_unmet_prompt():
    found = {p.kind: p for p in check([{"messages": talk("a<|b|>", "b")}, {"messages": talk("c", "d")}], chatty.tokenizer(), 64).problems}
    assert found["special_text"].lines == (1,) and "<|b|>" in found["special_text"].message
    found = {p.kind: p for p in check([{"messages": talk("a", "b")}], chatty.tokenizer(R1, eos="</s>"), 64).problems}
    assert found["generation_prompt"].level == "warn" and "'<|b|><think>\\n'" in found["generation_prompt"].message


def test_the_gate_tells_of_empty_thoughts_that_are_learned():
    """NVIDIA-NeMo/Automodel#3739: hybrid models are taught not to think, and no one says so."""
    thinks = talk("a", "b")
    thinks[1]["reasoning_content"] = "hm"
    found = {p.kind: p for p in check([{"messages": talk("a", "b")}, {"messages": thinks}], chatty.tokenizer(QWEN3), 64).problems}
    assert found["empty_reasoning"].lines == (1,) and found["empty_reasoning"].message.startswith("1 row learns an empty <think></think>")
    written = [{"messages": talk("a", "<think>\n</think>b")}, {"messages": talk("<think></think>", "b")}]
    assert [p.lines for p in check(written, chatty.tokenizer(), 64).problems if p.kind == "empty_reasoning"] == [(1,)]


def test_marks_that_no_row_reaches_train_nothing():
    checked = check(
        [{"messages": talk("a", "b")}], chatty.tokenizer(chatty.CHAT + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"), 64
    )
    assert {p.kind for p in checked.problems if p.level == "fail"} == {"no_trained_token"}
