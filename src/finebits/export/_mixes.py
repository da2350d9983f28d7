"""Which type of GGUF a tensor of a merged model gets: the mixes that llama.cpp's llama-quantize calls q4_k_m and so on, by its published rule.

A mix has one type for most matrices. The head, and a table of embeddings that is the head, are Q6_K (Q8_0 where rows do not fit); values of
attention and the second matrix of a feed-forward block get more bits in the layers where use_more_bits says so. A row that is no
whole number of super-blocks falls back to a type with blocks of 32, and one that is none of these to F16.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Mix(NamedTuple):
    """The type of most matrices, and the KL in nats a token above which a verification takes the file for another model."""

    kind: str
    kl: float


MIXES = {
    "f16": Mix("F16", 1e-2),
    "bf16": Mix("BF16", 1e-2),
    "q8_0": Mix("Q8_0", 2e-2),
    "q6_k": Mix("Q6_K", 5e-2),
    "q5_k_m": Mix("Q5_K", 0.1),
    "q5_k_s": Mix("Q5_K", 0.1),
    "q5_0": Mix("Q5_0", 0.1),
    "q5_1": Mix("Q5_1", 0.1),
    "q4_k_m": Mix("Q4_K", 0.3),
    "q4_k_s": Mix("Q4_K", 0.3),
    "q4_0": Mix("Q4_0", 0.5),
    "q4_1": Mix("Q4_1", 0.5),
    "q3_k_l": Mix("Q3_K", 1.0),
    "q3_k_m": Mix("Q3_K", 1.0),
    "q3_k_s": Mix("Q3_K", 1.0),
    "q2_k": Mix("Q2_K", 3.0),
}
BLOCKS = {"F32": 1, "F16": 1, "BF16": 1} | {f"Q{b}_{i}": 32 for b in (4, 5, 8) for i in (0, 1)} | {f"Q{b}_K": 256 for b in range(2, 7)}
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
ENDS = "output.weight", "token_embd.weight"


def more_bits(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits: the first and the last eighth of the layers, and of those between every third.

    >>> [i for i in range(16) if more_bits(i, 16)]
    [0, 1, 4, 7, 10, 13, 14, 15]
    """
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def kind_of(mix: str, name: str, shape: tuple[int, ...], config: Any, tied: bool) -> tuple[str, str]:
    """(the type of a tensor with GGUF's name, the type that the mix wanted before it fell back); `tied`: its table of embeddings is the head.

    >>> from types import SimpleNamespace as Config
    >>> small = Config(num_hidden_layers=16, num_attention_heads=8, num_key_value_heads=2, model_type="llama")
    >>> kind_of("q4_k_m", "blk.0.ffn_down.weight", (64, 256), small, False), kind_of("q4_k_m", "blk.2.ffn_down.weight", (64, 288), small, False)
    (('Q6_K', 'Q6_K'), ('Q5_0', 'Q4_K'))
    """
    usual, n = MIXES[mix].kind, shape[-1]
    if len(shape) < 2:
        return "F32", "F32"
    if BLOCKS[usual] == 1:
        return usual, usual
    if name == ENDS[0] or name == ENDS[1] and tied:
        wanted = "Q8_0" if usual == "Q8_0" or n % BLOCKS[usual] else "Q6_K"
    elif name == ENDS[1]:
        wanted = usual
    else:
        wanted = _inner(mix, name, config) or usual
    kind = wanted if n % BLOCKS[wanted] == 0 else FALLBACK.get(wanted, "F16")
    return (kind if n % BLOCKS[kind] == 0 else "F16"), wanted


def _inner(mix: str, name: str, config: Any) -> str | None:
    """What the rule says of a matrix of a block, where that is not the mix's own type."""
    match = re.match(r"blk\.(\d+)\.(\w+)\.weight$", name)
    if match is None:
        return None
    i, layers, part = int(match[1]), config.num_hidden_layers, match[2]
    shared = config.num_attention_heads // config.num_key_value_heads
    more = "Q6_K" if mix in ("q4_k_m", "q5_k_m") and more_bits(i, layers) else None
    rules: Mapping[str, Mapping[str, str | None]] = {
        "attn_v": {
            "q2_k": "Q4_K" if shared >= 4 else "Q3_K",
            "q3_k_m": "Q5_K" if i < 2 else "Q4_K",
            "q3_k_l": "Q5_K",
            "q4_k_s": "Q5_K" if i < 4 else None,
        },
        "ffn_down": {
            "q2_k": "Q3_K",
            "q3_k_m": "Q5_K" if i < layers // 16 else "Q4_K",
            "q3_k_l": "Q5_K",
            "q4_k_s": "Q5_K" if i < layers // 8 else None,
        },
        "attn_output": {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"},
    }
    wanted = rules.get(part, {}).get(mix) or (more if part in ("attn_v", "ffn_down") else None)
    if part == "attn_v" and layers == 80 and config.model_type in ("llama", "qwen2") and (wanted or MIXES[mix].kind) in ("Q3_K", "Q4_K"):
        return "Q5_K"  # of 70B models, whose values are small beside all else
    return wanted
