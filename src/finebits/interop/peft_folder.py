"""What a PEFT folder holds for a model: adapters by module, with their tensors.

A folder holds adapter_config.json and adapter_model.safetensors. Which modules it is for, its tensors say; what the settings say beside that, a
form of PEFT reads (finebits.peft_forms) or refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits.adapters.base import Base, Params
from finebits.anatomy import found as places
from finebits.build import Adapted
from finebits.carrier import tied
from finebits.errors import Invalid, WrongUse
from finebits.files import read_json, sha256
from finebits.interop import gguf_lora, honoured
from finebits.peft_forms._experts import parted
from finebits.peft_forms.base import TOKENS, Held, form_for, off_windows, sorted_out
from finebits.peft_forms.trainable_tokens import rows as trained_rows
from finebits.store import refuse_pickle
from finebits.tensorfile import Stored

CONFIG, TENSORS, GGUF = "adapter_config.json", "adapter_model.safetensors", ".gguf"


@dataclass(frozen=True)
class Given:
    """A folder's settings, adapters by module, dropout of their inputs, and tensors that belong to no adapter by their names in the model; and
    whether a head that is tied to an adapted table of embeddings follows it: what the folder has of such a head is the table's."""

    settings: Mapping[str, Any]
    held: Mapping[str, Held]
    dropout: float
    others: Mapping[str, Tensor]
    tied: bool = False


def read(folder: Path, model: nn.Module) -> Given:
    """What a folder holds for a model, which may be without values. Raises ValueError that names the setting or tensor which has no
    meaning here, and where the folder holds a pickle."""
    at = place(folder)
    settings, tensors = gguf_lora.read(at, model) if at.suffix == GGUF else opened(at)
    honoured.check_values(settings)
    form = form_for(settings)
    found, common, others = sorted_out(form, tensors)
    given = others
    found, settings = parted(found, settings, model)
    over, heads = cast(Any, form.adapter).over, _heads(model, found)
    found = {name: parts for name, parts in found.items() if name not in heads}
    found = off_windows(form, found, model)
    shapes = _shapes(model, list(found)) if over in ("matrix", "table") else places(model, over)
    honoured.check_places(settings, found if over == "matrix" else (), model, given, heads)
    held = form.read(settings, found, common, shapes)
    tokens, others = _tokens(model, settings, others)
    return Given(settings, held | tokens, float(settings.get(form.dropout) or 0.0), others, bool(heads) and over == "matrix")


def place(folder: Path) -> Path:
    """Where the adapter lies: the folder itself, the one inside that has its settings (as LoftQ is published, beside its base), or a GGUF file.
    Raises ValueError where there is none, or more than one."""
    if folder.suffix == GGUF and folder.is_file() or (folder / CONFIG).is_file():
        return folder
    inside = sorted(p.parent for p in folder.glob(f"*/{CONFIG}")) or sorted(folder.glob(f"*{GGUF}"))
    if len(inside) > 1:
        raise Invalid(f"{folder} holds {len(inside)} adapters ({inside[0].name}, {inside[1].name}, …): give one of them")
    if not inside:
        raise WrongUse(
            f"there is no PEFT adapter at {folder} (no {CONFIG}): give the folder that peft's save_pretrained wrote, or a .gguf file"
        )
    return inside[0]


def mark(folder: Path) -> str:
    """A hash of what a folder says, by which a change is seen."""
    at = place(folder)
    return sha256(at) if at.suffix == GGUF else ":".join(sha256(at / name) for name in (CONFIG, TENSORS))


def base_of(folder: Path, settings: Mapping[str, Any]) -> tuple[Path | None, str]:
    """(where the base of an adapter lies that is here, what the adapter calls it)."""
    at, said = place(folder), str(settings.get("base_model_name_or_path") or "")
    own = (at.parent if at.suffix == GGUF else at) / "base"  # an export of finebits
    if (own / "config.json").is_file():
        return own, str(own)
    return (Path(said), said) if said and (Path(said) / "config.json").is_file() else (None, said)


def base_named(folder: Path) -> str:
    """Where the base of an adapter lies: beside it, or where it says; "" where it names none. Raises ValueError where there is no adapter."""
    at = place(folder)
    base, said = base_of(folder, {} if at.suffix == GGUF else opened(at)[0])
    return said if base is None else str(base)


