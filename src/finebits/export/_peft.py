"""An adapter folder over a base of its own: what most targets are, whatever the base is held in.

At the root of the folder lies a PEFT adapter, in `base/` the model that it belongs to. The update of every module is one product L R of one
common rank, whatever ranks, scalings and gates it was trained with; what rescales a weight is folded into the base (finebits.export._fold). A
model without adapters is its base alone. With `own`, adapters are written as the method of PEFT that is the same (finebits.peft_forms).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from finebits.build import all_hosts, hosts
from finebits.carrier import Following, tables, tied
from finebits.errors import Invalid
from finebits.experts import tensors
from finebits.export import _fold as fold
from finebits.export._card import ADAPTER, QUANTIZED, card
from finebits.export._safetensors import FORMAT, describe_model, model_files
from finebits.export.base import Extras, File
from finebits.files import write_text
from finebits.linears import inputs_first
from finebits.peft_forms._experts import KEY, check, joined
from finebits.peft_forms.base import Held, form_for, form_of, held, named, over_tables, over_windows
from finebits.served import beside
from finebits.store import plan_of
from finebits.tasks import base as tasks
from finebits.tensorfile import Entry, size, write

TENSORS = "adapter_model.safetensors"
ROUNDED = "The tuned model: what its adapter added is in the weights, which were rounded once more. No adapter belongs over it."
BASE = "base"


def portable(model: nn.Module, packed: bool = False) -> tuple[int, dict[str, tuple[Tensor, Tensor]]]:
    """(r, {module: (L (m, r), R (r, n))}): every module's update as L R in float32, scaling in L, filled up with zeros to one rank, over a
    base with what is folded into it (`packed`: into codes). Of a table of embeddings rows are outputs.

    Several active adapters on a module become one product. Raises ValueError that names the module whose adapter is not low-rank, and where
    there is no active adapter.
    """
    if not any(beside(host) for _, host in all_hosts(model)):
        raise Invalid("the model has no active adapter to export: export target merged writes its weights")
    for name, host in all_hosts(model):
        for kind in (host.kinds[a] for a in beside(host)):
            if kind.form == "beside":
                own = ", and target peft in its own form" if form_of(kind) else ""
                raise Invalid(
                    f"{name or 'the model'}: {type(kind).__name__} cannot be exported as plain LoRA because it depends on its input, and no "
                    f"weight is what it does: finebits.save keeps it{own}"
                )
    folds = fold.folded(model, packed)
    products = {name: folds[name].weight[2:] for name, host in hosts(model) if beside(host)}
    for name, host in tables(model).items():
        for kind in (host.kinds[a] for a in host.active if name not in fold.into_tables(model)):
            L, R = cast(Any, kind).lowrank({k: t.detach() for k, t in host.tensors(host.active[0]).items()})
            products[name] = L.float(), R.float()
    rank = max([1, *(R.shape[0] for _, R in products.values())])
    for name, (L, R) in products.items():
        more = rank - R.shape[0]
        products[name] = nn.functional.pad(L, (0, more)), nn.functional.pad(R, (0, 0, 0, more))
    return rank, products


def adapted(model: nn.Module, own: bool = False) -> bool:
    """Does any module have an active adapter, which is written as such? Trained rows of a table are in the base, where they are not in their
    `own` form."""
    inside = {} if own else fold.into_tables(model)
    return any(beside(host) for name, host in all_hosts(model) if name not in inside)


def biases(model: nn.Module, packed: bool = False) -> dict[str, Tensor]:
    """What adapters add to the outputs of layers that have no bias in the base to take it."""
    of = dict(hosts(model))
    folds = fold.folded(model, packed)
    return {name: f.bias for name, f in folds.items() if f.bias is not None and name in of and of[name].bias is None}


def to_peft(model: nn.Module, base: str, packed: bool = False, own: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """(peft's config, tensors by PEFT's names) of the active adapters, for the base model named `base`: one rank r, lora_alpha = r, or with
    `own` what they are.

    Raises ValueError that names the module whose adapter is not a low-rank update, or is in no method of PEFT.
    """
    if own:
        form, found = held(model)
        layers, dropout = tensors(model), max((host.dropout for _, host in hosts(model) if host.active), default=0.0)
        check({n: h.adapter for n, h in found.items()}, {tensor: len(own) for tensor, own in layers.items()}, dropout)
        found, places = _joined(model, found)
        plain = form.write(found)
        written = over_tables(form, plain, model)
        settings = ({form.starts[0]: True} if form.starts[0] else {}) | {**form.marks, **written.settings}
        if form.dropout:
            settings[form.dropout] = max((host.dropout for _, host in hosts(model)), default=0.0)
        parts_of = {n: parts for n, parts in written.tensors.items() if n not in places}
        shaped = {**written.tensors, **over_windows(form, parts_of, model)}
        moved = {places.get(name, name): parts for name, parts in shaped.items()}
        return config_for(model, form.peft, list(plain.tensors), base, settings), named(written._replace(tensors=moved))
    rank, products = portable(model, packed)
    factors, places = joined({name: {"A": R, "B": L} for name, (L, R) in products.items()}, model)
    written, beside, words, followed = {}, biases(model, packed), tables(model), False
    if places and beside:
        raise Invalid(
            f"{next(iter(beside))}: its adapter adds a bias, and PEFT has none beside adapters over experts: export target merged"
        )
    if beside and (name := next((n for n in products if n in words), None)):
        raise Invalid(
            f"{name} is a table of embeddings, and {next(iter(beside))} has an adapter that adds to outputs: PEFT has no LoRA with both; export "
            "target merged writes the weights"
        )
    for name, p in factors.items():
        R, L, at = p["A"], p["B"], f"base_model.model.{places.get(name, name)}"
        if name in words:
            written[f"{at}.lora_embedding_A"] = L.mT.contiguous()
            written[f"{at}.lora_embedding_B"] = R.mT.contiguous()
            for head, module in tied(model, words[name]).items():
                if isinstance(module, Following):
                    written[f"base_model.model.{head}.lora_A.weight"] = R.clone()
                    written[f"base_model.model.{head}.lora_B.weight"] = L.clone()
                    followed = True
            continue
        p = {"lora_A.weight": R, "lora_B.weight": L}
        if name not in places:
            p = over_windows(form_for({"peft_type": "LORA"}), {name: p}, model)[name]
        written |= {f"{at}.{k}": t for k, t in p.items()}
        if beside:
            written[f"{at}.lora_B.bias"] = beside.get(name, L.new_zeros(len(L)))
    settings = {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "init_lora_weights": True}
    settings |= {"ensure_weight_tying": True} if followed else {}
    return config_for(model, "LORA", list(factors), base, settings | {"lora_bias": bool(beside)}), written


def _joined(model: nn.Module, found: Mapping[str, Held]) -> tuple[dict[str, Held], dict[str, str]]:
    """Adapters as they are, those of a layer's experts as one."""
    of = tensors(model)
    apart = {name: found[name].p for layers in of.values() for name in layers if name in found}
    whole, places = joined(apart, model)
    one = {tensor: found[of[tensor][0]]._replace(p=p) for tensor, p in whole.items()}
    return {name: h for name, h in found.items() if name not in apart} | one, places


