"""The notebook: ten cells without outputs, and each of them runs."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "lecture" / "hispec.ipynb"


def test_it_has_ten_cells_and_no_outputs():
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    assert len(cells) == 10
    assert [cell for cell in cells if cell["outputs"] or cell["execution_count"]] == []


def test_it_runs():
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    client = nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3")
    client.resources = resources
    client.execute()
    assert all(cell["outputs"] for cell in notebook.cells)
