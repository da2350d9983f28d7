"""A recipe: what a user writes, one YAML file that every verb reads.

Sections only group; the keys inside are transformers', TRL's and PEFT's own names where these exist, and methods go by the names of
`finebits list`. Every mistake is reported at its line, all of them at once.
"""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from finebits import registry, sizes
from finebits.plan import budget as budgets
from finebits.plan._candidates import CANDIDATES
from finebits.source import Dumper, Loader, Place, Problem, Source, broken, compose, place_of

if TYPE_CHECKING:
    from finebits.adapters.base import Adapter as AdapterValue
    from finebits.formats.base import Format
    from finebits.init.base import Init
    from finebits.plan._ranks import Ranking
    from finebits.plan.base import Planner
    from finebits.quantizers.base import Quantizer
    from finebits.refine.base import Refine
    from finebits.rules.base import Rule

Path_ = tuple[str | int, ...]
Method = str | dict[str, Any]


class Section(BaseModel):
    """Keys that belong together; a key that is not listed is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


def _size(text: str | int | None) -> str | int | None:
    if text is not None:
        sizes.parse(text)
    return text


def _budget(stated: Any) -> Any:
    """Before types are looked at, so that a number without a unit, whole or not, is asked what it means."""
    budgets.read(stated)
    return stated


def _share(text: str) -> str:
    sizes.share(text, 1 << 62)
    return text


VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)


def _path(text: str) -> str:
    """The path with ~ and the variables of the environment written out; one that is there as it is written is left."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the path holds a character that is none: write it in UTF-8") from None
    if "\0" in text:
        raise ValueError("the path holds the character NUL, which no path does")
    if os.path.exists(text):
        return text
    unset = [name or braced for name, braced in VARIABLE.findall(text) if (name or braced) not in os.environ]
    if unset:
        raise ValueError(f"the environment has no variable {unset[0]}: set it, or write the path out")
    found = os.path.expanduser(os.path.expandvars(text))
    if not found:
        raise ValueError(f"{text} is empty: write the path out")
    return found


Written = Annotated[str, AfterValidator(_path)]  # of a file or a folder


def _hf_init(value: Any) -> Any:
    """PEFT's init_lora_weights: true is a start at zero; false has no counterpart."""
    if value is False:
        raise ValueError("init wants the name of a method, and false came: write zeros for a start that changes nothing")
    return "zeros" if value is True else value


class Model(Section):
    """Which model."""

    model_name_or_path: Written = Field(
        min_length=1,
        description="A local folder in Hugging Face form, a hub id, a .gguf file, or package:NAME for the one .gguf file or model folder "
        "inside an installed Python package.",
    )
    model_revision: str | None = Field(None, description="Branch, tag or commit of a hub id; null takes the newest.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="What is computed in; auto is bfloat16 where the device computes in it, else float32."
    )
    attn_implementation: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="The attention of transformers; auto leaves it the choice."
    )


Lever = Literal["micro_batch", "checkpointing", "loss_chunk", "optim", "head", "embeddings"]


def _levers(value: Any) -> Any:
    """ "all" is every lever; a list of a file is a tuple here."""
    return typing.get_args(Lever) if value in ("all", ["all"]) else tuple(value) if isinstance(value, list) else value


class Budget(Section):
    """What the job may take."""

    memory: Annotated[str | int | None, BeforeValidator(_budget)] = Field(
        None,
        description='What every phase of the job may take above the bare process: "400MiB", "8GiB", "6 GB", bytes; or an average number of '
        'bits of a linear weight, scales included ("3.1 bits"), the same plan on every machine; or a share of what the job would take with one '
        'format for all matrices ("80% of nf4"; bf16 is 16 bits). null sets no limit.',
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "cpu",
        description="Where the model is trained, and whose memory is meant; auto is a CUDA device where torch sees one, else the CPU.",
    )
    reserve: Annotated[str, AfterValidator(_share)] = Field("5%", description='Kept back from memory: a share ("5%") or a size ("300MiB").')
    serve_memory: Annotated[str | int | None, AfterValidator(_size)] = Field(
        None, description="A second budget, for the tuned model as it is saved: weights, embeddings, head and adapters; null sets no limit."
    )
    levers: Annotated[tuple[Lever, ...], BeforeValidator(_levers)] = Field(
        (),
        description="What the plan may change to leave more memory for bits: micro_batch (the effective batch stays), checkpointing, "
        "loss_chunk, optim (Adam's state in 8 bits, on CUDA), head (an output head of its own in 8 bits), embeddings (on CUDA those that are no "
        "head stay in host memory), or all; what training says is where it begins.",
    )

    @property
    def total(self) -> int | None:
        """`memory` in bytes, where it is stated in bytes."""
        stated = budgets.read(self.memory)
        return stated if isinstance(stated, int) else None

    @property
    def usable(self) -> int | None:
        """`memory` less `reserve`, in bytes: what a plan may spend."""
        return None if self.total is None else self.total - sizes.share(self.reserve, self.total)

    @property
    def reserve_share(self) -> float:
        """`reserve` as a share of `memory`, from 0 to 1; 0 where there is no limit."""
        if self.memory is None:
            return 0.0
        if self.total is None:
            return sizes.share(self.reserve, 1 << 40) / (1 << 40)
        assert self.usable is not None
        return 1 - self.usable / self.total

    @model_validator(mode="after")
    def _something_is_left(self) -> Budget:
        if self.memory is not None and self.total is None and not (self.reserve.strip().endswith("%") or self.reserve.strip() == "0"):
            raise ValueError(
                f"reserve is {self.reserve} and memory is {self.memory}, which is no size: write reserve as a share, such as 5%"
            )
        self.usable
        return self


