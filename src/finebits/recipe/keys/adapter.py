"""The keys of what is trained over the frozen weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field

from finebits.recipe import values
from finebits.recipe.keys.base import Method, Section, Written


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
    init: Annotated[Method | None, BeforeValidator(values.init, json_schema_input_type=bool | Method | None)] = Field(
        default=None,
        validation_alias=AliasChoices("init", "init_lora_weights"),
        description="How it starts (PEFT: init_lora_weights): a name of finebits list --shape init, or a mapping {paper: loftq, steps: 5}; "
        "null is the adapter's own, which is loftq for lora.",
    )
