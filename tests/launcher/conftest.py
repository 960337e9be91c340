"""A private SLURM, and jobs for it that take seconds."""

import dataclasses

import pytest

from paper.cells import select
from paper.presets import budget
from slurm import graph
from tests import slurm_cluster
from tests.launcher.jobs import STAGE


@pytest.fixture(scope="session")
def cluster():
    with slurm_cluster.running() as started, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", started.environment["SLURM_CONF"])
        yield started


@pytest.fixture
def stages(cluster, tmp_path):
    """`stages(4, 30)`: the first four jobs of Table 4, pre-trainings and probes in turn, as stages of 30 steps."""
    script = tmp_path / "stage.py"
    script.write_text(STAGE)

    def make(number, steps, *settings):
        jobs = graph.jobs(select(["table4"]), budget("smoke", ["cluster.constraint=n1", *settings]), tmp_path / "runs")
        words = [("python", str(script), str(job.directory), str(steps)) for job in jobs]
        return [dataclasses.replace(j, command=w) for j, w in zip(jobs[:number], words[:number], strict=True)]

    return make