class Dataset(Section):
    """One file of rows."""

    path: Written = Field(
        min_length=1,
        description="A .jsonl, .json or .txt file; relative paths start at the current folder. In every path ~ and $NAME are written out.",
    )
    format: Literal["auto", "messages", "text"] = Field("auto", description="What a row holds; auto looks and says what it decided.")


class HeldOut(Section):
    """Rows that are never trained on."""

    path: Written = Field(min_length=1, description="A file of rows in the form of the training rows.")


class Data(Section):
    """What is learned from."""

    datasets: list[Dataset] = Field([], description="Files of training rows, in this order.")
    held_out: HeldOut | None = Field(None, description="A file of rows to evaluate on; null splits them off the training rows.")
    test_split_size: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="The share of the rows to hold out where held_out is null; null takes 0.02, but at least 20 rows, or a quarter of few.",
    )
    max_length: int = Field(1024, ge=2, description="Tokens of a row; longer rows are cut, and data check says how many.")
    assistant_only_loss: bool = Field(True, description="Learn the assistant's turns alone; false learns every token.")


class Constraints(Section):
    """What a plan must keep to beside its budgets; any of them makes the planner an integer program (pip install 'finebits[milp]')."""

    tie: list[list[str]] = Field(
        [],
        description="Groups of endings of names whose matrices share a format within a block of the model: [[q_proj, k_proj, v_proj]].",
    )
    max_formats: int | None = Field(None, ge=1, description="At most this many formats in one plan.")
    overhead: float | None = Field(None, ge=0, description="Scales take at most this share of the codes' bytes, such as 0.05.")

    def __bool__(self) -> bool:
        return bool(self.tie) or self.max_formats is not None or self.overhead is not None


class Quantization(Section):
    """What the planner may choose from."""

    candidates: list[Method] = Field(
        list(CANDIDATES),
        min_length=1,
        description="Number formats: short names such as nf4, nf3-b64, nf2-b64-bf16, int4-b128, int4a-b32 (method, bits, a for asymmetric, "
        "block, store of the scales) or mappings {paper: nf, bits: 3, block: 64, scale: bf16}.",
    )
    objective: Literal["weight", "output", "fisher", "kl"] = Field(
        "output",
        description="What a plan keeps small: the error of the weights; that error weighed by the inputs that meet it; by the Fisher "
        "information, matrices against each other too; or that, with KL predicted from variants that are really measured.",
    )
    planner: Method = Field("lagrange", description="How the budget is spent: a name of finebits list --shape plan.")
    constraints: Constraints = Field(Constraints(), description="What a plan must keep to beside its budgets.")
    locks: dict[str, Method | None] = Field(
        {},
        description="Modules (a whole name, its end, or a pattern with *) and the format that each must have, or null to keep it dense; "
        "they stand above overrides.",
    )
    quantizer: Method = Field(
        "rtn",
        description="How weights are rounded: a name of finebits list --shape quantizers, or a mapping {paper: gptq, scales: search}.",
    )
    pricing: Method | None = Field(
        None,
        description="How candidates are rounded while they are priced: rtn takes a part of gptq's time and needs no statistics of its own; "
        "null rounds them as the quantizer will.",
    )
    calibration_rows: int = Field(32, ge=1, description="Training rows that statistics are gathered from.")
    calibration: Literal["collect", "sweep"] = Field(
        "collect",
        description="What statistics are gathered from: collect takes one pass of the unquantized model; sweep quantizes block by block, and "
        "every block sees what the quantized blocks before it make of the rows.",
    )
    overrides: dict[str, Method | None] = Field(
        {},
        description="Regular expressions over whole module names, each with the format that these must have, or null to keep them dense. "
        "The last one that matches counts; one that matches nothing is an error.",
    )


