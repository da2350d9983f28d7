"""What a plan is: data. Explicit per module, written by a planner or by hand, round-tripping through JSON.

It is chosen from menus (module -> priced options).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from finebits import registry
from finebits.adapters.base import Adapter, Codes
from finebits.errors import FinebitsError, Invalid, WrongType, WrongUse
from finebits.files import write_text
from finebits.formats.base import Format
from finebits.init.base import Init
from finebits.init.zeros import Zeros
from finebits.plan.levers import Counted, Levers, Start, Workload
from finebits.quantizers.base import Quantizer
from finebits.quantizers.rtn import RTN

SCHEMA = "finebits.plan/1"
ENDS = "head", "embeddings"
KINDS: dict[str, Any] = {  # of what a plan's JSON has
    "model": str,
    "model_hash": str,
    "seed": int,
    "budget": (int, type(None)),
    "stated": str,
} | dict.fromkeys(("memory", "rows", "host", "costs", "solver", "sizes", "over"), dict)
SLOTS = {"format": "formats", "quantizer": "quantizers", "adapter": "adapters", "init": "init"}


@dataclass(frozen=True)
class Spec:
    """What happens to one module. No format: the weight stays dense. No adapter: nothing is trained there.

    >>> spec = fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=8))
    >>> type(spec.quantizer).__name__, type(spec.init).__name__  # rounded to nearest, started at zero
    ('RTN', 'Zeros')
    """

    format: Format | None = None
    quantizer: Quantizer = field(default_factory=RTN)
    adapter: Adapter | None = None
    init: Init = field(default_factory=Zeros)


def served(spec: Spec) -> Format | None:
    """The format that a module is exported in; None where it is dense. Raises ValueError where its adapter makes codes of no such weight.

    >>> served(fb.Spec(fb.NF(4), adapter=fb.LoRA())), served(fb.Spec(adapter=fb.L4Q(bits=3))).bits
    (NF(bits=4, block=64, scale='fp32', unit=None), 3)
    """
    if spec.adapter is None or spec.adapter.form != "codes":
        return spec.format
    return cast(Codes, spec.adapter).served(spec.format)


def begun(spec: Spec) -> Format | None:
    """The format of the codes that a quantizer finds for an adapter to begin with, over a weight that stays dense; None where nothing is found
    for it. One that rounds to nearest finds none: such an adapter does that itself, and begins as its paper says.

    >>> begun(fb.Spec(None, fb.GPTQ(), fb.L4Q(bits=3))).bits, begun(fb.Spec(adapter=fb.L4Q())), begun(fb.Spec(fb.Int(4), fb.GPTQ(), fb.LoRA()))
    (3, None, None)
    """
    own = spec.adapter is not None and spec.adapter.form == "codes"
    return served(spec) if own and spec.format is None and not spec.quantizer.nearest else None


@dataclass(frozen=True)
class Option:
    """One line of a menu: what it would be, what it holds in bytes while training, what it loses.

    `more` is what else it takes, by name, for planners with a second limit: "serve" (bytes in the exported model), "weight" (bytes of the
    weight alone), "overhead" (those of them that are no codes), "latency" (seconds).

    >>> format = fb.NF(4, block=64)
    >>> fb.Option(fb.Spec(format), format.storage_bits(8, 128) // 8, loss=0.01).bytes
    576
    """

    spec: Spec
    bytes: int
    loss: float
    more: Mapping[str, float] = field(default_factory=dict, hash=False)


def at_end(cost: Mapping[str, Any]) -> str | None:
    """Which end of the model a matrix of `plan.costs` is, "head" or "embeddings"; None for one of its blocks, which averages of bits are over.

    >>> at_end({"shape": [1000, 64], "embeddings": True}), at_end({"shape": [64, 64]})
    ('embeddings', None)
    """
    return next((end for end in ENDS if cost.get(end)), None)


class Infeasible(Invalid):
    """No choice fits the budget. `smallest` is the least number of bytes that would; `for_bytes` is False where no number of them does.

    >>> fb.Lagrange()({"q_proj": [fb.Option(fb.Spec(fb.NF(2)), 10, 5.0)]}, 8)
    Traceback (most recent call last):
        ...
    finebits.plan.base.Infeasible: the smallest choice holds 10 B of weights, and 8 B are left for them
    """

    code = 3
    for_bytes = True

    def __init__(self, message: str, smallest: int, hint: str = "") -> None:
        super().__init__(message + (f"\n{hint}" if hint else ""))
        self.smallest, self.hint = smallest, hint


@dataclass(frozen=True)
class Plan:
    """Data only.

    `budget` is in bytes, `stated` how it was said where that was otherwise ("3.1 bits"). `memory` holds the terms of the training peak in bytes
    (their sum is the prediction), `rows` the peaks of further phases, for which the budget holds as well (load, eval, save), `host` what stays
    in host memory beside a device that has its own, `levers`, `counted` and `start` what was fixed beside the bits and what it goes by,
    `notices` what a person should know of the model's files, `over` the adapters over modules that are no matrices, tables of embeddings among
    them, `tied` whether a head that is the same tensor as such a table follows its adapter, `trained` the modules that
    are trained themselves, `costs` per module
    the shape and the menu that the choice was made from, `sizes` what the memory model knows of the model and its adapters, so that a plan can
    be solved again without the model.

    >>> plan = fb.Plan({"q_proj": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=8))}, memory={"linear weights": 100, "adapters": 20})
    >>> plan.peak, fb.Plan.from_json(plan.to_json()) == plan
    (120, True)
    """

    modules: dict[str, Spec]
    model: str = ""
    model_hash: str = ""
    seed: int = 42
    budget: int | None = None
    memory: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    levers: Levers = Levers()
    counted: Counted = Counted()
    start: Start = Start()
    notices: tuple[str, ...] = ()
    over: dict[str, Adapter] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    solver: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)
    stated: str = ""
    model_revision: str | None = None
    trained: tuple[str, ...] = ()
    continues: dict[str, str] = field(default_factory=dict)
    tied: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.levers, Levers):
            raise WrongType(f"a plan's levers are fb.Levers(dtype=…, …), and {type(self.levers).__name__} came")

    @property
    def peak(self) -> int:
        """Predicted training peak in bytes.

        >>> fb.Plan({}, memory={"linear weights": 100, "adapters": 20}).peak
        120
        """
        return sum(self.memory.values())

    @property
    def workload(self) -> Workload:
        """What the memory model goes by.

        >>> fb.Plan({}, levers=fb.Levers(max_length=256)).workload.to_json()["max_length"]
        256
        """
        return Workload(self.levers, self.counted, self.start)

    @property
    def phases(self) -> dict[str, int]:
        """Predicted peaks of all phases, training first: the budget is for the largest.

        >>> fb.Plan({}, memory={"linear weights": 100}, rows={"eval": 110}).phases
        {'training': 100, 'eval': 110}
        """
        return {"training": self.peak} | self.rows

    @property
    def need(self) -> int:
        """What the whole job takes: the largest of its phases.

        >>> fb.Plan({}, memory={"linear weights": 100}, rows={"eval": 110}).need
        110
        """
        return max(self.phases.values())

    @property
    def hash(self) -> str:
        """What the plan is, in sixteen hexadecimal digits.

        >>> len(fb.Plan({}).hash), fb.Plan({}).hash == fb.Plan({}, seed=42).hash, fb.Plan({}).hash == fb.Plan({}, seed=7).hash
        (16, True, False)
        """
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        modules = {name: {slot: registry.to_json(getattr(spec, slot)) for slot in SLOTS} for name, spec in self.modules.items()}
        rest = {
            k: getattr(self, k)
            for k in ("model", "model_hash", "seed", "budget", "stated", "memory", "rows", "host", "costs", "solver", "sizes")
        }
        levers = self.workload.to_json() | {"model_revision": self.model_revision}
        levers |= {k: list(v) for k, v in (("notices", self.notices), ("trained", self.trained)) if v}
        levers |= {"continues": self.continues} if self.continues else {}
        over = {name: registry.to_json(adapter) for name, adapter in self.over.items()}
        return (
            {"schema": SCHEMA, **rest, "levers": levers, "modules": modules}
            | ({"over": over} if over else {})
            | ({"tied": True} if self.tied else {})
        )

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            schema = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
            raise Invalid(f"this is not a plan of schema {SCHEMA} (found {schema!r}): make one with finebits plan")
        try:
            return cls._read(data)
        except FinebitsError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise Invalid(
                f"the plan is not as finebits writes one ({type(e).__name__}: {str(e)[:200]}): make one with finebits plan"
            ) from None

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> Plan:
        rest = {k: v for k, v in data.items() if k not in ("schema", "modules", "levers")}
        for key, kinds in KINDS.items():
            if key in rest and not (isinstance(rest[key], kinds) and not isinstance(rest[key], bool)):
                raise WrongType(f"{key} is {str(rest[key])[:80]}")
        for key in ("memory", "rows", "host"):
            if odd := next((k for k, v in rest.get(key, {}).items() if not isinstance(v, int)), None):
                raise WrongType(f"{key} of {odd} is no whole number of bytes")
        levers = dict(data.get("levers", {}))
        rest |= {"model_revision": levers.pop("model_revision", None), "notices": tuple(levers.pop("notices", ()))}
        rest["over"] = {name: registry.from_json("adapters", entry) for name, entry in data.get("over", {}).items()}
        rest["trained"] = tuple(levers.pop("trained", ()))
        rest["continues"] = dict(levers.pop("continues", {}))
        specs = {
            name: Spec(**{slot: registry.from_json(shape, entry.get(slot)) for slot, shape in SLOTS.items()})
            for name, entry in data["modules"].items()
        }
        return cls(modules=specs, **rest, **vars(Workload.of(levers)))

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON; an old file is replaced only once the new one is complete.

        >>> import tempfile
        >>> plan = fb.Plan({"q_proj": fb.Spec(fb.NF(4))})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plan.save(f"{folder}/plan.json")
        ...     print(fb.Plan.load(f"{folder}/plan.json") == plan)
        True
        """
        write_text(Path(path), json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        path = Path(path)
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except RecursionError:
            raise Invalid(f"{path} is no plan (its values lie too deep in each other): make one with finebits plan") from None
        except FileNotFoundError:
            raise WrongUse(f"there is no plan at {path}: make one with finebits plan") from None
        except json.JSONDecodeError as e:
            raise Invalid(f"{path} is not JSON (line {e.lineno}): {e.msg}") from None
        except UnicodeDecodeError:
            raise Invalid(f"{path} is not JSON but binary: a plan is text, made with finebits plan") from None
        except FinebitsError:
            raise
        except ValueError as e:  # a number without end
            raise Invalid(f"{path} is no plan ({e}): make one with finebits plan") from None

    def with_start(self, init: Init) -> Plan:
        """The same bits and adapters, rounded to nearest and with another start everywhere, which nothing refines.

        >>> plan = fb.Plan({"q_proj": fb.Spec(fb.NF(4), fb.GPTQ(), fb.LoRA(rank=8), fb.QERA())})
        >>> spec = plan.with_start(fb.LoftQ()).modules["q_proj"]
        >>> type(spec.quantizer).__name__, type(spec.init).__name__
        ('RTN', 'LoftQ')
        """
        specs = {name: replace(spec, quantizer=RTN(), init=init) for name, spec in self.modules.items()}
        return replace(self, modules=specs, start=self.start.plain, continues={})

    def unquantized(self) -> Plan:
        """The same adapters over the unquantized weights, started at zero.

        >>> fb.Plan({"q_proj": fb.Spec(fb.NF(4), adapter=fb.LoRA(rank=8))}).unquantized().modules["q_proj"].format is None
        True
        """
        specs = {name: replace(spec, format=None, quantizer=RTN(), init=Zeros()) for name, spec in self.modules.items()}
        return replace(self, modules=specs, start=self.start.plain)

    def summary(self) -> str:
        """The plan in a few lines of text."""
        from finebits.report.text import plan_summary

        return plan_summary(self)

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained page."""
        from finebits.report.page import plan_page

        write_text(Path(path), plan_page(self))
