"""What was trained on a pruned model, as a plain LoRA of the whole one: the last stage of LoRAM (finebits.loram).

Whatever low-rank adapter was trained, and however it began: what counts is what was learned, s·(B A − B₀ A₀). A start that is not zero (LoftQ's
makes up for the rounding of the pruned base, PiSSA's lies in the base) is taken off, at twice the rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finebits import artefacts
from finebits.adapters.lora import LoRA
from finebits.build import all_hosts, hosts
from finebits.errors import Invalid
from finebits.export._fold import folded
from finebits.export._peft import TENSORS, config_for, portable
from finebits.export._safetensors import FORMAT
from finebits.files import write_text
from finebits.init.zeros import Zeros
from finebits.interop.checkpoint import Tensors, config_of, fingerprint
from finebits.interop.from_peft import CONFIG, load_peft
from finebits.interop.hf import fill, folder_of, load, skeleton
from finebits.interop.pruning import Manifest
from finebits.loram import Cut, cuts, moved
from finebits.peft_forms.base import Held, named
from finebits.peft_forms.base import held as held_by
from finebits.peft_forms.lora import Lora
from finebits.store import BASE, TUNED, plan_of
from finebits.tensorfile import Entry, write

SCHEMA = "finebits.recovered/1"


def recover(
    tuned: str | Path,
    out: str | Path,
    *,
    start: str | Path | None = None,
    pruned: str | Path | None = None,
    model: str | Path | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write the adapter of a pruned model to `out` as a PEFT LoRA of the whole model.

    `tuned` is what `save` wrote, with `start`, what it wrote before training, where that was not zero; or a folder of PEFT. `pruned` and `model`
    are where the two models lie, where that is not where they were. Raises Invalid where one of them is another, and where more was trained
    than low-rank updates.

    >>> import tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    >>> with tempfile.TemporaryDirectory() as place:
    ...     LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(f"{place}/llama")
    ...     made = fb.prune(f"{place}/llama", f"{place}/small", 0.5)
    ...     small = LlamaForCausalLM.from_pretrained(f"{place}/small")
    ...     get_peft_model(small, LoraConfig(r=2, target_modules=["up_proj"])).save_pretrained(f"{place}/tuned")
    ...     made = fb.recover(f"{place}/tuned", f"{place}/adapter")
    ...     large = fb.load_peft(f"{place}/adapter", LlamaForCausalLM.from_pretrained(f"{place}/llama"))
    >>> tuple(large.model.layers[0].mlp.up_proj.p.default.B.shape)
    (96, 2)
    """
    tuned, out = Path(tuned), Path(out)
    trained, name, revision = _trained(tuned, None if pruned is None else str(pruned))
    small = folder_of(name, revision)
    manifest = Manifest.read(small)
    learned = _learned(trained, tuned, None if start is None else Path(start))
    dropout = max(float(host.dropout) for _, host in hosts(trained))
    whole = folder_of(model or manifest.model, None if model else manifest.revision)
    manifest.check("whole model", whole, manifest.base)
    del trained
    base: Any = skeleton(whole, torch.float32)
    full = _recovered(base, config_of(whole).get_text_config(), manifest, learned)
    written = Lora().write(full)
    settings = written.settings | {"lora_dropout": dropout, "bias": "none", "init_lora_weights": True}
    named_base = str(whole.resolve()) if model or Path(manifest.model).expanduser().exists() else manifest.model
    config = config_for(base, "LORA", list(full), named_base, settings)
    entries = {key: Entry.of(t) for key, t in named(written).items()}
    with artefacts.folder(out, SCHEMA, overwrite) as new:
        write(new / TENSORS, entries, FORMAT)
        config.save_pretrained(new)
        _settle(new / CONFIG)
        about = {"base": manifest.base, "pruned": manifest.pruned, "aligned": manifest.aligned}
        artefacts.record(new, SCHEMA, model=manifest.model, **about)
    return manifest