class Adapter(Section):
    """What is trained over the frozen weights. Further keys are the settings of the method that paper names."""

    model_config = ConfigDict(extra="allow")

    paper: str = Field("lora", description="The adapter, by its name in finebits list --shape adapters.")
    rank: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("rank", "r"), description="Rank of the update (PEFT: r); null is the method's own."
    )
    alpha: float | None = Field(
        None,
        gt=0,
        validation_alias=AliasChoices("alpha", "lora_alpha"),
        description="The update is scaled by alpha / rank (PEFT: lora_alpha); null is the method's own.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(rank) instead.")
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        validation_alias=AliasChoices("dropout", "lora_dropout"),
        description="Dropout of the adapter's input (PEFT: lora_dropout).",
    )
    refine: list[Method] = Field(
        [],
        description="How the start is improved on the calibration rows against the unquantized model, in this order: names of finebits list "
        "--shape refine, or mappings {paper: apiq, epochs: 4}; those of a block run when the block is quantized, those of the model last.",
    )
    ranks: list[Annotated[int, Field(ge=1)]] | Method = Field(
        [],
        description="Ranks that the planner chooses from, matrix by matrix, by what the start mends; or what gives them out before, as many "
        "together as if all had the same: eva_ranks, lamda_pp, or a mapping {paper: eva_ranks, rho: 2}; none: rank everywhere.",
    )
    inits: list[Method] = Field([], description="Starts that the planner chooses from, matrix by matrix; none: init everywhere.")
    target_modules: str | list[str] = Field(
        "all-linear",
        min_length=1,
        description="all-linear (every linear layer but the head), a list of endings of names, or a regular expression over whole names.",
    )
    init: Annotated[Method | None, BeforeValidator(_hf_init)] = Field(
        None,
        validation_alias=AliasChoices("init", "init_lora_weights"),
        description="How it starts (PEFT: init_lora_weights): a name of finebits list --shape init, or a mapping {paper: loftq, steps: 5}; "
        "null is the adapter's own, which is loftq for lora.",
    )


