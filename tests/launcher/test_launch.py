"""slurm/launch.py: cells -> distinct runs -> a graph of jobs -> an executor."""

import dataclasses
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mixmask import config as configs
from mixmask.config import Backbone, ConfigError, UserError
from paper import cost
from paper.cells import select
from paper.presets import budget, steps
from slurm import graph, launch, local, shell, squeue

ROOT = Path(__file__).resolve().parents[2]


def table4(runs_dir, preset="paper", settings=()):
    return graph.jobs(select(["table4"]), budget(preset, settings), Path(runs_dir))


def finish(job, **metrics):
    job.directory.mkdir(parents=True, exist_ok=True)
    (job.directory / "result.json").write_text(json.dumps({"metrics": metrics or {"loss": 1.0}}))


# ---------------------------------------------------------------------------------------------------- the graph


def test_table4_is_six_pretrainings_and_six_linear_probes(tmp_path):
    jobs = table4(tmp_path)
    assert [job.stage for job in jobs] == ["pretrain", "linear"] * 6
    assert {(job.config.method, job.config.epochs) for job in jobs[::2]} == {
        (method, epochs) for method in ("vanilla", "mscn", "mixmask") for epochs in (200, 800)
    }
    assert len({job.directory for job in jobs}) == 12


def test_a_probe_waits_for_its_pretraining_and_takes_its_seed(tmp_path):
    jobs = table4(tmp_path, settings=["seed=3"])
    for pretraining, probe in zip(jobs[::2], jobs[1::2], strict=True):
        assert pretraining.parents == () and probe.parents == (pretraining.directory,)
        assert probe.config.checkpoint == pretraining.id and probe.config.seed == pretraining.config.seed == 3
        assert f"{pretraining.directory}/checkpoint.pt" in probe.command


def test_a_printed_command_says_the_whole_config(tmp_path):
    for job in table4(tmp_path, "smoke")[::2]:
        words = shlex.split(job.shell)
        recipe, after = words[words.index("--config") + 1], words[words.index("--set") + 1 : words.index("--run-dir")]
        assert configs.load(ROOT / recipe, configs.parse_overrides(after)) == job.config


def test_equal_runs_are_shared_by_their_cells(tmp_path):
    jobs = table4(tmp_path, "smoke", ["epochs=1"])
    assert len(jobs) == 6
    assert jobs[0].cells == ("table4/imagenet/moco/vanilla/200", "table4/imagenet/moco/vanilla/800")


def test_states_finished_unfinished_new(tmp_path):
    jobs = table4(tmp_path)
    finish(jobs[0])
    jobs[2].directory.mkdir(parents=True)
    (jobs[2].directory / "config.yaml").write_text("{}")
    assert [job.state for job in jobs[:3]] == ["finished", "new", "unfinished"]


def test_smoke_epochs_are_the_papers_divided_by_50(tmp_path):
    assert [job.config.epochs for job in table4(tmp_path, "smoke")[::2]] == [4, 16] * 3


def test_a_mask_grid_finer_than_the_image_is_clamped_with_a_note():
    cell = select(["table4/*/mixmask/200"])[0]
    cell = dataclasses.replace(cell, overrides={**cell.overrides, "mask.grid": 48})
    step = steps(cell, 0, budget("smoke"))[0]
    assert step.config.mask.grid == step.config.augment.size == 32
    assert "48" in step.notes[0]
    assert steps(cell, 0, budget("paper"))[0].config.mask.grid == 48


def test_set_reaches_the_stage_it_names(tmp_path):
    jobs = table4(tmp_path, settings=["epochs=100", "linear.epochs=7", "cluster.partition=a100"])
    assert jobs[0].config.epochs == 100 and jobs[1].config.epochs == 7 and jobs[0].resources.partition == "a100"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["epohcs=3"], ("epohcs", "epochs")),
        (["linear.epohcs=3"], ("linear", "epohcs", "epochs")),
        (["cluster.partitoin=x"], ("cluster.partitoin", "partition")),
        (["linear.seed=3"], ("linear.seed",)),
        (["epochs"], ("key=value",)),
    ],
)
def test_a_wrong_key_is_named_with_the_nearest(tmp_path, settings, named):
    with pytest.raises(ConfigError) as error:
        table4(tmp_path, settings=settings)
    assert all(word in str(error.value) for word in named)


