"""A model folder of a part of another model, and the manifest that says which part: what LoRAM trains (finebits.loram).

The folder is a stock checkpoint: its config has fewer heads, channels or blocks, and transformers loads it. `prune.json` beside it holds what
was kept and fingerprints of the whole model and of the folder. Weights are read, cut and written one at a time.
"""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finebits import artefacts, files, registry
from finebits.build import generator
from finebits.calibrate.blockwise import blocks_of
from finebits.errors import Invalid
from finebits.export._safetensors import model_files
from finebits.interop.checkpoint import Tensors, config_of, fingerprint, held_dtype, persistent
from finebits.interop.configs import class_of
from finebits.interop.hf import folder_of, skeleton
from finebits.interop.linears import linearized
from finebits.linears import as_stored, stored_otherwise
from finebits.loram import Cut, Kept, choose, cuts, groups_of, masked, matrices, moved, pattern
from finebits.plan.levers import Levers, Start, Workload
from finebits.pruners.base import Pruner
from finebits.pruners.magnitude import Magnitude
from finebits.pruners.wanda import Wanda
from finebits.stats.base import Stats
from finebits.tensorfile import Entry

SCHEMA, MANIFEST = "finebits.prune/1", "prune.json"
WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_hidden_dim")  # what configs call the channels
BESIDE = (".json", ".jinja", ".model", ".txt")  # of files that are neither weights nor config


@dataclass(frozen=True)
class Manifest:
    """What a pruned folder is a part of. `aligned` is the fingerprint of the weights once they were trained on; None where they were not."""

    model: str
    revision: str | None
    base: str  # fingerprint of the whole model
    pruned: str  # and of the folder as it was pruned
    aligned: str | None
    by: dict[str, Any]
    seed: int
    mask: str | None
    parameters: tuple[int, int]  # of the whole model, and left
    kept: Kept

    def save(self, folder: Path) -> None:
        """Into its file in the folder."""
        files.write_json(folder / MANIFEST, {"schema": SCHEMA} | asdict(self) | {"kept": self.kept.to_json()})

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """That of a folder. Raises Invalid where there is none, or where the folder's weights are others."""
        try:
            data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if data.pop("schema") != SCHEMA:
                raise Invalid(f"it is not of schema {SCHEMA}")
            held = cls(**data | {"kept": Kept.read(data["kept"]), "parameters": tuple(data["parameters"])})
        except (FileNotFoundError, NotADirectoryError):
            raise Invalid(f"{folder} is no pruned model (it has no {MANIFEST}): give the folder that finebits prune wrote") from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise Invalid(f"{folder / MANIFEST} is no manifest of a pruned model ({type(e).__name__}: {e}): prune again") from None
        held.check("pruned model", folder, held.aligned or held.pruned)
        return held

    def check(self, what: str, folder: Path, wanted: str) -> None:
        """Raise Invalid where a folder is not the one of this fingerprint."""
        if (actual := fingerprint(folder)) != wanted:
            raise Invalid(
                f"{MANIFEST} is for the {what} with fingerprint {wanted}, and {folder} has {actual}: give the one that was pruned, or prune "
                "again"
            )


