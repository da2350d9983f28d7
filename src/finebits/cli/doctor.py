"""What is installed here, on what, and which kernels are chosen."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator

import typer

from finebits import __version__
from finebits.cli._screen import GREEN, PLAIN, RED, YELLOW, Screen

ORDER = 100


def doctor(context: typer.Context) -> None:
    """Versions, devices, and the kernels that run here."""
    screen: Screen = context.obj
    rows = [*_versions(), *_devices(), *_kernels()]

    def human() -> str:
        ink = {"ok": GREEN, "warn": YELLOW, "fail": RED}
        marks = {mark: f"{ink[mark]}{mark:<5}{PLAIN}" if screen.colour else f"{mark:<5}" for mark in ink}
        bad = sum(row["mark"] == "fail" for row in rows)
        wide = max(len(row["what"]) for row in rows)
        lines = [f" {marks[row['mark']]} {row['what']:<{wide}}  {row['found']}" for row in rows]
        return "\n".join([*lines, f" {bad} problem{'' if bad == 1 else 's'}"])

    screen.show(rows, human, "\n".join(f"{row['what']} {row['found']}" for row in rows if row["mark"] == "fail"))


def _row(mark: str, what: str, found: str) -> dict[str, str]:
    return {"mark": mark, "what": what, "found": found}


def _numbers(version: str) -> tuple[int, ...]:
    """1.16.0+cpu -> (1, 16, 0), and 1.16 the same."""
    numbers = [int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit()]
    return (*numbers, 0, 0, 0)[:3]


def _versions() -> Iterator[dict[str, str]]:
    yield _row("ok", "finebits", __version__)
    yield _row("ok", "python", f"{platform.python_version()}   {platform.platform()}")
    try:
        wanted_ones = importlib.metadata.requires("finebits") or []
    except importlib.metadata.PackageNotFoundError:
        yield _row("warn", "packages", "not checked: finebits runs from a folder and is not installed (pip install -e FOLDER)")
        return
    for line in wanted_ones:
        wanted = re.match(r"([A-Za-z0-9_-]+)>=([0-9.]+)(?:; extra == \"(\w+)\")?", line)
        if wanted is None or wanted[3] == "test":
            continue
        package, least, extra = wanted.groups()
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            why = f"not installed: pip install 'finebits[{extra}]'" if extra else "not installed, and nothing runs without it"
            yield _row("warn" if extra else "fail", package, why)
            continue
        old = _numbers(installed) < _numbers(least)
        yield _row("fail" if old else "ok", package, f"{installed}; finebits needs {least} or newer" if old else installed)


def _devices() -> Iterator[dict[str, str]]:
    import torch

    from finebits.sizes import show

    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f"   {show(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))} memory"
    capability = torch.backends.cpu.get_cpu_capability()
    yield _row("ok", "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {capability}{memory}")
    if not torch.cuda.is_available():
        yield _row("ok", "cuda", "none")
        return
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        name = f"{torch.cuda.get_device_name(i)}   sm_{major}{minor}   {show(free)} of {show(total)} free"
        yield _row("ok", f"cuda:{i}", f"{name}   bf16 {'yes' if torch.cuda.is_bf16_supported() else 'no'}")


def _kernels() -> Iterator[dict[str, str]]:
    import torch

    from finebits import kernels
    from finebits.kernels import cpu

    for body, reason in kernels.bodies():
        runs = f"runs here, with {cpu.LEVELS[cpu.level()]}" if body is cpu and reason is None else "runs here"
        yield _row("ok" if reason is None else "warn", "kernels", f"{body.name}: {reason or runs}")
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device in devices:
        for task in kernels.JOBS:
            by_body: dict[str, list[int]] = {}
            for bits in (2, 3, 4, 8):
                by_body.setdefault(kernels.chosen(task, device, bits).name, []).append(bits)
            chosen = ", ".join(f"{name} for {'/'.join(map(str, widths))} bits" for name, widths in by_body.items())
            yield _row("ok", f"{task}", f"on {device.type}: {chosen}")
    setting = os.environ.get(kernels.VARIABLE)
    if setting:
        yield _row("warn", kernels.VARIABLE, f"is {setting}, so the choice above is not the fastest" if setting != "auto" else "is auto")