def test_an_unknown_target_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"tabel4.*did you mean 'table4'.*targets: "):
        select(["tabel4"])
    with pytest.raises(ConfigError, match="did you mean 'table5/cifar100/byol/mixmask'"):
        select(["table5/cifar100/byol/mixmsk"])
    assert select([]) == select(["all"]) and select(["table4"]) == select(["table4/*", "table4"])
    assert select(["table[23]"]) == select(["table2", "table3"])


def test_flops_are_those_counted_for_the_papers_networks():
    assert cost.forward_gflop(Backbone("resnet18", "cifar", 64, 8), 32) == pytest.approx(1.111, rel=1e-3)
    assert cost.forward_gflop(Backbone("resnet50", "imagenet", 64, 4), 224) == pytest.approx(8.178, rel=1e-3)


def test_on_imagenet_mixmask_costs_seven_forward_passes_and_moco_four_and_mscn_four_and_six_of_its_crops(tmp_path):
    vanilla, mscn, mixmask = (job.gpu_hours for job in table4(tmp_path)[::2] if job.config.epochs == 200)
    assert mixmask / vanilla == pytest.approx(7 / 4)
    assert mscn / vanilla == pytest.approx((4 + 6 * (96 / 224) ** 2) / 4)


def test_a_named_gpus_kept_report_decides_the_hours_and_is_named(tmp_path, monkeypatch, cli):
    monkeypatch.setattr(cost, "REPORTS", tmp_path)
    rows = {
        "steps/moco/mixmask, fp32": {"tflop_per_second": 154.0},
        "steps/moco/mixmask, bf16": {"tflop_per_second": 300},
    }
    (tmp_path / "h900.json").write_text(json.dumps({"results": {**rows, "knn/predict": {"seconds": 1}}}))
    cells, runs = select(["table5/cifar100/moco/mixmask", "table4/imagenet/moco/mixmask/200"]), tmp_path / "runs"
    assumed, ours = (graph.jobs(cells, budget("paper"), runs, gpu=gpu) for gpu in ("", "h900"))
    small = [a.hours / b.hours for a, b in zip(assumed, ours, strict=True) if a.config.dataset == "cifar100"]
    assert small and small == pytest.approx([154 / 38.5] * len(small))
    large = [(a, b) for a, b in zip(assumed, ours, strict=True) if a.config.dataset == "imagenet"]
    assert large and all(a.hours == b.hours for a, b in large)  # the report has no row of it
    words = ["table5/cifar100/moco/mixmask", "--dry-run", "--runs-dir", runs, "--gpu"]
    shown = cli(launch.main, *words, "h900")[1]
    assert "measured on h900 (benchmarks/results/h900.json), TFLOP/s: resnet18 fp32 154, bf16 300; the rest" in shown
    assert cli(launch.main, *words, "h901")[2].startswith("error: --gpu: no report of 'h901' in benchmarks/results")


def test_the_duration_of_runs_of_own_images_is_unknown(tmp_path):
    config = configs.load(ROOT / "pretrain/configs/folder_moco.yaml")
    assert math.isnan(cost.hours(config, config, gpus=1))
    (job, *_) = table4(tmp_path)
    unknown = dataclasses.replace(job, hours=math.nan)
    assert (
        launch._duration(unknown).startswith("duration unknown") and launch._cost([job, unknown], gpu=True) == job.hours
    )


# --------------------------------------------------------------------------------------------------- the command


