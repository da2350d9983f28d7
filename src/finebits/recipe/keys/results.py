"""The keys of what is measured and of what is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from finebits import registry
from finebits.export._mixes import MIXES
from finebits.recipe import values
from finebits.recipe.keys.base import Method, Section

if TYPE_CHECKING:  # no checker lists a folder
    Target = str
else:
    Target = Literal[*registry.names("export"), *(f"gguf:{mix}" for mix in MIXES)]


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
        description="What then brings it closer to the tuned model: of finebits list --shape refine what moves scales, of single blocks or, as "
        "{paper: efficient_qat, scope: model}, of all together, which takes the memory of a training step.",
    )


class Runtimes(Section):
    """Environments of programs that serve models."""

    llama_cpp: str | None = Field(
        default=None, description="The python of an environment with llama-cpp-python; --verify also looks for .venv-llama."
    )
    vllm: str | None = Field(default=None, description="The python of an environment with vLLM; --verify also looks for .venv-vllm.")


class Export(Section):
    """What is written for others to load."""

    to: list[Target] = Field(
        default=["adapter"],
        description="Names of finebits list --shape export; left out, the first of adapter, peft, packed and merged that can hold what is "
        "trained, or none. adapter is a PEFT folder with the dense base it belongs to (a plain LoRA "
        "where the update is low-rank), peft the same in the method's own form, merged one bfloat16 model without adapters; those of a layout "
        "hold the base in its codes, and the plan's formats must be ones that it holds as they are; gguf:q4_k_m and the like one merged file.",
    )
    verify: bool = Field(default=True, description="Read the export with the libraries that it is for and compare logits on held-out rows.")
    tolerance: float = Field(default=1e-3, gt=0, description="The largest difference of a logit at which an export passes, but for merged.")
    rows: int = Field(default=8, ge=1, description="Held-out rows that verification looks at.")
    importance: bool = Field(
        default=True,
        description="Merged GGUF files of few bits are rounded so that columns count as their inputs on calibration rows are large, as "
        "llama.cpp's importance matrix has it; false counts all alike.",
    )
    runtimes: Runtimes = Field(
        default=Runtimes(),
        description="Verification also asks the programs that serve a target, each in a process of the environment that is named here: "
        "llama.cpp for gguf and its mixes, vLLM for adapter, merged, compressed_tensors and gptq.",
    )
    push_to_hub: bool = Field(
        default=False,
        description="Push every target to the Hugging Face hub once it is verified, with the account of hf auth login or HF_TOKEN.",
    )
    hub_model_id: str | None = Field(
        default=None,
        description="The repository, as NAME/MODEL; of several targets each has its own (NAME/MODEL-gguf), and a base beside an adapter too "
        "(NAME/MODEL-base).",
    )
    hub_private_repo: bool = Field(default=True, description="Whether repositories that are made are private.")
    requantize: Annotated[Requantize | None, BeforeValidator(values.requantize, json_schema_input_type=str | Requantize | None)] = Field(
        default=None,
        description="A format, or a mapping {format: int4-b32-bf16, quantizer: gptq}: targets that hold codes get one quantized model without "
        "an adapter, rounded once more against the tuned model's outputs on calibration rows. null keeps the plan's codes and the adapter.",
    )
