"""Saving a tuned model and getting it back, bit for bit, without pickles.

A saved folder holds
- `plan.json`: the plan that the model was built from;
- `adapter.safetensors`: every trained tensor as `module.adapter.param`, or what its adapter packs it into, and one line of JSON a host: its
  adapters, which are active, dropout;
- `base.safetensors`: every weight that was quantized or moved (`module.weight.codes`, …, or `module.weight`), and one line of JSON a
  weight: format, shape, dtype. Weights that the plan leaves as they were come from the original model and are not written;
- `tuned.safetensors`, where there is something to hold: biases, gains of norms and other tensors outside of adapters that were trained;
- `finebits.json`: schema, model, and the sha256 of each of the others.
Frozen tensors of adapters that are drawn from a seed are not stored: they are drawn again.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits import kernels, registry
from finebits.adapters.base import Adapter, Base, Params
from finebits.anatomy import size_of
from finebits.artefacts import RECORD as MANIFEST
from finebits.artefacts import folder as new_folder
from finebits.artefacts import record, recorded, settle
from finebits.build import Adapted, built, common, generator, release, sign, tuned, weighted
from finebits.carrier import Carrier, carriers, lay
from finebits.errors import FinebitsError, Invalid, out_of_memory
from finebits.files import read_json, sha256
from finebits.lookup import Lookup, put
from finebits.plan.base import Plan, Spec, begun
from finebits.qtensor import QTensor, format_of
from finebits.tensorfile import CODES, Entry, Spool, Stored, write

SCHEMA = "finebits.saved/1"
RANKS = 16  # times the longer side of a matrix: no adapter has more
PLAN, ADAPTER, BASE = "plan.json", "adapter.safetensors", "base.safetensors"
TUNED = "tuned.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
LINES = "finebits"  # the metadata key that holds the lines
DTYPES = {str(d).removeprefix("torch."): d for d in CODES}


@dataclass(frozen=True)
class Saved:
    """What a folder holds: `bases[module][part]` of every quantized or moved base (the part "" for a dense one), which a model need not
    have read from anywhere else; `adapter[module][adapter][param]`; `weights` and `hosts` are the lines beside them, by module; `tuned[name]`
    of parameters outside of adapters.

    >>> import tempfile
    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=2))}))
    >>> with tempfile.TemporaryDirectory() as place:
    ...     fb.save(model, f"{place}/model")
    ...     saved = read(f"{place}/model")
    >>> sorted(saved.bases["0"]), sorted(saved.adapter["0"]["default"]), saved.plan.hash == plan_of(model).hash
    (['codes', 'scale'], ['A', 'B'], True)
    """

    plan: Plan
    bases: dict[str, Params]
    weights: dict[str, dict[str, Any]]
    adapter: dict[str, dict[str, Params]]
    hosts: dict[str, dict[str, Any]]
    tuned: Params


def plan_of(model: nn.Module) -> Plan:
    """The plan that a model was built from. Raises ValueError if it was not built here.

    >>> plan_of(fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(fb.NF(4))}))).modules["0"].format.bits
    4
    """
    origin = built(model)
    if origin is None:
        raise Invalid("saving and exporting need a model made by finebits.build, and this one carries no plan: build it from a plan")
    return origin.plan


def layout(model: nn.Module, packed: bool = True) -> dict[str, tuple[dict[str, Entry], dict[str, str]]]:
    """What `save` writes: per file the tensors and the metadata, nothing computed yet.

    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=2))}))
    >>> {file: list(entries) for file, (entries, _) in layout(model).items()}
    {'adapter.safetensors': ['0.default.A', '0.default.B'], 'base.safetensors': ['0.weight.codes', '0.weight.scale']}
    """
    plan = plan_of(model)
    written = set[Any]()
    parts = [_host(name, host, plan, written, packed) for name, host in weighted(model).items()]
    parts += [_carrier(name, host, plan, packed) for name, host in carriers(model)]
    files = {file: (_joined(p[file][0] for p in parts), _lines([p[file][1] for p in parts])) for file in (ADAPTER, BASE)}
    more = tuned(model)
    return files | ({TUNED: (_joined([more]), _lines([]))} if more else {})


def _host(
    name: str, host: Adapted | Lookup, plan: Plan, written: set[Any], packed: bool
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any] | None]]:
    """Per file the tensors of one host and its line, packed where an adapter can be. Of tensors that hosts hold together the first has them in
    the file; `written` tells."""
    W, spec = host.weight, plan.modules.get(name, Spec())
    line = {"module": name, "format": None, "shape": list(W.shape), "dtype": str(W.dtype).removeprefix("torch.")}
    base, adapter = {}, {}
    if isinstance(W, QTensor):
        base = {f"{name}.weight.{k}": part for k, part in W.parts.items()}
        line["format"] = registry.to_json(W.format)
    elif spec.init.moves or spec.init.chooses or begun(spec) is not None:  # one that was chosen may have moved it
        base = {f"{name}.weight": W}
    if isinstance(host, Lookup):
        return {ADAPTER: ({}, None), BASE: (base, line if base else None)}
    for key, kind in host.kinds.items():
        frozen = kind.buffers(Base(W, host.bias), generator(plan.seed, name))
        left = frozen.keys() | (kind.shared if (key, kind, W.shape) in written else frozenset())
        written.add((key, kind, W.shape))
        tensors = {k: t for k, t in host.tensors(key).items() if k not in left}
        adapter |= {f"{name}.{key}.{k}": t for k, t in (kind.packed(tensors) if packed else tensors).items()}
    kinds = {key: registry.to_json(kind) for key, kind in host.kinds.items()}
    beside = {"module": name, "adapters": kinds, "active": host.active, "dropout": host.dropout}
    return {ADAPTER: (adapter, beside), BASE: (base, line if base else None)}


def _carrier(name: str, host: Carrier, plan: Plan, packed: bool) -> dict[str, tuple[dict[str, Tensor], dict[str, Any] | None]]:
    """The same of a host that is no matrix."""
    adapter = dict[str, Tensor]()
    for key, kind in host.kinds.items():
        drawn = kind.buffers(host.view(), generator(plan.seed, name))
        tensors = {k: t for k, t in host.tensors(key).items() if k not in drawn}
        adapter |= {f"{name}.{key}.{k}": t for k, t in (kind.packed(tensors) if packed else tensors).items()}
    kinds = {key: registry.to_json(kind) for key, kind in host.kinds.items()}
    return {ADAPTER: (adapter, {"module": name, "adapters": kinds, "active": host.active, "dropout": host.drops}), BASE: ({}, None)}


def _joined(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Entry]:
    return {name: Entry.of(t) for part in parts for name, t in part.items()}


def save(model: nn.Module, folder: str | Path, overwrite: bool = False, packed: bool = True) -> None:
    """Write `folder`; what was saved there before is replaced only when the new files are complete, and files of others stay. One tensor at a
    time is copied. `packed` holds an adapter in the fewest bytes that compute the same; without it, as training goes on from it.

    Raises ValueError if the model carries no plan, and, without `overwrite`, if the folder holds a model or files that `save` did not write
    where it would.

    >>> import tempfile
    >>> model = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8)), fb.Plan({"0": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=2))}))
    >>> with tempfile.TemporaryDirectory() as place:
    ...     fb.save(model, f"{place}/model")
    ...     print(sorted(p.name for p in Path(place, "model").iterdir()))
    ['adapter.safetensors', 'base.safetensors', 'finebits.json', 'plan.json']
    """
    plan, files = plan_of(model), layout(model, packed)
    with new_folder(Path(folder), SCHEMA, overwrite) as new:
        for file, (entries, metadata) in files.items():
            write(new / file, entries, metadata)
        _manifest_of(plan, new)


def save_each(plan: Plan, each: Iterable[tuple[str, Adapted | Lookup]], folder: str | Path, overwrite: bool = False) -> None:
    """What `save` writes, of hosts that come one after another and need not stay."""
    with new_folder(Path(folder), SCHEMA, overwrite) as new:
        with Spool(new / ADAPTER) as adapter, Spool(new / BASE) as base:
            spools = {ADAPTER: adapter, BASE: base}
            lines: dict[str, list[dict[str, Any] | None]] = {file: [] for file in spools}
            written = set[Any]()
            for name, host in each:
                for file, (tensors, line) in _host(name, host, plan, written, False).items():
                    for key, t in tensors.items():
                        spools[file].add(key, t)
                    lines[file].append(line)
            for file, spool in spools.items():
                spool.close(_lines(lines[file]))
        _manifest_of(plan, new)


def _manifest_of(plan: Plan, new: Path) -> None:
    plan.save(new / PLAN)
    record(new, SCHEMA, model=plan.model, model_hash=plan.model_hash, plan=plan.hash)


def read(folder: str | Path) -> Saved:
    """Plan and tensors of a saved folder, each file checked against its sha256.

    Raises ValueError that names the file if one is missing, damaged or a pickle; nothing is ever unpickled.
    """
    path = Path(folder)
    settle(path)
    refuse_pickle(path)
    manifest = _manifest(path)
    more = [TUNED] if TUNED in manifest["sha256"] else []
    for file in (PLAN, ADAPTER, BASE, *more):
        if not (path / file).is_file():
            raise Invalid(f"{path} has no {file}, and its {MANIFEST} says that it should: the copy is incomplete, save or copy it again")
        _refuse_content(path / file)
        actual, wanted = sha256(path / file), manifest["sha256"].get(file)
        if actual != wanted:
            bytes_ = (path / file).stat().st_size
            raise Invalid(
                f"{path / file} is damaged: its sha256 is {actual[:16]}…, {MANIFEST} says {str(wanted)[:16]}… ({bytes_} bytes here); "
                "save or copy it again"
            )
    with _as_saved(path):
        return _read(path, bool(more))


def _read(path: Path, more: bool) -> Saved:
    flat, weights = _tensors(path / BASE)
    bases: dict[str, Params] = {}
    for module, line in weights.items():
        weight = f"{module}.weight"
        if line["format"] is None:
            bases[module] = {"": _take(flat, weight, path / BASE)}
        else:
            bases[module] = {k.removeprefix(f"{weight}."): flat.pop(k) for k in list(flat) if k.rpartition(".")[0] == weight}
    _nothing_left(flat, path / BASE)
    flat, lines = _tensors(path / ADAPTER)
    adapter: dict[str, dict[str, Params]] = {}
    for key in list(flat):
        module, name, param = key.rsplit(".", 2)
        if name in lines.get(module, {}).get("adapters", {}):
            adapter.setdefault(module, {}).setdefault(name, {})[param] = flat.pop(key)
    _nothing_left(flat, path / ADAPTER)
    return Saved(Plan.load(path / PLAN), bases, weights, adapter, lines, _tensors(path / TUNED)[0] if more else {})


def apply(model: nn.Module, saved: Saved) -> nn.Module:
    """Put what was saved into a freshly constructed model, in place: no quantizer and no initialiser runs.

    Weights that were quantized or moved may be on the meta device. Raises ValueError that names the module where the model has no such
    module or another shape.

    >>> import tempfile
    >>> plan = fb.Plan({"0": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=2))})
    >>> model, x = fb.build(torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False)), plan), torch.ones(1, 64)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     fb.save(model, f"{place}/model")
    ...     again = apply(torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False)), read(f"{place}/model"))
    >>> torch.equal(again(x), model(x))
    True
    """
    with _as_saved(Path(ADAPTER)):
        return _apply(model, saved)


def _apply(model: nn.Module, saved: Saved) -> nn.Module:
    dtype = getattr(torch, saved.plan.levers.dtype)
    for p in model.parameters():
        p.requires_grad_(False)
    kinds = {n: {k: registry.from_json("adapters", v) for k, v in line["adapters"].items()} for n, line in saved.hosts.items()}
    for name, line in saved.hosts.items():
        linear = cast(nn.Linear, _module(model, name))
        if isinstance(linear, nn.Embedding) or any(kind.over != "matrix" for kind in kinds[name].values()):
            continue
        host = Adapted.over(linear)
        if name in saved.weights:
            W = _weight(saved.bases[name], saved.weights[name], f"{name}.weight")
            if W.shape != host.weight.shape:
                raise Invalid(f"{name}.weight was saved as {tuple(W.shape)}; the model's is {tuple(host.weight.shape)}: another model")
            device = host.weight.device
            host.weight = nn.Parameter(W if device.type == "meta" else W.to(device), requires_grad=False)
        elif host.weight.dtype != dtype:
            host.weight = nn.Parameter(host.weight.detach().to(dtype), requires_grad=False)
        for key, kind in kinds[name].items():
            if kind.rank > RANKS * max(host.weight.shape):
                raise Invalid(
                    f"{name}.{key} says that its rank is {kind.rank}, over a matrix {tuple(host.weight.shape)}: save or copy it again"
                )
            tensors = kind.unpacked(saved.adapter.get(name, {}).get(key, {}), *host.weight.shape)
            _attach(model, host, key, kind, tensors, saved.plan.seed, name)
        host.active, host.dropout = list(line["active"]), float(line["dropout"])
    for name in [n for n in saved.weights if n not in saved.hosts or isinstance(model.get_submodule(n), nn.Embedding)]:
        table = _module(model, name)
        W = _weight(saved.bases[name], saved.weights[name], f"{name}.weight")
        if not isinstance(table, nn.Embedding) or table.weight.shape != W.shape:
            raise Invalid(f"{name} was saved as a table {tuple(W.shape)} of embeddings, and the model has none such: another model")
        device = table.weight.device
        put(model, table, W if device.type == "meta" else W.to(device))
    for name, line in saved.hosts.items():
        if isinstance(_module(model, name), Adapted):
            continue
        for key, kind in kinds[name].items():
            module = model.get_submodule(name)
            sizes = size_of(module, "table" if isinstance(module, nn.Embedding) else kind.over)
            tensors = kind.unpacked(saved.adapter.get(name, {}).get(key, {}), *sizes)
            host = lay(model, name, key, kind, generator(saved.plan.seed, name), tensors, float(line["dropout"]), saved.plan.tied)
            _complete(host.p[key], tensors, f"{name}.{key}", kind)
            host.active = list(line["active"])
    release(model, saved.plan)
    sign(model, saved.plan)  # before the tuned tensors come, so that saving again finds them tuned
    parameters = dict(model.named_parameters())
    for name, t in saved.tuned.items():
        if name not in parameters or parameters[name].shape != t.shape:
            has = tuple(parameters[name].shape) if name in parameters else "none"
            raise Invalid(f"{name} was saved as {tuple(t.shape)} and the model has {has}: it was saved from another model")
        parameters[name].data = t.to(parameters[name].device)
    return model


@contextlib.contextmanager
def _as_saved(path: Path) -> Iterator[None]:
    """What fails while tensors and lines are put together becomes one sentence: their hashes may be right, and they may not be `save`'s."""
    try:
        yield
    except FinebitsError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as e:
        if out_of_memory(e):
            raise
        reason = " ".join(str(e).split())[:200]
        raise Invalid(f"{path} is not as finebits.save writes it ({type(e).__name__}: {reason}): save or copy it again") from e