def command(*words, **environment):
    return subprocess.run(
        [sys.executable, "slurm/launch.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=60,
    )


def cpu_seconds():
    """Of the processes that have ended: what a command takes on a machine that has nothing else to do."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_dry_run_answers_within_two_seconds_and_prints_each_command_alone(tmp_path):
    start = cpu_seconds()
    done = command("table4", "--dry-run", "--runs-dir", str(tmp_path), PATH="/nowhere")
    assert cpu_seconds() - start < 2
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("python pretrain/train.py ") for line in lines) == 6
    assert sum(line.startswith("python eval/linear.py ") for line in lines) == 6
    assert "our reconstruction" in done.stdout and "GPU-hours" in done.stdout and "estimate" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_everything_answers_within_three_seconds_with_the_cost_of_each_table(tmp_path):
    start = cpu_seconds()
    done = command("all", "--dry-run", "--runs-dir", str(tmp_path), PATH="/nowhere")
    assert cpu_seconds() - start < 3
    assert done.returncode == 0, done.stderr
    costs = [line.split()[0] for line in done.stdout.splitlines()[-13:]]
    assert costs == [
        "cells",
        *(f"table{n}" for n in range(1, 8)),
        "figure5",
        "figure6",
        "figure7",
        "total",
        "estimate:",
    ]
    assert "236 pretrain, 137 linear" in done.stdout


def test_runs_that_tables_share_are_counted_once_in_the_total(tmp_path, capsys):
    launch.main(["table1/imagenet/grid/8", "table5/imagenet/moco/mixmask", "--dry-run", "--runs-dir", str(tmp_path)])
    table1, table5, total = (line.split()[1:4] for line in capsys.readouterr().out.splitlines()[-4:-1])
    assert table1 == table5 == ["1", "2", total[2].rstrip(",")] and total[:2] == ["2", "2"]


def test_what_cannot_be_launched_is_said_in_a_line_with_the_file_that_it_needs(tmp_path, capsys):
    launch.main(["table6", "--dry-run", "--runs-dir", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "no pre-training of ours; --set checkpoints.swav=PATH" in shown
    assert shown.count("python pretrain/train.py") == 5 and "18 distinct (5 pretrain, 13 finetune)" in shown


@pytest.mark.parametrize(
    ("target", "maker"), [("table8", "make_tables.py table8"), ("figure1", "make_figures.py figure1")]
)
def test_a_target_without_runs_says_what_makes_it(target, maker, capsys):
    launch.main([target])
    assert f"{target} needs no runs: python paper/{maker}" in capsys.readouterr().out


def test_methods_that_are_not_implemented_launch_nothing_and_say_so(tmp_path, capsys):
    launch.main(["table7/swav/voc/*", "--dry-run", "--runs-dir", str(tmp_path)])
    assert "0 distinct" in capsys.readouterr().out


def test_the_launcher_never_imports_torch():
    code = (
        "import sys; sys.argv = ['launch', 'all', '--dry-run']; sys.path.insert(0, '.')\n"
        "from slurm import launch; launch.main(); launch.main(['status', 'table4'])\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("executor", ["auto", "slurm"])
def test_the_paper_preset_without_slurm_ends_at_once_and_says_what_to_type(tmp_path, executor):
    done = command("table4", "--executor", executor, "--runs-dir", str(tmp_path), PATH="/nowhere")
    assert done.returncode == 1 and "no SLURM was found" in done.stderr and "--executor local" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_status_tells_the_value_of_a_finished_cell(tmp_path, capsys):
    jobs = table4(tmp_path)
    finish(jobs[1], linear_sgd_last=66.6)
    launch.main(["status", "table4/*/vanilla/200", "--runs-dir", str(tmp_path)])
    assert "66.6" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- the local executor

SUCCEED = "import json, sys\nprint('hello')\njson.dump({'metrics': {'a_last': 12.3}}, open(sys.argv[1], 'w'))\n"


def scripted(tmp_path, *scripts):
    """Jobs of table4, the first ones running the given scripts; each gets the path of its result file."""
    jobs = []
    for job, script in zip(table4(tmp_path / "runs")[: len(scripts)], scripts, strict=True):
        path = tmp_path / f"{job.id}.py"
        path.write_text(script)
        words = ("python", str(path), str(job.directory / "result.json"))
        jobs.append(dataclasses.replace(job, command=words))
    return jobs


def test_local_runs_what_is_not_finished_and_keeps_the_output(tmp_path, capfdbinary):
    jobs = scripted(tmp_path, SUCCEED, SUCCEED)
    finish(jobs[0])
    local.launch(jobs)
    shown = capfdbinary.readouterr().out
    assert shown.count(b"hello") == 1 and b"1 of 2 runs are finished already" in shown and b"a_last 12.3" in shown
    assert (jobs[1].directory / "output.log").read_text() == "hello\n"
    assert [job.state for job in jobs] == ["finished", "finished"]


def test_local_leaves_a_run_that_slurm_has_a_job_for(tmp_path, monkeypatch, capfdbinary):
    jobs = scripted(tmp_path, SUCCEED, SUCCEED, SUCCEED)
    live = {str(jobs[0].directory): squeue.Live("12_3", "PENDING", "Priority")}
    monkeypatch.setattr(shell, "available", lambda: True)
    monkeypatch.setattr(squeue, "live_jobs", lambda: live)
    with pytest.raises(UserError, match=f"{jobs[0].directory}: left to SLURM: job 12_3 is PENDING"):
        local.launch(jobs)
    assert [job.state for job in jobs] == ["new", "new", "finished"]
    assert not jobs[0].directory.exists() and b"left to SLURM: job 12_3" in capfdbinary.readouterr().out


def test_local_goes_on_with_a_note_where_slurm_does_not_answer(tmp_path, monkeypatch, capfdbinary):
    def unanswered():
        raise UserError("no answer")

    (job,) = scripted(tmp_path, SUCCEED)
    monkeypatch.setattr(shell, "available", unanswered)
    local.launch([job])
    assert job.state == "finished" and b"note: no answer; runs that have a SLURM job" in capfdbinary.readouterr().out


def test_local_says_in_one_line_that_a_log_cannot_be_written(tmp_path):
    (job,) = scripted(tmp_path, SUCCEED)
    (job.directory / "output.log").mkdir(parents=True)
    with pytest.raises(UserError, match=f"cannot write {job.directory}/output.log: Is a directory"):
        local.launch([job])


def test_local_skips_the_descendants_of_a_failure_names_them_and_goes_on(tmp_path, capfdbinary):
    jobs = scripted(tmp_path, "raise SystemExit('boom')", SUCCEED, SUCCEED, SUCCEED)
    with pytest.raises(UserError) as error:
        local.launch(jobs)
    assert [job.state for job in jobs] == ["new", "new", "finished", "finished"]
    assert "2 of 4 runs" in str(error.value)
    assert f"{jobs[0].directory}/output.log" in str(error.value)
    assert f"{jobs[1].directory}: skipped: it needs {jobs[0].directory}" in str(error.value)
    assert "boom" in (jobs[0].directory / "output.log").read_text()


def test_ctrl_c_reaches_the_job_which_saves_and_ends_with_status_130(tmp_path):
    job = tmp_path / "job.py"
    job.write_text(
        "import pathlib, time\ntry:\n    print('running', flush=True)\n    time.sleep(30)\n"
        f"except KeyboardInterrupt:\n    pathlib.Path({str(tmp_path / 'saved')!r}).write_text('yes')\n    raise\n"
    )
    launcher = tmp_path / "launcher.py"
    launcher.write_text(
        f"import dataclasses, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom mixmask.config import main_guard\nfrom paper.cells import select\n"
        "from paper.presets import budget\nfrom slurm import graph, local\n"
        "def main():\n"
        f"    jobs = graph.jobs(select(['table4']), budget('smoke'), Path({str(tmp_path / 'runs')!r}))[:1]\n"
        f"    local.launch([dataclasses.replace(jobs[0], command=('python', {str(job)!r}))])\n"
        "if __name__ == '__main__':\n    main_guard(main)\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(launcher)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "running" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and "the same command continues" in errors
    assert (tmp_path / "saved").read_text() == "yes"


def test_a_job_of_the_project_s_own_scripts_ends_well_through_the_launcher_s_pipe(tmp_path, capfdbinary):
    """What every stage's script does with its streams (`main_guard`) must work where they are a pipe."""
    guarded = "from mixmask.config import main_guard\nmain_guard(lambda: print('guarded'))\n"
    (job,) = scripted(tmp_path, guarded + SUCCEED)
    local.launch([job])
    assert job.state == "finished" and b"guarded" in capfdbinary.readouterr().out


# -------------------------------------------------------------------------------------------- where it is called


@pytest.mark.parametrize("verb", ["status", "cancel"])
def test_an_option_may_stand_between_the_verb_and_its_target(verb, tmp_path, capsys):
    launch.main([verb, "--preset", "smoke", "--runs-dir", str(tmp_path), "table4/*/vanilla/200"])
    shown = capsys.readouterr().out
    assert "1 cells are complete" in shown if verb == "status" else "0 jobs cancelled" in shown


def test_efficiency_is_asked_of_status_alone_and_launches_nothing(tmp_path, cli):
    status, _, errors = cli(launch.main, "table4", "--efficiency", "--preset", "smoke", "--runs-dir", tmp_path)
    assert status == 1 and "launch.py status --efficiency TARGET" in errors and not list(tmp_path.iterdir())


def test_a_profile_of_one_s_own_is_seen_from_where_the_caller_is(tmp_path, capsys, monkeypatch):
    (tmp_path / "mine.yaml").write_text("hours: 7\n")
    monkeypatch.chdir(tmp_path)
    launch.main(["table4/*/vanilla/200", "--dry-run", "--cluster", "mine.yaml"])
    assert "in jobs of up to 7 h" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["slurm", "/"])
