"""Pictures as a model is given them: read, brought to its size, and their numbers brought to its range.

What is done to a picture stands in the model's preprocessor_config.json, in the keys of transformers' image processors; of these size, rescaling
and normalization are done here, with torch alone, and a model that asks for more is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from finebits.data.error import DataError
from finebits.data.rows import Row
from finebits.errors import Invalid

CONFIG = "preprocessor_config.json"
ASKED = ("do_center_crop", "do_pad", "do_reduce_labels")  # what is not done here
BILINEAR = 2  # as PIL numbers the ways to make a picture larger or smaller


@dataclass(frozen=True)
class Pictures:
    """Pictures of `shape` (channels, height, width), whose numbers x from 0 to 255 become (rescale · x − mean) / std, a channel each.

    >>> pictures = Pictures((1, 2, 2), rescale=1 / 255)
    >>> pictures.values(torch.full((1, 1, 2, 2), 255, dtype=torch.uint8)).unique()
    tensor([1.])
    """

    shape: tuple[int, int, int]
    rescale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    folder: Path | None = None

    @classmethod
    def of(cls, folder: Path, shape: tuple[int, int, int]) -> Pictures:
        """As a model folder says. Raises Invalid where it does not, or asks for what is not done here."""
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Invalid(
                f"{folder} has no {CONFIG}, which says what is done to a picture: copy it from where the model came from"
            ) from None
        except ValueError as e:
            raise Invalid(f"{folder / CONFIG} is not JSON ({e}): fetch it again") from None
        if other := [k for k in ASKED if config.get(k)]:
            raise Invalid(f"{folder / CONFIG} asks for {other[0]}, which finebits does not do: make the pictures so, and set it to false")
        if config.get("do_resize") and config.get("resample", BILINEAR) != BILINEAR:
            raise Invalid(
                f"{folder / CONFIG} asks for resample {config['resample']}, and pictures are resized bilinearly ({BILINEAR}) here"
            )
        rescale = float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0
        mean, std = (tuple(map(float, config.get(k, ()))) if config.get("do_normalize") else () for k in ("image_mean", "image_std"))
        if any(len(v) not in (0, shape[0]) for v in (mean, std)) or len(mean) != len(std):
            raise Invalid(f"{folder / CONFIG} has image_mean and image_std of {len(mean)} and {len(std)} numbers; wanted {shape[0]} each")
        return cls(shape, rescale, mean, std, folder)

    def read(self, row: Row, where: str) -> UInt8[Tensor, "c h w"]:
        """A row's picture in the model's size. Raises DataError where it is none."""
        array = _array(row.image, where)
        if array.ndim == 2:
            array = array[..., None]
        if array.ndim != 3 or array.shape[-1] not in (1, self.shape[0]):
            raise DataError(
                f"{where}: the picture is {'x'.join(map(str, array.shape))}; wanted height x width, or x {self.shape[0]} channels"
            )
        picture = torch.from_numpy(array).permute(2, 0, 1).expand(self.shape[0], -1, -1)
        if picture.shape == self.shape:
            return picture.contiguous()
        wide = F.interpolate(picture[None].float(), self.shape[1:], mode="bilinear", antialias=True)[0]
        return wide.round().clamp(0, 255).to(torch.uint8)

    def values(self, pixels: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """What the model is given.

        >>> grey = Pictures((1, 1, 2), rescale=1 / 255, mean=(0.5,), std=(0.5,))
        >>> grey.values(torch.tensor([[[[0, 255]]]], dtype=torch.uint8))
        tensor([[[[-1., 1.]]]])
        """
        x = pixels.float() * self.rescale
        if not self.mean:
            return x
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std

    def save_pretrained(self, folder: str | Path) -> None:
        """The file that says so, beside another model."""
        if self.folder is not None:
            shutil.copyfile(self.folder / CONFIG, Path(folder) / CONFIG)


def _array(image: Any, where: str) -> np.ndarray:
    if isinstance(image, str) and not image.endswith(".npy"):
        try:
            from PIL import Image  # pyright: ignore[reportMissingImports]  # who has pictures in files has it
        except ImportError:
            raise DataError(f"{where}: to read {Path(image).name}, pip install pillow, or save pictures as .npy") from None
        try:
            with Image.open(image) as opened:
                return np.array(opened if opened.mode in ("L", "RGB") else opened.convert("RGB"))
        except OSError as e:
            raise DataError(f"{where}: {image} is no picture that can be read ({e})") from None
    try:
        array = np.load(image, allow_pickle=False) if isinstance(image, str) else np.asarray(image)
    except ValueError as e:
        raise DataError(f"{where}: the picture cannot be read ({e}): its rows are equally long, and hold numbers from 0 to 255") from None
    if array.dtype.kind not in "iu" or not array.size or array.min() < 0 or array.max() > 255:
        raise DataError(f"{where}: a picture holds whole numbers from 0 to 255; this one holds {array.dtype}")
    return array.astype(np.uint8)


def stacked(rows: Sequence[Mapping[str, Sequence[int]]], shape: tuple[int, int, int]) -> UInt8[Tensor, "b c h w"]:
    """Pictures of rows of numbers, each followed by its class, as a batch.

    >>> stacked([{"input_ids": [0, 64, 128, 255, 1]}], (1, 2, 2))  # of class 1
    tensor([[[[0, 64], [128, 255]]]], dtype=torch.uint8)
    """
    return torch.tensor([list(r["input_ids"])[:-1] for r in rows], dtype=torch.uint8).view(len(rows), *shape)
