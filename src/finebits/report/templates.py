"""The chat template that an export holds, beside the one that was trained with: the same, or where the two part.

A model that is asked in another template than it learned answers worse, and nothing of it shows in a loss.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finebits import artefacts
from finebits.report.cells import Json
from finebits.report.summary import json_of

JINJA, CONFIG = "chat_template.jinja", "tokenizer_config.json"


@dataclass(frozen=True)
class Template:
    """One that a folder holds: its sha256, and its text where that is at hand."""

    sha: str
    text: str | None = None

    @classmethod
    def of(cls, text: str) -> Template:
        """Of a text.

        >>> Template.of("{{ messages }}").sha[:6]
        'f24189'
        """
        return cls(hashlib.sha256(text.encode()).hexdigest(), text)


def held(folder: Path) -> Template | None:
    """The chat template in a folder of a tokenizer, or the one that its record names; None where there is none.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     _ = Path(place, JINJA).write_text("{{ messages }}")
    ...     print(held(Path(place)).sha[:6], held(Path(place, "nowhere")))
    f24189 None
    """
    if (folder / JINJA).is_file():
        return Template.of((folder / JINJA).read_text(encoding="utf-8", errors="replace"))
    try:
        config = json_of(folder / CONFIG)
    except ValueError:  # the page of a run does not depend on it
        config = None
    if isinstance(config, dict) and isinstance(named := config.get("chat_template"), str):
        return Template.of(named)
    noted = artefacts.recorded(folder).get("template_sha")
    return Template(noted) if isinstance(noted, str) else None


def of_model(name: str) -> Template | None:
    """The chat template of a model whose folder is here; None for one that goes by its hub id.

    >>> of_model("nobody/nothing") is None
    True
    """
    return held(Path(name)) if name and Path(name).is_dir() else None


def problems(trained: str, base: Template | None, exports: Mapping[str, Template]) -> tuple[list[Json], str]:
    """(what is to be said of exports whose template is not the one that was `trained` with, by its sha256; where the first of them parts from
    it, as lines of a difference: empty where there is none, or no text of both).

    >>> before, after = Template.of("a\\nb\\n"), Template.of("a\\nc\\n")
    >>> problems(before.sha, before, {"merged": before})
    ([], '')
    >>> said, difference = problems(before.sha, before, {"merged": after})
    >>> len(said), difference.splitlines()[-2:]
    (1, ['-b', '+c'])
    """
    known = [t for t in (base, *exports.values()) if t is not None and t.sha == trained and t.text is not None]
    others = {name: t for name, t in exports.items() if t.sha != trained}
    said: list[Json] = [
        {
            "level": "warn",
            "message": f"{name} holds another chat template (sha {t.sha[:6]}) than was trained with (sha {trained[:6]}): export again",
        }
        for name, t in others.items()
    ]
    if base is not None and base.sha != trained:
        said.append(
            {
                "level": "warn",
                "message": f"the base model's chat template (sha {base.sha[:6]}) is not the one that was trained with (sha {trained[:6]})",
            }
        )
    name, other = next(((n, t) for n, t in (*others.items(), ("the base model", base)) if t and t.sha != trained and t.text), ("", None))
    if not known or other is None:
        return said, ""
    return said, "\n".join(_lines(known[0].text or "", other.text or "", name))


def _lines(trained: str, other: str, name: str) -> Sequence[str]:
    return [*difflib.unified_diff(trained.splitlines(), other.splitlines(), "trained with", name, lineterm="")]
