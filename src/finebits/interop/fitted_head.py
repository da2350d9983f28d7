"""An encoder becomes a classifier: a head is laid over it that tells the labels of rows from its states.

    argmin_{W, b}  Σ_i −log softmax(W h_i + b)_{y_i} + λ/2 ‖W‖²,    h_i the states that the encoder's own head would be given

States are standardized first, so that λ means the same for every width. What fine-tuning then begins from is a model whose outputs mean
something (Kumar et al., ICLR 2022, arXiv:2202.10054v1: a head that is fitted first distorts less of the encoder).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finebits.artefacts import folder as new_folder
from finebits.artefacts import record
from finebits.build import Progress
from finebits.data.rows import DataError, gathered
from finebits.errors import Invalid
from finebits.evaluate.heldout import backbone, evaluating
from finebits.interop.hf import folder_of
from finebits.interop.tokenizer import tokenizer_of
from finebits.tasks import base as tasks

SCHEMA = "finebits.classifier/1"


def classifier(
    model: str | Path,
    data: Any,
    folder: str | Path,
    max_length: int = 256,
    penalty: float = 1e-2,
    progress: Progress = lambda done, total, name: None,
    overwrite: bool = False,
) -> Path:
    """Write a stock model folder: the encoder of `model`, and a head fitted to the labels of `data` (a path, or rows {"text", "label"}), whose
    names become the model's. Gives the folder.

    `penalty` is λ a row. The encoder is run once over the rows, in float32. Raises Invalid where rows have no labels, or all the same, or the
    checkpoint has not all of the encoder.

    >>> import tempfile
    >>> from tokenizers import Tokenizer, models
    >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    >>> sizes = dict(vocab_size=3, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> words = Tokenizer(models.WordLevel({"[PAD]": 0, "ham": 1, "spam": 2}, "[PAD]"))
    >>> rows = [{"text": "ham", "label": "good"}, {"text": "spam", "label": "bad"}]
    >>> with tempfile.TemporaryDirectory() as place:
    ...     BertModel(BertConfig(**sizes)).save_pretrained(f"{place}/bert")
    ...     _ = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]").save_pretrained(f"{place}/bert")
    ...     print(BertConfig.from_pretrained(fb.classifier(f"{place}/bert", rows, f"{place}/made")).id2label)
    {0: 'bad', 1: 'good'}
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    if max_length < 2 or not penalty >= 0:
        raise Invalid(f"max_length is at least 2 and penalty at least 0; {max_length} and {penalty} came")
    source, rows = folder_of(model), gathered(data)
    labels = sorted({str(row.label) for row in rows if row.label is not None})
    if len(labels) < 2:
        raise DataError(
            f'a classifier tells rows apart by their "label", and {rows.path} holds {len(labels)} different '
            f"label{'' if len(labels) == 1 else 's'}: give rows of two or more"
        )
    logging.set_verbosity_error()  # of the head, which is new: it is fitted here
    named = {"id2label": dict(enumerate(labels)), "label2id": {v: k for k, v in enumerate(labels)}}
    arguments: dict[str, Any] = dict(dtype=torch.float32, num_labels=len(labels), output_loading_info=True) | named
    network: Any
    network, info = AutoModelForSequenceClassification.from_pretrained(source, **arguments)
    task = tasks.of(network)
    processor = task.processor(source, tokenizer_of)
    head: Any = task.head(network).module
    own = next(k for k, m in network.named_modules() if m is head)
    if lost := sorted(k for k in info["missing_keys"] if not k.startswith(f"{own}.")):
        raise Invalid(f"{source} has no {lost[0]}, which {type(network).__name__} needs beside its head: take another encoder")
    spelled = replace(rows, rows=tuple(replace(r, label=None if r.label is None else str(r.label)) for r in rows))
    numbered = [vars(e) for e in task.examples(spelled, processor, max_length, False)]
    order = sorted(range(len(numbered)), key=lambda i: -len(numbered[i]["input_ids"]))
    states, kinds = list[Tensor](), list[Tensor]()
    with evaluating(network):
        for i in range(0, len(order), 32):
            batch = task.batch([numbered[j] for j in order[i : i + 32]], processor)
            states.append(backbone(network)(batch))
            kinds.append(batch["labels"])
            progress(min(i + 32, len(order)), len(order), "states of the encoder")
    W, b = fitted(torch.cat(states), torch.cat(kinds), len(labels), penalty)
    with torch.no_grad():
        head.weight.copy_(W)
        if head.bias is not None:
            head.bias.copy_(b)
    with new_folder(Path(folder), SCHEMA, overwrite) as new:
        network.save_pretrained(new)
        processor.save_pretrained(new)
        record(new, SCHEMA)
    return Path(folder)


def fitted(states: Tensor, labels: Tensor, count: int, penalty: float) -> tuple[Tensor, Tensor]:
    """(W, b) of the equation above, by L-BFGS in float64.

    >>> W, b = fitted(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), count=2, penalty=1e-2)
    >>> (torch.tensor([[-1.0], [1.0]]).double() @ W.mT + b).argmax(-1)
    tensor([0, 1])
    """
    mean, spread = states.double().mean(0), states.double().std(0).clamp_min(1e-6)
    x = (states.double() - mean) / spread
    W = torch.zeros(count, x.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ W.mT + b, labels) + penalty / 2 * W.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    W = (W / spread).detach()
    return W, b.detach() - W @ mean
