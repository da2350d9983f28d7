"""Real pictures for a small classification run: Fashion-MNIST, and a small vision transformer that is trained on them from nothing.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb runs/fashion/deb
    python examples/fashion_mnist.py [OUT_DIR] [--source FOLDER] [--steps N]

writes OUT_DIR/train.jsonl and OUT_DIR/held_out.jsonl, rows {"image", "label"} whose pictures are .npy files beside them, and OUT_DIR/vit: a
stock ViTForImageClassification of 28 x 28 pixels in patches of 7, trained in float32 for about a minute on pictures that are in neither file.
The held-out pictures are of the data set's own test part.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from finebits.files import write_text

NAMES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
SOURCE, DEFAULT = "runs/fashion/deb/usr/share/datasets/fashion-mnist", "runs/fashion/data"
MEAN, STD = 0.286, 0.353  # of the training pictures' numbers, from 0 to 1


def read(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (n, 28, 28) and labels (n,) of the part train or t10k, in IDX files: a header of 16 and 8 bytes, then the numbers."""
    pictures = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    return np.frombuffer(pictures, np.uint8).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8)


def write(out: Path, name: str, pictures: np.ndarray, labels: np.ndarray) -> None:
    """Rows, and their pictures beside them."""
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        np.save(folder / f"{i:05d}.npy", picture)
        rows.append(json.dumps({"image": f"{name}/{i:05d}.npy", "label": NAMES[label]}) + "\n")
    write_text(out / f"{name}.jsonl", "".join(rows))
    print(f"{out / name}.jsonl: {len(rows):,} pictures", flush=True)


def trained(pictures: np.ndarray, labels: np.ndarray, steps: int, batch: int = 64) -> torch.nn.Module:
    """A small ViT after so many steps of AdamW."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        id2label=dict(enumerate(NAMES)),
        label2id={name: i for i, name in enumerate(NAMES)},
    )
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    x, y = torch.from_numpy(pictures.copy()), torch.from_numpy(labels.astype(np.int64))
    for step in range(steps):
        picked = torch.randint(len(x), (batch,))
        values = (x[picked, None].float() / 255 - MEAN) / STD
        loss = F.cross_entropy(model(pixel_values=values).logits, y[picked])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1} of {steps}: loss {float(loss.detach()):.3f}", flush=True)
    return model


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("out", metavar="OUT_DIR", type=Path, nargs="?", default=Path(DEFAULT), help="default: %(default)s")
    parser.add_argument("--source", metavar="FOLDER", type=Path, default=Path(SOURCE), help="the data set's files (default: %(default)s)")
    parser.add_argument("--steps", metavar="N", type=int, default=1200, help="steps of the ViT's training (default: %(default)s)")
    parser.add_argument("--rows", metavar="N", type=int, default=4000, help="rows to tune on (default: %(default)s)")
    parser.add_argument("--held-out", metavar="N", type=int, default=500, help="held-out rows (default: %(default)s)")
    asked = parser.parse_args(args)
    if not asked.source.is_dir():
        parser.error(f"there is no folder {asked.source}: unpack Debian's dataset-fashion-mnist, and name its folder with --source")
    pictures, labels = read(asked.source, "train")
    write(asked.out, "train", pictures[: asked.rows], labels[: asked.rows])
    test, kinds = read(asked.source, "t10k")
    write(asked.out, "held_out", test[: asked.held_out], kinds[: asked.held_out])
    model = trained(pictures[asked.rows :], labels[asked.rows :], asked.steps)
    model.save_pretrained(asked.out / "vit")  # type: ignore[operator]
    said = {"do_resize": True, "size": {"height": 28, "width": 28}, "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255}
    said |= {"do_normalize": True, "image_mean": [MEAN], "image_std": [STD], "image_processor_type": "ViTImageProcessor"}
    write_text(asked.out / "vit" / "preprocessor_config.json", json.dumps(said, indent=1) + "\n")
    print(f"{asked.out / 'vit'}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
