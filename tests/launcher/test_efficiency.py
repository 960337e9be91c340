"""slurm/efficiency.py: what sacct says of jobs, and what to ask for instead."""

import dataclasses

import pytest

from paper.cells import select
from paper.presets import budget
from slurm import efficiency, graph, launch, squeue

ASKED = ["cluster.hours=24", "cluster.cpus=8", "cluster.memory_gb=64"]
# JobID|State|ElapsedRaw|TimelimitRaw|AllocCPUS|TotalCPU|ReqMem|MaxRSS|AllocTRES|NNodes|NTasks, over two starts of 7
ACCOUNTS = """\
7|PREEMPTED|3600|1440|8|02:00:00|64G||billing=8,cpu=8,gres/gpu=1,mem=64G,node=1|1|
7.batch|CANCELLED|3600||8|00:00.500||4096K|cpu=8|1|1
7.0|CANCELLED|3600||8|02:00:00||10G|cpu=8|1|1
7|COMPLETED|7200|1440|8|1-00:00:00|64G||billing=8,cpu=8,gres/gpu=1,mem=64G,node=1|1|
7.0|COMPLETED|7200||8|04:00:00||12582912K|cpu=8|1|1
9_1|CANCELLED by 0|0|60|0|00:00:00|4000M|||1|
"""


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    (tmp_path / "sacct").write_text(f"#!/bin/sh\ncat <<'END'\n{ACCOUNTS}END\n")
    (tmp_path / "sacct").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return graph.jobs(select(["table4"]), budget("paper", ASKED), tmp_path / "runs")


def test_what_was_used_is_summed_over_all_starts_of_a_job(jobs):
    used = efficiency.accounted(["7", "9_1"])
    first = used["7"]
    assert (first.state, first.hours, first.limit, first.starts) == ("COMPLETED", 3.0, 24.0, 2)
    assert (first.memory, first.memory_asked, first.gpu_hours) == (12.0, 64.0, 3.0)
    assert first.cpu_hours == pytest.approx(6.0, abs=1e-3) and first.cpu_share == pytest.approx(6 / 24, abs=1e-3)
    assert used["9_1"] == efficiency.Used("CANCELLED", limit=1.0, memory_asked=4000 / 1024, starts=1)


def test_what_to_ask_for_instead_has_a_quarter_to_spare_and_nothing_is_proposed_without_cause(jobs):
    used = efficiency.Used("COMPLETED", 2.0, 24.0, 12.0, 64.0, 8, 4.0, 1, 1)
    assert efficiency.advice([used], jobs[0]) == ["hours=2.5", "memory_gb=15", "cpus=2"]
    full = dataclasses.replace(used, hours=20.0, memory=60.0, cpu_hours=150.0)
    assert efficiency.advice([full], jobs[0]) == []
    assert efficiency.advice([dataclasses.replace(used, state="TIMEOUT", starts=2)], jobs[0])[0] == "memory_gb=15"


def test_the_table_has_a_line_for_each_run_that_has_had_a_job(jobs, tmp_path, capsys):
    (tmp_path / "runs" / "slurm").mkdir(parents=True)
    squeue.record(tmp_path / "runs", directory=str(jobs[0].directory.resolve()), job="7")
    launch.main(["status", "--efficiency", "table4", "--runs-dir", str(tmp_path / "runs"), "--set", *ASKED])
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if line.startswith("7 ")]
    assert line.split() == [
        *("7", "pretrain", "COMPLETED", "3.00", "of", "24.00", "12.0", "of", "64.0", "25", "%", "of", "8", "3.00"),
        jobs[0].id,
    ]
    assert "ask for, of pretrain: --set pretrain.cluster.memory_gb=15 pretrain.cluster.cpus=2" in shown


def test_without_accounting_it_says_so(jobs, tmp_path, cli):
    (tmp_path / "runs" / "slurm").mkdir(parents=True)
    squeue.record(tmp_path / "runs", directory=str(jobs[0].directory.resolve()), job="7")
    (tmp_path / "sacct").write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
    status, _, errors = cli(launch.main, "status", "--efficiency", "table4", "--runs-dir", tmp_path / "runs")
    assert status == 1 and errors == (
        "error: --efficiency asks SLURM's accounting: sacct failed: Slurm accounting storage is disabled\n"
    )


def test_an_accounting_that_does_not_answer_is_not_taken_for_the_controller(jobs, tmp_path, cli, monkeypatch):
    (tmp_path / "runs" / "slurm").mkdir(parents=True)
    squeue.record(tmp_path / "runs", directory=str(jobs[0].directory.resolve()), job="7")
    (tmp_path / "sacct").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(squeue, "ACCOUNTING", 0.2)
    _, _, errors = cli(launch.main, "status", "--efficiency", "table4", "--runs-dir", tmp_path / "runs")
    assert errors == "error: --efficiency asks SLURM's accounting: sacct has waited for 0.2 s\n"