class Training(Section):
    """The names of transformers.TrainingArguments and trl.SFTConfig."""

    num_train_epochs: float = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: int = Field(-1, ge=-1, description="Optimizer steps; if above 0 it decides instead of num_train_epochs.")
    learning_rate: float = Field(2e-4, gt=0, description="The highest learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = Field("linear", description="How the learning rate moves after the warm-up.")
    warmup_steps: float = Field(0.0, ge=0, description="Steps of linear warm-up; below 1, a share of all steps.")
    per_device_train_batch_size: int = Field(1, ge=1, description="Rows of one forward and backward pass on one device.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Passes whose gradients make one optimizer step.")
    gradient_checkpointing: bool = Field(True, description="Keep a block's input alone and compute the block again in the backward pass.")
    max_grad_norm: float = Field(1.0, ge=0, description="Longer gradients are cut to this norm; 0 leaves them.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of the adapters.")
    optim: Literal["adamw_torch", "adamw_bnb_8bit"] = Field(
        "adamw_torch", description="The optimizer; adamw_bnb_8bit holds its state in 8 bits (bitsandbytes, on CUDA)."
    )
    logging_steps: int = Field(10, ge=1, description="Steps between two lines of progress.")
    save_steps: int = Field(100, ge=1, description="Steps between two checkpoints.")
    seed: int = Field(42, ge=0, lt=2**32, description="Of the adapters' start, the order of the rows, and dropout.")
    report_to: str | list[str] = Field("none", description="Trackers of transformers: none, trackio, tensorboard, wandb, or a list.")
    loss_chunk: int = Field(256, ge=1, description="Tokens whose logits are held at a time when the loss is computed.")


class Evaluation(Section):
    """What is measured on the held-out rows."""

    compare: list[Literal["qlora", "zeros", "loftq", "lora16"]] = Field(
        [],
        description="Further runs of the same steps on the same batches: qlora (PEFT and bitsandbytes in a stock SFTTrainer, NF4 with double "
        "quantization), zeros and loftq (the same bits rounded to nearest, started so), lora16 (LoRA on the unquantized model).",
    )
    full_precision: bool = Field(
        True,
        description="Score the unquantized, untuned model too: what KL and agreement are measured against. Without it there are none, and no "
        "samples from before.",
    )
    samples: int = Field(3, ge=0, description="Held-out prompts to answer before and after.")
    limit: int | None = Field(None, ge=1, description="At most this many held-out rows; null takes all.")
    per_device_eval_batch_size: int = Field(4, ge=1, description="Rows of one forward pass.")


class Export(Section):
    """What is written for others to load."""

    to: list[Literal["adapter", "merged"]] = Field(
        ["adapter"], description="adapter: a PEFT folder with the base it belongs to; merged: one bfloat16 model without adapters."
    )
    verify: bool = Field(True, description="Load the export with transformers and peft alone and compare logits on held-out rows.")
    tolerance: float = Field(1e-3, gt=0, description="The largest difference of a logit at which the adapter export passes.")
    rows: int = Field(8, ge=1, description="Held-out rows that verification looks at.")


class Recipe(Section):
    """A whole recipe. `Recipe.load` reads one from a file; its parts are plain values."""

    recipe: Literal[1] = Field(1, description="Version of this layout.")
    model: Model = Field(description="Which model.")
    budget: Budget = Field(Budget(), description="What the job may take.")
    data: Data = Field(Data(), description="What is learned from.")
    quantization: Quantization = Field(Quantization(), description="What the planner may choose from.")
    adapter: Adapter = Field(Adapter(), description="What is trained over the frozen weights.")
    training: Training = Field(Training(), description="How it is trained, in the names of transformers and TRL.")
    rules: list[Method] = Field([], description="Training rules: names of finebits list --shape rules, or mappings {paper: adalora, …}.")
    evaluation: Evaluation = Field(Evaluation(), description="What is measured on the held-out rows.")
    export: Export = Field(Export(), description="What is written for others to load.")
    output_dir: Written = Field("runs/default", min_length=1, description="The folder that everything is written to.")

    @model_validator(mode="after")
    def _an_8_bit_optimizer_has_its_device(self) -> Recipe:
        if self.training.optim == "adamw_bnb_8bit" and self.budget.device != "cuda":
            raise ValueError(
                f"adamw_bnb_8bit works on CUDA alone, and budget.device is {self.budget.device}: take adamw_torch, or say cuda"
            )
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """The recipe at `path` with `overrides` ("training.learning_rate=1e-4") laid over it.

        Raises RecipeError with every mistake found.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (FileNotFoundError, NotADirectoryError):
            raise RecipeError([Problem(f"there is no recipe at {path}")]) from None
        except IsADirectoryError:
            raise RecipeError([Problem(f"{path} is a folder, and a recipe is a YAML file")]) from None
        except UnicodeDecodeError:
            raise RecipeError([Problem(f"{path} is not text in UTF-8, so it is no recipe")]) from None
        return cls.parse(text, str(path), overrides)

    @classmethod
    def parse(cls, text: str, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
        """The same from a text; `name` stands for the file in messages."""
        tree = Tree.read(Source(name, text))
        for override in overrides:
            tree.override(override)
        if tree.problems:
            raise RecipeError(tree.problems)
        try:
            recipe = cls.model_validate(tree.data)
        except ValidationError as e:
            raise RecipeError(_explain(e, tree)) from None
        problems = [problem for path, check in recipe._methods() for problem in _try(path, check, tree)]
        if problems:
            raise RecipeError(problems)
        return recipe

    def to_yaml(self) -> str:
        """Every key with its value; `Recipe.parse` gives the same recipe back."""
        return yaml.dump(self.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=140)

    def formats(self) -> list[Format]:
        """The candidates as format values, in order."""
        return [format_value(entry) for entry in self.quantization.candidates]

    def override_values(self) -> dict[str, Format | None]:
        """{regular expression over whole module names: format, or None to keep dense}, in order."""
        return {pattern: None if entry is None else format_value(entry) for pattern, entry in self.quantization.overrides.items()}

    def lock_values(self) -> dict[str, Format | None]:
        """{module: format, or None to keep dense}, in order."""
        return {name: None if entry is None else format_value(entry) for name, entry in self.quantization.locks.items()}

    def init_values(self) -> list[Init]:
        """The starts to choose from, if there is a choice."""
        return [self._start(entry) for entry in self.adapter.inits]

    def ranking_value(self) -> Ranking | None:
        """What gives out ranks; None where they are all the same, or chosen with the bits."""
        from finebits.plan._ranks import Ranking

        if isinstance(self.adapter.ranks, list):
            return None
        made = _method("plan", self.adapter.ranks)
        if not isinstance(made, Ranking):
            known = [n for n in registry.names("plan") if hasattr(registry.load("plan", n), "score")]
            raise Misfit(f"{type(made).__name__} gives out no ranks: take {' or '.join(known)}, or a list of ranks to choose from")
        return made

    def planner_value(self) -> Planner:
        """The planner with its settings; constraints make it the integer program."""
        from finebits.plan.milp import MILP

        made, c = _method("plan", self.quantization.planner), self.quantization.constraints
        if not c:
            return made
        if self.quantization.planner not in ("lagrange", "milp"):
            raise Misfit("quantization.constraints are kept by the planner milp: leave planner out, or give it these settings itself")
        return MILP(ties=tuple(map(tuple, c.tie)), formats=c.max_formats, overhead=c.overhead)

    def adapter_value(self) -> AdapterValue:
        """The adapter with its settings; those that the recipe leaves out are the method's own."""
        a = self.adapter
        given = {"rank": a.rank, "alpha": a.alpha, "scaling": "rslora" if a.use_rslora else None}
        given = {k: v for k, v in given.items() if v is not None}
        extra = a.model_extra or {}
        for key in extra:
            if key in _spellings(Adapter):
                raise Misfit(f"{key} says what another key says already: leave one out", key)
            if key in given:
                raise Misfit("use_rslora and scaling say the same thing twice: leave one out", key)
        return _method("adapters", {"paper": a.paper} | given | extra)

    def init_value(self) -> Init:
        """How the adapter starts."""
        return self._start(self.adapter.init)

    def _start(self, entry: Method | None) -> Init:
        """A start that the adapter admits; its own for None."""
        from finebits.init.base import check_start

        if entry is not None:
            _method("init", entry)  # what is wrong with it alone is said first
        adapter: Any = self.adapter_value()
        made = _method("init", adapter.own if entry is None else entry)
        try:
            check_start(adapter, made)
        except ValueError as e:
            raise Misfit(str(e)) from None
        return made

    def quantizer_value(self) -> Quantizer:
        """How weights are rounded."""
        return _method("quantizers", self.quantization.quantizer)

    def pricing_value(self) -> Quantizer | None:
        """How candidates are rounded while they are priced; None for the quantizer."""
        return None if self.quantization.pricing is None else _method("quantizers", self.quantization.pricing)

    def refine_values(self) -> list[Refine]:
        """How the start is improved."""
        return [_method("refine", entry) for entry in self.adapter.refine]

    def rule_values(self) -> list[Rule]:
        """The training rules, new ones at every call: rules hold state."""
        return [_method("rules", entry) for entry in self.rules]

    def _checked(self, entry: Method | None) -> None:
        """The start alone where the adapter is wrong itself, which is said of the adapter."""
        try:
            self.adapter_value()
        except ValueError:
            if entry is not None:
                _method("init", entry)
        else:
            self._start(entry)

    def _methods(self) -> Iterator[tuple[Path_, Callable[[], Any]]]:
        for i, entry in enumerate(self.quantization.candidates):
            yield ("quantization", "candidates", i), functools.partial(format_value, entry)
        for pattern, entry in self.quantization.overrides.items():
            yield ("quantization", "overrides", pattern), functools.partial(_override_value, pattern, entry)
        for name, entry in self.quantization.locks.items():
            yield ("quantization", "locks", name), functools.partial(format_value, entry if entry is not None else "nf4")
        yield ("quantization", "planner"), self.planner_value
        yield ("adapter", "ranks"), self.ranking_value
        for i, entry in enumerate(self.adapter.inits):
            yield ("adapter", "inits", i), functools.partial(self._checked, entry)
        yield ("adapter", "paper"), functools.partial(_class, "adapters", self.adapter.paper)
        yield ("adapter",), self.adapter_value
        yield ("adapter", "target_modules"), functools.partial(_pattern, self.adapter.target_modules)
        yield ("adapter", "init"), functools.partial(self._checked, self.adapter.init)
        yield ("quantization", "quantizer"), self.quantizer_value
        yield ("quantization", "pricing"), self.pricing_value
        for i, entry in enumerate(self.adapter.refine):
            yield ("adapter", "refine", i), functools.partial(_method, "refine", entry)
        for i, entry in enumerate(self.rules):
            yield ("rules", i), functools.partial(_method, "rules", entry)


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


def _pattern(pattern: str | list[str]) -> None:
    if isinstance(pattern, str):
        try:
            re.compile(pattern)
        except re.error as e:
            raise Misfit(f"{pattern!r} is not a regular expression: {e}") from None


def _override_value(pattern: str, entry: Method | None) -> None:
    _pattern(pattern)
    if entry is not None:
        format_value(entry)


class Misfit(ValueError):
    """A method or one of its settings (`key`) that finebits does not have."""

    code = 2

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


def _class(shape: str, paper: str) -> type:
    """A method's class; what is a setting of methods is none itself."""
    if paper in registry.family(shape):
        raise ValueError(f"{paper} is a setting of {shape} and no method of its own: {', '.join(registry.names(shape))}")
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
            near = _near(key, known)
            raise Misfit(f"{paper} has no setting {key!r}" + (f": did you mean {near}?" if near else f" (it has {', '.join(known)})"), key)
        if key in known and _plain(hints.get(key)):
            try:
                TypeAdapter(hints[key], config=ConfigDict(strict=True)).validate_python(value)
            except ValidationError as e:
                wanted = " or ".join(dict.fromkeys(_wanted(found) for found in e.errors()))
                raise Misfit(f"{paper}.{key} wants {wanted}, and {_came(value)} came", key) from None
    try:
        return registry.from_json(shape, data)
    except ValueError as e:
        raise Misfit(str(e)) from None


def _plain(hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return all(_plain(part) for part in typing.get_args(hint))
    return hint in (int, float, bool, str, type(None)) or typing.get_origin(hint) is Literal


# What other tools call these things.
SYNONYMS = {
    "base_model": "model.model_name_or_path",
    "checkpoint_dir": "model.model_name_or_path",
    "model": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "revision": "model.model_revision",
    "torch_dtype": "model.dtype",
    "vram": "budget.memory",
    "gpu_budget": "budget.memory",
    "dataset_name": "data.datasets",
    "dataset": "data.datasets",
    "hf_dataset": "data.datasets",
    "train_file": "data.datasets",
    "val_set_size": "data.test_split_size",
    "val_size": "data.test_split_size",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "block_size": "data.max_length",
    "completion_only_loss": "data.assistant_only_loss",
    "train_on_inputs": "data.assistant_only_loss",
    "train_on_completions": "data.assistant_only_loss",
    "mask_prompt": "data.assistant_only_loss",
    "load_in_4bit": "quantization.candidates",
    "load_in_8bit": "quantization.candidates",
    "bnb_4bit_quant_type": "quantization.candidates",
    "bnb_4bit_use_double_quant": "quantization.candidates",
    "quantization_bit": "quantization.candidates",
    "quantize": "quantization.candidates",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "lora_target": "adapter.target_modules",
    "lora_target_linear": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "num_epochs": "training.num_train_epochs",
    "epochs": "training.num_train_epochs",
    "iters": "training.max_steps",
    "lr": "training.learning_rate",
    "lr_scheduler": "training.lr_scheduler_type",
    "warmup_ratio": "training.warmup_steps",
    "micro_batch_size": "training.per_device_train_batch_size",
    "batch_size": "training.per_device_train_batch_size",
    "grad_accumulation_steps": "training.gradient_accumulation_steps",
    "activation_checkpointing": "training.gradient_checkpointing",
    "enable_activation_checkpointing": "training.gradient_checkpointing",
    "optimizer": "training.optim",
    "save_interval": "training.save_steps",
    "out_dir": "output_dir",
    "lora": "adapter",
    "peft": "adapter",
    "eval": "evaluation",
    "train": "training",
    "trainer": "training",
}
NOTES = {
    "warmup_ratio": "a number below 1 there is a share of all steps",
    "train_on_inputs": "it says the opposite",
    "train_on_completions": "it says the same",
}


def _sections() -> dict[str, type[Section]]:
    return {k: f.annotation for k, f in Recipe.model_fields.items() if isinstance(f.annotation, type) and issubclass(f.annotation, Section)}


def _spellings(section: type[BaseModel]) -> list[str]:
    """Every accepted spelling of a section's keys."""
    found = []
    for name, field in section.model_fields.items():
        alias = field.validation_alias
        found += [str(c) for c in alias.choices] if isinstance(alias, AliasChoices) else [name]
    return found


@functools.cache
def leaves() -> dict[str, tuple[str, ...]]:
    """{key: the sections that have it}, in every accepted spelling."""
    found: dict[str, tuple[str, ...]] = {}
    for name, section in _sections().items():
        for key in _spellings(section):
            found[key] = (*found.get(key, ()), name)
    return found


def _near(word: str, known: Iterable[str]) -> str:
    return next(iter(difflib.get_close_matches(word.lower(), list(known), 1, 0.7)), "")


def _suggest(path: Path_, more: Iterable[str] = ()) -> str:
    """What may have been meant by the unknown key at `path`."""
    *outer, key = path
    key = str(key).replace("-", "_")
    here: type[BaseModel] | None = Recipe
    if outer:
        here = (
            Dataset
            if outer[:2] == ["data", "datasets"]
            else HeldOut
            if outer[:2] == ["data", "held_out"]
            else _sections().get(str(outer[0]))
        )
    known = [*(_spellings(here) if here else ()), *more]
    place = SYNONYMS.get(key)
    if key in known:
        return f"did you mean {key}?"
    if place and not (outer and place.startswith(f"{outer[0]}.")):
        return f"finebits calls this {place}" + (f"; {NOTES[key]}" if key in NOTES else "")
    if place:
        return f"did you mean {place.split('.', 1)[1]}?" + (f" ({NOTES[key]})" if key in NOTES else "")
    if key in leaves():
        return f"it belongs into the section {' or '.join(leaves()[key])}"
    if near := _near(key, known):
        return f"did you mean {near}?"
    if near := _near(key, leaves()):
        return f"did you mean {leaves()[near][0]}.{near}?"
    return f"known here: {', '.join(known)}"


class RecipeError(ValueError):
    """Every mistake found in a recipe and its overrides."""

    code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(p) for p in problems))
        self.problems = list(problems)


