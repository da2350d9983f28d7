"""One stage of a job in several processes, started by accelerate: its words are those that `accelerate launch` takes."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from finebits.errors import Invalid

SEVERAL = ("multi_gpu", "use_fsdp", "use_deepspeed", "use_megatron_lm", "tpu", "config_file", "use_parallelism_config")
SHARDS = ("use_fsdp", "use_megatron_lm", "use_parallelism_config")
WHOLE_TO = 2  # the last stage of ZeRO that leaves weights whole
INTERRUPTED = 130


def parsed(words: Sequence[str], device: str, module: str = "finebits.run", arguments: Sequence[str] = ()) -> Any:
    """accelerate's own reading of the words. Raises Invalid where it does not know one, or where they ask for what nothing here trains in.

    >>> parsed(["--num_processes", "2"], "cpu").multi_gpu  # gloo ranks, which accelerate starts as it starts those of GPUs
    True
    """
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    refused = _Refused()
    parser.error = refused  # type: ignore[method-assign]  # pyright: ignore[reportAttributeAccessIssue]
    found = parser.parse_args([*words, "--module", module, *arguments])
    if not isinstance(found.training_script, str) or found.training_script != module:
        raise Invalid(f"behind -- stand accelerate's arguments, and {found.training_script} is none: see accelerate launch --help")
    if shards := _shards(found):
        raise Invalid(
            f"{shards} splits a model's weights, and weights in codes are held whole by every process here: leave it out, which gives "
            "DistributedDataParallel (recipes/accelerate/ddp_one_machine.yaml); what is too large for one device wants a smaller budget.memory"
        )
    if found.cpu and (found.num_processes or 1) > 1:
        raise Invalid("--cpu starts several processes by MPI alone: leave it out and set budget.device to cpu")
    if not any(getattr(found, name, None) for name in SEVERAL) and (found.num_processes or 1) > 1:
        found.multi_gpu = True
    if device == "cpu":
        found.num_machines, found.mixed_precision, found.dynamo_backend = found.num_machines or 1, found.mixed_precision or "no", "no"
    config = _configuration(found)[1]
    if (
        found.main_process_port is None
        and not config.get("main_process_port")
        and (config.get("num_machines") or found.num_machines or 1) == 1
    ):
        found.main_process_port = 0  # a free one: accelerate's own, 29500, belongs to whoever came first
    return found


def _shards(found: Any) -> str:
    """What asks for shards of the weights: a word, or a key of the configuration that accelerate would read; nothing where none does."""
    if word := next((name for name in SHARDS if getattr(found, name, False)), None):
        return f"--{word}"
    if found.use_deepspeed and found.zero_stage == WHOLE_TO + 1:
        return f"--zero_stage {found.zero_stage}"
    file, config = _configuration(found)
    kind = str(config.get("distributed_type", ""))
    if kind in ("FSDP", "MEGATRON_LM", "TP") or config.get("parallelism_config"):
        return f"distributed_type: {kind} of {file}"
    stage = (config.get("deepspeed_config") or {}).get("zero_stage", 0) if kind == "DEEPSPEED" else 0
    return f"zero_stage: {stage} of {file}" if stage == WHOLE_TO + 1 else ""


def _configuration(found: Any) -> tuple[str, dict[str, Any]]:
    """The configuration that accelerate would read, and its name: the one that is named, or the one that `accelerate config` has left."""
    from accelerate.commands.config.config_args import default_config_file

    file = found.config_file or ("" if found.cpu else default_config_file)
    if not Path(file).is_file():
        if found.config_file:
            raise Invalid(f"--config_file names {file}, and there is no such file: give one as accelerate config writes it")
        return "", {}
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))  # which is JSON's too
    except (UnicodeDecodeError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        raise Invalid(f"{file} is no configuration of accelerate, which is a mapping in YAML or JSON: write one by accelerate config")
    return str(file), config


class _Refused:
    def __call__(self, message: str) -> Any:
        raise Invalid(f"behind -- stand accelerate's arguments: {message}; see accelerate launch --help")


def launch(words: Sequence[str], device: str, arguments: Sequence[str], module: str = "finebits.run") -> int:
    """Start a module as accelerate is told to and wait; the exit code of the first process that failed."""
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(parsed(words, device, module, arguments))
    except ChildFailedError as e:
        code = e.get_first_failure()[1].exitcode
        return INTERRUPTED if -code in (signal.SIGTERM, signal.SIGINT) else code
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 1
    return 0
