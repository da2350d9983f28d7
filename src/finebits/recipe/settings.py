"""What a plan is made from beside the model, the budget and the data: a recipe with its names of methods as methods."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from finebits import registry, sizes
from finebits.errors import Invalid
from finebits.recipe.loading import Recipe
from finebits.recipe.mistakes import nearest

if TYPE_CHECKING:
    from finebits.formats.base import Format
    from finebits.objectives.base import Objective
    from finebits.optim.base import Optimizer
    from finebits.plan.planner import Planner
    from finebits.quantizers.base import Quantizer
    from finebits.ranks.base import Ranking
    from finebits.rules.base import Rule


@dataclasses.dataclass(frozen=True, init=False)
class Settings:
    """Candidates, adapter, start, and the levers that are fixed. What is not given is as in a recipe that does not say, whose keys
    (finebits.recipe.keys) explain each; those below that are no keys stand for one or several of them.

    >>> Settings(max_length=256).calibration_rows == Recipe.parse("model: {model_name_or_path: m}").quantization.calibration_rows
    True
    """

    formats: tuple[Format | None, ...]  # candidates
    embeddings: tuple[Format | None, ...]  # candidates of the input embeddings; none: they are dense
    quantizer: Quantizer
    pricing: Quantizer | None  # None: by the quantizer
    adapter: Any
    init: Any
    choose: tuple[tuple[Any, Any], ...]  # adapters to choose from in place of `adapter`, each with its start
    calibration: str
    refine: tuple[Any, ...]
    rules: tuple[Rule, ...]
    planner: Planner
    objective: str
    calibration_rows: int
    ranks: tuple[int, ...]  # ranks to choose from, matrix by matrix; none: the adapter's own everywhere
    ranking: Ranking | None  # gives every matrix its rank before bits are chosen
    inits: tuple[Any, ...]  # starts to choose from; none: `init` everywhere, and errors are those of the quantized weight alone
    serve_budget: int | None  # serve_memory in bytes
    serve_adapters: int
    serve_rank: int | None
    serve_tokens: int
    locks: Mapping[str, Format | None]
    folder: str | None  # of PEFT, whose adapters take the place of `adapter`
    target_modules: str | Sequence[str] | None  # None: all linears, with the adapter where its paper puts it
    exclude_modules: str | Sequence[str] | None
    layers_to_transform: int | Sequence[int] | None
    layers_pattern: str | Sequence[str] | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: Sequence[str] | None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None
    ensure_weight_tying: bool
    overrides: Mapping[str, Format | None]
    reserve: float  # as a share of the budget
    compared: tuple[str, ...]  # further runs that the budget is for
    left_out: tuple[str, ...]  # phases that the job does without, of finebits.plan.refusal.PHASES
    seed: int
    dtype: str
    device: str  # cpu or cuda
    attn_implementation: str
    max_length: int
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    loss_chunk: int
    optim: str | Optimizer
    levers: tuple[str, ...]  # of finebits.plan.levers.PULLS: those that the plan may change
    max_steps: int
    num_train_epochs: float
    preference: Objective | None  # what compares answers; None: the task's own loss
    eval_strategy: str  # no: held-out rows are not scored while training
    eval_on_start: bool
    dropout: float
    assistant_only_loss: bool
    packing: bool
    model_revision: str | None
    runtime: int | None = None  # what the process holds beside tensors, where a probe has measured it; no recipe says it

    def __init__(self, **values: Any) -> None:
        names = [f.name for f in dataclasses.fields(self)]
        for name in values:
            if name not in names:
                meant = nearest(name, names)
                raise Invalid(f"Settings have no {name}" + (f": did you mean {meant}?" if meant else f": they are {', '.join(names)}"))
        if values.get("init") is None and values.keys() & {"adapter", "init"}:
            adapter = values["adapter"] if "adapter" in values else _unsaid().adapter
            values["init"] = registry.from_json("init", getattr(adapter, "own", "zeros"))  # the adapter's own
        for name in names:
            object.__setattr__(self, name, values[name] if name in values else getattr(_unsaid(), name))

    @classmethod
    def of(cls, recipe: Recipe) -> Settings:
        """Those of a recipe: its plain keys by their names, and what the others stand for.

        >>> of = Settings.of(Recipe.parse("model: {model_name_or_path: m}", overrides=["rank=8", "budget.memory=1GiB"]))
        >>> of.adapter.rank, of.reserve, of.device
        (8, 0.05, 'cpu')
        """
        names = {f.name for f in dataclasses.fields(cls)}
        plain = {name: value for _, section in recipe if hasattr(section, "model_fields_set") for name, value in section if name in names}
        read = {
            "formats": tuple(recipe.formats()),
            "embeddings": tuple(recipe.embedding_values()),
            "quantizer": recipe.quantizer_value(),
            "pricing": recipe.pricing_value(),
            "adapter": recipe.adapter_value(),
            "init": recipe.init_value(),
            "choose": tuple(recipe.choices()),
            "refine": tuple(recipe.refine_values()),
            "rules": tuple(recipe.rule_values()),
            "planner": recipe.planner_value(),
            "ranks": tuple(recipe.adapter.ranks) if isinstance(recipe.adapter.ranks, list) else (),
            "ranking": recipe.ranking_value(),
            "inits": tuple(recipe.init_values()),
            "serve_budget": None if recipe.budget.serve_memory is None else sizes.parse(recipe.budget.serve_memory),
            "locks": recipe.lock_values(),
            "overrides": recipe.override_values(),
            "reserve": recipe.budget.reserve_share,
            "compared": tuple(recipe.evaluation.compare),
            "left_out": _left_out(recipe),
            "device": device(recipe),
            "optim": recipe.optimizer_value(),
            "preference": recipe.objective_value(),
            "per_device_train_batch_size": recipe.training.begins[0],
            "gradient_accumulation_steps": recipe.training.begins[1],
            "levers": _pulls(recipe),
            "runtime": None,
        }
        return cls(**plain | read)


@functools.cache
def _unsaid() -> Settings:
    """What a recipe that names a model and a budget has beside them."""
    return Settings.of(Recipe.parse("{model: {model_name_or_path: m}, budget: {memory: 1TiB}}"))


def device(recipe: Recipe) -> str:
    """Where the recipe is trained: auto is what a Trainer takes by itself.

    >>> device(Recipe.parse("model: {model_name_or_path: m}", overrides=["budget.device=cuda"]))
    'cuda'
    """
    if recipe.budget.device != "auto":
        return recipe.budget.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _pulls(recipe: Recipe) -> tuple[str, ...]:
    """The levers that the plan may change: the size of a pass is one where the recipe leaves it to the plan."""
    own = ("micro_batch",) if recipe.training.per_device_train_batch_size == "auto" else ()
    return tuple(dict.fromkeys((*recipe.budget.levers, *own)))


def _left_out(recipe: Recipe) -> tuple[str, ...]:
    """The phases that a recipe does without: nothing is planned for them."""
    full, shipped = recipe.evaluation.full_precision, bool(recipe.export.to)
    wanted = {
        "full": full,
        "samples": full and recipe.evaluation.samples > 0,
        "export": shipped,
        "verify": shipped and recipe.export.verify,
    }
    return tuple(phase for phase, kept in wanted.items() if not kept)
