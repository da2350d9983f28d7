"""The tensors of a model folder by the loaded model's own names, each read from its file when it is asked for.

What is given is what transformers' from_pretrained would load: of the same files, under its own conversions of names and layouts (its
objects do the work, so that a new architecture needs nothing here), tied where it ties. Weights that are held as codes are read by
`finebits.interop.coded`. Only headers and a few small tensors are read before a value is asked for.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finebits import tensorfile
from finebits.errors import Invalid
from finebits.experts import fused
from finebits.files import read_json
from finebits.formats.base import Format
from finebits.interop.coded import Coded, Unreadable, coded, fitting
from finebits.interop.configs import FLOATS, class_of, plain_config, raw_config, understood
from finebits.interop.from_gguf import blocks_beside
from finebits.interop.linears import cuts, is_conv1d
from finebits.qtensor import QTensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SCALES = re.compile(r"(weight_)?(scales?|scale_inv|qscale_weight|absmax|SCB|qzeros|zero_point|zeros|nested_absmax)")


class Stored(NamedTuple):
    """Where a tensor lies, and what its file says of it."""

    file: tensorfile.Stored
    dtype: torch.dtype
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The weight files that count, as transformers chooses them: those that config.json names, else the single file, else the shards of the
    index. Empty where there are none. Raises Unreadable where an index is damaged or a file that it names is missing."""
    named = raw_config(folder).get("transformers_weights")
    if named is not None and (not isinstance(named, str) or Path(named).is_absolute() or ".." in Path(named).parts or "\0" in named):
        raise Unreadable(
            f"config.json of {folder} names {named!r} for its weights, which lies outside of the folder or is no file: fetch it again"
        )
    first = folder / str(named) if named else folder / SINGLE if (folder / SINGLE).is_file() else folder / INDEX
    if not first.is_file():
        if named:
            raise Unreadable(f"config.json of {folder} names {named} for its weights, and the file is missing: fetch it again")
        return []
    if first.suffix != ".json":
        return [first]
    try:
        names = sorted(set(read_json(first)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as e:
        raise Unreadable(f"{first} is no index of weight files ({type(e).__name__}: {e}): fetch it again") from None
    for name in names:
        if not isinstance(name, str) or "\0" in name or not name:
            raise Unreadable(f"{first} is no index of weight files (it names {name!r}): fetch it again")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Unreadable(f"{first} names {name}, which lies outside of the folder: fetch the checkpoint again")
        if not (folder / name).is_file():
            raise Unreadable(f"{first} names {name}, and the file is missing: fetch it again")
    return [folder / name for name in names]


def headers(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's weight files by their names there. Raises Unreadable where there are none, and ValueError where one is
    damaged."""
    files = weight_files(folder)
    if not files:
        raise Unreadable(_no_weights(folder))
    stored: dict[str, Stored] = {}
    for file in files:
        try:
            opened = tensorfile.Stored(file)
        except tensorfile.UnknownType as e:
            raise Unreadable(f"{e}: give the unquantized model") from None
        for name, (dtype, shape, *_) in opened.lines.items():
            stored[name] = Stored(opened, dtype, shape)
    return stored


def _no_weights(folder: Path) -> str:
    """What a folder has in the place of model.safetensors, and what to do about it."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    missing = f"{folder} has no {SINGLE}"
    for name in names:
        if name.endswith(PICKLES):
            return f"{missing}; {name} is a pickle, which finebits does not open: save the model as safetensors"
        if name.endswith(".gguf"):
            return f"{missing}; give {folder / name} itself to read that file"
        if name.endswith(".safetensors"):
            return f"{missing}; transformers does not load {name} either: rename it if it is the model"
    return f"{missing}: fetch the weights, or give the folder that holds them"


def read(stored: Stored, name: str, at: int | None = None) -> Tensor:
    """One tensor out of its file, or of its first dimension `at` alone."""
    return stored.file.read(name, at)


def fingerprint(folder: Path) -> str:
    """What a model folder holds, in sixteen hexadecimal digits: its config, and of each weight file that counts the size, the header and 64
    samples."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            header = int.from_bytes(f.read(8), "little")
            digest.update(f.read(min(header, 2**24)))
            for i in range(64):
                f.seek(size * i // 64)
                digest.update(f.read(65536))
    return digest.hexdigest()[:16]


def config_of(folder: Path) -> Any:
    """transformers' config of a folder, as the model is once it is loaded: unquantized, and tied only where the weights are."""
    return copy.deepcopy(_layout(folder).config) if weight_files(folder) else plain_config(folder)


class Tensors(Mapping[str, Tensor]):
    """The tensors of a model folder by the names of the loaded model's parameters and persistent buffers, each read when it is asked for.

    Weights of linears are (out, in), those too that files and transformers' own modules (`stock`) have otherwise, and experts are one by one.
    Values are in the dtype of the file, float32 where it holds codes. Raises Unreadable where the files are not this model's.
    """

    def __init__(self, folder: Path, stock: bool = False) -> None:
        self.layout = _layout(folder)
        self.sources, self.other = self.layout.sources, dict[str, Callable[[Tensor], Tensor]]()
        if not stock:
            apart, self.other = self.layout.apart, self.layout.matrices
            self.sources = {k: s for k, s in self.sources.items() if k not in apart}
            for each in apart.values():
                self.sources |= {name: source for name, (source, _) in each.items()}
                self.other |= {name: taken for name, (_, taken) in each.items()}

    @property
    def notices(self) -> list[str]:
        """What a user should know of how the checkpoint is read."""
        return list(self.layout.notices)

    def __getitem__(self, name: str) -> Tensor:
        source = self.sources[name]
        value = source.values(self.layout)[source.target]
        return self.other[name](value) if name in self.other else value

    def weight(self, name: str, format: Format | None) -> Tensor:
        """A weight: where the file holds it in just this format, with the codes of the file, else its values."""
        exact = self.sources[name].exact(self.layout) if format is not None and name not in self.other else None
        return exact if exact is not None and exact.format == format else self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True)
class Source:
    """One of transformers' conversions over the tensors that it takes: [(name after renaming, name in the files, pattern)] -> values of the
    loaded model, of which `target` is one; or of each of these tensors the part of expert `at` alone."""

    transform: Any
    inputs: tuple[tuple[str, str, str], ...]
    target: str
    at: int | None = None

    def values(self, layout: Layout, meta: bool = False) -> dict[str, Tensor]:
        transform = copy.deepcopy(self.transform)
        for renamed, name, pattern in self.inputs:
            transform.add_tensor(renamed, name, pattern, lambda name=name: layout.read(name, meta, self.at))
        converted = transform.convert(self.inputs[0][0], model=layout.model, config=layout.model.config)
        return {k: v[0] if isinstance(v, list) else v for k, v in converted.items()}

    def experts(self, count: int, layout: Layout) -> list[Source]:
        """What gives (1, …) of each of `count` experts, and reads no other: files have a tensor for each, or one that leads with them. Empty
        where they have neither."""
        by_pattern: dict[str, list[tuple[str, str, str]]] = {}
        for line in self.inputs:
            by_pattern.setdefault(line[2], []).append(line)
        if all(len(lines) == count for lines in by_pattern.values()):
            return [replace(self, inputs=of_one) for of_one in zip(*by_pattern.values(), strict=True)]
        if all(layout.leads(name, count) for _, name, _ in self.inputs):
            return [replace(self, at=e) for e in range(count)]
        return []

    def exact(self, layout: Layout) -> QTensor | None:
        """The weight as a QTensor with the codes of the file, where it is one tensor of it that a format of ours holds as it is."""
        codes = (
            {**layout.coded, **layout.beside}.get(self.inputs[0][1])
            if len(self.inputs) == 1 and self.at is None and not hasattr(self.transform, "operations")
            else None
        )
        if codes is None or codes.exact is None:
            return None
        try:
            with fitting(self.target):
                q = codes.exact(layout.parts(codes))
        except ValueError:
            return None
        return q if tuple(q.shape) == tuple(codes.shape) or codes.file is not None else None


@dataclass
class Layout:
    """How the files of a folder become the tensors of a model: headers, codes, conversions and ties, and no values."""

    config: Any
    model: Any  # on the meta device
    stored: Mapping[str, Stored]
    coded: Mapping[str, Coded]
    beside: Mapping[str, Coded] = field(default_factory=dict)  # what a format holds of tensors that are there dense as well
    sources: dict[str, Source] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)

    @property
    def matrices(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What makes (out, in) of the weights that are not."""
        turned = {f"{name}.weight": lambda t: t.T.contiguous() for name, module in self.model.named_modules() if is_conv1d(module)}
        return turned | {f"{name}.weight": lambda t: t.flatten(1) for name, module in self.model.named_modules() if cuts(module)}

    @functools.cached_property
    def apart(self) -> dict[str, dict[str, tuple[Source, Callable[[Tensor], Tensor]]]]:
        """Of tensors that hold all experts, what gives those of each by their names there, and what makes (out, in) of them."""
        found: dict[str, dict[str, tuple[Source, Callable[[Tensor], Tensor]]]] = {}
        for owner, module in self.model.named_modules():
            for leaf, (count, m, n) in fused(module).items():
                turned = module.is_transposed
                for key, kind in ((leaf, "weight"), (f"{leaf}_bias", "bias")):
                    if (name := f"{owner}.{key}") in self.sources:
                        each = self._experts(self.sources[name], count, (1, m) if kind == "bias" else (1, n, m) if turned else (1, m, n))
                        names = [f"{owner}.{leaf}.{e}.{kind}" for e in range(count)]
                        found[name] = {
                            k: (s, functools.partial(_taken, at, turned and kind == "weight"))
                            for k, (s, at) in zip(names, each, strict=True)
                        }
        return found

    def _experts(self, source: Source, count: int, shape: tuple[int, ...]) -> list[tuple[Source, int]]:
        """For every expert a source, and its place in what that gives."""
        each = source.experts(count, self)
        try:
            alone = bool(each) and each[0].values(self, meta=True)[source.target].shape == shape
        except Exception:  # conversions fail in many ways on what they were not written for
            alone = False
        return [(one, 0) for one in each] if alone else [(source, e) for e in range(count)]

    def leads(self, name: str, count: int) -> bool:
        """Do a tensor, and all parts of one in codes, lead with so many experts?"""
        codes = self.coded.get(name)
        shapes = [self.stored[name].shape] if codes is None else [codes.shape, *(self.stored[part].shape for part in codes.parts.values())]
        return all(len(s) > 1 and s[0] == count for s in shapes)

    def parts(self, codes: Coded, at: int | None = None) -> dict[str, Tensor]:
        if codes.file is not None:
            return {role: codes.file.read(name, at) for role, name in codes.parts.items()}
        return {role: read(self.stored[name], name, at) for role, name in codes.parts.items()}

    def read(self, name: str, meta: bool = False, at: int | None = None) -> Tensor:
        """A tensor by its name in the files, plain, or its part of expert `at`; on the meta device for its shape alone."""
        codes = self.coded.get(name)
        if meta:
            shape, dtype = (codes.shape, torch.float32) if codes else (self.stored[name].shape, self.stored[name].dtype)
            return torch.empty(shape if at is None else (1, *shape[1:]), dtype=dtype, device="meta")
        if codes is None:
            return read(self.stored[name], name, at)
        with fitting(name):
            value = codes.plain(self.parts(codes, at))
            if value.shape[at is not None :] != codes.shape[at is not None :]:
                raise Invalid(f"the parts of {name} give {tuple(value.shape)} in the place of {codes.shape}: fetch the files again")
        return value


def _taken(at: int, turned: bool, value: Tensor) -> Tensor:
    return value[at].T.contiguous() if turned else value[at]


def _layout(folder: Path) -> Layout:
    stats = [(f, f.stat().st_mtime_ns, f.stat().st_size) for f in (folder / "config.json", *weight_files(folder))]
    return _read_layout(folder.resolve(), tuple(stats))


@lru_cache(4)
def _read_layout(folder: Path, stats: tuple[Any, ...]) -> Layout:
    config, stored = plain_config(folder), headers(folder)
    codes = coded({k: (s.dtype, s.shape) for k, s in stored.items()}, raw_config(folder), lambda name: read(stored[name], name))
    with torch.device("meta"), understood(str(folder / "config.json")):
        model = class_of(config).from_config(config)
    beside, notices = blocks_beside(folder)
    layout = Layout(config, model, stored, codes, beside, notices=notices)
    left = _convert(layout)
    _tie(layout)
    _check(layout, left, folder)
    return layout


def _convert(layout: Layout) -> list[str]:
    """Fill `sources`; give the names in the files that the model has no place for."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    model, prefix = layout.model, layout.model.base_model_prefix
    state, conversions = model.state_dict(), get_model_conversion_mapping(layout.model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    inside = {part for codes in layout.coded.values() for part in codes.parts.values()}
    groups: dict[str, tuple[Any, list[tuple[str, str, str]]]] = {}
    left = []
    for name in sorted({k for k in layout.stored if k not in inside} | layout.coded.keys(), key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = rename_source_key(name, [], [], prefix, state)
        if renamed not in state:
            left.append(name)
            continue
        transform = by_pattern[pattern] if pattern is not None else WeightRenaming(name, renamed)
        groups.setdefault(renamed, (transform, []))[1].append((renamed, name, pattern if pattern is not None else name))
    for first, (transform, inputs) in groups.items():
        try:
            converted = Source(transform, tuple(inputs), first).values(layout, meta=True)
        except Exception as e:  # conversions fail in many ways on tensors that are not what they were written for
            raise Unreadable(
                f"the checkpoint's tensors for {first} ({inputs[0][1]}, …) do not fit together ({type(e).__name__}: {e}): fetch it again"
            ) from e
        for target, value in converted.items():
            _fits(target, value, state, layout, inputs)
            layout.sources[target] = Source(transform, tuple(inputs), target)
    return left


def _fits(target: str, value: Tensor, state: Mapping[str, Tensor], layout: Layout, inputs: list[tuple[str, str, str]]) -> None:
    if target not in state:
        raise Unreadable(
            f"the checkpoint's {inputs[0][1]} becomes {target}, and the model has no such tensor: it is of another architecture"
        )
    if value.shape != state[target].shape:
        raise Unreadable(f"{target} is {tuple(value.shape)} in the checkpoint, and config.json asks for {tuple(state[target].shape)}")
    plain = {layout.stored[name].dtype for _, name, _ in inputs if name not in layout.coded}
    odd = [d for d in plain if d not in FLOATS]
    if state[target].is_floating_point() and odd:
        raise Unreadable(
            f"{inputs[0][1]} is {str(odd[0]).removeprefix('torch.')} and has no scale beside it that is known: codes of an unknown layout are "
            "not read as weights; give the unquantized model"
        )


def _tie(layout: Layout) -> None:
    """Names that share one tensor get one source, whichever of them the files hold. Where they hold both and not the same, transformers
    leaves them apart."""
    sources = layout.sources
    tied: dict[str, str] = layout.model.get_expanded_tied_weights_keys(all_submodels=True)
    for target, source in tied.items():
        if target in sources and source in sources:
            a, b = (sources[k].values(layout)[sources[k].target] for k in (target, source))
            if a.shape != b.shape or not torch.equal(a, b):
                for config in (layout.config, layout.model.config):
                    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
                layout.notices.append(
                    f"config.json ties {target} to {source}, the files hold both and they differ: they are two, as in transformers"
                )
                continue
        known = next((k for k in (source, target, *(t for t, s in tied.items() if s == source)) if k in sources), None)
        if known is not None:
            sources[source] = sources[target] = sources[known]


def _check(layout: Layout, left: list[str], folder: Path) -> None:
    """Raise Unreadable where the model lacks a parameter, or a weight lies beside a scale that nothing is known of; note the rest."""
    kind, used = type(layout.model).__name__, {name for s in layout.sources.values() for _, name, _ in s.inputs}
    lost = [k for k, _ in layout.model.named_parameters(remove_duplicate=False) if k not in layout.sources]
    lost = [k for k in lost if k not in layout.model.get_expanded_tied_weights_keys(all_submodels=True)] or lost
    if lost:
        more = f" (nor {len(lost) - 1} others)" if len(lost) > 1 else ""
        other = f", and it holds {left[0]}, which has no place there" if left else ""
        raise Unreadable(
            f"the checkpoint has no tensor {lost[0]}{more}, which {kind} needs{other}: {folder} was saved from another architecture, under "
            "other names, or in part"
        )
    for name in left:
        stem, _, leaf = name.rpartition(".")
        if SCALES.fullmatch(leaf) and (f"{stem}.weight" in used or stem in used or leaf == "scales"):  # AWQ scales activations so
            raise Unreadable(
                f"{name} lies beside a weight as if it were its scale, and nothing says how the two belong together: give the unquantized "
                "model, or the quantization_config that it was saved with"
            )
    ignored = layout.model._keys_to_ignore_on_load_unexpected or ()
    odd = [k for k in left if not re.search(r"rotary_emb\.inv_freq|(^|\.)position_ids$", k) and not any(re.search(p, k) for p in ignored)]
    if odd:
        layout.notices.append(f"{len(odd)} tensors of the checkpoint have no place in {kind} and are left out: {', '.join(odd[:3])}")
    new = [k for k in persistent(layout.model) if k not in layout.sources]
    if new:
        layout.notices.append(f"the checkpoint has no buffer {new[0]} ({len(new)} in all): it is what it is in a new {kind}")
    codes = [layout.coded[k] for k in used if k in layout.coded]
    if codes:
        keeps = (
            "; a matrix keeps its codes where the plan gives it the very format that it is held in" if any(c.exact for c in codes) else ""
        )
        layout.notices.append(
            f"the weights are quantized already ({', '.join(sorted({c.kind for c in codes}))}): they are dequantized{keeps}"
        )


def held_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that transformers holds a parameter or buffer in, in a model loaded in `dtype`."""
    for pattern, wide in model._get_dtype_plan(dtype).items():
        if re.search(pattern.replace("*", ".*"), name):
            return wide
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf).dtype


def persistent(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that belong to a model's state, by name."""
    state = model.state_dict()
    return {name: b for name, b in model.named_buffers() if name in state}
