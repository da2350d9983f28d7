"""How methods are named in a recipe, by the names of `finebits list`, and the values that these names stand for."""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, Self, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError

from finebits import registry
from finebits.errors import Invalid
from finebits.optim.base import named
from finebits.plan.candidates import TRAINED
from finebits.recipe.keys.adapter import Adapter
from finebits.recipe.keys.base import Method
from finebits.recipe.mistakes import nearest, wanted
from finebits.recipe.schema import Keys, spellings
from finebits.recipe.source import Keypath, came

if TYPE_CHECKING:
    from finebits.adapters.base import Adapter as AdapterValue
    from finebits.adapters.base import Codes
    from finebits.federate.base import Aggregator
    from finebits.formats.base import Format
    from finebits.init.base import Init
    from finebits.objectives.base import Objective
    from finebits.optim.base import Optimizer
    from finebits.plan.base import Plan
    from finebits.plan.planner import Planner
    from finebits.quantizers.base import Quantizer
    from finebits.ranks.base import Ranking
    from finebits.refine.base import Refine
    from finebits.requantize import Requantize
    from finebits.rules.base import Rule


class Misfit(Invalid):
    """A method or one of its settings (`key`) that finebits does not have.

    >>> format_value({"paper": "nf", "bit": 3})
    Traceback (most recent call last):
        ...
    finebits.recipe.methods.Misfit: nf has no setting 'bit': did you mean bits?
    """

    code = 2

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class Named(Keys):
    """The keys of a recipe, and the methods that they name as values."""

    def formats(self) -> list[Format | None]:
        """The candidates as format values, in order. Where the recipe names none and weights are trained themselves, they are dense
        (None) or have 8 bits; where an adapter makes codes, they are those that it makes them of.

        >>> from finebits.recipe import Recipe
        >>> Recipe.parse("model: {model_name_or_path: m}", overrides=["candidates=[nf4, nf3-b32]"]).formats() == [fb.NF(4), fb.NF(3, block=32)]
        True
        """
        if "candidates" not in self.quantization.model_fields_set:
            kind = registry.load("adapters", self.adapter.paper)()
            if kind.itself:
                return [None, *(format_value(entry) for entry in TRAINED)]
            if kind.form == "codes":
                return list(cast("Codes", self.adapter_value()).candidates)
        return [format_value(entry) for entry in self.quantization.candidates]

    def embedding_values(self) -> list[Format | None]:
        """What the input embeddings may be, None for dense, in order.

        >>> from finebits.recipe import Recipe
        >>> recipe = Recipe.parse("model: {model_name_or_path: m}", overrides=["quantization.embeddings=[null, nf4]"])
        >>> recipe.embedding_values() == [None, fb.NF(4)]
        True
        """
        return [None if entry is None else format_value(entry) for entry in self.quantization.embeddings]

    def override_values(self) -> dict[str, Format | None]:
        """{regular expression over whole module names: format, or None to keep dense}, in order.

        >>> from finebits.recipe import Recipe
        >>> recipe = Recipe.parse("model: {model_name_or_path: m}", overrides=["quantization.overrides={.*o_proj: null, .*down_proj: nf4}"])
        >>> recipe.override_values() == {".*o_proj": None, ".*down_proj": fb.NF(4)}
        True
        """
        return {pattern: None if entry is None else format_value(entry) for pattern, entry in self.quantization.overrides.items()}

    def lock_values(self) -> dict[str, Format | None]:
        """{module: format, or None to keep dense}, in order.

        >>> from finebits.recipe import Recipe
        >>> Recipe.parse("model: {model_name_or_path: m}", overrides=["quantization.locks={layers.0.*: null}"]).lock_values()
        {'layers.0.*': None}
        """
        return {name: None if entry is None else format_value(entry) for name, entry in self.quantization.locks.items()}

    def init_values(self) -> list[Init]:
        """The starts to choose from, if there is a choice."""
        return [self._start(entry) for entry in self.adapter.inits]

    def ranking_value(self) -> Ranking | None:
        """What gives out ranks; None where they are all the same, or chosen with the bits."""
        return None if isinstance(self.adapter.ranks, list) else _method("ranks", self.adapter.ranks)

    def planner_value(self) -> Planner:
        """The planner with its settings; constraints make it the integer program.

        >>> from finebits.recipe import Recipe
        >>> Recipe.parse("model: {model_name_or_path: m}").planner_value()
        Lagrange()
        >>> Recipe.parse("model: {model_name_or_path: m}", overrides=["quantization.constraints.max_formats=2"]).planner_value().formats
        2
        """
        from finebits.planners.milp import MILP

        planner, c = _method("planners", self.quantization.planner), self.quantization.constraints
        if not c:
            return planner
        if self.quantization.planner not in ("lagrange", "milp"):
            raise Misfit("quantization.constraints are kept by the planner milp: leave planner out, or give it these settings itself")
        return MILP(ties=tuple(map(tuple, c.tie)), formats=c.max_formats, overhead=c.overhead)

    def choices(self) -> list[tuple[AdapterValue, Init]]:
        """The adapters that the planner chooses from, each with how it starts; none where the recipe gives one.

        >>> from finebits.recipe import Recipe
        >>> said = ["adapter.choose=[paca, {paper: lora, rank: 8, init: pissa}]"]
        >>> recipe = Recipe.parse("model: {model_name_or_path: m}", overrides=said)
        >>> [(type(adapter).__name__, type(init).__name__) for adapter, init in recipe.choices()]
        [('PaCA', 'Zeros'), ('LoRA', 'PiSSA')]
        """
        return [self._choice(entry) for entry in self.adapter.choose]

    def _choice(self, entry: Method) -> tuple[AdapterValue, Init]:
        a = self.adapter
        given = {"rank": a.rank, "alpha": a.alpha, "use_rslora": a.use_rslora or None} | (a.model_extra or {})
        given |= {"paper": a.paper} if a.paper != Adapter.model_fields["paper"].default else {}
        if said := next((k for k, v in given.items() if v is not None), None):
            raise Misfit(f"adapter.{said} is of one adapter, and adapter.choose gives several with their settings: say it there", said)
        settings = {"paper": entry} if isinstance(entry, str) else {k: v for k, v in entry.items() if k != "init"}
        init = a.init if isinstance(entry, str) else entry.get("init", a.init)
        adapter = _method("adapters", settings)
        return adapter, self._started(adapter, init)

    def settled(self, plan: Plan) -> Self:
        """The recipe with the adapter that a plan has chosen; itself where there was nothing to choose.

        >>> from finebits.recipe import Recipe
        >>> recipe = Recipe.parse("model: {model_name_or_path: m}", overrides=["adapter.choose=[paca, dora]"])
        >>> taken = {"adapter": {"paper": "dora", "rank": 4}, "init": {"paper": "zeros"}, "chosen": True}
        >>> recipe.settled(fb.Plan({}, solver={"adapters": [taken]})).adapter_value().rank
        4
        """
        if not self.adapter.choose:
            return self
        taken = next((line for line in plan.solver.get("adapters", ()) if line["chosen"]), None)
        if taken is None:
            raise Invalid("the recipe lets the planner choose an adapter (adapter.choose), and this plan was made without: plan again")
        kept = {k: v for k, v in self.adapter.model_dump().items() if k not in ("choose", "paper", "rank", "alpha", "init")}
        adapter = Adapter.model_validate(kept | taken["adapter"] | {"init": taken["init"]})
        return self.model_copy(update={"adapter": adapter})

    def adapter_value(self) -> AdapterValue:
        """The adapter with its settings; those that the recipe leaves out are the method's own. Of several to choose from, the first.

        >>> from finebits.recipe import Recipe
        >>> Recipe.parse("model: {model_name_or_path: m}", overrides=["adapter.r=8", "use_rslora=true"]).adapter_value()
        LoRA(rank=8, alpha=16.0, scaling='rslora')
        """
        if self.adapter.choose:
            return self._choice(self.adapter.choose[0])[0]
        a = self.adapter
        settings = {"rank": a.rank, "alpha": a.alpha, "scaling": "rslora" if a.use_rslora else None}
        settings = {k: v for k, v in settings.items() if v is not None}
        extra = a.model_extra or {}
        for key in extra:
            if key in spellings(Adapter):
                raise Misfit(f"{key} says what another key says already: leave one out", key)
            if key in settings:
                raise Misfit("use_rslora and scaling say the same thing twice: leave one out", key)
        return _method("adapters", {"paper": a.paper} | settings | extra)

    def init_value(self) -> Init:
        """How the adapter starts.

        >>> from finebits.recipe import Recipe
        >>> Recipe.parse("model: {model_name_or_path: m}").init_value() == fb.LoftQ()  # lora's own
        True
        """
        return self._choice(self.adapter.choose[0])[1] if self.adapter.choose else self._start(self.adapter.init)

    def _start(self, entry: Method | None) -> Init:
        if entry is not None:
            _method("init", entry)  # what is wrong with it alone is said first
        return self._started(self.adapter_value(), entry)

    def _started(self, adapter: Any, entry: Method | None) -> Init:
        """A start that the adapter admits; its own for None."""
        from finebits.init.base import check_start

        start = _method("init", adapter.own if entry is None else entry)
        try:
            check_start(adapter, start)
        except ValueError as e:
            raise Misfit(str(e)) from None
        return start

    def quantizer_value(self) -> Quantizer:
        """How weights are rounded.

        >>> from finebits.recipe import Recipe
        >>> Recipe.parse("model: {model_name_or_path: m}", overrides=["quantizer={paper: gptq, scales: search}"]).quantizer_value().scales
        'search'
        """
        return _method("quantizers", self.quantization.quantizer)

    def pricing_value(self) -> Quantizer | None:
        """How candidates are rounded while they are priced; None for the quantizer."""
        return None if self.quantization.pricing is None else _method("quantizers", self.quantization.pricing)

    def optimizer_value(self) -> str | Optimizer:
        """The optimizer by its name where that says all of it, else with its settings. Raises where the rest of the recipe needs what it does
        not leave.

        >>> from finebits.recipe import Recipe
        >>> Recipe.parse("model: {model_name_or_path: m}").optimizer_value()
        'adamw_torch'
        """
        t = self.training
        optimizer = t.optim if isinstance(t.optim, str) else _method("optim", t.optim)
        if named(optimizer).layerwise:
            from finebits.optim._shell import refuse_layerwise

            refuse_layerwise(t.begins[1], t.max_grad_norm, 1, bool(self.rules))
        return optimizer

    def objective_value(self) -> Objective | None:
        """What answers teach that were liked more and less; None for the task's own loss.

        >>> from finebits.recipe import Recipe
        >>> Recipe.parse("model: {model_name_or_path: m}", overrides=["loss={paper: kto, beta: 0.2}"]).objective_value()
        KTO(beta=0.2, desirable=1.0, undesirable=1.0, reference='start')
        """
        if self.training.loss is None:
            return None
        made: Objective = _method("objectives", self.training.loss)
        size, _ = self.training.begins
        if size % made.together:
            key = "effective_batch_size" if self.training.per_device_train_batch_size == "auto" else "per_device_train_batch_size"
            raise Misfit(f"every pair of answers takes two rows of training.{key}, which is {size}: give an even number")
        if "qlora" in self.evaluation.compare:
            raise Misfit("the run qlora of evaluation.compare learns the task's own loss alone: leave it out, or leave training.loss out")
        return made

    def _beside(self, entry: Method) -> None:
        """Raise where a rule cannot act beside the optimizer; what is wrong with either itself is said elsewhere."""
        try:
            rule, optimizer = _method("rules", entry), named(self.optimizer_value())
        except ValueError:
            return
        try:
            rule.beside(optimizer)
        except ValueError as e:
            raise Misfit(str(e)) from None

    def refine_values(self) -> list[Refine]:
        """How the start is improved."""
        return [_method("refine", entry) for entry in self.adapter.refine]

    def requantize_value(self) -> Requantize | None:
        """How the export is rounded once more; None where it is not.

        >>> from finebits.recipe import Recipe
        >>> base = "model: {model_name_or_path: m}"
        >>> Recipe.parse(base, overrides=["export.to=[gptq]", "export.requantize=int4-b32-fp16"]).requantize_value().format.bits
        4
        """
        from finebits.export.base import rounded_anew
        from finebits.requantize import Requantize

        entry = self.export.requantize
        if entry is None:
            return None
        refine = tuple(_method("refine", r) for r in entry.refine)
        try:
            how = Requantize(format_value(entry.format), _method("quantizers", entry.quantizer), refine)
            rounded_anew(self.export.to, how)
        except Misfit:
            raise
        except ValueError as e:
            raise Misfit(str(e)) from None
        return how

    def aggregator_values(self) -> dict[str, Aggregator]:
        """{name: what a server makes of what clients send}, in order.

        >>> from finebits.recipe import Recipe
        >>> said = ["federation.aggregators=[fedavg, {paper: flora, cap: 64}]"]
        >>> Recipe.parse("model: {model_name_or_path: m}", overrides=said).aggregator_values()
        {'fedavg': FedAvg(), 'flora': FLoRA(cap=64)}
        """
        values = [_method("federate", entry) for entry in self.federation.aggregators]
        return {registry.to_json(value)["paper"]: value for value in values}

    def _each_once(self) -> None:
        names = [e if isinstance(e, str) else e.get("paper") for e in self.federation.aggregators]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise Misfit(f"{twice} is there twice, and a run has one of it: give its other settings an output_dir of their own")

    def rule_values(self) -> list[Rule]:
        """The training rules, new ones at every call: rules hold state."""
        return [self._rule(entry) for entry in self.rules]

    def _rule(self, entry: Method) -> Rule:
        """A rule that can act on the adapter, whichever that will be; what is wrong with the adapter itself is said elsewhere."""
        from finebits.rules.base import check

        rule = _method("rules", entry)
        try:
            adapters = [adapter for adapter, _ in self.choices()] or [self.adapter_value()]
        except ValueError:
            return rule
        try:
            for adapter in adapters:
                check(rule, adapter, self.adapter.dropout)
        except ValueError as e:
            raise Misfit(str(e)) from None
        return rule

    def _checked(self, entry: Method | None) -> None:
        """The start alone where the adapter is wrong itself, which is said of the adapter."""
        try:
            self.adapter_value()
        except ValueError:
            if entry is not None:
                _method("init", entry)
        else:
            self._start(entry)

    def _alone(self, key: str) -> None:
        """Raise where a key of the adapter says what the folder says that it goes on from."""
        field = Adapter.model_fields.get(key)
        if self.adapter.folder is None or key in ("folder", "dropout") or field and getattr(self.adapter, key) == field.get_default():
            return
        raise Misfit(f"{self.adapter.folder} says itself what it holds, so nothing else can: leave {key} out, or adapter.folder", key)

    def checks(self) -> Iterator[tuple[Keypath, Callable[[], Any]]]:
        """Every place where a method is named, and what fails if there is no such method, or its settings do not fit."""
        for i, entry in enumerate(self.quantization.candidates):
            yield ("quantization", "candidates", i), functools.partial(format_value, entry)
        for i, entry in enumerate(self.quantization.embeddings):
            yield ("quantization", "embeddings", i), functools.partial(format_value, entry if entry is not None else "nf4")
        for pattern, entry in self.quantization.overrides.items():
            yield ("quantization", "overrides", pattern), functools.partial(_override_value, pattern, entry)
        for name, entry in self.quantization.locks.items():
            yield ("quantization", "locks", name), functools.partial(format_value, entry if entry is not None else "nf4")
        yield ("quantization", "planner"), self.planner_value
        yield ("adapter", "ranks"), self.ranking_value
        for i, entry in enumerate(self.adapter.inits):
            yield ("adapter", "inits", i), functools.partial(self._checked, entry)
        for key in [*Adapter.model_fields, *(self.adapter.model_extra or {})]:
            yield ("adapter", key), functools.partial(self._alone, key)
        for i, entry in enumerate(self.adapter.choose):
            yield ("adapter", "choose", i), functools.partial(self._choice, entry)
        yield ("adapter", "paper"), functools.partial(_class, "adapters", self.adapter.paper)
        if not self.adapter.choose:
            yield ("adapter",), self.adapter_value
        yield ("adapter", "target_modules"), functools.partial(_pattern, self.adapter.target_modules)
        if not self.adapter.choose:
            yield ("adapter", "init"), functools.partial(self._checked, self.adapter.init)
        yield ("quantization", "quantizer"), self.quantizer_value
        yield ("quantization", "pricing"), self.pricing_value
        yield ("training", "optim"), self.optimizer_value
        yield ("training", "loss"), self.objective_value
        for i, entry in enumerate(self.adapter.refine):
            yield ("adapter", "refine", i), functools.partial(_method, "refine", entry)
        if self.export.requantize is not None:
            yield ("export", "requantize"), self.requantize_value
        for i, entry in enumerate(self.rules):
            yield ("rules", i), functools.partial(self._rule, entry)
            yield ("rules", i), functools.partial(self._beside, entry)
        for i, entry in enumerate(self.federation.aggregators):
            yield ("federation", "aggregators", i), functools.partial(_method, "federate", entry)
        yield ("federation", "aggregators"), self._each_once