def config_for(model: nn.Module, method: str, modules: list[str], base: str, settings: dict[str, Any]) -> Any:
    """PEFT's config of a method over these modules."""
    import peft

    if method not in peft.PeftType.__members__:
        raise Invalid(f"the installed peft {peft.__version__} has no method {method}: pip install --upgrade peft, or export target merged")
    task = tasks.of(model).peft
    task = None if task == "CAUSAL_LM" and not hasattr(model, "prepare_inputs_for_generation") else task  # which PEFT asks of such a model
    where = {"task_type": task, "base_model_name_or_path": base}
    experts = [name for name in modules if name in tensors(model)]
    where |= {"target_modules": target_modules(model, [name for name in modules if name not in experts])} if modules else {}
    where |= {KEY: target_parameters(model, experts)} if experts else {}
    modules = [name for name in modules if name not in experts]
    kind: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[method]]
    if "fan_in_fan_out" in kind.__dataclass_fields__ and any(inputs_first(model.get_submodule(name)) for name in modules):
        where["fan_in_fan_out"] = True
    return kind(**settings, **where, inference_mode=True)


def target_modules(model: nn.Module, wanted: list[str]) -> list[str]:
    """Leaf names (`q_proj`, …) if they pick exactly the wanted linears, else full names."""
    leaves = sorted({name.rpartition(".")[2] for name in wanted})
    picked = {n for n, m in model.named_modules() if n.rpartition(".")[2] in leaves and not isinstance(m, nn.ParameterDict)}
    return leaves if picked == set(wanted) else sorted(wanted)


