"""The notebooks run, over a tiny model and a few rows."""

from __future__ import annotations

from pathlib import Path

import pytest

import chatty
from doc_pages import ROOT

NOTEBOOKS = ROOT / "docs" / "notebooks"
nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: pip install '.[docs]'")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install '.[docs]'")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install '.[docs]'")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chatty.model(tmp_path / "m")
    chatty.written(tmp_path / "rows.jsonl", chatty.rows(12))
    said = {
        "MODEL": "m",
        "ROWS": "rows.jsonl",
        "STEPS": "2",
        "OUT": "out",
        "FINEBITS_HOME": str(tmp_path / "home"),
        "FINEBITS_SHAPES": "off",
    }
    for name, value in (said | {"PYTHONPATH": str(ROOT / "src"), "JUPYTER_PLATFORM_DIRS": "1"}).items():
        monkeypatch.setenv(name, value)
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=180, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")
