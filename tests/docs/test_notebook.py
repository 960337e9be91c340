"""The notebook runs, on a CPU and without a network; shortened here, in full by `make notebook`."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "mixmask_in_ten_minutes.ipynb"


def printed(notebook) -> str:
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")


def accuracies(notebook) -> dict[str, float]:
    """k-NN of the random network and of the two that were trained."""
    found = re.findall(r"^(random network|MoCo|MoCo with MixMask) +([\d.]+) %$", printed(notebook), re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_notebook_runs_and_both_networks_learn(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = NOTEBOOK.read_text(encoding="utf-8")
    short = text.replace("epochs=8", "epochs=2").replace('\\"epochs\\": 4', '\\"epochs\\": 1')
    assert short.count("epochs=2") == 1 and short.count('\\"epochs\\": 1') == 1
    notebook = nbformat.reads(short, as_version=4)
    nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    found = accuracies(notebook)
    assert found["MoCo"] > found["random network"] + 5 and found["MoCo with MixMask"] > found["random network"] + 5
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 9
    assert (tmp_path / "runs" / "pretrain").is_dir()


def test_what_the_stored_notebook_shows_was_made_by_running_it_once_in_order():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert len(accuracies(notebook)) == 3 and all(value > 30 for value in accuracies(notebook).values())
    lines = sum(len(cell["source"]) for cell in code)
    assert lines < 220, "it is to be read in ten minutes"
