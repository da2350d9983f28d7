"""What is installed here, on what, which kernels are chosen, and what mends what is wrong. Nothing is said that was not looked at."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from finebits import __version__
from finebits.cli._screen import GREEN, PLAIN, RED, YELLOW, Screen

ORDER = 100
ROOM = 5 << 30  # bytes on a disk, below which there is a warning: a small model with its runs
Row = dict[str, str]


def doctor(
    context: typer.Context,
    bench: Annotated[bool, typer.Option("--bench", help="Also time the kernels beside dense layers, for some seconds.")] = False,
    paste: Annotated[bool, typer.Option("--paste", help="As a block to paste into an issue, without names, homes and tokens.")] = False,
) -> None:
    """Versions, devices and kernels that run here, with fixes.

    The exit code is 1 if something cannot work.
    """
    screen: Screen = context.obj
    rows = [*_versions(), *_devices(), *_places(), *_kernels(), *(_timings() if bench else ())]
    from finebits.run.machine import scrubbed

    failed = [row for row in rows if row["mark"] == "fail"]
    screen.code = 1 if failed else 0

    def human() -> str:
        ink = {"ok": GREEN, "warn": YELLOW, "fail": RED}
        painted = screen.colour and not paste
        marks = {mark: f"{ink[mark]}{mark:<5}{PLAIN}" if painted else f"{mark:<5}" for mark in ink}
        wide = max(len(row["what"]) for row in rows)
        lines = []
        for row in rows:
            lines.append(f" {marks[row['mark']]} {row['what']:<{wide}}  {row['found']}")
            lines += [f" {'':<5} {'':<{wide}}  fix: {row['fix']}"] if row.get("fix") else []
        lines.append(f" {len(failed)} problem{'' if len(failed) == 1 else 's'}")
        lines += [f" all of it: {line}"] if (line := _together(failed)) else []
        text = "\n".join(lines)
        return f"```text\n{scrubbed(text)}\n```" if paste else f"{text}\n To paste into an issue: finebits doctor --paste"

    screen.show(rows, human, "\n".join(f"{row['what']} {row['found']}" for row in failed))
    if failed:
        raise typer.Exit(1)


def _row(mark: str, what: str, found: str, fix: str = "") -> Row:
    return {"mark": mark, "what": what, "found": found} | ({"fix": fix} if fix else {})


def _together(failed: Sequence[Row]) -> str:
    """One line of pip for all that pip mends; empty where one line is enough as it stands."""
    lines = [row["fix"].removeprefix(PIP) for row in failed if row.get("fix", "").startswith(PIP)]
    return PIP + " ".join(lines) if len(lines) > 1 else ""


PIP = "pip install -U "


def _wanted() -> dict[str, tuple[str, str]]:
    """{package: (the oldest that will do, the extra that asks for it)}; where finebits runs from a folder and is not installed, nobody says the
    former."""
    from finebits.messages import EXTRAS
    from finebits.run.machine import TESTED

    try:
        lines = importlib.metadata.requires("finebits") or []
    except importlib.metadata.PackageNotFoundError:
        return {package: ("0", EXTRAS.get(package, "")) for package in TESTED}
    parsed = [re.match(r"([A-Za-z0-9_-]+)>=([0-9.]+)(?:; extra == \"(\w+)\")?", line) for line in lines]
    return {m[1]: (m[2], m[3] or "") for m in parsed if m is not None and m[3] != "test"}


def _versions() -> Iterator[Row]:
    from finebits.run.machine import TESTED, numbers, version

    yield _row("ok", "finebits", __version__)
    yield _row("ok", "python", f"{platform.python_version()}   {platform.platform()}")
    for package, (least, extra) in _wanted().items():
        installed, (oldest, newest) = version(package), TESTED.get(package, ("", ""))
        line = f'{PIP}"{package}>={least}"' if least != "0" else f"{PIP}{package}"
        tested = f"tested {oldest} - {newest}" if oldest != newest else f"tested {newest}"
        if installed is None:
            why = f"not installed; it is part of finebits[{extra}]" if extra else "not installed, and nothing runs without it"
            yield _row("warn" if extra else "fail", package, why, f"pip install 'finebits[{extra}]'" if extra else line)
        elif numbers(installed) < numbers(least):
            yield _row("fail", package, f"{installed}; finebits needs {least} or newer", line)
        elif newest and (numbers(installed)[:2] > numbers(newest)[:2] or numbers(installed) < numbers(oldest)):
            major, minor = numbers(newest)[:2]
            fix = f'if something fails: {PIP}"{package}>={oldest},<{major}.{minor + 1}"'
            age = "newer" if numbers(installed) > numbers(newest) else "older"
            yield _row("warn", package, f"{installed}; {age} than any that was tested ({tested.removeprefix('tested ')})", fix)
        else:
            yield _row("ok", package, f"{installed} ({tested})" if newest else installed)


def _devices() -> Iterator[Row]:
    import torch

    from finebits.run import machine
    from finebits.sizes import show

    held, cores = machine.memory(), machine.cores()
    memory = f"   {show(held)} memory" if held is not None else ""
    capability = torch.backends.cpu.get_cpu_capability()
    yield _row("ok", "cpu", f"{machine.processor()}, {cores} cores, {torch.get_num_threads()} threads of torch, {capability}{memory}")
    if torch.get_num_threads() > cores:
        found = f"torch computes with {torch.get_num_threads()} threads on {cores} cores, which slows all of them down"
        yield _row("warn", "threads", found, f"export OMP_NUM_THREADS={cores}")
    devices = machine.devices()
    if not devices:
        built = f"torch is built for CUDA {torch.version.cuda} and sees no device" if torch.version.cuda else "torch is built without it"
        yield _row("ok", "cuda", f"none: {built}")
    for i, d in enumerate(devices):
        name = f"{d['name']}   {d['capability']}   {show(d['free'])} of {show(d['total'])} free"
        yield _row("ok", f"cuda:{i}", f"{name}   bf16 {'yes' if d['bf16'] else 'no'}")


def _places() -> Iterator[Row]:
    """Disks that runs and models are written to, and what the environment says of them."""
    from finebits.sizes import show

    home = os.environ.get("HF_HOME")
    for what, path in (("this folder", Path.cwd()), *([("HF_HOME", Path(home).expanduser())] if home else [])):
        there = next((p for p in (path, *path.parents) if p.exists()), path)
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield _row("warn", what, f"{path} cannot be written to", f"chmod u+w {there}, or work elsewhere")
        elif free < ROOM:
            yield _row("warn", what, f"{show(free)} free on its disk", "finebits runs clean takes checkpoints of finished runs away")
        else:
            yield _row("ok", what, f"{show(free)} free on its disk")
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        yield _row("ok", "HF_HUB_OFFLINE", "is set: models and data come from folders and from what was fetched before")


def _kernels() -> Iterator[Row]:
    import torch

    from finebits import kernels
    from finebits.kernels import cpu
    from finebits.run import bench

    for body, reason in kernels.bodies():
        runs = f"runs here, with {cpu.LEVELS[cpu.level()]}" if body is cpu and reason is None else "runs here"
        yield _row("ok" if reason is None else "warn", "kernels", f"{body.name}: {reason or runs}")
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for device in devices:
        for task in kernels.JOBS:
            by_body: dict[str, list[int]] = {}
            for bits in bench.BITS:
                by_body.setdefault(kernels.chosen(task, device, bits).name, []).append(bits)
            chosen = ", ".join(f"{name} for {'/'.join(map(str, widths))} bits" for name, widths in by_body.items())
            yield _row("ok", f"{task}", f"on {device.type}: {chosen}")
        tried = bench.agreement(device)
        wrong = [t for t in tried if not t["ok"]]
        if wrong:
            said = ", ".join(f"{t['job']} at {t['bits']} bits by {t['error']:.1e} ({t['body']})" for t in wrong)
            fix = f"export {kernels.VARIABLE}=reference, and tell us: finebits doctor --paste"
            yield _row("fail", "self-test", f"on {device.type}: off the reference: {said}", fix)
        elif tried:
            most = max(t["error"] for t in tried)
            yield _row("ok", "self-test", f"on {device.type}: largest error {most:.1e} against the reference")
        else:
            yield _row("ok", "self-test", f"on {device.type}: the reference runs, there is nothing to hold against it")
    setting = os.environ.get(kernels.VARIABLE)
    if setting:
        said = f"is {setting}, so the choice above is not the fastest" if setting != "auto" else "is auto"
        yield _row("warn", kernels.VARIABLE, said, f"unset {kernels.VARIABLE}" if setting != "auto" else "")


def _timings() -> Iterator[Row]:
    import torch

    from finebits.run import bench

    for device in [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]:
        for t in bench.timings(device):
            size = f"{t['side']} x {t['side']}, {t['bits']} bits, {t['dtype']}"
            took = f"{1e3 * t['ours']:.3f} ms, dense {1e3 * t['dense']:.3f} ms, ratio {t['ratio']:.2f}"
            yield _row("ok", "bench", f"on {device.type}: {t['what']}, {size}: {t['body']} {took}")
