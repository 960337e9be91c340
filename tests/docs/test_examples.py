"""The examples for Lightning and lightly run, where those are installed."""

import math
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)


def test_moco_in_lightning():
    pytest.importorskip("lightning")
    parts = runpy.run_path(str(EXAMPLES / "lightning_mixmask.py"))["train"](steps=3, batch=8)
    assert set(parts) == {"loss_clean", "loss_mixmask", "loss_mixmask_switch"}
    assert all(math.isfinite(value) for value in parts.values())


def test_simsiam_of_lightlys_modules():
    pytest.importorskip("lightly")
    losses = runpy.run_path(str(EXAMPLES / "lightly_mixmask.py"))["train"](steps=12, batch=16)
    assert sum(losses[-3:]) < sum(losses[:3])
