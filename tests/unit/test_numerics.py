"""Devices without float64, and systems without file locks."""

import subprocess
import sys

import pytest
import torch

from mixmask import knn, numerics
from mixmask.config import KNN
from mixmask.training.state import TrainState


def test_a_device_without_float64_leaves_it_to_the_cpu(monkeypatch):
    """As a Mac's GPU (mps): here a stand-in, the meta device, is declared to be one."""
    monkeypatch.setattr(numerics, "WITHOUT_FLOAT64", ("meta",))
    assert numerics.exact_device(torch.device("meta")) == torch.device("cpu")
    assert numerics.exact_device(torch.device("cuda")) == torch.device("cuda")
    assert numerics.wide(torch.ones(3)).dtype == torch.float64


@pytest.mark.parametrize("what", ["sums", "neighbours"])
def test_what_needs_float64_asks_for_it_in_one_place(monkeypatch, what):
    asked = []
    monkeypatch.setattr("mixmask.training.state.wide", lambda x: asked.append(x) or x.double())
    monkeypatch.setattr("mixmask.knn.wide", lambda x: asked.append(x) or x.double())
    if what == "sums":
        state = TrainState(torch.nn.Linear(1, 1), None, 1, 1)
        state.add({"loss": torch.ones(())})
    else:
        knn.predict(
            KNN(1, features="output", every=0, distance="euclidean", vote="majority"),
            *(torch.randn(4, 2), torch.arange(4), torch.randn(2, 2), 4),
        )
    assert asked


def test_the_library_imports_where_there_are_no_file_locks(tmp_path):
    """As on Windows, which has no fcntl and no resource."""
    code = (
        "import sys; sys.modules['fcntl'] = None; sys.modules['resource'] = None\n"
        "import mixmask; mixmask.MoCo, mixmask.mixmask, mixmask.load_backbone\n"
        "from mixmask.runs import Run, is_busy\n"
        "from mixmask.config import load\n"
        f"run = Run({str(tmp_path / 'run')!r}, load('pretrain/configs/cifar100_moco.yaml'))\n"
        "print(is_busy(run.directory)); run.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
