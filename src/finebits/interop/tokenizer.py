"""A model's tokenizer, and what the model's config says about its ids: compared here, before anything is planned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finebits.data.limits import Limits, positions_of
from finebits.data.turns import closing
from finebits.errors import Invalid
from finebits.files import fetched, read_json
from finebits.interop.configs import plain_dtype

SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


class Unfit(Invalid):
    """A model folder whose tokenizer or config does not fit its weights."""

    code = 2


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a model folder. A padding token that has no embedding (it was added to the tokenizer alone) gives its place to the
    end token: padding is masked, so any token of the model pads. Raises Unfit if there is none, or its end token has no embedding."""
    from transformers import AutoConfig, AutoTokenizer

    read = {"config": AutoConfig.from_pretrained(folder, **given)} if (given := plain_dtype(_json(folder / "config.json"))) else {}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **read)
    except Exception as e:  # the readers fail in many ways
        for file in folder.glob("*token*"):
            if file.is_file():
                fetched(file)
        reason = str(e).strip().splitlines()[0].rstrip(".:") if str(e).strip() else type(e).__name__
        raise Unfit(
            f"the tokenizer of {folder} cannot be loaded ({reason[:200]}): the folder of a model holds its tokenizer.json or tokenizer.model "
            "and tokenizer_config.json; copy them from where the model came from"
        ) from e
    ids = embedded(folder)
    if ids is None:
        return tokenizer
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id >= ids:
        raise Unfit(
            f"the tokenizer of {folder} ends texts with {tokenizer.eos_token} (id {tokenizer.eos_token_id:,}), and the model embeds the ids 0 "
            f"to {ids - 1:,}: use the model's own tokenizer, or enlarge its embedding first"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= ids:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def limits_of(folder: Path, tokenizer: Any) -> Limits:
    """What the model of a folder can take of rows. Raises Unfit as `embedded` does."""
    positions, fixed = seats(folder)
    notes, first = [], str(tokenizer.init_kwargs.get("pad_token") or "")
    if first and tokenizer.pad_token and first != tokenizer.pad_token:
        notes.append(f"the padding token {first} has no embedding: {tokenizer.pad_token} pads in its place, and no padding is learned")
    stops = frozenset(stops_of(folder, tokenizer, turn=False))
    return Limits(embedded(folder), positions, fixed, stops, tuple(notes))


def seats(folder: Path) -> tuple[int | None, bool]:
    """`positions_of` the model of a folder. Raises Unfit where its config is none."""
    positions, fixed = positions_of(_config(folder))
    if fixed and positions is not None:
        from finebits.interop.selecting import meta

        return positions_of(_config(folder), meta(folder))
    return positions, fixed


def embedded(folder: Path) -> int | None:
    """How many ids the model of a folder embeds; None if its config does not say. Raises Unfit if an id in config.json or
    generation_config.json is beyond them."""
    config = _config(folder)
    ids = getattr(config, "vocab_size", None)
    if not isinstance(ids, int):
        return None
    for file in ("config.json", "generation_config.json"):
        data = _json(folder / file)
        text = data.get("text_config")
        for where, section in ((file, data), (f"{file} (text_config)", text if isinstance(text, Mapping) else {})):
            for key in SPECIAL:
                value = section.get(key)
                for id in value if isinstance(value, list) else [value]:
                    if id is not None and (not isinstance(id, int) or isinstance(id, bool)):
                        raise Unfit(f"{folder}/{where} has the {key} {id!r}, and an id is a whole number: mend it, or set it to null")
                    if id is not None and id >= ids:
                        raise Unfit(
                            f"{folder}/{where} has the {key} {id:,}, and the model embeds the ids 0 to {ids - 1:,}: set it to one of these, "
                            "or to null"
                        )
    return ids


def stops_of(folder: Path, tokenizer: Any, turn: bool = True) -> list[int]:
    """The ids that generation ends at: the tokenizer's end token, those of the model's config, and (`turn`) the token that closes an
    assistant's turn in the chat template."""
    stops = [tokenizer.eos_token_id, closing(tokenizer) if turn else None]
    generation = _json(folder / "generation_config.json")
    named = generation.get("eos_token_id", getattr(_config(folder), "eos_token_id", None))
    stops += named if isinstance(named, list) else [named]
    return sorted({i for i in stops if isinstance(i, int) and i >= 0})


def generating(model: Any, folder: Path, tokenizer: Any) -> Any:
    """`model` with the generation settings of its folder, which also end at the end of a turn, so that what is exported stops there."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    stops = stops_of(folder, tokenizer)
    if stops and getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    return model


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        given = plain_dtype(_json(folder / "config.json"))
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **given).get_text_config()
    except Exception as e:  # the readers fail in many ways
        raise Unfit(f"{folder}/config.json is no config of a model that transformers knows ({' '.join(str(e).split())[:200]})") from e


def _json(file: Path) -> dict[str, Any]:
    try:
        return read_json(file) if file.exists() else {}
    except Invalid as e:
        raise Unfit(str(e)) from None
