"""A GGUF file as a model folder: config and tokenizer as transformers derives them, weights dequantized one at a time, in the cache.

The folder is one that transformers loads: bfloat16, or what the file's matrices are in where they are dense. Beside its weights lie the blocks
of those that a format holds as they are (Q4_0, Q4_1, Q8_0), in the order of the model's rows: a matrix keeps them where a plan gives it that
format (finebits.interop.checkpoint).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finebits.artefacts import folder as new_folder
from finebits.artefacts import record, recorded, settle
from finebits.errors import FinebitsError, Invalid, WrongUse
from finebits.interop.coded import Coded
from finebits.interop.gguf_file import GGUFFile
from finebits.layouts.gguf import FORMATS, from_gguf
from finebits.qtensor import QTensor
from finebits.tensorfile import Spool, Stored

SCHEMA = "finebits.converted/1"  # a model that was made of a file of another kind
BLOCKS, KINDS = "gguf_blocks.safetensors", "kinds"
WEIGHTS = "model.safetensors"
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def one_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds a model in no other way; None where it has none. Raises ValueError where it has several."""
    if any(folder.glob("*.safetensors")):
        return None
    found = sorted(p for p in folder.glob("*.gguf") if p.is_file())
    if len(found) > 1:
        raise Invalid(f"{folder} has {len(found)} GGUF files ({found[0].name}, {found[1].name}, …) and no other weights: give one of them")
    return found[0] if found else None


def converted(path: Path, cache: Path) -> Path:
    """The folder in `cache` that a GGUF file becomes; made once a file. Raises ValueError where it is none of a model that is read."""
    if not path.is_file():
        raise WrongUse(f"there is no GGUF file at {path}")
    file = GGUFFile(path)
    if str(file.values_of.get("general.type", "model")) != "model":
        raise Invalid(f"{path} holds an {file.values_of['general.type']} and no model: give the model, and this as adapter.folder")
    if file.values_of.get("split.count") not in (None, 0, 1):
        raise Invalid(
            f"{path} is one of {file.values_of['split.count']} parts: join them with llama.cpp's gguf-split --merge and give that"
        )
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()[:16]
    target = cache / f"{path.stem}-{digest}"
    settle(target)
    if (target / "config.json").exists() and KINDS in recorded(target):
        return target
    with new_folder(target, SCHEMA) as new:
        with _read(path):
            kinds = _write(file, new)
        record(new, SCHEMA, **{KINDS: kinds})
    return target


@contextlib.contextmanager
def _read(path: Path) -> Iterator[None]:
    try:
        yield
    except (FinebitsError, OSError, MemoryError):
        raise
    except Exception as e:  # the readers fail in many ways on a damaged file
        reason = " ".join(str(e).split())[:300]
        raise Invalid(f"{path} could not be read as a GGUF model, it may be damaged ({type(e).__name__}: {reason})") from e


def _write(file: GGUFFile, new: Path) -> dict[str, int]:
    """Fill the folder; how many matrices there are of each type."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers import modeling_gguf_pytorch_utils as stock

    where = {"pretrained_model_name_or_path": file.path.parent, "gguf_file": file.path.name}
    AutoTokenizer.from_pretrained(**where).save_pretrained(new)
    config = AutoConfig.from_pretrained(**where)
    sizes: Counter[str] = Counter()
    for line in file.lines.values():
        sizes[line.kind] += int(np.prod(line.shape)) if len(line.shape) > 1 else 0
    dtype = DENSE.get(sizes.most_common(1)[0][0], torch.bfloat16) if sizes else torch.bfloat16
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    process = stock.TENSOR_PROCESSORS.get(file.values_of["general.architecture"], stock.TensorProcessor)(config=config.to_dict())
    names = stock.get_gguf_hf_weights_map(model, process)
    with Spool(new / WEIGHTS) as weights, Spool(new / BLOCKS) as blocks:
        kinds = dict[str, str]()
        for together in _groups(file, names):
            made: dict[str, Any] = {"tensors": {}}
            for name in together:
                found = process.process(weights=file[name], name=name, tensor_key_mapping=names, parsed_parameters=made)
                if found.name in names:
                    value = torch.from_numpy(np.array(found.weights, dtype=np.float32))
                    made["tensors"][names[found.name]] = value
                    if (rows := _kept(file, name, process, names, value)) is not None:
                        blocks.add(names[found.name], rows)
                        kinds[names[found.name]] = file.lines[name].kind
            for name, value in made["tensors"].items():
                weights.add(name, value.to(dtype))
        weights.close({"format": "pt"})
        blocks.close({KINDS: json.dumps(kinds)})
    model.config.dtype, model.config.architectures = dtype, [type(model).__name__]
    model.config.save_pretrained(new)
    if model.can_generate():
        model.generation_config.save_pretrained(new)
    return dict(sorted(Counter(line.kind for line in file.lines.values() if len(line.shape) > 1).items()))


def _groups(file: GGUFFile, names: dict[str, str]) -> list[list[str]]:
    """The file's tensors in the order of the model's names, those together that become one."""
    of: dict[str, list[str]] = {}
    for name in file:
        of.setdefault(names.get(name) or names.get(name.removesuffix(".weight")) or name, []).append(name)
    return [of[name] for name in sorted(of)]


def _kept(file: GGUFFile, name: str, process: Any, names: dict[str, str], value: torch.Tensor) -> torch.Tensor | None:
    """The blocks of a matrix whose rows the model has in some order; None where it is held in no format, or is more than reordered."""
    (kind, shape, _, _) = file.lines[name]
    if kind not in FORMATS or len(shape) != 2:
        return None
    numbers = np.repeat(np.arange(shape[0], dtype=np.float32)[:, None], shape[1], 1)
    order = process.process(weights=numbers, name=name, tensor_key_mapping=names, parsed_parameters={"tensors": {}}).weights
    if order.shape != shape:
        return None
    rows = file.raw(name)[order[:, 0].astype(np.int64)]
    return torch.from_numpy(rows) if torch.equal(from_gguf(rows, kind).dequantize(), value) else None


def blocks_beside(folder: Path) -> tuple[dict[str, Coded], list[str]]:
    """(the blocks that lie in a folder which was a GGUF file, by the names of the weights, what is to be known of it)."""
    kinds = recorded(folder).get(KINDS) if recorded(folder).get("schema") == SCHEMA else None
    coded_kinds = [kind for kind in kinds or () if kind not in DENSE]
    if not coded_kinds:
        return {}, []
    blocks = Stored(folder / BLOCKS)
    beside = {
        name: Coded(
            f"GGUF {kind}", {"blocks": name}, blocks.lines[name][1], lambda t: t["blocks"], functools.partial(_blocks, kind), blocks
        )
        for name, kind in json.loads(blocks.metadata[KINDS]).items()
    }
    held = sorted({codes.kind.removeprefix("GGUF ") for codes in beside.values()})
    keeps = f"; a matrix in {', '.join(held)} keeps its codes where the plan gives it the very format that it is held in" if held else ""
    return beside, [f"the weights are quantized already (GGUF {', '.join(coded_kinds)}): they are dequantized{keeps}"]


def _blocks(kind: str, parts: Mapping[str, torch.Tensor]) -> QTensor:
    return from_gguf(parts["blocks"].numpy(), kind)