def go_on(model: nn.Module, folder: Path, marked: str) -> None:
    """The folder's tensors into the adapters that a plan has made for them. Raises ValueError where it is not what it was planned with."""
    try:
        same = mark(folder) == marked
    except (OSError, Invalid):
        same = False
    if not same:
        raise Invalid(f"{folder} is not there or not as it was when the plan was made, which goes on from it: plan again")
    fill(model, read(folder, model).held)


def opened(folder: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """(settings, tensors by PEFT's names) of a folder. Raises ValueError where it holds none, or a pickle."""
    if not (folder / CONFIG).is_file():
        raise WrongUse(f"there is no PEFT adapter at {folder} (no {CONFIG}): give the folder that peft's save_pretrained wrote")
    settings = read_json(folder / CONFIG)
    if not (folder / TENSORS).is_file():
        refuse_pickle(folder)
        raise Invalid(f"{folder} has no {TENSORS}: the copy is incomplete, save or copy it again")
    return settings, Stored(folder / TENSORS)


def _shapes(model: nn.Module, modules: list[str]) -> dict[str, tuple[int, ...]]:
    of, shapes = dict(model.named_modules()), {}
    for name in modules:
        if name not in of:
            raise Invalid(f"the adapter is for {name}, and the model has no such module: it was trained over another model")
        if not isinstance(of[name], nn.Linear | nn.Embedding):
            raise Invalid(
                f"the adapter is for {name}, a {type(of[name]).__name__}, and finebits lays adapters over nn.Linear and nn.Embedding: merge it "
                "with peft"
            )
        shapes[name] = tuple(cast(Tensor, of[name].weight).shape)
    return shapes


def _heads(model: nn.Module, found: Mapping[str, Params]) -> set[str]:
    """Those modules of an adapter that are tied to a table which it has as well, whose tensors are the table's. Raises ValueError where they are
    others."""
    of, heads = dict(model.named_modules()), set[str]()
    for table in [name for name in found if isinstance(of.get(name), nn.Embedding)]:
        for head in tied(model, of[table]).keys() & found.keys():
            if any(not torch.equal(t, found[table][k]) for k, t in found[head].items()):
                raise Invalid(
                    f"{head} is the same tensor as {table} in this model, and the folder has another adapter for each: untie the two"
                )
            heads.add(head)
    return heads


def _tokens(model: nn.Module, settings: Mapping[str, Any], others: Mapping[str, Tensor]) -> tuple[dict[str, Held], dict[str, Tensor]]:
    """(trained rows beside an adapter, by their table, the other tensors)."""
    asked = settings.get("trainable_token_indices")
    rows = {key.removesuffix(f".{TOKENS}"): t for key, t in others.items() if key.endswith(f".{TOKENS}")}
    if bool(asked) != bool(rows):
        raise Invalid(
            f"trainable_token_indices is {asked!r} in {CONFIG}, and the folder has trained rows of {', '.join(rows) or 'no table'}"
        )
    held, of, shapes = {}, dict(model.named_modules()), _shapes(model, list(rows))
    for name, T in rows.items():
        indices = asked if isinstance(asked, list) else next((i for k, i in cast(Any, asked).items() if name.endswith(k)), None)
        if indices is None or not isinstance(of[name], nn.Embedding):
            raise Invalid(f"the folder has trained rows of {name}, and those of a table of embeddings that {CONFIG} names are read")
        held[name] = trained_rows(name, indices, T, cast(tuple[int, int], shapes[name]))
    return held, {key: t for key, t in others.items() if not key.endswith(f".{TOKENS}")}


def fill(model: nn.Module, held: Mapping[str, Held]) -> None:
    with torch.no_grad():
        for module, h in held.items():
            host: Any = model.get_submodule(module)
            made = h.adapter.buffers(Base(host.weight, host.bias), torch.Generator()).keys() if isinstance(host, Adapted) else set()
            tensors = host.tensors("default")
            assert tensors.keys() - made == h.p.keys(), f"{module}: {sorted(tensors)} and {sorted(h.p)}"
            for k, t in h.p.items():
                tensors[k].copy_(t)