class Tree:
    """Plain data, and for every key and value the place that it was written at."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.data: dict[str, Any] = {}
        self.keys: dict[Path_, Place] = {}
        self.values: dict[Path_, Place] = {}
        self.problems: list[Problem] = []

    @classmethod
    def read(cls, source: Source) -> Tree:
        tree = cls(source.name)
        data = tree._compose(source, source.text, 0, ())
        if isinstance(data, dict):
            tree.data = {
                k: v for k, v in data.items() if not (v is None and k in _sections())
            }  # a section whose keys are all commented out
        elif not tree.problems:
            came = "it is empty" if data is None else f"{_came(data)} came"
            tree.problems.append(
                Problem(f"{source.name} wants sections of keys, and {came}", None, "begin with model: and model_name_or_path:")
            )
        return tree

    def at(self, path: Path_) -> Place | None:
        """Where the value at `path`, or the nearest thing around it, was written."""
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path) if path else None

    def override(self, text: str) -> None:
        """Lay "section.key=value" over the data; the value is YAML."""
        source = Source("command line", text, numbered=False)
        dotted, sign, value = text.partition("=")
        if not sign:
            self.problems.append(Problem(f"an override is written section.key=value, and {text!r} came", Place(source, 0, 0, len(text))))
            return
        path = self._resolve(dotted, Place(source, 0, 0, len(dotted)))
        if path is None:
            return
        node = self._descend(path, Place(source, 0, 0, len(dotted)))
        if node is None:
            return
        for places in (self.keys, self.values):
            for old in [p for p in places if p[: len(path)] == path]:
                del places[old]
        self._drop_spellings(path, node)
        self.keys[path] = Place(source, 0, 0, len(dotted))
        new = self._compose(source, value, len(dotted) + 1, path)
        if isinstance(node, list) and isinstance(path[-1], int):
            node[path[-1] : path[-1] + 1] = [new]
        else:
            node[path[-1]] = new

    def _resolve(self, dotted: str, place: Place) -> Path_ | None:
        parts = dotted.strip().split(".")
        parts[0] = parts[0].replace("-", "_")
        if parts[0] not in Recipe.model_fields:
            sections = leaves().get(parts[0], ())
            if len(sections) > 1:
                where = " and ".join(f"{s}.{parts[0]}" for s in sections)
                self.problems.append(Problem(f"{parts[0]} is a key of more than one section: write {where}", place))
                return None
            parts = [*sections, *parts]
        if parts[:2] in (["quantization", "overrides"], ["quantization", "locks"]) and len(parts) > 2:
            return ("quantization", parts[1], ".".join(parts[2:]))  # an expression, or a module's name, stays as it is
        return tuple(int(p) if re.fullmatch("[0-9]{1,9}", p) else p.replace("-", "_") for p in parts)

    def _descend(self, path: Path_, place: Place) -> Any:
        """The container that the last part of `path` goes into; made where it is missing. None after a problem."""
        node: Any = self.data
        for i, part in enumerate(path[:-1]):
            here = path[: i + 1]
            child = node.get(part) if isinstance(node, dict) else node[part] if part < len(node) else None
            if child is None:
                child = _own_start(self.data) if here == ("adapter", "init") else _default(here)
                child = ([] if isinstance(path[i + 1], int) else {}) if child is None else child
                self.keys[here] = self.values[here] = place
            if isinstance(child, str) and isinstance(path[i + 1], str) and _names_method(here):
                child = {"paper": child}
            if isinstance(node, list):
                node[part : part + 1] = [child]
            else:
                node[part] = child
            node, wanted = child, path[i + 1]
            if not isinstance(node, list if isinstance(wanted, int) else dict):
                self.problems.append(Problem(f"{_dotted(here)} has no entry {wanted!r}: it is {_came(node)}", place))
                return None
            if isinstance(node, list) and wanted > len(node):
                self.problems.append(Problem(f"{_dotted(here)} has no entry {wanted}: the next one is {len(node)}", place))
                return None
        return node

    def _drop_spellings(self, path: Path_, node: Any) -> None:
        """An override of adapter.rank also replaces an r in the file."""
        if path[:1] == ("adapter",) and len(path) == 2:
            for field in Adapter.model_fields.values():
                alias = field.validation_alias
                if isinstance(alias, AliasChoices) and path[1] in alias.choices:
                    for choice in alias.choices:
                        node.pop(choice, None)

    def _compose(self, source: Source, text: str, shift: int, path: Path_) -> Any:
        node = compose(source, text, shift)
        if isinstance(node, Problem):
            self.problems.append(node)
            return None
        try:
            return None if node is None else self._build(node, source, shift, path, set())
        except yaml.MarkedYAMLError as e:
            self.problems.append(broken(source, e, shift))
        return None

    def _build(self, node: yaml.Node, source: Source, shift: int, path: Path_, seen: set[int]) -> Any:
        self.values[path] = place_of(node, source, shift)
        if id(node) in seen:
            self.problems.append(Problem("a recipe holds no YAML aliases: write the value out", self.keys.get(path, self.values[path])))
            return None
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            return Loader("").construct_object(node)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            self.problems.append(Problem(f"a recipe holds no YAML tags, and {node.tag} came", self.values[path]))
            return None
        if isinstance(node, yaml.SequenceNode):
            return [self._build(child, source, shift, (*path, i), seen) for i, child in enumerate(node.value)]
        data: dict[str, Any] = {}
        for key_node, child in node.value:
            key, place = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?", place_of(key_node, source, shift)
            if key in data:
                first = self.keys[(*path, key)]
                self.problems.append(Problem(f"{_dotted((*path, key))} is there twice, first in line {first.line + 1}", place))
                continue
            self.keys[(*path, key)] = place
            data[key] = self._build(child, source, shift, (*path, key), seen)
        return data


def _own_start(data: Mapping[str, Any]) -> str | None:
    """The name of the start that the adapter of a recipe takes by itself; None where there is no such adapter."""
    given = data.get("adapter", {})
    paper = given.get("paper", Adapter.model_fields["paper"].default)
    if paper not in registry.names("adapters"):
        return None
    cls = registry.load("adapters", paper)
    return cls(**{k: v for k, v in given.items() if k == "train" and k in inspect.signature(cls).parameters}).own


def _names_method(path: Path_) -> bool:
    """Whether a name at `path` stands for a method, whose settings can follow."""
    single = (
        ("adapter", "init"),
        ("adapter", "ranks"),
        ("quantization", "quantizer"),
        ("quantization", "pricing"),
        ("quantization", "planner"),
    )
    return path in single or path[:-1] in (("rules",), ("adapter", "refine"), ("adapter", "inits"))


def _default(path: Path_) -> Any:
    """What the value at `path` is where a recipe does not say; None for a section, within another one too."""
    section = _sections().get(str(path[0]))
    field = section.model_fields.get(str(path[1])) if section and len(path) == 2 else None
    found = copy.deepcopy(field.default) if field and not field.is_required() else None
    return None if isinstance(found, Section) else found


def _dotted(path: Iterable[str | int]) -> str:
    return ".".join(map(str, path))


def _came(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return repr(value) if isinstance(value, (str, int, float)) else str(value)


TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "dict": "a mapping",
    "model": "a section of keys",
    "dataclass": "a section of keys",
    "finite_number": "a finite number",
}
BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "of at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "of at most"),
}


def _wanted(error: Mapping[str, Any]) -> str:
    """What pydantic wanted, in words."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in BOUNDS:
        key, word = BOUNDS[kind]
        return f"a number {word} {context[key]:g}"
    if kind == "literal_error":
        return re.sub(r"'", "", context["expected"])
    if kind in ("string_too_short", "too_short"):
        return "something" if kind == "string_too_short" else "at least one entry"
    return TYPES.get(kind) or TYPES.get(kind.split("_")[0]) or error["msg"]


