"""What a plan is: data. Explicit per module, written by a planner or by hand, round-tripping through JSON.

And what a planner is: a pure function of a menu (module -> priced options) and a budget. It knows no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from finebits import registry
from finebits.adapters.base import Adapter
from finebits.errors import Invalid
from finebits.files import write_text
from finebits.formats.base import Format
from finebits.init.base import Init
from finebits.init.zeros import Zeros
from finebits.quantizers.base import Quantizer
from finebits.quantizers.rtn import RTN

SCHEMA = "finebits.plan/1"
SLOTS = {"format": "formats", "quantizer": "quantizers", "adapter": "adapters", "init": "init"}


@dataclass(frozen=True)
class Spec:
    """What happens to one module. No format: the weight stays dense. No adapter: nothing is trained there."""

    format: Format | None = None
    quantizer: Quantizer = field(default_factory=RTN)
    adapter: Adapter | None = None
    init: Init = field(default_factory=Zeros)


@dataclass(frozen=True)
class Option:
    """One line of a menu: what it would be, what it holds in bytes while training, what it loses.

    `more` is what else it takes, by name, for planners with a second limit: "serve" (bytes in the exported model), "weight" (bytes of the
    weight alone), "overhead" (those of them that are no codes), "latency" (seconds).
    """

    spec: Spec
    bytes: int
    loss: float
    more: Mapping[str, float] = field(default_factory=dict, hash=False)


@runtime_checkable
class Planner(Protocol):
    """A frozen dataclass of settings with this call. Raises Infeasible if nothing fits."""

    def __call__(self, menu: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Option]: ...


class Infeasible(Invalid):
    """No choice fits the budget. `smallest` is the least number of bytes that would."""

    code = 3

    def __init__(self, message: str, smallest: int, hint: str = "") -> None:
        super().__init__(message + (f"\n{hint}" if hint else ""))
        self.smallest, self.hint = smallest, hint


@dataclass(frozen=True)
class Plan:
    """Data only.

    `budget` is in bytes, `stated` how it was said where that was otherwise ("3.1 bits"). `memory` holds the terms of the training peak in bytes
    (their sum is the prediction), `rows` the peaks of further phases, for which the budget holds as well (load, eval, save), `host` what stays
    in host memory beside a device that has its own, `levers` what was fixed beside the bits (dtype, micro-batch, lengths), `costs` per module
    the shape and the menu that the choice was made from, `sizes` what the memory model knows of the model and its adapters, so that a plan can
    be solved again without the model.
    """

    modules: dict[str, Spec]
    model: str = ""
    model_hash: str = ""
    seed: int = 42
    budget: int | None = None
    memory: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    levers: dict[str, Any] = field(default_factory=lambda: {"dtype": "float32"})
    costs: dict[str, Any] = field(default_factory=dict)
    solver: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    stated: str = ""

    @property
    def peak(self) -> int:
        """Predicted training peak in bytes."""
        return sum(self.memory.values())

    @property
    def phases(self) -> dict[str, int]:
        """Predicted peaks of all phases, training first: the budget is for the largest."""
        return {"training": self.peak} | self.rows

    @property
    def need(self) -> int:
        """What the whole job takes: the largest of its phases."""
        return max(self.phases.values())

    @property
    def hash(self) -> str:
        """What the plan is, in sixteen hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        modules = {name: {slot: registry.to_json(getattr(spec, slot)) for slot in SLOTS} for name, spec in self.modules.items()}
        rest = {
            k: getattr(self, k)
            for k in ("model", "model_hash", "seed", "budget", "stated", "memory", "rows", "host", "levers", "costs", "solver", "sizes")
        }
        return {"schema": SCHEMA, **rest, "modules": modules}

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
            raise Invalid(f"this is not a plan of schema {SCHEMA} (found {found!r}): make one with finebits plan")
        rest = {k: v for k, v in data.items() if k not in ("schema", "modules")}
        specs = {
            name: Spec(**{slot: registry.from_json(shape, entry.get(slot)) for slot, shape in SLOTS.items()})
            for name, entry in data["modules"].items()
        }
        return cls(modules=specs, **rest)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; an old file is replaced only once the new one is complete."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        path = Path(path)
        try:
            return cls.from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            raise Invalid(f"there is no plan at {path}: make one with finebits plan") from None
        except json.JSONDecodeError as e:
            raise Invalid(f"{path} is not JSON (line {e.lineno}): {e.msg}") from None
        except UnicodeDecodeError:
            raise Invalid(f"{path} is not JSON but binary: a plan is text, made with finebits plan") from None

    def with_start(self, init: Init) -> Plan:
        """The same bits and adapters, rounded to nearest and with another start everywhere, which nothing refines."""
        levers = {k: v for k, v in self.levers.items() if k not in ("calibration", "refine")}
        specs = {name: replace(spec, quantizer=RTN(), init=init) for name, spec in self.modules.items()}
        return replace(self, modules=specs, levers=levers)

    def unquantized(self) -> Plan:
        """The same adapters over the unquantized weights, started at zero."""
        specs = {name: replace(spec, format=None, quantizer=RTN(), init=Zeros()) for name, spec in self.modules.items()}
        return replace(self, modules=specs, levers={k: v for k, v in self.levers.items() if k not in ("calibration", "refine")})

    def summary(self) -> str:
        """The plan in a few lines of text."""
        from finebits.report.text import plan_summary

        return plan_summary(self)

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page."""
        from finebits.report.page import plan_page

        write_text(Path(path), plan_page(self))
