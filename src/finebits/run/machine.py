"""What finebits runs on: libraries with the versions that its tests have met, processors, memory, devices."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import re
import socket
from pathlib import Path
from typing import Any

from finebits import __version__

TESTED = {  # package: the oldest and the newest that the tests have passed with: constraints.txt, and make supported
    "torch": ("2.13", "2.13"),
    "numpy": ("2.4", "2.4"),
    "safetensors": ("0.8", "0.8"),
    "transformers": ("5.20.2", "5.23"),
    "accelerate": ("1.10.1", "1.15"),
    "huggingface_hub": ("1.31", "2.4"),
    "gguf": ("0.17.1", "0.19"),
    "trl": ("1.5.1", "1.16"),
    "peft": ("0.21", "0.21"),
    "datasets": ("4.7", "5.2"),
}
PART = ("triton", "bitsandbytes", "tokenizers")  # not asked for, and part of what a run computes where they are there

SECRET = re.compile(r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|xox[bp]-|AKIA|glpat-)[A-Za-z0-9_-]{8,}|(?<=://)[^/@\s]+@")


def version(package: str) -> str | None:
    """Of an installed package; None where it is not.

    >>> version("no-such-package") is None
    True
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """finebits, Python, and every package that has a say in what a run computes.

    >>> list(versions())[:3]
    ['finebits', 'python', 'torch']
    """
    found = {package: version(package) for package in (*TESTED, *PART)}
    return {"finebits": __version__, "python": platform.python_version()} | {k: v for k, v in found.items() if v is not None}


def memory() -> int | None:
    """Bytes of the machine's memory, or of what its container may have; None where the system does not tell.

    >>> memory() is None or memory() > 1 << 20
    True
    """
    told = []
    if hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        told.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        told.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # there is no such limit
        pass
    return min(told, default=None)


def processor() -> str:
    """The name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def cores() -> int:
    """Those that this process may use.

    >>> cores() >= 1
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def devices() -> list[dict[str, Any]]:
    """The CUDA devices: name, capability, bytes free and in all, and whether they compute in bfloat16."""
    import torch

    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        with torch.cuda.device(i):
            wide = torch.cuda.is_bf16_supported()
        found.append(
            {"name": torch.cuda.get_device_name(i), "capability": f"sm_{major}{minor}", "free": free, "total": total, "bf16": wide}
        )
    return found


def machine(device: str) -> dict[str, Any]:
    """What a run of `device` has computed on: nothing here names its owner.

    >>> sorted(machine("cpu"))
    ['capability', 'cores', 'cpu', 'device', 'memory', 'system', 'threads']
    """
    import torch

    about: dict[str, Any] = {"system": platform.platform(), "cpu": processor(), "cores": cores(), "memory": memory()}
    about |= {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(), "device": device}
    return about | ({"devices": [{k: d[k] for k in ("name", "capability", "total")} for d in devices()]} if device == "cuda" else {})


def numbers(version: str) -> tuple[int, ...]:
    """1.16.0+cpu -> (1, 16, 0), and 1.16 the same; what follows the digits of a part (2.0rc1) is left out.

    >>> numbers("1.16.0+cpu"), numbers("1.16"), numbers("2.0rc1")
    ((1, 16, 0), (1, 16, 0), (2, 0, 0))
    """
    found = [int(m[0]) for part in version.split("+")[0].split(".")[:3] if (m := re.match(r"\d+", part))]
    return (*found, 0, 0, 0)[:3]


def scrubbed(text: str) -> str:
    """Without what names a person or a machine, or opens a door: homes, user and host names, tokens, passwords in addresses.

    >>> scrubbed(f"{Path.home()}/a hf_abcdefghijkl https://me:pw@host/x")
    '~/a … https://…host/x'
    """
    home = os.path.expanduser("~")
    for word, instead in ((home, "~"), (os.path.realpath(home), "~")):
        text = text.replace(word, instead) if len(word) > 1 else text
    text = SECRET.sub("…", text)
    text = re.sub(r"(/(?:home|Users)/|[A-Z]:\\Users\\)[^/\\\s]+", r"\1USER", text)
    names = [(_user(), "USER"), (socket.gethostname(), "HOST")]
    for name, instead in names:
        if len(name) > 2 and name not in ("root", "localhost"):
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])", instead, text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return ""
