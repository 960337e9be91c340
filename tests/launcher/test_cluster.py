"""slurm/cluster.py and sbatch.py: what a job asks for, from cluster.yaml, profiles and --set, stage by stage."""

import re
import shlex
from pathlib import Path

import pytest

from mixmask.config import ConfigError, UserError
from paper.cells import select
from paper.presets import budget
from slurm import graph, launch, sbatch, shell
from slurm.cluster import OWN, cluster

ROOT = Path(__file__).resolve().parents[2]
PROFILES = sorted(path.stem for path in (ROOT / "slurm" / "clusters").glob("*.yaml"))


def asked(*settings, preset="paper", profile="", stage="pretrain"):
    """sbatch's options of a job of Table 4."""
    jobs = graph.jobs(select(["table4"]), budget(preset, settings), Path("runs"), profile)
    return sbatch.options(next(job for job in jobs if job.stage == stage), [], Path("copy"))


@pytest.mark.parametrize(
    ("settings", "option", "value"),
    [
        (["cluster.qos=gold"], "qos", "gold"),
        (["cluster.reservation=night"], "reservation", "night"),
        (["cluster.nodelist=n[1-2]"], "nodelist", "n[1-2]"),
        (["cluster.exclude=n3"], "exclude", "n3"),
        (["cluster.exclusive=true"], "exclusive", True),
        (["cluster.gpu_type=a100"], "gpus-per-node", "a100:1"),
        (["cluster.gres=gpu"], "gres", "gpu:1"),
        (["cluster.gres=gpu:a100"], "gres", "gpu:a100:1"),
        (["cluster.memory_gb=5", "cluster.memory_per_cpu=true"], "mem-per-cpu", "640M"),
        (["cluster.memory_gb=1.5"], "mem", "1536M"),
        (["cluster.mail_user=a@b", "cluster.mail_type=END,FAIL"], "mail-type", "END,FAIL"),
        (["cluster.wckey=proj"], "wckey", "proj"),
        (["cluster.extra={licenses: matlab, nice: 100}"], "nice", 100),
        (["cluster.extra.licenses=matlab"], "licenses", "matlab"),
        (["cluster.extra.contiguous=true"], "contiguous", True),
        (["cluster.extra.core-spec=0"], "core-spec", 0),
        (["cluster.extra={nice: 5}", "linear.cluster.extra.nice=6"], "nice", 5),
        (["cluster.account=12345"], "account", "12345"),
        (["cluster.account=0123"], "account", "0123"),
        (["cluster.account=1_000"], "account", "1_000"),
        (["cluster.account=0x1F"], "account", "0x1F"),
        (["cluster.reservation=2026-01-01"], "reservation", "2026-01-01"),
        (["cluster.hours=30:00"], "time", 30),
        (["cluster.hours=24:00:00"], "time", 1440),
        (["cluster.hours=2-00:00:00"], "time", 2880),
        (["cluster.hours=1-12"], "time", 2160),
        (["cluster.hours=1:30:30"], "time", 91),
        (["cluster.hours=4:00"], "time", 4),
        (["cluster.hours=1.5"], "time", 90),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_a_cluster_asks_for_is_said_by_its_key(settings, option, value):
    assert asked(*settings)[option] == value


@pytest.mark.parametrize(
    ("setting", "option"),
    [("cluster.partition=", "partition"), ("cluster.memory_gb=0", "mem"), ("cluster.exclusive=false", "exclusive")],
)
def test_what_is_empty_is_not_asked_for(setting, option):
    assert option not in asked(setting)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("cluster.extra.output=x", "--output itself (status looks for logs where they are now)"),
        ("cluster.extra.dep=x", "--dependency itself"),  # sbatch takes the beginning of a name for it
        ("cluster.extra.mem=1G", "--mem itself (cluster.memory_gb)"),
        ("cluster.extra.account=x", "--account itself (cluster.account)"),
        ("cluster.extra.J=x", "the long name of an option"),
        ("cluster.extra.export-file=x", "--export-file itself (a job has the environment of the launch"),
        ("cluster.extra.usage=true", "--usage itself"),
        ("cluster.extra=licenses", "cluster.extra: expected keys and values, found 'licenses'"),
        ("linear.cluster.extra=[nice]", "cluster.linear.extra: expected keys and values, found ['nice']"),
        ("cluster.linear=4", "cluster.linear: expected keys and values, found 4"),
        ("cluster.extra.nice=[1]", "expected a word, a number or true"),
        ('cluster.extra.nice="1\\n#SBATCH --hold"', "expected a word, a number or true"),
        ('cluster.partition="a\\nb"', "cluster.partition: expected one line"),
        ("cluster.account=1.10", "cluster.account: expected a word, found 1.1; quote it"),
        ("cluster.qos=true", "cluster.qos: expected a word, found True; quote it"),
        ("cluster.partitoin=x", "did you mean 'cluster.partition'?"),
        ("linear.cluster.partitoin=x", "did you mean 'cluster.partition'?"),
        ("cluster.hours=1:2:3:4", "cluster.hours: expected a number, found '1:2:3:4'; or as SLURM has it: 30:00, "),
        ("cluster.hours=UNLIMITED", "cluster.hours: expected a number, found 'UNLIMITED'; or as SLURM has it"),
        ("cluster.cpus=08", "cluster.cpus: expected a whole number, found '08'"),
    ],
)
def test_what_no_job_could_ask_for_is_refused_by_its_key(setting, named):
    with pytest.raises(ConfigError) as error:
        asked(setting)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_every_option_that_the_launcher_sets_is_refused_as_an_extra_one():
    everything = ["qos=q", "reservation=r", "nodelist=n", "exclude=e", "exclusive=true", "mail_user=u", "mail_type=t"]
    everything += ["partition=p", "account=a", "constraint=c", "wckey=w"]
    options = asked(*(f"cluster.{setting}" for setting in everything))
    assert options.keys() <= OWN.keys()