def _explain(errors: ValidationError, tree: Tree) -> list[Problem]:
    """Pydantic's errors as problems: one a place, deepest first, union branches joined."""
    found: dict[Path_, list[Any]] = {}
    problems: list[tuple[Path_, Problem]] = []
    for error in errors.errors():
        path: Path_ = ()
        for part in error["loc"]:  # union branches leave their names in between
            path = (*path, part) if (*path, part) in tree.values else path
        if error["type"] == "missing":
            at = tree.keys.get(path) or tree.at(path)
            message = f"{_dotted(error['loc'])} is missing" if at else f"{tree.name} has no {_dotted(error['loc'])}"
            problems.append((path, Problem(message, at, f"add {error['loc'][-1]}: …")))
        elif error["type"] == "extra_forbidden":
            problems.append((path, Problem(f"{_dotted(path)} is not a known key", tree.keys.get(path), _suggest(path))))
        else:
            found.setdefault(path, []).append(error)
    for path, several in found.items():
        if any(other != path and other[: len(path)] == path for other in found):
            continue  # a branch of a union that another branch got further than
        own = [e for e in several if e["type"] == "value_error"]
        came = several[0]["input"]
        if own:
            message, note = f"{_dotted(path)}: {own[0]['ctx']['error']}", ""
        else:
            wanted = list(dict.fromkeys(_wanted(e) for e in several))
            message = f"{_dotted(path)} wants {' or '.join(wanted)}, and {_came(came)} came"
            choices = [c for e in several if e["type"] == "literal_error" for c in re.findall(r"'([^']+)'", e["ctx"]["expected"])]
            near = _near(came, choices) if isinstance(came, str) else ""
            if wanted[0] == "true or false" and str(came).lower() in ("yes", "on", "no", "off"):
                near = "true" if str(came).lower() in ("yes", "on") else "false"
            quotes = wanted[0] == "text" and came is not None and not isinstance(came, (list, dict))
            note = f"did you mean {near}?" if near else "put it in quotes" if quotes else ""
        problems.append((path, Problem(message, tree.at(path), note)))
    order = {id(p): (p.place.line if p.place and p.place.source.numbered else 1 << 30) for _, p in problems}
    return [p for _, p in sorted(problems, key=lambda item: order[id(item[1])])]


