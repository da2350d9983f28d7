"""The words of a GGUF file: what llama.cpp's conversion writes of a config and of a tokenizer, and how it names and orders tensors.

llama.cpp turns the rows of q and k in Llama's attention: the two halves of a head, which are rotated against each other, lie there pair by
pair. Tokens are written of byte-level BPE, whose splitting llama.cpp knows by a name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from finebits.errors import Invalid

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # transformers' model_type -> GGUF's
TURNED = ("llama",)

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPLITS = {  # the regular expression that a tokenizer splits by -> llama.cpp's name of the whole
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens


def architecture(config: Mapping[str, Any]) -> str:
    """GGUF's name of the architecture of a model, given what config.json says. Raises ValueError where it is not written."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise Invalid(
            f"GGUF is written of {', '.join(ARCHITECTURES)} here, and this is {kind}: export merged and convert that with llama.cpp"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    odd = "scaled positions" if rope.get("rope_type", rope.get("type", "default")) != "default" else ""
    odd = odd or ("a sliding window" if _window(config) else "")
    if odd:
        raise Invalid(f"GGUF is written of models without {odd} here: export merged and convert that with llama.cpp")
    return ARCHITECTURES[kind]


def _window(config: Mapping[str, Any]) -> bool:
    """Do any layers see a window that is shorter than the positions there are?"""
    kinds, wide = config.get("layer_types"), config.get("sliding_window")
    used = config.get("use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds)
    return bool(wide) and used and wide < config.get("max_position_embeddings", 0)


def sizes(writer: Any, config: Any) -> None:
    """The model's sizes as metadata."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float((getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(2)


def tokens(writer: Any, tokenizer: Any, count: int, ends: Sequence[int] = ()) -> None:
    """The tokenizer as metadata, with its chat templates as they are; `count` tokens, those that it lacks unused; `ends` are the tokens that end
    an answer, of which a file has room for two beside the tokenizer's own. Raises ValueError where it is of another kind."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tokenizer_json = json.loads(backend.to_str()) if backend is not None else {}
    name = _splitting(tokenizer_json)
    names = [f"[PAD{i}]" for i in range(count)]
    kinds = [UNUSED] * count
    for token, i in tokenizer_json["model"]["vocab"].items():
        names[i], kinds[i] = token, NORMAL
    for added in tokenizer_json["added_tokens"]:
        names[added["id"]], kinds[added["id"]] = added["content"], CONTROL if added["special"] else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer_json["model"]["merges"]])
    writer.add_add_bos_token(begins(tokenizer))
    for kind in ("bos", "eos", "unk", "pad"):
        if (i := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(i)
    others = [i for i in ends if i != tokenizer.eos_token_id]
    for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(i)
    template = tokenizer.chat_template
    if template:
        named = template if isinstance(template, str) else [{"name": name, "template": text} for name, text in template.items()]
        writer.add_chat_template(named)


def begins(tokenizer: Any) -> bool:
    """Does the tokenizer put its first token before every text?"""
    return tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def _splitting(tokenizer_json: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer splits text before it merges."""
    parts = (tokenizer_json.get("pre_tokenizer") or {}).get("pretokenizers") or [tokenizer_json.get("pre_tokenizer") or {}]
    kinds = [part.get("type") for part in parts]
    if tokenizer_json.get("model", {}).get("type") == "BPE" and kinds[-1] == "ByteLevel" and not parts[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and (name := SPLITS.get(parts[0].get("pattern", {}).get("Regex", ""))):
            return name
    raise Invalid(
        "GGUF is written here with byte-level BPE that splits as GPT-2, SmolLM, Llama 3 or Qwen 2 do, and this tokenizer is another: export "
        "merged and convert that with llama.cpp"
    )


def named(arch: str, layers: int) -> Callable[[str], str]:
    """transformers' name of a tensor -> GGUF's. Raises ValueError for a tensor that this architecture has no name for."""
    import gguf

    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(kind, layers)

    def of(name: str) -> str:
        stem, dot, leaf = name.rpartition(".")
        renamed = names.get_name(stem)
        if renamed is None:
            raise Invalid(f"GGUF has no name for {name} of a {arch}: export merged and convert that with llama.cpp")
        return renamed + dot + leaf

    return of


def order(name: str, arch: str, config: Any, rows: int) -> Tensor | None:
    """Which rows of a tensor (GGUF's name) come one after another; None for those that stay."""
    if arch not in TURNED or not any(part in name for part in (".attn_q.", ".attn_k.")):
        return None
    heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
    return torch.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
