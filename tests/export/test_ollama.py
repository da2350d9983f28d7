"""A Modelfile renders what the chat template renders, or leaves the template out; tokenizer, template and ends lie in the file as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import finebits as fb
import tiny_llama as tiny
from finebits.export._ollama import ends_of, modelfile, turns
from finebits.interop.peft import export

CHATML = """{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system
Be brief.<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + m['role'] + '
' + m['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ ('[INST] ' if m['role'] == 'user' else ' ') + m['content'] + (' [/INST]' if m['role'] == 'user' else '<|end|>') }}{% endfor %}"
)
NUMBERED = "{% for m in messages %}{{ loop.index | string + m['role'] + m['content'] }}{% endfor %}"


def worded(template: Any, first: bool = False) -> Any:
    """A byte-level tokenizer that ends with <|end|>, and with `first` puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<pad>", "<s>", "<|end|>", "<|eot|>", *sorted(pre_tokenizers.ByteLevel.alphabet())[:96]])}
    inner = Tokenizer(models.BPE(words, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()  # type: ignore[assignment]
    inner.add_special_tokens(["<|eot|>"])
    if first:
        inner.post_processor = processors.TemplateProcessing("<s> $0", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>", chat_template=template)


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template gives of the few words that are used here."""
    system = any(m["role"] == "system" for m in messages)
    text = re.sub(r"\{\{ if not \.System \}\}(.*?)\{\{ end \}\}", lambda m: "" if system else m[1], template, flags=re.S)
    match = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*?)", text, re.S)
    assert match is not None
    roles = dict(re.findall(r'\{\{ if eq \.Role "(\w+)" \}\}(.*?)\{\{ end \}\}', match[2], re.S))
    return match[1] + "".join(roles[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + match[3]


TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And\nnow"}]
SYSTEM = [{"role": "system", "content": "Be kind."}]


@pytest.mark.parametrize("template,first", [(CHATML, False), (LLAMA3, True), (LLAMA3, False), (NO_SYSTEM, False)])
def test_ollamas_template_gives_what_the_tokenizers_gives(template: str, first: bool) -> None:
    tokenizer = worded(template, first)
    text = modelfile("./model.gguf", "./adapter.gguf", tokenizer, [2, 3])
    assert text.startswith("FROM ./model.gguf\nADAPTER ./adapter.gguf\nTEMPLATE ")
    assert text.endswith('PARAMETER stop "<|end|>"\nPARAMETER stop "<|eot|>"\n')
    found = re.search(r'TEMPLATE """(.*?)"""', text, re.S)
    assert found is not None
    for messages in (TALK, TALK[:1], SYSTEM + TALK, SYSTEM + TALK[:1])[: 2 if template == NO_SYSTEM else 4]:
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ("<s>" if first else "") + go(found[1], messages) == wanted


@pytest.mark.parametrize(
    "template", [NUMBERED, "{{ messages[0]['content'] }}", "{{ raise_exception('never') }}", CHATML.replace("brief", '"""')]
)
def test_a_template_that_ollama_cannot_say_is_left_out(template: str) -> None:
    assert turns(worded(template)) is None
    assert "TEMPLATE by hand" in modelfile("./model.gguf", None, worded(template), [])


@pytest.mark.parametrize("to", ["gguf", "gguf:q8_0"])
def test_template_and_ends_lie_in_the_file_byte_for_byte(to: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = tiny.tuned(tiny.plan(fb.LoRA(rank=2), fb.Int(4, 32, True, "fp16"), fb.Zeros()), tiny.fresh(dtype=torch.float32))
    model.generation_config.eos_token_id = [2, 3]
    tokenizer = worded(CHATML)
    export(model, tmp_path / "x", to, tokenizer)
    file = tmp_path / "x" / ("base/model.gguf" if to == "gguf" else "model.gguf")
    said = {k: f.contents() for k, f in gguf.GGUFReader(file).fields.items()}
    assert said["tokenizer.chat_template"] == CHATML
    assert (said["tokenizer.ggml.eos_token_id"], said["tokenizer.ggml.eot_token_id"]) == (2, 3) and ends_of(model, tokenizer) == [2, 3]
    text = (tmp_path / "x" / "Modelfile").read_text()
    assert text.startswith("FROM ./base/model.gguf\nADAPTER ./adapter.gguf\n" if to == "gguf" else "FROM ./model.gguf\nTEMPLATE ")
    assert all((tmp_path / "x" / line.split()[1]).exists() for line in text.splitlines()[:2] if line.startswith(("FROM", "ADAPTER")))
    assert 'PARAMETER stop "<|eot|>"' in text


def test_several_templates_keep_their_names(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    model = tiny.tuned(tiny.plan(fb.LoRA(rank=2), fb.Int(4, 32, True, "fp16"), fb.Zeros()))
    export(model, tmp_path / "x", "gguf:f16", worded({"default": CHATML, "tool_use": LLAMA3}))
    said = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "x" / "model.gguf").fields.items()}
    assert said["tokenizer.chat_template"] == CHATML and said["tokenizer.chat_template.tool_use"] == LLAMA3
