"""The output folder of a recipe: the name of every file in it, and what made each part.

`run.json` is its record: the recipe's settings, a fingerprint of the rows, the plan, and for every part (the full-precision scores, a run's
start, a tuned run, the export) the hash of all that it depends on, beside the sha256 of its files. A part counts only under that hash. Beside
that it says what the run was made of and on (`about`), who worked at it from when to when (`sessions`), and how it stands (`status`). A run
that is finished is changed by nothing but --resume with more to do, `finebits export`, and --overwrite; the next run moves it to a folder of its
own. Files of others are never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finebits import artefacts, files
from finebits.errors import Invalid
from finebits.files import Occupied, write_text

if TYPE_CHECKING:
    from finebits.plan.base import Plan

SCHEMA = "finebits.run/1"
RECIPE, PLAN, RECORD, DATA, PROBE, PAGE = "recipe.yaml", "plan.json", "run.json", "data.json", "probe.json", "report.html"
EVALUATION, EXPORTED, SAMPLES, EVENTS = "evaluation.json", "export.json", "samples.json", "events.jsonl"
TOKENS = "tokens.safetensors"  # the rows as the model sees them
SCORES, STATES, START_SCORES, MEMORY = "scores.npz", "states.safetensors", "start.npz", "memory.json"
PEAKS, CHOICES, REFINED, PEER = "peaks.json", "choices.json", "refined.json", "peer.json"
COMPARISON = "comparison.html"  # beside run folders
RUNS, TARGETS, PLANS = "runs", "export", "plans"  # folders
EVALUATIONS = "evaluations"  # and that of what `finebits eval` measured beside the run's own evaluation
STARTED, MODEL, CHECKPOINTS = "start", "model", "checkpoints"  # folders of a run
FULL, EXPORT = "full", "export"  # parts; the others are NAME/start and NAME of every run
RUNNING, FINISHED, FAILED, INTERRUPTED, KILLED = "running", "finished", "failed", "interrupted", "killed"  # how a run stands

WHOLE = (RECIPE, PLAN, RECORD, DATA, TOKENS, PROBE, EVALUATION, EXPORTED, SAMPLES, PAGE)
OF_RUN = (EVENTS, SCORES, STATES, START_SCORES, MEMORY, PEAKS, CHOICES, REFINED, PEER, SAMPLES)
HEAD = "# Every key of this run's recipe with its value; written by finebits.\n"
MARKS = {
    RECIPE: HEAD,
    PLAN: "finebits.plan/",
    DATA: '"preview"',
    PROBE: "finebits.probe/",
    PAGE: "finebits",
    RECORD: SCHEMA,
    TOKENS: "finebits.tokens/",
}
EVALUATED = "finebits.evaluation/"  # the mark of such a file
FREE = (
    "output_dir",
    "evaluation",
    "export",
    "data.datasets",
    "data.held_out",
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
)
LENGTH = ("training.max_steps", "training.num_train_epochs")  # beside FREE (rows have their own fingerprint), what --resume may change


class RunFolder:
    """`folder / NAME` is a path inside it.

    >>> str(RunFolder("runs/a") / "plan.json")
    'runs/a/plan.json'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.handles: list[int] = []  # open files that hold its lock

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __str__(self) -> str:
        return str(self.path)

    def ours(self, *names: str) -> None:
        """Raise Occupied if one of these files, where no run is, was not written by finebits."""
        for name in names if not self.holds() else ():
            files.ours(self / name, MARKS.get(name, SCHEMA))

    def run(self, name: str) -> Path:
        """The folder of one run of the recipe, or of a part that is none.

        >>> str(RunFolder("runs/a").run("qera"))
        'runs/a/runs/qera'
        """
        return self.path / RUNS / name

    def target(self, name: str) -> Path:
        """The folder that a target is exported into.

        >>> str(RunFolder("runs/a").target("gguf")), str(RunFolder("runs/a").target("gguf:q6_k"))
        ('runs/a/export/gguf', 'runs/a/export/gguf-q6_k')
        """
        return self.path / TARGETS / name.replace(":", "-")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made if need be; processes that are handed `handles` hold it as well. One that nothing was written to is not left
        behind. Raises Occupied."""
        made = list(itertools.takewhile(lambda p: not p.exists(), (self.path, *self.path.parents)))
        with files.writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with files.locked(self.path, "is in use by another run of finebits: wait for it, or name another output_dir") as handle:
            self.handles.append(handle)
            try:
                yield
            finally:
                self.handles.remove(handle)
                with contextlib.suppress(OSError):  # there is something in it
                    for place in made:
                        place.rmdir()

    # The record ------------------------------------------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """What run.json says; empty where no run has begun. Raises ValueError where it cannot be read.

        >>> RunFolder("/nowhere").record()
        {}
        """
        path = self / RECORD
        if not path.exists():
            return {}
        way = "name another output_dir, or begin anew with --overwrite"
        try:
            record = files.read_json(path)
        except Invalid as e:
            raise Invalid(f"{str(e).rpartition(':')[0] or e}: {way}") from None
        parts = record.get("parts", {})
        known = all(
            isinstance(record.get(k, kind()), kind) for k, kind in (("parts", dict), ("settings", dict), ("data", str), ("plan", str))
        )
        known = known and all(isinstance(p, dict) and isinstance(p.get("made_by"), str) and "files" in p for p in parts.values())
        if record.get("schema") != SCHEMA or not known:
            raise Invalid(f"{path} is not of schema {SCHEMA}: {way}")
        return record

    def _write(self, record: Mapping[str, Any]) -> None:
        write_text(self / RECORD, json.dumps(record, indent=1) + "\n")

    def holds(self) -> bool:
        """Is there a run, finished or not, also one from before there were records?

        >>> RunFolder("/nowhere").holds()
        False
        """
        return (self / RECORD).exists() or bool(self.made())

    def made(self) -> list[Path]:
        """The folders of its runs and other parts; each has had something to tell."""
        return [p.parent for p in (self / RUNS).glob(f"*/{EVENTS}")]

    def begin(
        self, settings: Mapping[str, Any], data: str, plan: Plan, parts: Mapping[str, str], about: Mapping[str, Any] | None = None
    ) -> None:
        """Take the folder for a run, or go on with its own: of the parts that are there those count on that `parts` would make alike. `about`
        is what it is made of and on."""
        before = self.record()
        old = before.get("parts", {})
        for part, entry in old.items():
            if parts.get(part) != entry["made_by"]:
                self._drop(part, wanted=part in parts)
        still_valid = {part: old[part] for part in old if self.has(part, parts.get(part, ""))}
        record = {"schema": SCHEMA, "status": RUNNING, "settings": settings, "data": data, "plan": plan.hash, "finished": False}
        record |= {"about": dict(about)} if about is not None else {}
        self._write(record | {"sessions": before.get("sessions", []), "parts": still_valid})

    def has(self, part: str, made_by: str) -> bool:
        """Is the part there, made by just that, its files as they were written?

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = RunFolder(place)
        ...     folder.begin({}, "rows", fb.Plan({}), {"full": "a1"})
        ...     folder.done("full", "a1")
        ...     print(folder.has("full", "a1"), folder.has("full", "b2"), folder.record()["finished"])
        True False False
        """
        entry = self.record().get("parts", {}).get(part)
        return entry is not None and entry["made_by"] == made_by and entry["files"] == self._stamp(part)

    def done(self, part: str, made_by: str) -> None:
        """Note a part that is complete."""
        record = self.record()
        self._write(record | {"parts": record["parts"] | {part: {"made_by": made_by, "files": self._stamp(part)}}})

    def finish(self) -> None:
        """Nothing is left to do."""
        self._write(self.record() | {"finished": True})

    def note(self, **facts: Any) -> None:
        """Put facts into the record."""
        self._write(self.record() | facts)

    @property
    def status(self) -> str:
        """How the run of the record stands; killed, where it says that somebody works at it and nobody holds the folder; empty where there is
        none.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = RunFolder(place)
        ...     folder.begin({}, "rows", fb.Plan({}), {})
        ...     with folder.locked():
        ...         print(folder.status)
        ...     print(folder.status)
        running
        killed
        """
        record = self.record()
        if not record:
            return ""
        if record.get("finished"):
            return FINISHED
        status = str(record.get("status", "unfinished"))
        return status if status != RUNNING or files.held(self.path) else KILLED

    def adopt(self, other: RunFolder, part: str, made_by: str) -> bool:
        """Take over a part from another folder, if that has the one which is made by just this. Large files are shared where the disk allows it
        (none is ever changed in place); its events stay where they were."""
        if not other.has(part, made_by):
            return False
        run, theirs = (folder.run(part.removesuffix("/start")) for folder in (self, other))
        names = (START_SCORES, PEAKS, CHOICES, REFINED, STARTED) if part.endswith("/start") else (SCORES, STATES, PEAKS, SAMPLES)
        run.mkdir(parents=True, exist_ok=True)
        for name in names:
            for file in [theirs / name, *(theirs / name).rglob("*")]:
                if file.is_file():
                    files.shared(file, run / file.relative_to(theirs))
        if not (run / EVENTS).exists():
            line = {"t": time.time(), "event": "phase", "name": f"taken over from {other}"}
            write_text(run / EVENTS, json.dumps(line) + "\n")
        self.done(part, made_by)
        return True

    def _stamp(self, part: str) -> dict[str, str]:
        run = self.run(part.removesuffix("/start"))
        if part == EXPORT:
            paths = [self / EXPORTED, run / SCORES]
        elif part.endswith("/start"):
            paths = [run / START_SCORES, run / STARTED / artefacts.RECORD]
        else:
            paths = [run / SCORES, run / STATES, run / MODEL / artefacts.RECORD]
        return {p.relative_to(self.path).as_posix(): files.sha256(p) for p in paths if p.is_file()}

    def _drop(self, part: str, wanted: bool) -> None:
        """Take away what a part that no longer counts would be reported by; its checkpoints stay, its losses too if it is `wanted` again."""
        run = self.run(part.removesuffix("/start"))
        stale = [self / EVALUATION, self / PAGE]
        if part.endswith("/start"):
            stale += [run / name for name in (START_SCORES, PEAKS, CHOICES, REFINED)]
        else:
            stale += [run / SCORES, run / MEMORY, *([] if wanted else [run / EVENTS])] + (
                [self / EXPORTED] if part == EXPORT else [self / SAMPLES]
            )
        for path in stale:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Take away all that finebits wrote, and nothing else."""
        places = list((self / TARGETS).glob("*/"))
        runs = self.made()
        for run in runs:
            places += [run / STARTED, run / MODEL, *(run / CHECKPOINTS).glob("checkpoint-*/"), run / CHECKPOINTS]
            for name in OF_RUN:
                (run / name).unlink(missing_ok=True)
        for place in places:
            artefacts.remove(place)
        for name in WHOLE:
            (self / name).unlink(missing_ok=True)
        for file in (self / EVALUATIONS).glob("*.json"):
            if EVALUATED.encode() in file.read_bytes():
                file.unlink()
        for folder in [*runs, self / RUNS, self / TARGETS, self / EVALUATIONS]:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def set_aside(self) -> Path:
        """Move a finished run, whole, to the first of NAME.1, NAME.2, … that is free, and say where; it goes on saying what it said.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     folder = RunFolder(Path(place, "a"))
        ...     folder.begin({}, "rows", fb.Plan({}), {})
        ...     print(folder.set_aside().name, folder.holds())
        a.1 False
        """
        place = next(p for i in itertools.count(1) if not (p := self.path.with_name(f"{self.path.name}.{i}")).exists())
        with files.writing(place):
            place.mkdir()
            for name in (*(n for n in WHOLE if n != RECORD), RUNS, TARGETS, PLANS, EVALUATIONS, RECORD):
                if (self / name).exists():
                    shutil.move(self / name, place / name)
            for config in (place / TARGETS).glob("*/adapter_config.json"):
                artefacts.rebased(config, self.path.resolve(), place.resolve())
        return place

    # Plans -----------------------------------------------------------------------------------------------------------------------------

    def plan_path(self, plan: Plan) -> Path:
        """Where `finebits plan` writes: beside a run, which keeps the plan that it follows.

        >>> str(RunFolder("runs/new").plan_path(fb.Plan({})))
        'runs/new/plan.json'
        """
        return self.path / PLANS / f"{plan.hash}.json" if self.holds() else self / PLAN

    # Whose it is -----------------------------------------------------------------------------------------------------------------------

    def claim(self, settings: Mapping[str, Any], data: str, resume: bool, overwrite: bool) -> bool:
        """May a run of these settings over these rows have the folder, if need be once a finished one is set aside? False if `resume` finds this
        very run, finished. Raises Occupied."""
        if overwrite and resume:
            raise Occupied("--resume goes on with the run that is there and --overwrite begins anew: leave one of the two out")
        files.ours(self / RECORD, SCHEMA)
        self.ours(*WHOLE)
        if overwrite:
            return True
        if not self.holds():
            if resume:
                raise Occupied(f"there is nothing to resume in {self}: no run has begun there, leave --resume out or name its output_dir")
            return True
        record = self.record()
        if not resume:
            if record.get("finished"):
                return True
            self._taken(record, settings, data)
        if why := self._ended(record, settings, data):
            raise Occupied(why)
        return not (record["finished"] and not self.differences(record, settings, data, ("output_dir", "data.datasets", "data.held_out")))

    def _ended(self, record: Mapping[str, Any], settings: Mapping[str, Any], data: str) -> str:
        """Why --resume cannot go on with the run of the record under these settings; empty if it can."""
        if not record:
            return f"the run in {self} was not made by this version of finebits and cannot be resumed: name another output_dir"
        if other := self.differences(record, settings, data, (*FREE, *LENGTH)):
            return (
                f"--resume goes on with the run in {self} as it began, and here {other}: leave that as it was, or name another output_dir"
            )
        for key in LENGTH:
            before, now = _at(record["settings"], key), _at(settings, key)
            if now < before and (key != LENGTH[1] or _at(settings, LENGTH[0]) <= 0) and now > 0:
                return f"--resume goes on, and {key} is {now} here where the run in {self} has {before}: name as many or more"
        return ""

    def _taken(self, record: Mapping[str, Any], settings: Mapping[str, Any], data: str) -> None:
        other = self.differences(record, settings, data, FREE[:1]) if record else "it says nothing of its recipe"
        whose = f"of another recipe ({other})" if other else "of this recipe"
        go_on = "" if self._ended(record, settings, data) else ", go on with it (--resume)"
        raise Occupied(f"{self} holds an unfinished run {whose}: name another folder (output_dir=...){go_on}, or replace it (--overwrite)")

    def differences(self, record: Mapping[str, Any], settings: Mapping[str, Any], data: str, free: tuple[str, ...]) -> str:
        """In words, how settings and rows are not those of the record; empty if they are.

        >>> held = {"settings": {"training": {"seed": 42}, "output_dir": "a"}, "data": "rows"}
        >>> RunFolder("a").differences(held, {"training": {"seed": 7}, "output_dir": "b"}, "rows", ("output_dir",))
        'training.seed is 7 and was 42'
        """
        before, now = dict(flat(record["settings"])), dict(flat(settings))
        keys = [k for k in sorted(before.keys() | now.keys()) if not any(k == f or k.startswith(f"{f}.") for f in free)]
        changes = [f"{k} is {now.get(k)} and was {before.get(k)}" for k in keys if before.get(k) != now.get(k)]
        changes += ["the rows or the tokenizer are others"] if data != record["data"] else []
        return "; ".join(changes[:3]) + (f"; and {len(changes) - 3} more" if len(changes) > 3 else "")


def digest(*what: Any) -> str:
    """Of values of JSON, in sixteen hexadecimal digits.

    >>> digest("start", "qera") == digest("start", "qera"), len(digest("start", "qera"))
    (True, 16)
    """
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def flat(settings: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested settings by its whole name, with its value.

    >>> dict(flat({"training": {"seed": 42, "rules": []}, "task": "auto"}))
    {'training.seed': 42, 'training.rules': [], 'task': 'auto'}
    """
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value


def _at(settings: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return settings[section][name]
