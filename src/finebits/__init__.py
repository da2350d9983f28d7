"""finebits: name a memory budget, a model and a data set; get the best fine-tuned model that fits, with proof.

Public names are found when they are first used, so that importing finebits (and `finebits --help`) does not import torch. Every method is
public under its class name: fb.NF, fb.LoRA, fb.LoftQ, …; the folder it lies in is the registry.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

from finebits import registry

__version__ = "0.1.0"

PUBLIC = {
    "FinebitsError": "finebits.errors",
    "QTensor": "finebits.qtensor",
    "Plan": "finebits.plan.base",
    "Spec": "finebits.plan.base",
    "Option": "finebits.plan.base",
    "Levers": "finebits.plan.levers",
    "Start": "finebits.plan.levers",
    "Infeasible": "finebits.plan.base",
    "Adapted": "finebits.build",
    "build": "finebits.build",
    "needs": "finebits.build",
    "hosts": "finebits.build",
    "choices": "finebits.build",
    "sweep": "finebits.sweep",
    "Requantize": "finebits.requantize",
    "requantize": "finebits.requantize",
    "collect": "finebits.calibrate.whole_model",
    "chunked_cross_entropy": "finebits.losses",
    "train": "finebits.train",
    "Run": "finebits.rules.base",
    "Rule": "finebits.rules.base",
    "factor": "finebits.rules.base",
    "save": "finebits.store",
    "settle": "finebits.settle",
    "quantize": "finebits.api",
    "load": "finebits.interop.hf",
    "load_peft": "finebits.interop.from_peft",
    "load_planned": "finebits.interop.hf",
    "merge": "finebits.interop.merging",
    "start_folder": "finebits.interop.hf",
    "plan_model": "finebits.interop.planning",
    "prune": "finebits.interop.pruning",
    "recover": "finebits.interop.recovering",
    "classifier": "finebits.interop.fitted_head",
    "FinebitsConfig": "finebits.interop.quantizer",
    "AdapterSet": "finebits.interop.adapter_set",
}


def __getattr__(name: str) -> Any:
    if name in PUBLIC:
        return getattr(importlib.import_module(PUBLIC[name]), name)
    if not name.startswith("_"):
        method = registry.find(name)
        if method is not None:
            return method
    raise AttributeError(f"finebits has no {name!r}")


def __dir__() -> list[str]:
    return sorted([*PUBLIC, "__version__"])


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name in PUBLIC and isinstance(value, ModuleType):  # importing finebits.build binds fb.build to the module: keep the function
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


class _Quantizers:
    """What makes finebits a quantizer of transformers, once that is imported: a finder that has found it is gone."""

    NAME = "transformers.quantizers.auto"

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name != cls.NAME:
            return None
        sys.meta_path.remove(cls)  # pyright: ignore[reportArgumentType]
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                importlib.import_module("finebits.interop.quantizer")

            spec.loader.exec_module = run_and_register  # pyright: ignore[reportAttributeAccessIssue]
        return spec


if _Quantizers.NAME in sys.modules:
    importlib.import_module("finebits.interop.quantizer")
else:
    sys.meta_path.insert(0, _Quantizers)  # pyright: ignore[reportArgumentType]