def refuse_pickle(path: Path) -> None:
    """Raise if `path` is a pickle, or a folder whose only adapter is one; without opening it.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".bin") as file:
    ...     try:
    ...         refuse_pickle(Path(file.name))
    ...     except ValueError as e:
    ...         print(str(e).rpartition("is a pickle")[2])
    , which can run code when it is opened, and is refused: ask for the adapter as safetensors
    """
    pickles = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()] if path.is_dir() else []
    pickles = [f for f in pickles if f.suffix.lower() in PICKLES]
    if pickles and not (path / MANIFEST).exists():
        raise Invalid(f"{pickles[0]} is a pickle, which can run code when it is opened, and is refused: ask for the adapter as safetensors")


def _attach(model: nn.Module, host: Adapted, key: str, kind: Adapter, saved: Params, seed: int, name: str) -> None:
    together = common(model, key, kind, host, seed, saved)
    host.add(key, kind, generator(seed, name), {k: t for k, t in saved.items() if k not in together}, together)
    _complete(host.p[key], saved | together, f"{name}.{key}", kind)


def _complete(tensors: Any, saved: Mapping[str, Tensor], at: str, kind: Adapter) -> None:
    missing = [k for k, t in tensors.items() if t.requires_grad and k not in saved]
    if missing:
        raise Invalid(f"{ADAPTER} has no {at}.{missing[0]}, which a {type(kind).__name__} needs: the file is not complete")


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise Invalid(f"the saved folder holds {name}, and the model has no such module: it was saved from another model") from None


