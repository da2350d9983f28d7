"""config.json of a model folder: read as it is written, made into transformers' own, and refused where no model comes of it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from finebits import registry
from finebits.errors import FinebitsError, Invalid
from finebits.files import read_json
from finebits.interop.coded import Unreadable, method_of
from finebits.tasks import base as tasks
from finebits.tasks.causal_lm import CausalLM

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Of what a model has many of, each an object; vocab_size_per_layer_input is none of these, and vision_feature_layer may be -2.
COUNTS = re.compile(r"(num|n)_(\w+_)?(layers?|heads?|experts|labels|codebooks|blocks)|(\w+_)?(layers|depth|heads|block_count|experts)")
MOST = 100_000


def raw_config(folder: Path) -> dict[str, Any]:
    """config.json as it is written."""
    try:
        config = read_json(folder / "config.json")
    except Invalid as e:
        raise Unreadable(str(e)) from None
    for key, value in _numbers(config):
        if COUNTS.fullmatch(key) and not 0 <= value <= MOST:
            raise Unreadable(f"{folder / 'config.json'} says that {key} is {value}, and 0 to {MOST:,} are read: fetch it again")
    return config


def _numbers(config: Any, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(config, int | float) and not isinstance(config, bool):
        yield key, config
    for name, value in config.items() if isinstance(config, dict) else ():
        yield from _numbers(value, name)


@contextlib.contextmanager
def understood(file: str) -> Iterator[None]:
    """While transformers makes something of a config.json: whatever it raises becomes Unreadable, in one sentence."""
    try:
        yield
    except (FinebitsError, MemoryError):
        raise
    except Exception as e:  # each class checks its config in its own way, or does not, and fails somewhere
        reason = " ".join(str(e).split())
        if "Unrecognized configuration class" in reason:
            reason = f"no such model is for {', '.join(registry.names('tasks'))}, which is what finebits tunes"
        raise Unreadable(
            f"{file} makes no model with this transformers ({type(e).__name__}: {reason[:300]}): mend it, or fetch it again"
        ) from e


def class_of(config: Any) -> Any:
    """The class of transformers that makes the models of a config for their task."""
    import transformers

    return getattr(transformers, tasks.of(config).auto)


def plain_dtype(raw: Mapping[str, Any]) -> dict[str, torch.dtype]:
    """What to read a config with whose dtype is one that no model is made in, as from_pretrained(dtype=…) is: "auto", "torch.bfloat16", that of
    codes.

    >>> plain_dtype({"dtype": "bfloat16"}), plain_dtype({"torch_dtype": "auto"})
    ({}, {'dtype': torch.float32})
    """
    said = str(raw.get("dtype", raw.get("torch_dtype")))
    named = getattr(torch, said.removeprefix("torch."), None)
    odd = said == "auto" or (isinstance(named, torch.dtype) and (named not in FLOATS or said.startswith("torch.")))
    return {"dtype": torch.float32} if odd else {}


def plain_config(folder: Path) -> Any:
    """transformers' config of a folder, without what it says of codes. Raises Unreadable where it makes no model that is tuned here."""
    from transformers import AutoConfig

    method_of(raw := raw_config(folder))
    if (folder / "adapter_config.json").exists():
        raise Unreadable(
            f"{folder} holds an adapter beside its model (adapter_config.json), which transformers would lay over it: merge the adapter into "
            "the model, or take its files out of the folder"
        )
    if not isinstance(raw.get("model_type"), str) or not raw["model_type"]:
        raise Unreadable(f"{folder / 'config.json'} names no model_type, which tells what the model is: fetch it again")
    with understood(str(folder / "config.json")):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **plain_dtype(raw))
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    if (other := of_another_task(config)) is not None:
        raise Unreadable(
            f"{folder} holds a {other}: no such model is for {', '.join(registry.names('tasks'))}, which is what finebits tunes; take one with "
            "such a head"
        )
    return config


GENERATING = "ForCausalLM", "ForConditionalGeneration"  # how the heads of architectures begin that predict the next token


def of_another_task(config: Any) -> str | None:
    """The architecture of a config whose weights a causal language model could be made of and that is none: one that fills gaps sees what it
    is to predict, and of an encoder with a decoder one half would be missing. None where its task is known.

    >>> from types import SimpleNamespace as Config
    >>> of_another_task(Config(architectures=["BertForMaskedLM"])), of_another_task(Config(architectures=["GPT2LMHeadModel"]))
    ('BertForMaskedLM', None)
    """
    named = next(iter(getattr(config, "architectures", None) or []), "")
    head = re.search(r"For[A-Z]\w*$", named)
    if not isinstance(tasks.of(config), CausalLM):
        return None
    other = head is not None and not head[0].startswith(GENERATING)
    return named if named and (other or getattr(config, "is_encoder_decoder", False)) else None
