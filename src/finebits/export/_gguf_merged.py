"""One GGUF file with the update in the weights, in a mix of llama.cpp's: `gguf:q4_k_m`, `gguf:q8_0` and so on (finebits.export._mixes).

Base plus update are summed in float32 and rounded once, into the type of each tensor. Config and tokenizer lie beside the file for
transformers, a Modelfile for Ollama.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from finebits.errors import Invalid
from finebits.export import _gguf as conversion
from finebits.export._card import QUANTIZED, card
from finebits.export._gguf_file import MODEL, Blocks, Piece, file, loading, ordered
from finebits.export._mixes import BLOCKS, MIXES, kind_of
from finebits.export._ollama import ends_of, modelfile
from finebits.export._safetensors import describe_model, merged_entries, parted
from finebits.export.base import Extras, File, Layers, Read, Weights
from finebits.files import write_text
from finebits.layouts.gguf import rounded, size
from finebits.store import plan_of
from finebits.tensorfile import Entry

ABOUT = """The quantized weights and the adapter trained over them, summed in float32 and rounded once into model.gguf, {mix}: {kinds}.{fallen}

```
llama-cli -m model.gguf
ollama create NAME -f Modelfile
```"""


@dataclass(frozen=True)
class MergedGGUF:
    """The update in the weights, rounded into a mix.

    >>> MergedGGUF("q4_k_m").rounds  # nats a token
    0.3
    """

    mix: str
    scales: ClassVar[str | None] = None
    layers: ClassVar[Layers] = "all"

    def __post_init__(self) -> None:
        if self.mix not in MIXES:
            raise Invalid(f"a merged GGUF file is of {', '.join(MIXES)}, and gguf:{self.mix} was asked for")

    @property
    def rounds(self) -> float:
        """What rounding into the mix may cost."""
        return MIXES[self.mix].kl

    def check(self, weights: Weights, dtype: torch.dtype, config: Mapping[str, Any] | None = None) -> None:
        """Every weight has a dense form, and that can be rounded."""
        if config is not None:
            conversion.architecture(config)

    def files(self, model: nn.Module, extras: Extras) -> dict[str, File]:
        config: Any = model.config
        arch = conversion.architecture(config.to_dict())

        def about(writer: Any) -> None:
            import gguf

            writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{self.mix.upper()}"])
            conversion.sizes(writer, config)
            conversion.tokens(writer, extras.tokenizer, config.vocab_size, ends_of(model, extras.tokenizer))

        return {MODEL: file(arch, about, self.pieces(model, arch, extras.importance or {}))}

    def pieces(self, model: nn.Module, arch: str, importance: Mapping[str, Tensor]) -> dict[str, Piece]:
        """The tensors by GGUF's names; a weight is made, and rounded, when it is written, columns by the mean squares of their inputs, where
        these are known: what llama.cpp calls an importance matrix."""
        config, tensors = cast(Any, model.config), dict[str, Piece]()
        name_of = conversion.named(arch, config.num_hidden_layers)
        counts = {name_of(f"{module}.weight"): t for module, t in importance.items()}
        for name, (entry, kind, _) in self.kinds(model, arch).items():
            rows = conversion.order(name, arch, config, entry.shape[0])
            shape = (*entry.shape[:-1], size(kind, entry.shape[-1]))

            def value(entry: Entry = entry, kind: str = kind, rows: Tensor | None = rows, name: str = name) -> Any:
                try:
                    data = rounded(entry.value(), kind, counts.get(name))
                except Invalid as e:
                    raise Invalid(f"{name}: {e}") from None
                return ordered(data, rows, entry.shape[0])

            tensors[name] = Piece(kind, shape, value)
        return tensors

    def kinds(self, model: nn.Module, arch: str) -> dict[str, tuple[Entry, str, str]]:
        """What is to be written by GGUF's names, its type, and the type that the mix has for it."""
        name_of = conversion.named(arch, cast(Any, model.config).num_hidden_layers)
        entries = {name_of(name): entry for name, entry in merged_entries(model, torch.float32).items()}
        tied = "output.weight" not in entries
        return {name: (entry, *kind_of(self.mix, name, entry.shape, model.config, tied)) for name, entry in entries.items()}

    def note(self, model: nn.Module) -> str | None:
        """Which tensors fell back, in a line."""
        arch = conversion.architecture(cast(Any, model.config).to_dict())
        fallen = Counter((kind, wanted, entry.shape[-1]) for entry, kind, wanted in self.kinds(model, arch).values() if kind != wanted)
        said = [
            f"{many} of rows of {n}, no whole blocks of {BLOCKS[wanted]}, are {kind} for {wanted}"
            for (kind, wanted, n), many in fallen.items()
        ]
        return f"tensors that fell back: {'; '.join(said)}" if said else None

    def describe(self, model: nn.Module, folder: Path, place: Path, extras: Extras) -> None:
        describe_model(model, folder, torch.bfloat16, extras.tokenizer, apart=parted(model))
        arch = conversion.architecture(cast(Any, model.config).to_dict())
        kinds = Counter(kind for _, kind, _ in self.kinds(model, arch).values())
        note = self.note(model)
        said = {"mix": self.mix.upper(), "kinds": ", ".join(f"{n} {k}" for k, n in kinds.items()), "fallen": f" {note}." if note else ""}
        write_text(folder / "Modelfile", modelfile(f"./{MODEL}", None, extras.tokenizer, ends_of(model, extras.tokenizer)))
        write_text(folder / "README.md", card(plan_of(model), QUANTIZED, ABOUT.format(**said), place.name, extras))

    def read(self, folder: Path) -> Read:
        if not (folder / MODEL).is_file():
            raise Invalid(f"{folder} holds no {MODEL}, so it is no merged export to GGUF: export it again")
        return Read("transformers, gguf", folder, tensors=Blocks(folder, torch.float32), load=loading(folder))
