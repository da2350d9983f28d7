"""LoRA adapters in folders of PEFT, as factors: several made one, two compared, one made smaller. No model is needed, and none is loaded.

What is written is a folder of PEFT again, of the first's settings, with lora_alpha = r, and patterns where ranks differ.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from finebits import artefacts, files
from finebits.adapters.lora import LoRA
from finebits.build import generator
from finebits.errors import Invalid
from finebits.interop.peft_folder import CONFIG, TENSORS, opened
from finebits.merging.base import Factors, Merging, inner, norm
from finebits.merging.svd import shortened
from finebits.peft_forms._lowrank import A, B, said
from finebits.peft_forms.base import Held, Written, form_for, form_of, named, patterned, sorted_out
from finebits.tensorfile import Entry, write

SCHEMA = "finebits.adapter_folder/1"
TABLE = re.compile(r"base_model\.model\.(.+)\.lora_embedding_A")
WHERE = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")


@dataclass(frozen=True)
class LoraFolder:
    """Settings, and the update of every module; `tables` are those of embeddings, whose factors are as everywhere (rows are outputs)."""

    settings: Mapping[str, Any]
    updates: Mapping[str, Factors]
    tables: frozenset[str] = frozenset()


class Shortened(NamedTuple):
    """An adapter made smaller: by module its rank and ‖Δ − Δ_r‖/‖Δ‖, and the same error of all together."""

    adapter: LoraFolder
    ranks: dict[str, int]
    errors: dict[str, float]
    error: float


def lora_folder(folder: str | Path) -> LoraFolder:
    """The LoRA adapter of a folder. Raises ValueError where it holds another method, tensors beside it, or a pickle."""
    settings, tensors = opened(Path(folder))
    form = form_for(settings)
    if form.adapter is not LoRA:
        raise Invalid(
            f"{folder} is a {form.peft} adapter, and factors of LoRA are merged: export it as target adapter, which writes a LoRA"
        )
    found, _, others = sorted_out(form, tensors)
    if beside := next((key for key in others if ".base_layer." not in key), None):  # that is a copy of the base's
        raise Invalid(f"{folder} holds {beside} beside the adapter, which is not merged: train without modules_to_save and biases")
    updates = {}
    for name, p in found.items():
        r, alpha = (patterned(settings, key, f"{pattern}_pattern", name) for key, pattern in (("r", "rank"), ("lora_alpha", "alpha")))
        if p[A].shape[0] != int(r) or p[B].shape[1] != int(r):
            raise Invalid(f"{name} of {folder} has rank {p[A].shape[0]} and its {CONFIG} says {r}: the copy is not complete")
        kind = LoRA(int(r), float(alpha), "rslora" if settings.get("use_rslora") else "lora")
        updates[name] = Factors(p[B].contiguous(), p[A].contiguous(), kind.s)
    return LoraFolder(settings, updates, frozenset(m[1] for key in tensors if (m := TABLE.fullmatch(key))))


def combine(adapters: Sequence[LoraFolder], by: Merging, weights: Sequence[float] | None = None, seed: int = 0) -> LoraFolder:
    """Several adapters of one base as one; of a module that some lack, of those that have it. `weights` (1 each) stand before updates."""
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or len(adapters) < 1:
        raise Invalid(f"there are {len(adapters)} adapters and {len(weights)} weights: give one a weight each")
    names = list(dict.fromkeys(name for a in adapters for name in a.updates))
    made = {}
    for name in names:
        each = [(a.updates[name], w) for a, w in zip(adapters, weights, strict=True) if name in a.updates]
        if len(shapes := {(f.B.shape[0], f.A.shape[1]) for f, _ in each}) > 1:
            raise Invalid(f"{name} is {' and '.join(map(str, sorted(shapes)))} in these adapters: they are of different models")
        try:
            made[name] = by([f for f, _ in each], [w for _, w in each], generator(seed, name))
        except ValueError as e:
            raise Invalid(f"{name}: {e}") from e
    settings = dict(adapters[0].settings)
    if any(a.updates.keys() != adapters[0].updates.keys() for a in adapters):
        settings |= dict.fromkeys(WHERE) | {"target_modules": names}
    return LoraFolder(settings, made, frozenset().union(*(a.tables for a in adapters)))


def compress(adapter: LoraFolder, rank: int | None = None, energy: float | None = None) -> Shortened:
    """The best adapter of at most `rank`, or in every module of the least rank that holds `energy` (0 to 1) of its squared norm."""
    if (rank is None) == (energy is None) or not 0 < (energy or 1.0) <= 1 or (rank or 1) < 1:
        raise Invalid(
            f"an adapter is made smaller by a rank of at least 1 or by an energy of 0 to 1, and rank={rank}, energy={energy} came"
        )
    made = {name: shortened(f, rank, energy) for name, f in adapter.updates.items()}
    whole = sum(norm(f) ** 2 for f in adapter.updates.values())
    lost = sum((error * norm(adapter.updates[name])) ** 2 for name, (_, error) in made.items())
    return Shortened(
        LoraFolder(adapter.settings, {name: f for name, (f, _) in made.items()}, adapter.tables),
        {name: f.rank for name, (f, _) in made.items()},
        {name: error for name, (_, error) in made.items()},
        math.sqrt(lost / whole) if whole else 0.0,
    )


def diff(a: LoraFolder, b: LoraFolder) -> dict[str, Any]:
    """How far apart two adapters are: by module, and for all, the norms of both updates, of their difference, and their cosine; what only one
    has; settings that differ."""
    rows, totals = {}, [0.0, 0.0, 0.0]
    for name in sorted(a.updates.keys() & b.updates.keys()):
        x, y = a.updates[name], b.updates[name]
        if (x.B.shape[0], x.A.shape[1]) != (y.B.shape[0], y.A.shape[1]):
            raise Invalid(f"{name} is of another shape in each of the two: they are of different models")
        parts = inner(x, x), inner(y, y), inner(x, y)
        rows[name] = _distance(*parts) | {"ranks": [x.rank, y.rank]}
        totals = [t + p for t, p in zip(totals, parts, strict=True)]
    keys = sorted(a.settings.keys() | b.settings.keys())
    return {
        "all": _distance(*totals),
        "modules": rows,
        "only_first": sorted(a.updates.keys() - b.updates.keys()),
        "only_second": sorted(b.updates.keys() - a.updates.keys()),
        "settings": {k: [a.settings.get(k), b.settings.get(k)] for k in keys if a.settings.get(k) != b.settings.get(k)},
    }


def _distance(xx: float, yy: float, xy: float) -> dict[str, Any]:
    cosine = xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else 0.0
    return {"first": math.sqrt(xx), "second": math.sqrt(yy), "difference": math.sqrt(max(xx + yy - 2 * xy, 0.0)), "cosine": cosine}


def write_folder(adapter: LoraFolder, folder: str | Path, overwrite: bool = False) -> None:
    """A folder of PEFT. Raises ValueError where there is one already, without `overwrite`."""
    form = form_of(LoRA())
    assert form is not None
    held = {name: Held(LoRA(f.rank, f.s * f.rank), {"A": f.A, "B": f.B}) for name, f in adapter.updates.items()}
    written = form.write(held)
    looked = {name: {form.looked[k]: t.mT for k, t in p.items()} if name in adapter.tables else p for name, p in written.tensors.items()}
    settings = {**adapter.settings, **said(held), "init_lora_weights": True}
    tensors: dict[str, Tensor] = named(Written({}, looked, {}))
    with artefacts.folder(Path(folder), SCHEMA, overwrite) as new:
        write(new / TENSORS, {k: Entry.of(t) for k, t in tensors.items()}, {"format": "pt"})
        files.write_text(new / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        artefacts.record(new, SCHEMA)