def target_parameters(model: nn.Module, wanted: list[str]) -> list[str]:
    """Ends of names (`experts.down_proj`, …) if they pick exactly the wanted tensors of experts, else full names."""
    ends = sorted({".".join(name.split(".")[-2:]) for name in wanted})
    picked = {name for name in tensors(model) if any(name.endswith(f".{end}") for end in ends)}
    return ends if picked == set(wanted) else sorted(wanted)


def adapter_files(model: nn.Module, packed: bool = False, own: bool = False) -> dict[str, File]:
    """The adapter's weight file; none where there is no adapter."""
    if not adapted(model, own):
        return {}
    entries = {k: Entry.of(t) for k, t in to_peft(model, "", packed, own)[1].items()}
    return {TENSORS: File(size(entries, FORMAT), lambda path: write(path, entries, FORMAT))}


def over(model: nn.Module, base: dict[str, Entry], packed: bool = True, own: bool = False) -> dict[str, File]:
    """The weight files of an adapter over the base that these entries are."""
    return {f"{BASE}/{name}": file for name, file in model_files(base).items()} | adapter_files(model, packed, own)


def base_of(folder: Path) -> Path:
    """Where the base of an exported folder lies. Raises ValueError where there is none."""
    if not (folder / BASE / "config.json").is_file():
        raise Invalid(f"{folder} is not an exported adapter (it has no {BASE}/config.json): export it again")
    return folder / BASE


def describe(
    model: Any,
    folder: Path,
    place: Path,
    extras: Extras,
    about: str,
    base_about: str,
    quantization: dict[str, Any] | None = None,
    own: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """What lies beside the weights of an adapter over a base: configs, tokenizers, cards. `quantization` is config.json's word for how the
    base is held, `dtype` what its dense weights are in, where that is not the plan's."""
    plan, pipeline = plan_of(model), tasks.of(model).pipeline
    base_about = base_about if extras.requantized is None else ROUNDED
    describe_model(model, folder / BASE, dtype or getattr(torch, plan.levers.dtype), extras.tokenizer, quantization)
    write_text(folder / BASE / "README.md", card(plan, QUANTIZED, base_about, f"{place.name}: base", extras, pipeline))
    if adapted(model, own):
        config, _ = to_peft(model, extras.base_name or str(place.resolve() / BASE), own=own)
        config.save_pretrained(folder)
        about += (
            f"\n\nIt is written as the method {config.peft_type.value} of peft."
            if own
            else "\n\nIt is a plain LoRA: ranks, scalings and gates are folded in, into one rank with lora_alpha equal to it."
        )
        if extras.tokenizer is not None:
            extras.tokenizer.save_pretrained(folder)
        write_text(folder / "README.md", card(plan, ADAPTER, about, place.name, extras, pipeline))


def about(base: str, load: str) -> tuple[str, str]:
    """What the cards of an adapter and of its base say, given what the base is and how it is loaded."""
    return (
        f"An adapter for peft. It belongs to the model in `base/`, {base}, and is not valid over the original weights: a start such as LoftQ's "
        f"lies in the adapter *and* in the base.\n\n```python\nbase = {load}\nmodel = PeftModel.from_pretrained(base, folder)\n```",
        f"The model that the adapter beside it was trained over: {base}. Not the original model.",
    )
