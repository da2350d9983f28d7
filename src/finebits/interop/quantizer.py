"""finebits as a quantizer of transformers: `from_pretrained` reads packed weights, or packs them as it reads, and `save_pretrained` writes them.

A packed folder is one of transformers: config.json, whose `quantization_config` says by format which modules are in codes, and safetensors
with `weight.codes`, `weight.scale`, … in the place of a weight. Modules become hosts of finebits (`finebits.build.Adapted`, `Lookup`) before
they have values, so that hooks of accelerate and layers of peft come over them. `import finebits` is what makes transformers know all this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from finebits import kernels, registry
from finebits.build import Adapted, hosts, sign, weighted
from finebits.errors import Invalid
from finebits.experts import fused
from finebits.formats.base import Format
from finebits.layouts.packed import METHOD, groups_of, held_by
from finebits.linears import multiplies
from finebits.lookup import Tied, looking, lookups, rounded
from finebits.plan.base import Plan, Spec
from finebits.plan.levers import WIDTHS, Levers
from finebits.qtensor import QTensor, dense
from finebits.tensorfile import Stored


class FinebitsConfig(QuantizationConfigMixin):
    """How weights are packed. `format` is a number format or its short name; `modules` gives some modules one of their own (None: dense), by
    name; all other linear layers but the head take `format`. Embeddings are packed where `modules` names them.

    `groups` is what config.json holds of a packed folder: formats, each with the modules that it is for, and nothing else is packed.

    >>> FinebitsConfig("nf4-b64").format
    NF(bits=4, block=64, scale='fp32', unit=None)
    """

    def __init__(
        self,
        format: str | Format | None = None,
        modules: Mapping[str, str | Format | None] | None = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        if (format is None and not modules) == (groups is None):
            raise Invalid(
                "FinebitsConfig needs a format, such as FinebitsConfig('nf4-b64'), or modules with theirs; groups come from files"
            )
        self.quant_method: Any = quant_method
        self.format = format_for(format)
        self.own = {name: format_for(f) for name, f in (modules or {}).items()}
        self.held = None if groups is None else held_by(groups)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        if self.held is not None:
            return {"quant_method": METHOD, "groups": groups_of(self.held)}
        short = lambda f: None if f is None else registry.to_json(f)  # noqa: E731
        return {"quant_method": METHOD, "format": short(self.format), "modules": {name: short(f) for name, f in self.own.items()}}


def format_for(format: Any) -> Format | None:
    """A number format, its short name or its entry in a plan -> the format.

    >>> format_for("int4a-b32") == format_for(fb.Int(4, 32, symmetric=False))
    True
    """
    if format is None or isinstance(format, Format):
        return format
    return registry.from_json("formats", registry.spelled(format) if isinstance(format, str) else dict(format))


class FinebitsQuantizer(HfQuantizer):
    """What transformers asks while it makes a model. Made by `from_pretrained`."""

    quantization_config: FinebitsConfig
    formats: dict[str, Format]
    parts: Sequence[str] = ()  # by what names the files hold them

    def __init__(self, quantization_config: QuantizationConfigMixin, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized != (self.quantization_config.held is not None):
            raise Invalid(
                "the config.json of this folder says that it is packed and not in which formats: export or save the model again"
                if self.pre_quantized
                else "FinebitsConfig(groups=…) is for folders that are packed: give a format, such as FinebitsConfig('nf4-b64')"
            )
        self.formats = {name: format for name, (format, _) in (self.quantization_config.held or {}).items()}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        places = {str(place) for place in device_map.values()} if isinstance(device_map, Mapping) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise Invalid(
                f"the device_map puts modules on {', '.join(sorted(places))}, and packed weights stay where they compute: give the devices "
                "more memory (max_memory), take fewer bits, or device_map='cpu'"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            owned = re.compile(r"(.+)\.weight\.(\w+)")
            found = (owned.fullmatch(key) for file in kwargs.get("checkpoint_files") or () for key in Stored(Path(file)))
            self.parts = sorted({m[2] for m in found if m and m[1] in self.formats})
        modules = dict(model.named_modules())
        if not self.pre_quantized:
            self.formats = self._chosen(model, modules)
        for name, format in self.formats.items():
            module = modules.get(name)
            if isinstance(module, nn.Embedding):
                cast(Any, module).__class__ = looking(type(module))
            elif module is not None and multiplies(module):
                Adapted.over(cast(nn.Linear, module))
            else:
                what = "no such module" if module is None else f"a {type(module).__name__} there, which is not packed by transformers"
                raise Invalid(f"{name} is to be held as {format}, and the model has {what}: leave it out, or use finebits.load_planned")

    def _chosen(self, model: Any, modules: Mapping[str, nn.Module]) -> dict[str, Format]:
        own, common = self.quantization_config.own, self.quantization_config.format
        if lost := next((name for name in own if name not in modules), None):
            raise Invalid(
                f"FinebitsConfig has a format for {lost}, and the model has no such module: name it as model.named_modules() does"
            )
        left = {*self.get_modules_to_not_convert(model), *own}
        found = {name: f for name, f in own.items() if f is not None}
        if common is not None:
            if experts := next((name for name, m in modules.items() if fused(m)), None):
                raise Invalid(
                    f"{experts} holds its experts in one tensor, which transformers does not pack: plan and use finebits.load_planned"
                )
            found |= {name: common for name, m in modules.items() if name not in left and multiplies(m)}
        if not found:
            raise Invalid(f"a {type(model).__name__} has no nn.Linear to pack beside its head: plan and use finebits.load_planned")
        return {name: found[name] for name in modules if name in found}

    def _packs(self, name: str) -> Format | None:
        owner, _, leaf = name.rpartition(".")
        return self.formats.get(owner) if leaf == "weight" else None

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return self._packs(param_name) is not None

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        format = self._packs(param_name)
        return param.element_size() if format is None else format.storage_bits(*param.shape[-2:]) / 8 / math.prod(param.shape[-2:])

    def get_quantize_ops(self) -> ConversionOps:
        return Pack(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        return [WeightConverter([rf"\.weight\.{part}$" for part in self.parts], ".weight", [Unpacked(self)])] if self.parts else []

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is not None:  # which are undone when the model is saved, but for this one: its state has the parts
            ours = lambda c: any(isinstance(op, Unpacked) for op in getattr(c, "operations", ()))  # noqa: E731
            model._weight_conversions = [c for c in conversions if not ours(c)]
        self.quantization_config.held = {name: (f, tuple(model.get_submodule(name).weight.shape)) for name, f in self.formats.items()}
        tables = {id(table.weight) for _, table in lookups(model)}
        for m in model.modules():
            if isinstance(m, nn.Linear) and id(m.weight) in tables:
                m.__class__ = Tied
        if lost := next((name for name, host in weighted(model).items() if not isinstance(host.weight, QTensor)), None):
            raise Invalid(
                f"the files have no codes for {lost}, and their config.json says that they do: the copy is incomplete, copy it again"
            )
        dtype = str(model.dtype).removeprefix("torch.")
        levers = Levers(dtype=dtype if dtype in WIDTHS else "float32")
        return sign(model, Plan({n: Spec(f) for n, f in self.formats.items()}, model=str(model.config.name_or_path), levers=levers))

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for _, host in hosts(model):
            host.weight = nn.Parameter(dense(host.weight, dtype), requires_grad=False)
        for _, table in lookups(model):
            packed = table.weight
            plain = nn.Parameter(dense(packed, dtype), requires_grad=False)
            for m in model.modules():
                if m._parameters.get("weight") is packed:
                    m._parameters["weight"] = plain
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


class Pack(ConversionOps):
    """A dense weight as it is read -> packed."""

    def __init__(self, hf_quantizer: FinebitsQuantizer) -> None:
        self.by = hf_quantizer

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any = None, target_patterns: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        packed = {}
        for name, given in input_dict.items():
            W = given[0] if isinstance(given, list) else given
            format = self.by._packs(name)
            try:
                q = W if format is None else rounded(W, Spec(format), kwargs["model"].get_parameter(name).dtype)
            except ValueError as e:
                raise Invalid(f"{name}: {e}") from e
            packed[name] = nn.Parameter(q, requires_grad=False)
        return packed


class Unpacked(ConversionOps):
    """The parts of a weight, as files have them -> the packed weight."""

    def __init__(self, hf_quantizer: FinebitsQuantizer) -> None:
        self.hf_quantizer = hf_quantizer  # by which transformers sees that parts keep their dtypes

    def convert(
        self, input_dict: dict[str, Any], source_patterns: Any = None, target_patterns: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        by, name = self.hf_quantizer, kwargs["full_layer_name"]
        format, weight = by._packs(name), kwargs["model"].get_parameter(name)  # on the meta device
        parts = {k.rpartition(".")[2].removesuffix("$"): t[0] if isinstance(t, list) else t for k, t in input_dict.items()}
        if format is None:
            raise Invalid(
                f"the files hold codes of {name}, and their config.json does not say in which format: export or save the model again"
            )
        try:
            q = QTensor.from_parts({k: kernels.placed(p) for k, p in parts.items()}, format, weight.shape, weight.dtype)
        except ValueError as e:
            raise Invalid(f"{name}: {e}: export or save the model again") from None
        return {name: nn.Parameter(q, requires_grad=False)}


register_quantization_config(METHOD)(FinebitsConfig)
register_quantizer(METHOD)(FinebitsQuantizer)