def test_from_any_folder_the_runs_are_those_of_the_repository_and_an_own_place_is_named(place, tmp_path):
    """A run of the repository that is finished is not launched again from elsewhere."""
    names = ["table4/*/vanilla/200", "--preset", "smoke"]
    code = tmp_path / "code"
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split():
        if name.startswith(("mixmask/", "paper/", "slurm/", "pretrain/", "eval/", "detection/")):
            (code / name).parent.mkdir(parents=True, exist_ok=True)
            (code / name).write_bytes((ROOT / name).read_bytes())
    here = {**os.environ, "PYTHONPATH": str(code)}

    def status(cwd, *words):
        words = [sys.executable, str(code / "slurm" / "launch.py"), "status", *names, *words]
        done = subprocess.run(words, cwd=cwd, env=here, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for job in graph.jobs(select(names[:1]), budget("smoke"), code / "runs"):
        finish(job, linear_sgd_last=66.6)
    elsewhere = code / place if place == "slurm" else Path(place)
    assert "2 runs in runs: 2 finished" in status(code) and "2 runs in runs: 2 finished" in status(elsewhere)
    assert f"2 runs in {tmp_path}/own: 2 not started" in status(tmp_path, "--runs-dir", "own")


# -------------------------------------------------------------------------------------------- what a user is told


def test_a_table_at_its_own_scale_costs_minutes_of_the_cpu(tmp_path, capsys):
    launch.main(["reduced", "--dry-run", "--runs-dir", str(tmp_path / "runs")])
    *_, head, own, total, assumed = capsys.readouterr().out.splitlines()
    assert head.split() == ["cells", "runs", "CPU-minutes"] and float(own.split()[-1]) > 10
    jobs = len(graph.jobs(select(["reduced"]), budget("paper"), tmp_path / "runs"))
    assert f"{own.split()[-1]} left to run in {jobs} jobs" in total and "two CPU cores" in assumed


def test_results_that_are_kept_are_named_with_the_command_that_tabulates_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shell, "available", lambda: False)
    jobs = graph.jobs(select(["reduced"]), budget("paper"), tmp_path / "results")
    for job in jobs:
        finish(job)
    launch.main(["reduced", "--executor", "local", "--runs-dir", str(tmp_path / "runs")])
    said = capsys.readouterr().out
    assert f"results are in {tmp_path / 'results'} ({len(jobs)} of {len(jobs)} runs are kept there)\n" in said
    assert f"python paper/make_tables.py reduced --runs-dir {tmp_path / 'runs'}" in said


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--set", "lr=0.1"], "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        (["--set", "lrr=0.1"], "unknown key 'lrr'; did you mean 'optimizer.lr'?"),
        (["--set", "ratio=0.1"], "did you mean 'mask.ratio' or 'mscn.ratio'?"),
        (["--set", "linear.lr=0.1"], "did you mean 'optimizer.lr'?"),
        (["--set", "xyzzy=1"], "unknown key 'xyzzy'; --keys lists them"),
    ],
)
def test_a_misspelt_key_is_answered_by_the_nearest_and_never_by_all(tmp_path, words, hint):
    done = command("table4", "--dry-run", "--runs-dir", str(tmp_path), *words)
    assert done.returncode == 1 and hint in done.stderr and len(done.stderr) < 200