def _trained(tuned: Path, pruned: str | None) -> tuple[Any, str, str | None]:
    """(the tuned model, name and revision of the pruned one)."""
    if (tuned / CONFIG).is_file():
        if (tuned / "base").is_dir():
            raise Invalid(
                f"{tuned} belongs to the model in {tuned / 'base'}, which holds a part of its start: give the output_dir of the run"
            )
        name = pruned or str(json.loads((tuned / CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path"))
        folder = folder_of(name)
        Manifest.read(folder)  # before the model is read
        model = skeleton(folder, torch.float32)
        fill(model, Tensors(folder), torch.float32)
        return load_peft(tuned, model), name, None
    model, _ = load(tuned)
    plan = plan_of(model)
    if pruned is not None and fingerprint(folder_of(pruned)) != plan.model_hash:
        raise Invalid(f"{tuned} was trained on {plan.model} with fingerprint {plan.model_hash}, and {pruned} is another: give that one")
    return model, pruned or plan.model, None if pruned else plan.model_revision


def _learned(model: Any, tuned: Path, start: Path | None) -> dict[str, Held]:
    """What was learned, by modules of the pruned model: LoRA as it was trained where that is what it is, else products with their scale in B."""
    for name, host in all_hosts(model):
        for kind in (host.kinds[a] for a in host.active):
            if kind.form != "product":
                raise Invalid(
                    f"{name or 'the model'} has a {type(kind).__name__} adapter, and what is recovered is a low-rank update: train a LoRA, or "
                    "another adapter that is a product"
                )
    started = [n for n, spec in plan_of(model).modules.items() if spec.adapter is not None and not isinstance(spec.init, Zeros)]
    if start is None and started:
        raise Invalid(
            f"{started[0]} began with another update than none, which is no part of what was learned: give start, or the run's output_dir"
        )
    own = {id(p) for _, host in all_hosts(model) for p in host.p.parameters()}
    beside = next((n for n, p in model.named_parameters() if p.requires_grad and id(p) not in own), None)
    if beside is not None or (tuned / TUNED).exists():
        raise Invalid(
            f"{tuned} holds more that was trained than adapters ({beside or TUNED}), and a LoRA of the whole model holds no other"
        )
    if shifted := next((n for n, fold in folded(model).items() if fold.bias is not None), None):
        raise Invalid(
            f"the adapter of {shifted} adds to its outputs, and a plain LoRA of the whole model does not: train one without a bias"
        )
    first = None if start is None else _began(model, tuned, start)
    if first is None and all(len(h.active) == 1 and type(h.kinds[h.active[0]]) is LoRA for _, h in all_hosts(model) if h.active):
        return held_by(model)[1]
    _, products = portable(model)
    learned = {}
    for name, (L, R) in products.items():
        if first is not None and name in first:
            L, R = torch.cat([L, -first[name][0]], 1), torch.cat([R, first[name][1]])
        learned[name] = Held(LoRA(rank=len(R), alpha=float(len(R))), {"A": R, "B": L})
    return learned


def _began(model: Any, tuned: Path, start: Path) -> Mapping[str, tuple[Tensor, Tensor]] | None:
    """The products that training began with; None where they were zero."""
    first, _ = load(start)
    before, after = (artefacts.recorded(p)["sha256"].get(BASE) for p in (start, tuned))
    if before != after:
        raise Invalid(f"the base in {tuned} is not the one in {start}: it was trained too (a rule that merges?), and no LoRA holds that")
    _, products = portable(first)
    zero = all(not L.any() or not R.any() for L, R in products.values())
    return None if zero else products


def _recovered(base: nn.Module, text: Any, manifest: Manifest, learned: Mapping[str, Held]) -> dict[str, Held]:
    """The same over the modules of the whole model."""
    own, name_of, modules = cuts(base, text, manifest.kept), moved(base, manifest.kept), dict(base.named_modules())
    back = {new: full for full in modules if (new := name_of(full)) is not None}
    found = {}
    for name, h in learned.items():
        full = back[name]
        shape = tuple(modules[full].weight.shape)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue, reportCallIssue]
        B, A = own.get(full, Cut()).recovered(h.p["B"].cpu(), h.p["A"].cpu(), shape)
        found[full] = Held(h.adapter, {"A": A, "B": B}, shape)
    return found


def _settle(path: Path) -> None:
    """The same settings in one order: sets of names come in any."""
    data = json.loads(path.read_text(encoding="utf-8"))
    data = {k: sorted(v) if k == "target_modules" and isinstance(v, list) else v for k, v in sorted(data.items())}
    write_text(path, json.dumps(data, indent=2) + "\n")
