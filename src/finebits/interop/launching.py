"""One stage of a job in several processes, started by accelerate: its words are those that `accelerate launch` takes."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from finebits.errors import Invalid

if TYPE_CHECKING:
    from finebits.interop.sharding import Shards

SEVERAL = ("multi_gpu", "use_fsdp", "use_deepspeed", "use_megatron_lm", "tpu", "config_file", "use_parallelism_config")
OTHERS = ("use_megatron_lm", "use_parallelism_config")  # that split weights in ways of their own
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
    if splits := _splits(found):
        raise Invalid(
            f"{splits} splits a model's weights in a way that knows none in codes: take --use_fsdp --fsdp_version 2 "
            "(recipes/accelerate/fsdp2_one_machine.yaml), which does, or leave it out, and every process holds all of them"
        )
    shards(found)
    if found.cpu and (found.num_processes or 1) > 1:
        raise Invalid("--cpu starts several processes by MPI alone: leave it out and set budget.device to cpu")
    config = _configuration(found)[1]
    said = any(getattr(found, name, None) for name in SEVERAL) or config.get("distributed_type") in ("FSDP", "DEEPSPEED")
    if not said and (found.num_processes or 1) > 1:
        found.multi_gpu = True
    if device == "cpu":
        found.num_machines, found.mixed_precision, found.dynamo_backend = found.num_machines or 1, found.mixed_precision or "no", "no"
    if (
        found.main_process_port is None
        and not config.get("main_process_port")
        and (config.get("num_machines") or found.num_machines or 1) == 1
    ):
        found.main_process_port = 0  # a free one: accelerate's own, 29500, belongs to whoever came first
    return found


def shards(found: Any) -> Shards | None:
    """How the words, or the configuration that accelerate would read, say that a model is to be cut by FSDP; None where they do not. Raises
    Invalid where that is not how it is cut here."""
    config = _configuration(found)[1]
    if not found.use_fsdp and (_others(found) or config.get("distributed_type") != "FSDP"):
        return None
    from finebits.interop.sharding import asked

    named = {k if k.startswith("fsdp") else f"fsdp_{k}": v for k, v in (config.get("fsdp_config") or {}).items()}
    words = {k: v for k, v in vars(found).items() if k.startswith("fsdp_")}
    words |= {"mixed_precision": found.mixed_precision or config.get("mixed_precision")}
    return asked(words | {k: v for k, v in named.items() if k not in getattr(found, "nondefault", ())})


def check_installed(found: Any) -> None:
    """Raises Invalid where the words, or the configuration, ask for DeepSpeed and it is not there: accelerate looks for it when it starts
    processes, which is when all else of a job is done."""
    wanted = found.use_deepspeed or (
        not found.use_fsdp and not _others(found) and _configuration(found)[1].get("distributed_type") == "DEEPSPEED"
    )
    if wanted and importlib.util.find_spec("deepspeed") is None:
        raise Invalid("DeepSpeed is asked for, and it is not installed: pip install deepspeed, or take --use_fsdp --fsdp_version 2")


def count(found: Any) -> int:
    """How many processes the words, or the configuration that accelerate would read, start; 0 where neither says.

    >>> count(parsed(["--num_processes", "2"], "cpu"))
    2
    """
    return int(found.num_processes or _configuration(found)[1].get("num_processes") or 0)


def _others(found: Any) -> bool:
    """Do the words say how processes work together, so that accelerate asks no configuration?"""
    return any(getattr(found, name, False) for name in ("multi_gpu", "use_deepspeed", "tpu", *OTHERS))


def _splits(found: Any) -> str:
    """What asks for shards of the weights that are not made here: a word, or a key of the configuration that accelerate would read; nothing
    where none does."""
    if word := next((name for name in OTHERS if getattr(found, name, False)), None):
        return f"--{word}"
    if found.use_deepspeed and found.zero_stage == WHOLE_TO + 1:
        return f"--zero_stage {found.zero_stage}"
    file, config = _configuration(found)
    kind = str(config.get("distributed_type", ""))
    if kind in ("MEGATRON_LM", "TP") or config.get("parallelism_config"):
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
