"""The notebooks run from top to bottom, on a tiny student in the place of the quickstart's."""

import json
import re
import shutil

import pytest

from helpers.documented_world import save_eradio
from helpers.paths import ROOT

nbformat = pytest.importorskip("nbformat")
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    folder = tmp_path / "examples" / "notebooks"
    folder.mkdir(parents=True)
    save_eradio(tmp_path / "runs/quickstart/run/student")
    notebook = nbformat.read(shutil.copy(path, folder), as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    ).execute()
    for cell, committed in zip(notebook.cells, nbformat.read(path, as_version=4).cells, strict=True):
        if cell.cell_type == "code":  # what a reader sees in the repository is what the cell gives
            assert kinds_of(cell) == kinds_of(committed), cell.source


def kinds_of(cell):
    """What the outputs are, without progress bars and warnings."""
    return [
        sorted(output.get("data", {"text": None}).keys() - {"text/plain"})
        for output in cell.outputs
        if output.get("name") != "stderr"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_as_committed(path):
    """It is valid, was run from top to bottom, and shows nothing of the machine it ran on."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert path.stat().st_size < 500_000
    text = re.sub(r'"image/png": "[^"]*"', "", path.read_text(encoding="utf-8"))
    assert not re.search(r"/(?:root|home|tmp|work|Users|usr)/|\\\\Users", text)
    for link in re.findall(r"\]\((?!http)([^)#]+)", "".join(cell.source for cell in notebook.cells)):
        assert (path.parent / link).exists(), link
    assert json.loads(path.read_text(encoding="utf-8"))["nbformat"] == 4