def _try(path: Path_, check: Callable[[], Any], tree: Tree) -> list[Problem]:
    """The problem, if any, of one method value."""
    try:
        check()
    except ValueError as e:
        key = getattr(e, "key", None)
        if path == ("adapter",) and key == "paper":
            return []  # reported at adapter.paper
        if path == ("adapter",) and key == "scaling" and (*path, key) not in tree.keys:
            key = "use_rslora"
        spellings = [s for s in ({"rank": ["rank", "r"], "alpha": ["alpha", "lora_alpha"]}.get(str(key)) or [key])]
        place = next((tree.keys[(*path, s)] for s in spellings if s is not None and (*path, s) in tree.keys), None)
        if path == ("adapter",) and place is not None and "has no setting" in str(e) and key not in Adapter.model_fields:
            return [Problem(f"adapter.{key} is not a known key", place, _suggest((*path, str(key)), _settings(tree)))]
        if path[:2] in (("quantization", "overrides"), ("quantization", "locks")):
            place = place or tree.keys.get(path)
        return [Problem(f"{_dotted(path)}: {e}", place or tree.at(path) or tree.keys.get(path))]
    return []


def _settings(tree: Tree) -> list[str]:
    """The settings of the adapter that a recipe names."""
    paper = tree.data.get("adapter", {}).get("paper", Adapter.model_fields["paper"].default)
    return list(inspect.signature(registry.load("adapters", paper)).parameters)
