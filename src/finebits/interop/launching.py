"""One stage of a job in several processes, started by accelerate: its words are those that `accelerate launch` takes."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

from finebits.errors import Invalid

SEVERAL = ("multi_gpu", "use_fsdp", "use_deepspeed", "use_megatron_lm", "tpu", "config_file", "use_parallelism_config")
SHARDS = ("use_fsdp", "use_megatron_lm", "use_parallelism_config")
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
    if shards := next((name for name in SHARDS if getattr(found, name, False)), None):
        raise Invalid(
            f"--{shards} splits a model's weights, and weights in codes are held whole by every process here: leave it out, which gives "
            "DistributedDataParallel"
        )
    if found.cpu and (found.num_processes or 1) > 1:
        raise Invalid("--cpu starts several processes by MPI alone: leave it out and set budget.device to cpu")
    if not any(getattr(found, name, None) for name in SEVERAL) and (found.num_processes or 1) > 1:
        found.multi_gpu = True
    if device == "cpu":
        found.num_machines, found.mixed_precision, found.dynamo_backend = found.num_machines or 1, found.mixed_precision or "no", "no"
    return found


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
