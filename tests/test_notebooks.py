"""Notebooks: committed without outputs, short cells, and each runs on a tiny run."""

import os
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MAX_LINES = 15  # more logic than this belongs into the package


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs_and_in_the_house_order(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.splitlines()[0].endswith("?")  # the question that it answers
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "gptlab" in code[0].source and "workdir" in code[1].source
    for cell in code:
        assert not cell.outputs and cell.execution_count is None
        assert len(cell.source.splitlines()) <= MAX_LINES


@pytest.mark.smoke
@pytest.mark.timeout(900)
def test_quickstart_notebook_runs_on_the_smoke_run(smoke_run, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("GPTLAB_RUN", str(smoke_run))
    path = next(path for path in NOTEBOOKS if path.stem == "quickstart")
    notebook = nbformat.read(path, as_version=4)
    monkeypatch.setenv(
        "PYTHONPATH", str(path.parent.parent) + os.pathsep + os.environ.get("PYTHONPATH", "")
    )
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    tables = [o for o in outputs if "text/markdown" in o.get("data", {})]
    assert len(images) == 3 and len(tables) == 4
    assert "held-out bits a byte" in tables[0]["data"]["text/markdown"]
    assert "win rate" in tables[1]["data"]["text/markdown"]