def test_resources_of_one_stage_alone():
    settings = ["cluster.hours=10", "linear.cluster.hours=4:00", "linear.cluster.gpus=0"]
    assert asked(*settings)["time"] == 600
    linear = asked(*settings, stage="linear")
    assert linear["time"] == 4 and "gpus-per-node" not in linear
    chosen = budget("paper", ["cluster.hours=10", "convert.cluster.hours=2"])
    convert = cluster(chosen, "convert")
    assert (convert.hours, convert.cpus, convert.gpus) == (2, 1, 0)  # it takes little, whatever all ask for
    assert cluster(chosen, "detection").hours == 10
    assert chosen.replicates  # the numbers of such a launch are those of the published budget


def test_detection_asks_for_four_gpus_unless_the_user_says_otherwise():
    """16 images do not fit one or two GPUs of 40 GB."""
    asked_for = {(): 4, ("cluster.gpus=8",): 8, ("cluster.gpus=8", "detection.cluster.gpus=2"): 2}
    for settings, gpus in asked_for.items():
        assert cluster(budget("paper", settings), "detection").gpus == gpus
    assert cluster(budget("paper"), "linear").gpus == 1 and cluster(budget("smoke"), "detection").gpus == 0


def test_a_profile_lies_between_cluster_yaml_and_the_command_line(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("partition: gpu\nqos: 10\nhours: 48:00:00\nextra: {nice: 5}\nlinear: {hours: 2, cpus: 2}\n")
    own = asked("cluster.partition=big", profile=str(path))
    assert (own["partition"], own["qos"], own["time"], own["nice"]) == ("big", "10", 2880, 5)
    linear = asked("cluster.extra.nice=6", profile=str(path), stage="linear")
    assert (linear["time"], linear["cpus-per-task"], linear["nice"], linear["qos"]) == (120, 2, 6, "10")
    smoke = asked(preset="smoke", profile=str(path), stage="linear")
    assert smoke["time"] == 60  # its small nets need little on any cluster
    assert asked("cluster.extra={nice: 7}", profile=str(path))["nice"] == 7  # over the profile's
    path.write_text("partition: gpu\nextra:\nlinear:\n")  # sections of which nothing is left
    assert asked(profile=str(path), stage="linear")["partition"] == "gpu"
    path.write_text("# nothing\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: expected keys and values, found none$"):
        asked(profile=str(path))
    path.write_text("partitoin: gpu\n")
    with pytest.raises(ConfigError, match=r"did you mean 'cluster\.partition'"):
        asked(profile=str(path))
    with pytest.raises(ConfigError, match=r"--cluster aptainer: .*did you mean 'apptainer'"):
        asked(profile="aptainer")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_of_the_repository_is_valid_and_makes_a_batch_script(name, tmp_path):
    jobs = graph.jobs(select(["table4"]), budget("paper"), tmp_path / "runs", name)
    text = sbatch.batch_text(jobs[0], tmp_path / "runs")
    assert "#SBATCH --time=" in text and "srun --kill-on-bad-exit=1" in text


def test_the_environment_of_the_launching_shell_is_cleaned_of_what_belongs_to_others():
    brought = {
        "SLURM_JOB_ID": "7",
        "SBATCH_QOS": "x",
        "_SLURM_SPANK_OPTION_pyxis_image": "x",
        "SQUEUE_FORMAT": "x",
        "RANK": "0",
        "TMPDIR": "/of/job/7",
    }
    kept = {"SLURM_CONF": "/c", "HOME": "/h", "OMP_NUM_THREADS": "2", "PATH": "/bin", "RANKING": "1"}
    assert shell.clean({**brought, **kept}) == kept
    assert shell.clean({"TMPDIR": "/tmp"}) == {"TMPDIR": "/tmp"}


@pytest.mark.parametrize(
    ("gres", "kind", "count"),
    [
        ("gpu:2", "", 2),
        ("gpu:a100:4(S:0-1)", "", 4),
        ("gpu:a100:4,gpu:v100:2", "", 6),
        ("gpu:a100:4,gpu:v100:2", "v100", 2),
        ("(null)", "", 0),
        ("nvme:1,gpu:h100:8(S:0,1)", "h100", 8),
    ],
)
def test_the_gpus_of_a_node_are_read_from_sinfo(tmp_path, monkeypatch, gres, kind, count):
    (tmp_path / "sinfo").write_text(f"#!/bin/sh\necho Welcome\necho '64|256000|{gres}'\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert sbatch.nodes_of("p", kind) == [sbatch.Node(count, 64, 256000)]


def test_a_job_that_no_node_holds_is_refused_with_what_the_largest_has(tmp_path, monkeypatch):
    (tmp_path / "sinfo").write_text("#!/bin/sh\necho '64|256000|gpu:4'\necho '128+|512000+|(null)'\n")
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def launch(*settings):
        sbatch.check_nodes(graph.jobs(select(["table4"]), budget("paper", settings), tmp_path))

    launch("cluster.partition=big")
    with pytest.raises(
        UserError, match=r"1 GPUs, 100 CPUs, 64 GB of a node, .* partition big .* 4 GPUs, 64 CPUs, 250 GB"
    ):
        launch("cluster.partition=big", "cluster.cpus=100")
    with pytest.raises(UserError, match=r"1 GPUs, 8 CPUs, .* has 0 GPUs, 128 CPUs, 500 GB .of type h100.;"):
        launch("cluster.gpu_type=h100")


def test_both_images_install_the_lock_and_nothing_else_of_python_s():
    docker, apptainer = ((ROOT / "containers" / name).read_text() for name in ("Dockerfile", "mixmask.def"))
    base = re.search(r"^FROM (\S+)$", docker, re.M)[1]
    assert f"Bootstrap: docker\nFrom: {base}\n" in apptainer
    assert re.findall(r"^%(\w+)$", apptainer, re.M) == ["files", "post", "environment", "runscript"]
    installed = [re.findall(r"^\s*(?:RUN )?(python -m pip .*)$", text, re.M) for text in (docker, apptainer)]
    assert installed[0] == installed[1] and len(installed[0]) == 1
    assert installed[0][0].endswith("--require-hashes --no-deps -r /requirements.lock")
    copies = [
        re.search(r"^(?:COPY|\s+)\s*(requirements\.lock /requirements\.lock)$", t, re.M) for t in (docker, apptainer)
    ]
    assert all(copies)
    lock = (ROOT / "requirements.lock").read_text()
    blocks = re.split(r"\n(?=\S)", lock.strip())
    assert all("--hash=sha256:" in block for block in blocks if not block.startswith("#")) and "git+" not in lock


def test_each_row_of_the_page_s_table_reaches_the_batch_script(tmp_path, capsys):
    """docs/slurm.md, "your cluster asks for": what stands in each row's second column, typed."""

    def shown(*words):
        launch.main(["table4", "--dry-run", "--executor", "slurm", "--runs-dir", str(tmp_path), *words])
        return capsys.readouterr().out

    rows = (ROOT / "docs" / "slurm.md").read_text().split("| your cluster asks for | `--set` |")[1].split("\n\n")[0]
    typed = [code for row in rows.splitlines()[2:] for code in re.findall(r"`([^`]+)`", row.split("|")[2])]
    typed = [shlex.split(code) for code in typed if code.startswith(("cluster.", "linear.", "--cluster "))]
    assert len(typed) > 20
    plain = shown()
    for words in typed:
        assert shown(*(words if words[0] == "--cluster" else ["--set", *words])) != plain, words
    assert "one array: #SBATCH --array=0-5%8, of imagenet_moco-" in shown("--set", "cluster.parallel=8")
