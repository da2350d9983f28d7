"""A model and its adapters in the files that another engine reads, with the command that serves them.

Adapters are portable: one rank each, scaling folded into B, lora_alpha = r, so that no reader's idea of scales matters. Those that cannot be
served (another base, NaN, a rank over the limit, no plain product) are said and left out before the engine sees them: one bad adapter ends
vLLM's. A base that transformers holds densely is named where it lies and not copied; one in codes is written, for vLLM in the dtype that it was
trained in (its own products of codes drift under a LoRA), for llama.cpp as the blocks of a GGUF file.

Deviations: vLLM's resolver compares base_model_name_or_path with the model as the command names it, so both are absolute paths: a folder that
was moved is written again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from finebits import artefacts, files
from finebits.errors import Invalid
from finebits.export import _gguf as conversion
from finebits.export import _peft as peft
from finebits.export._fold import folded
from finebits.export._gguf_file import MODEL as GGUF_MODEL
from finebits.export._safetensors import base_entries
from finebits.export.base import Extras, write
from finebits.export.gguf import lora_file
from finebits.interop.adapter_folders import LoraFolder, write_folder
from finebits.interop.configs import raw_config
from finebits.interop.hf import folder_of, load, load_planned
from finebits.interop.pool import kv_layers
from finebits.interop.selecting import known_head, meta
from finebits.interop.serving import LONGEST, TUNED, Reader, factors_in, served, taken_off
from finebits.merging.base import Factors
from finebits.plan.base import Plan
from finebits.plan.levers import WIDTHS, Levers
from finebits.serve.backends import Asked, Backend, Command, Written
from finebits.serve.comparing import PROMPTS, Row, Running, compared, program
from finebits.serve.engine import Engine, Limits
from finebits.store import MANIFEST, plan_of

SCHEMA = "finebits.engine/1"
SCRIPT = "serve.sh"
VERIFIED = 3  # adapters that are compared
LOG = "engine.log"


class Handed(NamedTuple):
    """What was written, the command that serves it, and adapters that were left out with the reason."""

    written: Written
    command: Command
    left_out: Mapping[str, str]


class _Subject(NamedTuple):
    """A model, which may be without values, where it came from, and the adapter that it came with."""

    model: Any
    tokenizer: Any
    folder: Path
    revision: str | None
    own: Mapping[str, Factors] | None
    plain: bool  # is it served from its folder as it is?


def handed(
    what: str | Path,
    name: str,
    adapters: Path | None,
    out: Path,
    backend: Backend,
    asked: Asked,
    max_rank: int,
    more: tuple[str, ...] = (),
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Handed:
    """Write `out`: adapters/, a base where none can be named, and serve.sh, whose command ends with `more`. Raises ValueError where the engine
    cannot have this model, where the budget is too small, and, without `overwrite`, where the folder holds something else."""
    if adapters is not None and not adapters.is_dir():
        raise Invalid(f"there is no folder of adapters at {adapters}: give the folder whose folders are adapters")
    if max_rank > backend.max_rank:
        raise Invalid(f"--max-rank is {max_rank}, and {backend.name} takes ranks up to {backend.max_rank}")
    place = out.resolve()
    folders = sorted(p for p in adapters.iterdir() if p.is_dir() and not p.name.startswith(".")) if adapters is not None else []
    if taken := next((p for p in folders if p.name in (TUNED, name)), None):
        raise Invalid(f"{taken} has the name of what is served itself: rename it")
    it = _subject(what, backend, folders)
    head = known_head(it.model).module
    linears = {n: m for n, m in it.model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    found, left_out = dict[str, dict[str, Factors]](), dict[str, str]()
    if it.own is not None:
        found[TUNED] = dict(it.own)
    for folder in folders:
        try:
            found[folder.name] = factors_in(folder, it.model, linears, it.folder, it.revision, max_rank)
        except (Invalid, OSError) as e:
            left_out[folder.name] = str(e)
            say(f"{folder.name} is left out: {e}")
    config = it.model.config.get_text_config()
    with artefacts.folder(out, SCHEMA, overwrite) as new:
        base = _base(it, new, place, backend)
        paths, ranks = dict[str, Path](), [1]
        for key, factors in found.items():
            products = evened(factors)
            ranks.append(next(iter(products.values()))[1].shape[0])
            paths[key] = _adapter(products, key, new, place, backend, base, it.model)
        written = Written(
            base,
            name,
            paths,
            max(ranks),
            _sides(linears),
            sum(2 * heads * width for heads, width in kv_layers(config)),
            getattr(config, "max_position_embeddings", LONGEST),
        )
        staged = written._replace(adapters={k: new / p.relative_to(place) for k, p in paths.items()})
        command = backend.command(staged, asked)  # sizes are seen where the files still are
        command = Command(
            (*(w.replace(str(new), str(place)) for w in command.words), *more),
            {k: v.replace(str(new), str(place)) for k, v in command.environment.items()},
        )
        files.write_text(new / SCRIPT, f'#!/bin/sh\n# {backend.program}: {backend.install}\nexec env {command.line} "$@"\n')
        (new / SCRIPT).chmod(0o755)
        artefacts.record(new, SCHEMA, backend=backend.name, adapters=list(paths))
    return Handed(written, command, left_out)


def evened(adapter: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]]:
    """Products L (m, r), R (r, n) in float32, of one rank, filled up with zeros, the scale in L.

    >>> L, R = evened({"q": Factors(torch.ones(3, 2), torch.ones(2, 4), 0.5), "v": Factors(torch.ones(3, 1), torch.ones(1, 4))})["v"]
    >>> tuple(L.shape), tuple(R.shape), L @ R
    ((3, 2), (2, 4), tensor([[1., 1., 1., 1.],
            [1., 1., 1., 1.],
            [1., 1., 1., 1.]]))
    """
    rank = max(f.rank for f in adapter.values())
    pad = nn.functional.pad
    return {
        name: (pad(f.s * f.B.float(), (0, rank - f.rank)).contiguous(), pad(f.A.float(), (0, 0, 0, rank - f.rank)).contiguous())
        for name, f in adapter.items()
    }


def _subject(what: str | Path, backend: Backend, folders: list[Path]) -> _Subject:
    saved = Path(what)
    if (saved / MANIFEST).is_file() and not (saved / "config.json").is_file():
        model, tokenizer = load(saved)
        own, plan = taken_off(model), plan_of(model)
        return _Subject(_told(model), tokenizer, folder_of(plan.model, plan.model_revision), plan.model_revision, own, False)
    folder = folder_of(what)
    quantized = raw_config(folder).get("quantization_config")
    if quantized is not None and (quantized.get("quant_method") == "finebits" or backend.name != "vllm"):
        raise Invalid(
            f"{what} is packed ({quantized.get('quant_method')}), and {backend.name} does not read that: give the run it was exported "
            "from, a dense model, or serve it without --backend"
        )
    if backend.name == "vllm" and not any((p / MANIFEST).is_file() and not (p / "adapter_config.json").is_file() for p in folders):
        return _Subject(_told(meta(folder)), None, folder.resolve(), None, None, True)
    dtype = str(raw_config(folder).get("dtype") or raw_config(folder).get("torch_dtype") or "float32")
    model, tokenizer = load_planned(Plan({}, model=str(what), levers=Levers(dtype=dtype if dtype in WIDTHS else "float32")))
    return _Subject(_told(model), tokenizer, folder, None, None, backend.name == "vllm")


def _told(model: Any) -> Any:
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        raise Invalid(f"this is a {type(model).__name__}, which does not go on with a text: serve a causal language model")
    return model


def _base(it: _Subject, new: Path, place: Path, backend: Backend) -> Path:
    """Where the base will be; written into `new`, which will lie at `place`, where it must."""
    if it.plain:
        return it.folder.resolve()
    extras = Extras(it.tokenizer)
    if backend.name == "llama.cpp":
        write("gguf", it.model, new / "model", extras)
        return place / "model" / peft.BASE / GGUF_MODEL
    if peft.adapted(it.model):  # no plain product: it is served as the embedded engine does it, in the weights
        write("merged", it.model, new / "model", extras)
        return place / "model"
    dtype = getattr(torch, plan_of(it.model).levers.dtype)
    for path, file in peft.over(it.model, base_entries(it.model, dtype, folded(it.model)), packed=False).items():
        (new / path).parent.mkdir(parents=True, exist_ok=True)
        file.write(new / path)
    peft.describe(it.model, new, place, extras, "", "The dense form of the weights that adapters were trained over.", dtype=dtype)
    return place / peft.BASE


def _adapter(products: dict[str, Any], key: str, new: Path, place: Path, backend: Backend, base: Path, model: Any) -> Path:
    """Where the adapter will be."""
    (new / "adapters").mkdir(exist_ok=True)
    if backend.name == "llama.cpp":
        lora_file(products, conversion.architecture(model.config.to_dict()), model.config).write(new / "adapters" / f"{key}.gguf")
        return place / "adapters" / f"{key}.gguf"
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "base_model_name_or_path": str(base),
        "target_modules": peft.target_modules(model, list(products)),
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    write_folder(LoraFolder(settings, {n: Factors(L, R, 1.0) for n, (L, R) in products.items()}), new / "adapters" / key)
    return place / "adapters" / key


def _sides(linears: Mapping[str, nn.Linear]) -> int:
    return sum(m.in_features + m.out_features for m in linears.values())


def verified(what: str | Path, handed: Handed, source: Path | None, backend: Backend, asked: Asked, max_rank: int, log: Path) -> list[Row]:
    """Start the engine, and compare the base and its first three adapters with the engine here, which takes them from where they were given.

    Raises RuntimeError where the program is not installed, or does not serve.
    """
    program(backend)  # before a model is loaded
    it = served(what)
    engine = Engine(it.base, Limits(max(asked.budget, 256 << 20)))
    names, read, own = list(handed.written.adapters)[:VERIFIED], Reader(it, max_rank), it.own
    numbers = dict[str, int]()
    for name in names:
        if name == TUNED and own is not None:
            numbers[name] = engine.register(lambda: own)
        else:
            assert source is not None
            numbers[name] = engine.register(read.marked(source / name))
    prompts = [it.tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROMPTS]
    url = f"http://{f'[{asked.host}]' if ':' in asked.host else asked.host}:{asked.port}"
    try:
        with log.open("w", encoding="utf-8") as said, Running(backend, handed.command, handed.written, url, os.environ, said) as client:
            return compared(engine, numbers, prompts, client)
    finally:
        engine.stop()
