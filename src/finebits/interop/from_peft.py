"""A folder trained with PEFT, onto a model of ours: dense or quantized, to evaluate, to go on training, to export.

What the folder holds, finebits.interop.peft_folder reads. Tensors that belong to no adapter are trained biases and whole modules
(modules_to_save): they take the place of the model's own, and are trained when training goes on; and copies of tables of embeddings that an
adapter lies over, which must be the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finebits.artefacts import recorded
from finebits.build import build, built, sign
from finebits.carrier import tables
from finebits.errors import Invalid
from finebits.interop.checkpoint import config_of, fingerprint
from finebits.interop.hf import folder_of, load, load_planned, skeleton
from finebits.interop.linears import linearized
from finebits.interop.peft_folder import CONFIG, GGUF, base_of, fill, place, read
from finebits.interop.selecting import attention, meta
from finebits.plan.base import Plan, Spec
from finebits.plan.levers import WIDTHS, Levers
from finebits.qtensor import QTensor
from finebits.store import MANIFEST


def load_peft(folder: str | Path, base: Any) -> Any:
    """The model with the adapter of a PEFT folder over it, in eval mode.

    `base` is what the adapter lies over: a model (quantized by `build`, or dense), the name or folder of a dense one, a folder that `save`
    wrote, or a plan, of which the formats are taken. It must have no adapter yet. Raises ValueError that names the setting or the tensor
    which has no meaning here, and where the folder holds a pickle.

    >>> import tempfile
    >>> from peft import IA3Config, LoraConfig, get_peft_model
    >>> net = lambda: torch.nn.Sequential(torch.nn.Linear(64, 8))
    >>> with tempfile.TemporaryDirectory() as place:
    ...     get_peft_model(net(), LoraConfig(r=2, lora_alpha=8, target_modules=["0"])).save_pretrained(place)
    ...     over = fb.build(net(), fb.Plan({"0": fb.Spec(fb.NF(4))}))
    ...     model = fb.load_peft(place, over)
    >>> model[0].kinds, model[0].weight.format.bits
    ({'default': LoRA(rank=2, alpha=8.0, scaling='lora')}, 4)
    """
    model, plan = _base(base)
    whole = model if model is not None else skeleton(folder_of(plan.model, plan.model_revision), torch.float32)
    given = read(Path(folder), whole)
    if plan.model and not plan.modules:  # a model as it is, and none that is quantized on the way
        belonging(Path(folder), given.settings, folder_of(plan.model, plan.model_revision), plan.model_revision)
    held, settings = given.held, given.settings
    over = {n: h.adapter for n, h in held.items() if h.adapter.over != "matrix" or isinstance(whole.get_submodule(n), nn.Embedding)}
    specs = {
        module: replace(plan.modules.get(module, Spec()), adapter=h.adapter, init=Spec().init)
        for module, h in held.items()
        if module not in over
    }
    levers = replace(plan.levers, dropout=given.dropout)
    plan = replace(plan, modules={**plan.modules, **specs}, over=over, levers=levers, tied=given.tied)
    if model is None:
        model, _ = load_planned(plan)
    else:
        model = sign(build(model, replace(plan, modules=specs)), plan)
    fill(model, held)
    beside(model, given.others, settings)
    return model.eval()


def belonging(folder: Path, settings: Mapping[str, Any], base: Path, revision: str | None) -> list[str]:
    """What is to be known of an adapter's base; empty where the folder `base` is the one that it was trained over, file by file.

    Raises ValueError where it is another: by the base that lies in the folder, by what finebits wrote down when it wrote the adapter, or by the
    folder or package that the adapter names.
    """
    at = place(folder)
    written = recorded(at.parent if at.suffix == GGUF else at).get("base")
    own, said = base_of(folder, settings)
    if said.startswith("package:"):
        own = folder_of(said)
    theirs = written if isinstance(written, str) else None if own is None else fingerprint(folder_of(own))
    if theirs is not None and theirs != (ours := fingerprint(base)):
        raise Invalid(
            f"the adapter was trained over {said or 'another model'} (fingerprint {theirs}), and that is another model than {base} ({ours}): "
            "give that one"
        )
    if settings.get("revision") not in (None, "main", revision):
        raise Invalid(
            f"revision is {settings['revision']} in {CONFIG}, and the model is of {revision or 'no revision that was named'}: name it"
        )
    if theirs is not None:
        return []
    return [f"{said or 'what it was trained over'} is not here to compare: that its shapes are those of this model is all that is known"]


def _base(base: Any) -> tuple[Any, Plan]:
    """(the model, or None where it is still to be loaded, the plan that it has without the adapter)."""
    if isinstance(base, str | Path) and (Path(base) / MANIFEST).is_file() and not (Path(base) / "config.json").is_file():
        base = load(base)[0]
    if isinstance(base, str | Path):
        folder = folder_of(base)
        dtype = str(config_of(folder).dtype or torch.float32).removeprefix("torch.")
        levers = Levers(dtype=dtype if dtype in WIDTHS else "float32")
        levers = replace(levers, attn_implementation=attention(meta(folder)))
        return None, Plan({}, model=str(base), model_hash=fingerprint(folder), levers=levers)
    if isinstance(base, Plan):
        return None, replace(base, modules={name: replace(spec, adapter=None) for name, spec in base.modules.items()}, over={})
    origin = built(base)
    if origin is None:
        first = next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)
        return linearized(base), Plan({}, levers=Levers(dtype=str(first).removeprefix("torch.")))
    adapted = [name for name, spec in origin.plan.modules.items() if spec.adapter is not None] + [*origin.plan.over]
    if has := next(iter(adapted), None):
        raise Invalid(f"the base has an adapter already ({has}), over which the one of the folder was not trained: give it without")
    return base, origin.plan


def beside(model: nn.Module, others: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Trained biases and whole modules, put in the place of the model's own."""
    named: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    of: dict[int, list[str]] = {}
    words = tables(model)
    for name, p in named.items():
        of.setdefault(id(p), []).append(name)
    saved = tuple(settings.get("modules_to_save") or ())
    for key, t in others.items():
        name = key.replace(".base_layer.", ".")
        owner, p = name.rpartition(".")[0], named.get(name)
        if name != key and p is not None and any(n.removesuffix(".weight") in words for n in of[id(p)]):
            if not isinstance(p.data, QTensor) and (p.shape != t.shape or not torch.equal(p, t.to(p.dtype).to(p.device))):
                raise Invalid(f"the folder holds {key}, over which its adapter was trained, and the model has another: give that model")
            continue
        biased = settings.get("bias", "none") != "none" and name.endswith(".bias")
        if not biased and not any(owner == m or owner.endswith(f".{m}") for m in saved):
            raise Invalid(f"the folder holds {key}, and {CONFIG} does not say what for: it was made by a PEFT that finebits does not know")
        if p is None or isinstance(p.data, QTensor) or p.shape != t.shape:
            has = "has none" if p is None else "holds it in codes" if isinstance(p.data, QTensor) else f"has one of {tuple(p.shape)}"
            raise Invalid(f"the folder holds {key}, {tuple(t.shape)}, and the model {has}: give the model that it was trained over")
        if len(of[id(p)]) > 1:
            raise Invalid(
                f"modules_to_save holds {key}, which this model shares with {next(n for n in of[id(p)] if n != name)}: give a model in which "
                "the two are apart (tie_word_embeddings=False)"
            )
        p.data = t.to(p.dtype).to(p.device)
        vars(p).pop("read", None)  # it is there now
        p.requires_grad_(True)
