"""Labelled pictures: `{"image": "shirt.png", "label": "shirt"}`; a path begins where the file of the rows lies. In its place may stand the
numbers of the picture from 0 to 255: rows of pixels, or rows of pixels of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from finebits.data.error import DataError, kind
from finebits.data.rows import Row, labelled


@dataclass(frozen=True)
class Image:
    """One picture a row.

    >>> Image().row({"image": [[0, 255]], "label": "edge"}, 1, "rows.jsonl").label
    'edge'
    """

    order: ClassVar[int] = 50
    keys: ClassVar[tuple[str, ...]] = ("image",)

    def row(self, record: Mapping[str, Any], line: int, path: str) -> Row:
        image = record["image"]
        if isinstance(image, str):
            file = Path(path).parent / Path(image).expanduser()
            if not file.is_file():
                raise DataError(f'{path}:{line}: "image" names {image}, and there is no file {file}')
            image = str(file)
        elif not isinstance(image, list) or not image or not isinstance(image[0], list):
            raise DataError(f'{path}:{line}: "image" must be a path, or a list of rows of numbers from 0 to 255; got {kind(image)}')
        return Row(line, path=path, image=image, label=labelled(record))