def format_value(entry: Method) -> Format:
    """A number format from a short name or a mapping.

    >>> format_value("nf3-b128-bf16")
    NF(bits=3, block=128, scale='bf16', unit=None)
    >>> format_value("int4a-b32")
    Int(bits=4, block=32, symmetric=False, scale='fp32', variant=None, unit=None)
    """
    if isinstance(entry, dict):
        return _method("formats", entry)
    try:
        data = registry.spelled(entry)
    except ValueError as e:
        raise Misfit(str(e)) from None
    return _method("formats", data)


def _pattern(pattern: str | list[str] | None) -> None:
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as e:
            raise Misfit(f"{pattern!r} is not a regular expression: {e}") from None


def _override_value(pattern: str, entry: Method | None) -> None:
    _pattern(pattern)
    if entry is not None:
        format_value(entry)


def _class(shape: str, paper: str) -> type:
    """A method's class; what is a setting of methods is none itself."""
    if paper in registry.family(shape):
        raise Invalid(f"{paper} is a setting of {shape} and no method of its own: {', '.join(registry.names(shape))}")
    return registry.load(shape, paper)


def _method(shape: str, entry: Method) -> Any:
    """A method value; settings are checked against the types that the method declares."""
    data = {"paper": entry} if isinstance(entry, str) else entry
    paper = data.get("paper")
    if not isinstance(paper, str):
        raise Misfit(f"a method of {shape} is a name, or a mapping with the key paper: {', '.join(registry.names(shape))}")
    try:
        cls = _class(shape, paper)
    except ValueError as e:
        raise Misfit(str(e), "paper") from None
    hints, known = typing.get_type_hints(cls.__init__), inspect.signature(cls).parameters
    for key, value in data.items():
        if key != "paper" and key not in known:
            meant = nearest(key, known)
            raise Misfit(
                f"{paper} has no setting {key!r}" + (f": did you mean {meant}?" if meant else f" (it has {', '.join(known)})"), key
            )
        if key in known and _plain(hints.get(key)):
            try:
                TypeAdapter(hints[key], config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError as e:
                expected = " or ".join(dict.fromkeys(wanted(error) for error in e.errors()))
                raise Misfit(f"{paper}.{key} wants {expected}, and {came(value)} came", key) from None
    try:
        return registry.from_json(shape, data)
    except ValueError as e:
        raise Misfit(str(e)) from None


def _plain(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return all(_plain(part) for part in typing.get_args(hint))
    return hint in (int, float, bool, str, type(None)) or typing.get_origin(hint) is Literal