def prune(
    model: str | Path,
    out: str | Path,
    keep: float | None = None,
    *,
    channels: float | int | None = None,
    heads: float | int | None = None,
    blocks: float | int = 1.0,
    drop: Iterable[int] = (),
    mask: str | None = None,
    by: Pruner | None = None,
    data: Any = None,
    like: str | Path | None = None,
    seed: int = 0,
    calibration_rows: int = 128,
    max_length: int = 512,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Manifest:
    """Write the part of a model that is worth most to `out`, a folder that transformers loads and that is trained as any model is; `recover`
    then makes an adapter of the whole model of what was trained.

    `keep` is the share of feed-forward channels and of heads (of keys and values, with their queries) that every block keeps, `channels` and
    `heads` are each of them alone, or numbers above 1; half of both where nothing is said. `blocks` of them stay, those in `drop` do not. `mask`
    ("2:4", or a share such as "0.5") sets single entries to zero instead, which saves no memory while weights are stored whole. What is worth
    most `by` tells (a method of finebits.pruners): if nothing is said Wanda over `data` (rows), and magnitudes, which tell far less, where there
    are none. `like` takes what another pruned folder of this model has kept. Raises Invalid where the model has no such parts, or no stock
    model is made of what is left.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(f"{place}/llama")
    ...     made = fb.prune(f"{place}/llama", f"{place}/small", 0.5)
    ...     small = LlamaForCausalLM.from_pretrained(f"{place}/small")
    >>> small.config.intermediate_size, small.config.num_attention_heads, small.config.num_key_value_heads
    (48, 2, 1)
    """
    out, drop, by = Path(out), tuple(drop), by or (Magnitude() if data is None else Wanda())
    some = bool((channels, heads, mask, like) != (None, None, None, None) or blocks != 1 or drop)
    share = keep if keep is not None else 1.0 if some else 0.5
    wanted = {"channels": share if channels is None else channels, "heads": share if heads is None else heads}
    if mask is not None:
        pattern(mask)
    whole = Whole(str(model), revision, folder_of(model, revision))
    limits = data, calibration_rows, max_length
    if like is None:
        looked = whole.looked(by, [k for k, v in wanted.items() if v != 1], every=mask is not None or blocks != 1)
        stats = whole.statistics(by, looked, *limits)
        kept = choose(whole.model, whole.text, by, whole.read, stats, wanted, blocks, drop, seed, progress)
    else:
        if keep is not None or (channels, heads) != (None, None) or blocks != 1 or drop:
            raise Invalid(
                f"what is kept is said by {like}, and something else was said as well: leave keep, channels, heads, blocks and drop out"
            )
        other = Manifest.read(folder_of(like))
        other.check("whole model", whole.folder, other.base)
        kept, stats = other.kept, whole.statistics(by, whole.looked(by, [], every=mask is not None), *limits)

    inside = {m for block in whole.blocks for m in matrices(whole.model, block)}

    def entries(module: str, W: Tensor, cut: Cut) -> Tensor:
        """What stays of a weight."""
        if mask is None or module not in inside:
            return cut.of(W)
        return masked(cut.of(W), cut.of(by(W, stats.get(module, {}), generator(seed, module))), mask)

    config = narrowed(whole.model, whole.config, kept)
    small = _made(whole.folder, config)
    tensors = whole.left(small, kept, entries)
    counts = tuple(sum(p.numel() for p in m.parameters()) for m in (whole.model, small))
    with artefacts.folder(out, SCHEMA, overwrite) as new:
        config.save_pretrained(new)
        for path, file in model_files(tensors).items():
            file.write(new / path)
        for path in sorted(whole.folder.iterdir()):
            odd = path.name in ("config.json", artefacts.RECORD, MANIFEST) or path.name.endswith(".index.json")
            if path.is_file() and path.suffix in BESIDE and not odd:
                shutil.copyfile(path, new / path.name)
        hashes = fingerprint(whole.folder), fingerprint(new), None
        made = Manifest(whole.name, revision, *hashes, registry.to_json(by), seed, mask, (counts[0], counts[1]), kept)
        made.save(new)
        artefacts.record(new, SCHEMA, model=whole.name)
    return made


@dataclass(frozen=True)
class Whole:
    """A model to be pruned: its folder, and what is known of it without its values."""

    name: str
    revision: str | None
    folder: Path

    @cached_property
    def config(self) -> Any:
        return config_of(self.folder)

    @property
    def text(self) -> Any:
        return self.config.get_text_config()

    @cached_property
    def model(self) -> Any:
        """On the meta device."""
        model: Any = skeleton(self.folder, torch.float32)
        model.tie_weights()
        return model

    @cached_property
    def tensors(self) -> Tensors:
        return Tensors(self.folder)

    @cached_property
    def blocks(self) -> list[str]:
        return blocks_of(self.model)

    def read(self, module: str) -> Tensor:
        """The weight of a module."""
        return self.tensors[f"{module}.weight"]

    def looked(self, by: Pruner, kinds: list[str], every: bool) -> list[str]:
        """The matrices that a pruner looks at: those that units of these kinds are parts of, or `every` one of the blocks."""
        groups = groups_of(self.model, self.text, kinds, range(len(self.blocks))).values()
        found = {m for g in groups for m in ([g.back] if by.back else g.modules)}
        return sorted(found | ({m for name in self.blocks for m in matrices(self.model, name)} if every else set()))

    def statistics(self, by: Pruner, looked: list[str], data: Any, rows: int, length: int) -> Mapping[str, Stats]:
        """What a pruner needs of these matrices. Raises Invalid where that asks for rows and there are none."""
        from finebits.interop.pricing import gather

        if not by.needs or not looked:
            return {}
        if data is None:
            raise Invalid(
                f"{type(by).__name__} looks at what layers are given, and no rows came: give data (--data rows.jsonl), or prune by magnitude"
            )
        work = Workload(Levers(max_length=length), start=Start(calibration_rows=rows))
        return gather(self.folder, data, {m: by.needs for m in looked}, work)

    def left(self, small: Any, kept: Kept, entries: Callable[[str, Tensor, Cut], Tensor]) -> dict[str, Entry]:
        """The tensors of the `small` model, by their names in it, each read and cut by `entries` (of its module, the values, the cut) when it is
        written. Raises Invalid where the small model has it otherwise."""
        own, name_of, modules = cuts(self.model, self.text, kept), moved(self.model, kept), dict(self.model.named_modules())
        dtype = self.config.dtype or torch.float32
        state = dict(small.named_parameters()) | persistent(small)
        tensors = dict(self.model.named_parameters()) | {k: t for k, t in persistent(self.model).items() if k in self.tensors}
        found = dict[str, Entry]()
        for name, like in tensors.items():
            new, (module, _, leaf) = name_of(name), name.rpartition(".")
            if new is None:
                continue
            host, cut, is_weight = modules[module], own.get(module, Cut()), leaf == "weight"
            shape = cut.sides(like.shape)
            if new not in state or tuple(state[new].shape) != shape:
                has = f"is {tuple(state[new].shape)}" if new in state else "is not there"
                raise Invalid(
                    f"in a {type(small).__name__} of the config that is left {new} {has}, and {shape} is left of it: no stock model is "
                    "made of that, leave heads (heads=1) or channels (channels=1)"
                )
            turn = is_weight and stored_otherwise(host)
            wide = held_dtype(small, new, dtype)

            def value(
                name: str = name, module: str = module, host: Any = host, cut: Cut = cut, turn: bool = turn, wide: Any = wide
            ) -> Tensor:
                W = self.tensors[name]
                W = (entries(module, W, cut) if W.ndim == 2 else cut.of(W)).to(wide)
                return as_stored(host, W) if turn else W

            stored = as_stored(host, torch.empty(shape, device="meta")).shape if turn else shape
            found[new] = Entry(wide, tuple(stored), value)
        return found


def narrowed(model: Any, config: Any, kept: Kept) -> Any:
    """The config of what is left. Raises Invalid where the config says nothing of what was cut."""
    config = copy.deepcopy(config)
    text, first = config.get_text_config(), kept.blocks[0]
    layers = int(text.num_hidden_layers)
    for kind, group in groups_of(model, text, kept.units, [first]).items():
        count = len(kept.units[kind[0]][first])
        if kind[0] == "heads":
            inner = model.get_submodule(group.back).in_features
            g = text.num_attention_heads // group.count
            text.head_dim = inner // int(text.num_attention_heads)
            text.num_attention_heads = g * count
            if getattr(text, "num_key_value_heads", None) is not None:
                text.num_key_value_heads = count
            continue
        said = [k for k in WIDTHS if getattr(text, k, None) == group.count] or [
            k for k in WIDTHS if k in vars(text) and getattr(text, k) is None
        ]
        if not said:
            raise Invalid(f"the config of {type(model).__name__} does not say how many channels ({group.count}) there are: channels=1")
        setattr(text, said[0], count)
    if len(kept.blocks) < layers:
        for key, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == layers:
                setattr(text, key, [value[i] for i in kept.blocks])
        text.num_hidden_layers = len(kept.blocks)
    return config


def _made(folder: Path, config: Any) -> Any:
    """The model of a config, without values, after its config was written and read as a stock library does."""
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory() as place:
        config.save_pretrained(place)
        again = AutoConfig.from_pretrained(place)
    with torch.device("meta"):
        try:
            model = class_of(again).from_config(again, dtype=config.dtype or torch.float32)
        except Exception as e:  # classes check their configs in their own ways
            reason = " ".join(str(e).split())[:200]
            raise Invalid(f"no model is made of what is left of {folder} ({type(e).__name__}: {reason}): keep other numbers of it") from e
    model.tie_weights()
    return linearized(model)


def carry(folder: Path, trained: Path) -> None:
    """What was trained of a pruned model and merged is a pruned model: its manifest goes with it, as the aligned one."""
    if (folder / MANIFEST).is_file():
        held = Manifest.read(folder)
        record = artefacts.recorded(trained)
        replace(held, aligned=fingerprint(trained)).save(trained)
        artefacts.record(trained, **{k: v for k, v in record.items() if k != "sha256"})
