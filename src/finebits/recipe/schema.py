"""The keys of a recipe: their types, their defaults, and what they mean.

Sections only group; the keys inside are transformers', TRL's and PEFT's own names where these exist.
"""

from __future__ import annotations

import copy
import functools
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from finebits import registry, sizes
from finebits.errors import Invalid
from finebits.export._mixes import MIXES
from finebits.optim import base as optimizers
from finebits.plan import budget as budgets
from finebits.plan.candidates import CANDIDATES
from finebits.recipe import values
from finebits.recipe.source import Keypath

Method = str | dict[str, Any]

if TYPE_CHECKING:  # no checker lists a folder
    Form = Task = Optimizer = Target = str
else:
    Form = Literal["auto", *registry.names("data.forms")]
    Task = Literal["auto", *registry.names("tasks")]
    Optimizer = Literal[*optimizers.known()]
    Target = Literal[*registry.names("export"), *(f"gguf:{mix}" for mix in MIXES)]


class Section(BaseModel):
    """Keys that belong together; a key that is not listed is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


Written = Annotated[str, AfterValidator(values.path)]  # of a file or a folder


class Model(Section):
    """Which model."""

    model_name_or_path: Written = Field(
        min_length=1,
        description="A local folder in Hugging Face form, a hub id, a .gguf file, or package:NAME for the one .gguf file or model folder "
        "inside an installed Python package.",
    )
    model_revision: str | None = Field(default=None, description="Branch, tag or commit of a hub id; null takes the newest.")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto", description="What is computed in; auto is bfloat16 where the device computes in it, else float32."
    )
    attn_implementation: Literal["auto", "sdpa", "eager"] = Field(
        default="auto", description="The attention of transformers; auto leaves it the choice."
    )


Lever = Literal["micro_batch", "checkpointing", "loss_chunk", "optim", "head", "embeddings"]


def _levers(value: Any) -> Any:
    """ "all" is every lever; a list of a file is a tuple here."""
    return typing.get_args(Lever) if value in ("all", ["all"]) else tuple(value) if isinstance(value, list) else value


class Budget(Section):
    """What the job may take."""

    memory: Annotated[str | int | None, BeforeValidator(values.budget)] = Field(
        default=None,
        description='What every phase of the job may take above the bare process: "400MiB", "8GiB", "6 GB", bytes; or an average number of '
        'bits of a linear weight, scales included ("3.1 bits"), the same plan on every machine; or a share of what the job would take with one '
        'format for all matrices ("80% of nf4"; bf16 is 16 bits). null sets no limit.',
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="cpu",
        description="Where the model is trained, and whose memory is meant; auto is a CUDA device where torch sees one, else the CPU.",
    )
    reserve: Annotated[str, AfterValidator(values.share)] = Field(
        default="5%", description='Kept back from memory: a share ("5%") or a size ("300MiB").'
    )
    serve_memory: Annotated[str | int | None, AfterValidator(values.size)] = Field(
        default=None,
        description="A second budget, for the tuned model as it is saved: weights, embeddings, head and adapters; null sets no limit.",
    )
    levers: Annotated[tuple[Lever, ...], BeforeValidator(_levers)] = Field(
        default=(),
        description="What the plan may change to leave more memory for bits: micro_batch (the effective batch stays), checkpointing, "
        "loss_chunk, optim (Adam's state in 8 bits, on CUDA), head (an output head of its own in 8 bits), embeddings (on CUDA those that are no "
        "head stay in host memory), or all; what training says is where it begins.",
    )

    @property
    def total(self) -> int | None:
        """`memory` in bytes, where it is stated in bytes.

        >>> Budget(memory="400MiB").total, Budget(memory="3.1 bits").total
        (419430400, None)
        """
        stated = budgets.read(self.memory)
        return stated if isinstance(stated, int) else None

    @property
    def usable(self) -> int | None:
        """`memory` less `reserve`, in bytes: what a plan may spend.

        >>> Budget(memory="100MiB", reserve="5%").usable >> 20, Budget(memory="100MiB", reserve="10MiB").usable >> 20
        (95, 90)
        """
        return None if self.total is None else self.total - sizes.share(self.reserve, self.total)

    @property
    def reserve_share(self) -> float:
        """`reserve` as a share of `memory`, from 0 to 1; 0 where there is no limit.

        >>> Budget(memory="100MiB", reserve="10MiB").reserve_share, Budget().reserve_share
        (0.1, 0.0)
        """
        if self.memory is None:
            return 0.0
        if self.total is None:
            return sizes.share(self.reserve, 1 << 40) / (1 << 40)
        assert self.usable is not None
        return 1 - self.usable / self.total

    @model_validator(mode="after")
    def _something_is_left(self) -> Budget:
        if self.memory is not None and self.total is None and not (self.reserve.strip().endswith("%") or self.reserve.strip() == "0"):
            raise Invalid(f"reserve is {self.reserve} and memory is {self.memory}, which is no size: write reserve as a share, such as 5%")
        self.usable
        return self


class Dataset(Section):
    """One file of rows."""

    path: Written = Field(
        min_length=1,
        description="A .jsonl, .json or .txt file; relative paths start at the current folder. In every path ~ and $NAME are written out.",
    )
    format: Form = Field(
        default="auto",
        description="The form of a row, by its name in finebits list --shape data.forms; auto looks and says what it decided.",
    )


class HeldOut(Section):
    """Rows that are never trained on."""

    path: Written = Field(min_length=1, description="A file of rows in the form of the training rows.")


class Data(Section):
    """What is learned from."""

    datasets: list[Dataset] = Field(default=[], description="Files of training rows, in this order.")
    held_out: HeldOut | None = Field(default=None, description="A file of rows to evaluate on; null splits them off the training rows.")
    test_split_size: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="The share of the rows to hold out where held_out is null; null takes 0.02, but at least 20 rows, or a quarter of few.",
    )
    max_length: int = Field(default=1024, ge=2, description="Tokens of a row; longer rows are cut, and data check says how many.")
    assistant_only_loss: bool = Field(default=True, description="Learn the assistant's turns alone; false learns every token.")


class Constraints(Section):
    """What a plan must keep to beside its budgets; any of them makes the planner an integer program (pip install 'finebits[milp]')."""

    tie: list[list[str]] = Field(
        default=[],
        description="Groups of endings of names whose matrices share a format within a block of the model: [[q_proj, k_proj, v_proj]].",
    )
    max_formats: int | None = Field(default=None, ge=1, description="At most this many formats in one plan.")
    overhead: float | None = Field(default=None, ge=0, description="Scales take at most this share of the codes' bytes, such as 0.05.")

    def __bool__(self) -> bool:
        return bool(self.tie) or self.max_formats is not None or self.overhead is not None


class Quantization(Section):
    """What the planner may choose from."""

    candidates: list[Method] = Field(
        default=list(CANDIDATES),
        min_length=1,
        description="Number formats: short names such as nf4, nf3-b64, nf2-b64-bf16, int4-b128, int4a-b32 (method, bits, a for asymmetric, "
        "block, store of the scales) or mappings {paper: nf, bits: 3, block: 64, scale: bf16}.",
    )
    embeddings: list[Method | None] = Field(
        default=[],
        description="Number formats that the table of input embeddings may have, and with it a head that is the same tensor, written as "
        "candidates are: [null, int8-b64-fp16, nf4-b64-bf16]; null offers it dense; none: it is dense. Rounded by the quantizer where that "
        "needs no statistics, else to nearest.",
    )
    objective: Literal["weight", "output", "fisher", "kl"] = Field(
        default="output",
        description="What a plan keeps small: the error of the weights; that error weighed by the inputs that meet it; by the Fisher "
        "information, matrices against each other too; or that, with KL predicted from variants that are really measured.",
    )
    planner: Method = Field(default="lagrange", description="How the budget is spent: a name of finebits list --shape planners.")
    constraints: Constraints = Field(default=Constraints(), description="What a plan must keep to beside its budgets.")
    locks: dict[str, Method | None] = Field(
        default={},
        description="Modules (a whole name, its end, or a pattern with *) and the format that each must have, or null to keep it dense; "
        "they stand above overrides.",
    )
    quantizer: Method = Field(
        default="rtn",
        description="How weights are rounded: a name of finebits list --shape quantizers, or a mapping {paper: gptq, scales: search}.",
    )
    pricing: Method | None = Field(
        default=None,
        description="How candidates are rounded while they are priced: rtn takes a part of gptq's time and needs no statistics of its own; "
        "null rounds them as the quantizer will.",
    )
    calibration_rows: int = Field(default=32, ge=1, description="Training rows that statistics are gathered from.")
    calibration: Literal["collect", "sweep"] = Field(
        default="collect",
        description="What statistics are gathered from: collect takes one pass of the unquantized model; sweep quantizes block by block, and "
        "every block sees what the quantized blocks before it make of the rows.",
    )
    overrides: dict[str, Method | None] = Field(
        default={},
        description="Regular expressions over whole module names, each with the format that these must have, or null to keep them dense. "
        "The last one that matches counts; one that matches nothing is an error.",
    )


class Adapter(Section):
    """What is trained over the frozen weights. Further keys are the settings of the method that paper names."""

    model_config = ConfigDict(extra="allow")

    paper: str = Field(default="lora", description="The adapter, by its name in finebits list --shape adapters.")
    folder: Written | None = Field(
        default=None,
        validation_alias=AliasChoices("folder", "lora_model_dir"),
        description="A PEFT folder to go on from, which says method, ranks, alphas and modules; dropout and rules are the recipe's.",
    )
    rank: int | None = Field(
        default=None,
        ge=1,
        validation_alias=AliasChoices("rank", "r"),
        description="Rank of the update (PEFT: r); null is the method's own.",
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        validation_alias=AliasChoices("alpha", "lora_alpha"),
        description="The update is scaled by alpha / rank (PEFT: lora_alpha); null is the method's own.",
    )
    choose: list[Method] = Field(
        default=[],
        description="Adapters that the planner chooses from, in place of paper and its settings: names, or mappings {paper: dora, rank: 8}, "
        "each with its own init where it names one. Taken is the one beside which the budget leaves the weights the least loss, the first of "
        "equals: what an adapter learns is not in it.",
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead.")
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        validation_alias=AliasChoices("dropout", "lora_dropout"),
        description="Dropout of the adapter's input (PEFT: lora_dropout).",
    )
    refine: list[Method] = Field(
        default=[],
        description="How the start is improved on the calibration rows against the unquantized model, in this order: names of finebits list "
        "--shape refine, or mappings {paper: apiq, epochs: 4}; those of a block run when the block is quantized, those of the model last.",
    )
    ranks: list[Annotated[int, Field(ge=1)]] | Method = Field(
        default=[],
        description="Ranks that the planner chooses from, matrix by matrix, by what the start mends; or what gives them out before, as many "
        "together as if all had the same: eva_ranks, lamda_pp, or a mapping {paper: eva_ranks, rho: 2}; none: rank everywhere.",
    )
    inits: list[Method] = Field(default=[], description="Starts that the planner chooses from, matrix by matrix; none: init everywhere.")
    target_modules: str | list[str] | None = Field(
        default=None,
        min_length=1,
        description="all-linear (every linear layer but the head), a list of endings of names, or a regular expression over whole names; null "
        "plans all-linear, with the adapter where its paper puts it (lora: over all; ia3 and bottleneck: finebits list --shape adapters). A "
        "table of embeddings that is named (embed_tokens) is adapted too, from a start at zero, by adapters whose update is a product (lora).",
    )
    exclude_modules: str | list[str] | None = Field(
        default=None, description="Of these, modules to leave alone: a list of endings of names, or a regular expression over whole names."
    )
    layers_to_transform: int | list[int] | None = Field(
        default=None, description="The blocks whose modules are meant, by their numbers from 0; null takes all."
    )
    layers_pattern: str | list[str] | None = Field(
        default=None,
        description="What stands before the number of a block in names of modules (layers, h); null takes whatever stands before the first "
        "number.",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default={},
        description="Other ranks by regular expressions over ends of module names; the first that matches counts, one that matches nothing "
        "is an error, and alpha stays as it is.",
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default={}, description="Other alphas, in the same way.")
    modules_to_save: list[str] | None = Field(
        default=None,
        description="Endings of names of modules that are trained themselves, in the dtype of the model, and neither quantized nor adapted: "
        "lm_head, embed_tokens, norm. Where the head is the embeddings' own tensor, the two stay one.",
    )
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] | dict[str, list[Annotated[int, Field(ge=0)]]] | None = Field(
        default=None,
        description="Words of the table of input embeddings that are trained beside the adapter, by their numbers, and nothing else of it: new "
        "special tokens; a head that is the same tensor follows. PEFT's mapping with the table's name is read too.",
    )
    ensure_weight_tying: bool = Field(
        default=False,
        description="A head that is the same tensor as an adapted table of embeddings follows its adapter; false leaves the head as it was, "
        "and a merged export gives it a weight of its own.",
    )
    init: Annotated[Method | None, BeforeValidator(values.init)] = Field(
        default=None,
        validation_alias=AliasChoices("init", "init_lora_weights"),
        description="How it starts (PEFT: init_lora_weights): a name of finebits list --shape init, or a mapping {paper: loftq, steps: 5}; "
        "null is the adapter's own, which is loftq for lora.",
    )


class Training(Section):
    """The names of transformers.TrainingArguments and trl.SFTConfig."""

    num_train_epochs: float = Field(default=1.0, gt=0, description="Passes over the training rows.")
    max_steps: int = Field(default=-1, ge=-1, description="Optimizer steps; if above 0 it decides instead of num_train_epochs.")
    learning_rate: float = Field(default=2e-4, gt=0, description="The highest learning rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = Field(default="linear", description="How the learning rate moves after the warm-up.")
    warmup_steps: float = Field(default=0.0, ge=0, description="Steps of linear warm-up; below 1, a share of all steps.")
    per_device_train_batch_size: int = Field(default=1, ge=1, description="Rows of one forward and backward pass on one device.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Passes whose gradients make one optimizer step.")
    gradient_checkpointing: bool = Field(
        default=True, description="Keep a block's input alone and compute the block again in the backward pass."
    )
    max_grad_norm: float = Field(default=1.0, ge=0, description="Longer gradients are cut to this norm; 0 leaves them.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of the adapters.")
    optim: Annotated[Optimizer | dict[str, Any], AfterValidator(values.optimizer)] = Field(
        default="adamw_torch",
        description="The optimizer, by its name in finebits list --shape optim or by transformers' name, which is the one that is kept, or a "
        "mapping {paper: galore, …}.",
    )
    logging_steps: int = Field(default=10, ge=1, description="Steps between two lines of progress.")
    save_steps: int = Field(default=100, ge=1, description="Steps between two checkpoints.")
    seed: int = Field(default=42, ge=0, lt=2**32, description="Of the adapters' start, the order of the rows, and dropout.")
    report_to: str | list[str] = Field(
        default="none", description="Trackers of transformers: none, trackio, tensorboard, wandb, or a list."
    )
    loss_chunk: int = Field(default=256, ge=1, description="Tokens whose logits are held at a time when the loss is computed.")


class Evaluation(Section):
    """What is measured on the held-out rows."""

    compare: list[Literal["qlora", "zeros", "loftq", "lora16"]] = Field(
        default=[],
        description="Further runs of the same steps on the same batches: qlora (PEFT and bitsandbytes in a stock SFTTrainer, NF4 with double "
        "quantization), zeros and loftq (the same bits rounded to nearest, started so), lora16 (LoRA on the unquantized model).",
    )
    full_precision: bool = Field(
        default=True,
        description="Score the unquantized, untuned model too: what KL and agreement are measured against. Without it there are none, and no "
        "samples from before.",
    )
    samples: int = Field(default=3, ge=0, description="Held-out prompts to answer before and after.")
    limit: int | None = Field(default=None, ge=1, description="At most this many held-out rows; null takes all.")
    per_device_eval_batch_size: int = Field(default=4, ge=1, description="Rows of one forward pass.")


class Requantize(Section):
    """Base and adapter as one quantized model."""

    format: Method = Field(description="The number format of the merged weights, as among quantization.candidates.")
    quantizer: Method = Field(
        default={"paper": "gptq", "scales": "search"},
        description="How they are rounded: a name of finebits list --shape quantizers, or a mapping; rtn merges and rounds to nearest.",
    )
    refine: list[Method] = Field(
        default=[{"paper": "apiq", "epochs": 2, "scales": 2e-3}],
        description="What then brings every block closer to the tuned one: of finebits list --shape refine what moves scales of blocks.",
    )


class Export(Section):
    """What is written for others to load."""

    to: list[Target] = Field(
        default=["adapter"],
        description="Names of finebits list --shape export. adapter is a PEFT folder with the dense base it belongs to (a plain LoRA "
        "where the update is low-rank), peft the same in the method's own form, merged one bfloat16 model without adapters; those of a layout "
        "hold the base in its codes, and the plan's formats must be ones that it holds as they are; gguf:q4_k_m and the like one merged file.",
    )
    verify: bool = Field(default=True, description="Read the export with the libraries that it is for and compare logits on held-out rows.")
    tolerance: float = Field(default=1e-3, gt=0, description="The largest difference of a logit at which an export passes, but for merged.")
    rows: int = Field(default=8, ge=1, description="Held-out rows that verification looks at.")
    requantize: Annotated[Requantize | None, BeforeValidator(values.requantize)] = Field(
        default=None,
        description="A format, or a mapping {format: int4-b32-bf16, quantizer: gptq}: targets that hold codes get one quantized model without "
        "an adapter, rounded once more against the tuned model's outputs on calibration rows. null keeps the plan's codes and the adapter.",
    )


class Keys(Section):
    """Every key of a recipe."""

    recipe: Literal[1] = Field(default=1, description="Version of this layout.")
    task: Task = Field(
        default="auto",
        description="What the model is tuned for, a name of finebits list --shape tasks; auto is what its architecture is for.",
    )
    model: Model = Field(description="Which model.")
    budget: Budget = Field(default=Budget(), description="What the job may take.")
    data: Data = Field(default=Data(), description="What is learned from.")
    quantization: Quantization = Field(default=Quantization(), description="What the planner may choose from.")
    adapter: Adapter = Field(default=Adapter(), description="What is trained over the frozen weights.")
    training: Training = Field(default=Training(), description="How it is trained, in the names of transformers and TRL.")
    rules: list[Method] = Field(
        default=[], description="Training rules: names of finebits list --shape rules, or mappings {paper: adalora, …}."
    )
    evaluation: Evaluation = Field(default=Evaluation(), description="What is measured on the held-out rows.")
    export: Export = Field(default=Export(), description="What is written for others to load.")
    output_dir: Written = Field(default="runs/default", min_length=1, description="The folder that everything is written to.")

    @model_validator(mode="after")
    def _an_optimizer_has_its_device(self) -> Keys:
        entry = self.training.optim
        name = entry if isinstance(entry, str) else entry.get("paper")
        try:
            devices = (optimizers.named(entry) if isinstance(entry, str) else registry.from_json("optim", entry)).devices
        except (ValueError, TypeError):  # what is wrong with the entry is said elsewhere
            return self
        if len(devices) == 1 and self.budget.device not in devices:
            (only,) = devices
            raise Invalid(
                f"training.optim is {name}, which works on {only.upper()} alone, and budget.device is {self.budget.device}: take "
                f"adamw, or say {only}"
            )
        return self


def sections() -> dict[str, type[Section]]:
    """{name: section}, in order.

    >>> [*sections()][:4]
    ['model', 'budget', 'data', 'quantization']
    """
    return {k: f.annotation for k, f in Keys.model_fields.items() if isinstance(f.annotation, type) and issubclass(f.annotation, Section)}


def spelled(section: type[BaseModel]) -> dict[str, list[str]]:
    """{key: its accepted spellings} of a section.

    >>> spelled(Adapter)["rank"]
    ['rank', 'r']
    """
    aliases = {name: field.validation_alias for name, field in section.model_fields.items()}
    return {name: [str(c) for c in a.choices] if isinstance(a, AliasChoices) else [name] for name, a in aliases.items()}


def spellings(section: type[BaseModel]) -> list[str]:
    """Every accepted spelling of a section's keys.

    >>> spellings(HeldOut), "lora_alpha" in spellings(Adapter)
    (['path'], True)
    """
    return [one for known in spelled(section).values() for one in known]


@functools.cache
def leaves() -> dict[str, tuple[str, ...]]:
    """{key: the sections that have it}, in every accepted spelling.

    >>> leaves()["max_length"], leaves()["r"]
    (('data',), ('adapter',))
    """
    by_key: dict[str, tuple[str, ...]] = {}
    for name, section in sections().items():
        for key in spellings(section):
            by_key[key] = (*by_key.get(key, ()), name)
    return by_key


def default(path: Keypath) -> Any:
    """What the value at `path` is where a recipe does not say; None for a section, within another one too.

    >>> default(("data", "max_length")), default(("data",)) is None
    (1024, True)
    """
    section = sections().get(str(path[0]))
    field = section.model_fields.get(str(path[1])) if section and len(path) == 2 else None
    value = copy.deepcopy(field.default) if field and not field.is_required() else None
    return None if isinstance(value, Section) else value