def _weight(parts: Params, line: dict[str, Any], weight: str) -> Tensor:
    if line["format"] is None:
        return parts[""]
    format, shape = format_of(json.dumps(line["format"], sort_keys=True)), tuple(line["shape"])
    try:
        return QTensor.from_parts(parts, format, shape, DTYPES[line["dtype"]])
    except Invalid as e:
        raise Invalid(f"{BASE}: {weight}: {e}: the file was not written by save") from None


def _lines(lines: list[dict[str, Any] | None]) -> dict[str, str]:
    return {LINES: "\n".join(json.dumps(line, sort_keys=True) for line in lines if line is not None)}


def _tensors(path: Path) -> tuple[Params, dict[str, dict[str, Any]]]:
    try:
        file = Stored(path)
        lines = [json.loads(line) for line in file.metadata[LINES].splitlines()]
        return {k: kernels.placed(t) for k, t in file.items()}, {line["module"]: line for line in lines}
    except (ValueError, KeyError) as e:
        raise Invalid(f"{path} is not a tensor file that finebits.save wrote ({type(e).__name__}: {e}): save or copy it again") from None


def _take(flat: Params, key: str, path: Path) -> Tensor:
    if key not in flat:
        raise Invalid(f"{path} says that it holds {key} and does not: the file was not written by finebits.save")
    return flat.pop(key)


def _nothing_left(flat: Params, path: Path) -> None:
    if flat:
        raise Invalid(f"{path} holds {next(iter(flat))}, of which its metadata says nothing: the file was not written by finebits.save")


def _manifest(path: Path) -> dict[str, Any]:
    is_ours = (path / MANIFEST).is_file() and recorded(path).get("schema") in (None, SCHEMA)
    if (path / "adapter_config.json").is_file() and not is_ours:
        raise Invalid(f"{path} is a PEFT adapter folder, not one that finebits.save wrote: load it with peft over the base it names")
    if not (path / MANIFEST).exists():
        raise Invalid(f"there is no saved model at {path} (no {MANIFEST}): give the folder that finebits.save wrote")
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA or not isinstance(manifest.get("sha256"), dict):
        raise Invalid(f"{path / MANIFEST} is not of schema {SCHEMA}: it was written by another version, or by something else")
    return manifest


def _refuse_content(path: Path) -> None:
    with open(path, "rb") as f:
        start = f.read(9)
    if start[8:] != b"{" and (start[:1] == b"\x80" or start[:4] == b"PK\x03\x04"):
        raise Invalid(f"{path} is a pickle, which can run code when it is opened, and is refused: ask for the adapter as safetensors")
