"""Rows of the Hugging Face hub, and of folders in its form, by the library datasets. No code of a data set is run: datasets has none since
4.0."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finebits.data.error import DataError
from finebits.errors import Invalid


def records(
    source: str, name: str | None = None, split: str | None = None, data_files: Sequence[str] = (), revision: str | None = None
) -> tuple[str, Iterator[Mapping[str, Any]]]:
    """(what errors call it, its rows) of one split, `train` where none is said. Raises DataError (exit code 2) where the data set, the
    configuration or the split is not to be had.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "test.jsonl").write_text('{"text": "once"}\\n{"text": "twice"}\\n')
    ...     where, rows = records(folder, split="test")
    ...     print(where.removeprefix(folder), [*rows])
    [test] [{'text': 'once'}, {'text': 'twice'}]
    """
    import datasets

    wanted = split or "train"
    what = f"{source}[{f'{name}/' if name else ''}{wanted}]"
    with _quiet():
        try:
            if (folder := Path(source)).is_dir() and ((folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()):
                held: Any = datasets.load_from_disk(source)
                if isinstance(held, datasets.DatasetDict):
                    held = held[wanted]
                elif wanted != "train" or name is not None or data_files or revision is not None:
                    raise Invalid("the folder holds one data set without splits")
            else:
                # one split as datasets reads it, also "train[:10%]"
                held = datasets.load_dataset(source, name, split=wanted, data_files=list(data_files) or None, revision=revision)
        except Exception as e:  # datasets fails in many ways
            raise DataError(_sentence(what, e), code=2) from None
    return what, _rows(held)


def _rows(held: Any) -> Iterator[Mapping[str, Any]]:
    for batch in held.with_format("arrow").iter(1000):
        yield from batch.to_pylist()


def _sentence(what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:240] or type(error).__name__
    kind = type(error).__name__
    if (
        kind in ("OfflineModeIsEnabled", "ConnectionError", "ConnectTimeout", "LocalEntryNotFoundError")
        or "reach the Hugging Face Hub" in reason
    ):
        return (
            f"the data set {what} is no file here and the hub cannot be reached ({reason}): go online once, or name a local file or folder"
        )
    if kind in ("DatasetNotFoundError", "RepositoryNotFoundError"):
        return f"the data set {what} is neither a file here nor one of the hub that may be read: look at its name, or log in with hf auth login"
    return f"the data set {what} cannot be read: {reason}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of datasets."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
