"""A private SLURM on this machine: two nodes with two fake GPUs each, accounting, two partitions. Linux, as root.

    python tests/slurm_cluster.py start DIR     prints `export SLURM_CONF=...`; the cluster runs until it is stopped
    python tests/slurm_cluster.py stop DIR

Two slurmd share the host; munge, MariaDB and slurmdbd have their sockets and files in DIR, ports are free ones. All
daemons are children of one supervisor. Within tests (`running`) it ends with them, also when they are killed: its
standard input closes. Jobs in partition `high` preempt those in `low`, which are requeued.

The GPUs are character devices that compute nothing: jobs are placed by them, and CUDA_VISIBLE_DEVICES is set.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NODES = ("n1", "n2")
PROGRAMS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")
HOSTS = Path("/etc/hosts")
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36

# Requeued jobs wait out cred_expire (default 120 s); MinJobAge is how long the controller remembers an ended job.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool/%n
SlurmctldPidFile={dir}/pid/slurmctld
SlurmdPidFile={dir}/pid/slurmd.%n
SlurmctldLogFile={dir}/log/slurmctld
SlurmdLogFile={dir}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
MinJobAge=600
SlurmctldTimeout=30
SlurmdTimeout=15
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort={dbd}
AccountingStoragePass={dir}/munge/socket
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=4 RealMemory=16000 Gres=gpu:2 Feature=n1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=4 RealMemory=16000 Gres=gpu:2 Feature=n2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""

ACCOUNTING = """
AuthType=auth/munge
AuthInfo=socket={dir}/munge/socket
DbdHost=localhost
DbdPort={dbd}
SlurmUser=root
PidFile={dir}/pid/slurmdbd
LogFile={dir}/log/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mysql}
StorageUser=slurm
StoragePass=slurm
StorageLoc=accounting
CommitDelay=1
"""

DATABASE = """
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON accounting.* TO 'slurm'@'127.0.0.1';
"""


class ClusterError(Exception):
    """The cluster cannot be started; the text says why."""


def obstacle() -> str:
    """Why no cluster can run here; empty where one can."""
    if not sys.platform.startswith("linux"):
        return "SLURM's daemons need Linux"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm slurmdbd mariadb-server)"
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    if not os.access(HOSTS, os.W_OK):
        return f"{HOSTS} cannot be written"
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.mknod(f"{folder}/gpu", 0o20666, os.makedev(1, 3))
        except OSError as error:
            return f"fake GPUs need mknod: {error.strerror}"
    return ""


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


# -------------------------------------------------------------------------------------------- what tests see


class Cluster:
    """A running cluster in `directory`."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.environment = {"SLURM_CONF": str(directory / "slurm.conf")}

    def kill_node(self, name: str) -> None:
        """As a power cut would: the node's daemon, its job steps and all their processes, at once."""
        server = int((self.directory / "pid" / name).read_text())
        while family := [server, *descendants(server)]:
            for process in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            if not _alive(server):
                return
            time.sleep(0.02)

    def start_nodes(self) -> None:
        """Start the nodes that are down, and wait until they answer."""
        os.kill(int((self.directory / "pid" / "supervisor").read_text()), signal.SIGUSR1)
        _wait(60, lambda: _nodes_up(self.environment), "the nodes did not come back")


@contextlib.contextmanager
def running(settings: str = "") -> Iterator[Cluster]:
    """A cluster in a new temporary directory; ended and removed afterwards, or when this process dies.

    settings: further lines of its slurm.conf, over those above.
    """
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))
    (directory / "settings").write_text(settings)
    supervisor = _supervise(directory, attached=True)
    try:
        _wait_for_start(directory, supervisor)
        yield Cluster(directory)
    finally:
        supervisor.stdin.close()
        supervisor.wait(timeout=60)


def start(directory: Path) -> None:
    """A cluster that stays until `stop`."""
    (directory / "failed").unlink(missing_ok=True)
    _wait_for_start(directory, _supervise(directory, attached=False))


def stop(directory: Path) -> None:
    """End the cluster of `directory`; its logs stay."""
    path = directory / "pid" / "supervisor"
    process = int(path.read_text()) if path.exists() else 0
    if process and str(directory) in _command_line(process):
        os.kill(process, signal.SIGTERM)
        _wait(60, lambda: not _alive(process), "the supervisor did not end")


def _supervise(directory: Path, attached: bool) -> subprocess.Popen:
    directory.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, __file__, "serve" if attached else "serve-detached", str(directory)]
    with open(directory / "supervisor.log", "a") as log:
        return subprocess.Popen(
            words,
            stdin=subprocess.PIPE if attached else subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the tests; the supervisor then ends the daemons in order
        )


def _wait_for_start(directory: Path, supervisor: subprocess.Popen) -> None:
    _wait(120, lambda: (directory / "ready").exists() or supervisor.poll() is not None, "SLURM did not start")
    if supervisor.poll() is not None:
        raise ClusterError(f"SLURM did not start: {(directory / 'supervisor.log').read_text().strip()}")


# --------------------------------------------------------------------------------------------- the supervisor


def serve(directory: Path, attached: bool) -> None:
    """Start all daemons as children, wait to be told to end, end them. In the foreground."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)  # whoever a daemon leaves behind becomes a child of this process
    told = {signal.SIGTERM: False, signal.SIGUSR1: False}
    for number in told:
        signal.signal(number, lambda number, _: told.__setitem__(number, True))
    try:
        _start_daemons(directory)
        (directory / "ready").touch()
        while not told[signal.SIGTERM] and not (attached and _closed(sys.stdin)):
            _reap()
            if told[signal.SIGUSR1]:
                told[signal.SIGUSR1] = False
                _start_nodes(directory)
            time.sleep(0.1)
    finally:
        _end(directory)
        (directory / "ready").unlink(missing_ok=True)
        if attached and not sys.exc_info()[0]:
            shutil.rmtree(directory, ignore_errors=True)


def _closed(stream) -> bool:
    return bool(select.select([stream], [], [], 0)[0]) and not os.read(stream.fileno(), 1)


def _start_daemons(directory: Path) -> None:
    os.environ["PATH"] = _path()
    for name in ("pid", "log", "state", "munge", "dev", *(f"spool/{node}" for node in NODES)):
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "pid" / "supervisor").write_text(str(os.getpid()))
    ports = dict(zip(("ctld", "dbd", "mysql", *NODES), free_ports(3 + len(NODES)), strict=True))
    os.environ["SLURM_CONF"] = str(directory / "slurm.conf")
    _write_configuration(directory, ports)
    munge = directory / "munge"
    options = [f"--socket={munge}/socket", f"--pid-file={directory}/pid/munged", f"--log-file={munge}/log"]
    _spawn(
        directory, "munged", "--foreground", "--force", f"--key-file={munge}/key", f"--seed-file={munge}/seed", *options
    )
    _start_database(directory, ports["mysql"])
    _spawn(directory, "slurmdbd", "-D")
    _wait(60, lambda: _succeeds("sacctmgr", "-n", "list", "cluster"), "slurmdbd does not answer")
    _succeeds("sacctmgr", "-i", "add", "cluster", "tests")
    _spawn(directory, "slurmctld", "-D", "-i")
    _wait(60, lambda: _succeeds("scontrol", "ping"), "slurmctld does not answer")
    _start_nodes(directory)
    _wait(60, lambda: _nodes_up(), "the nodes did not start")


def _write_configuration(directory: Path, ports: dict[str, int]) -> None:
    values = {"dir": directory, "host": socket.gethostname().partition(".")[0], **ports}
    lines, settings = CONFIGURATION.format(**values).splitlines(), directory / "settings"
    own = settings.read_text().splitlines() if settings.exists() else []
    names = {line.partition("=")[0] for line in own if not line.startswith("PartitionName")}
    kept = [line for line in lines if line.partition("=")[0] not in names]
    (directory / "slurm.conf").write_text("\n".join([*kept, *own]) + "\n")
    (directory / "slurmdbd.conf").write_text(ACCOUNTING.format(**values))
    (directory / "slurmdbd.conf").chmod(0o600)
    (directory / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={directory}/dev/gpu[0-1]\n")
    (directory / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (directory / "database.sql").write_text(DATABASE)
    key = directory / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    (directory / "munge").chmod(0o711)
    directory.chmod(0o755)
    for number in range(2):
        device = directory / "dev" / f"gpu{number}"
        if not device.exists():
            os.mknod(device, 0o20666, os.makedev(1, 3))
    with open(HOSTS, "a") as hosts:  # so that a job's processes find each other by their nodes' names
        hosts.writelines(f"127.0.0.1 {node} # {directory}\n" for node in NODES)


def _start_database(directory: Path, port: int) -> None:
    data = directory / "mysql"
    if not (data / "mysql").exists():
        data.mkdir(exist_ok=True)
        words = ["mariadb-install-db", "--user=root", f"--datadir={data}", "--skip-test-db"]
        with open(directory / "log" / "mariadb-install", "w") as log:
            subprocess.run([*words, "--auth-root-authentication-method=normal"], stdout=log, stderr=log, check=True)
    _spawn(
        directory, "mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={data}/socket",
        f"--pid-file={directory}/pid/mariadbd", "--bind-address=127.0.0.1", f"--port={port}", "--skip-name-resolve",
        f"--init-file={directory}/database.sql", "--innodb-buffer-pool-size=64M", "--innodb-lock-wait-timeout=900",
        "--innodb-flush-log-at-trx-commit=0",
    )  # fmt: skip
    address = ["--no-defaults", "--protocol=tcp", "-h", "127.0.0.1", "-P", str(port), "-uslurm", "-pslurm"]
    _wait(60, lambda: _succeeds("mariadb-admin", *address, "ping"), "MariaDB does not answer")


def _start_nodes(directory: Path) -> None:
    """One process a node, whose family is all that runs on it."""
    for node in NODES:
        path = directory / "pid" / node
        if not path.exists() or not _alive(int(path.read_text())):
            path.write_text(str(_spawn(directory, sys.executable, __file__, "node", str(directory), node)))


def serve_node(directory: Path, node: str) -> None:
    """slurmd, and afterwards the job steps that it left behind, as this process's children."""
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    _spawn(directory, "slurmd", "-D", "-N", node)
    while True:
        _reap()
        time.sleep(0.1)


def _spawn(directory: Path, *words: str) -> int:
    """A daemon as a child that dies with this process."""
    with open(directory / "log" / f"{Path(words[0]).name}.output", "a") as log:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_die_with_parent, start_new_session=True
        ).pid


def _die_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end(directory: Path) -> None:
    """Jobs first, then every descendant; the names leave /etc/hosts."""
    subprocess.run(["timeout", "5", "scancel", "--me"], stderr=subprocess.DEVNULL)
    for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
        end = time.monotonic() + seconds
        while (family := descendants(os.getpid())) and time.monotonic() < end:
            for process in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
            time.sleep(0.1)
            _reap()
    lines = HOSTS.read_text().splitlines(keepends=True)
    HOSTS.write_text("".join(line for line in lines if not line.endswith(f" # {directory}\n")))


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


# --------------------------------------------------------------------------------------------------- helpers


def descendants(ancestor: int) -> list[int]:
    """Living processes below `ancestor`."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))):
            children.setdefault(int(stat[1]), []).append(int(entry.name))
    found, left = [], [ancestor]
    while left:
        below = children.get(left.pop(), [])
        left += below
        found += below
    return [process for process in found if _alive(process)]


def _stat(process: int) -> list[str]:
    """State, parent, ... of a process; empty where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _alive(process: int) -> bool:
    return _stat(process)[:1] not in ([], ["Z"])


def _command_line(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _nodes_up(environment: dict[str, str] | None = None) -> bool:
    words = ["sinfo", "-h", "-N", "-p", "low", "-t", "idle,alloc,mix", "-o", "%N %t"]
    answer = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    states = [line.split() for line in answer.stdout.splitlines()]
    return {name for name, state in states if not state.endswith("*")} == set(NODES)


def _succeeds(*words: str) -> bool:
    return subprocess.run(words, capture_output=True, timeout=30).returncode == 0


def _wait(seconds: float, condition: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise ClusterError(f"{otherwise} within {seconds:g} s")
        time.sleep(0.1)


def main() -> None:
    what, directory, *rest = sys.argv[1:] or ["", ""]
    place = Path(directory).resolve()
    if what == "start":
        if reason := obstacle():
            sys.exit(f"error: {reason}")
        start(place)
        print(f"export SLURM_CONF={place}/slurm.conf")
    elif what == "stop":
        stop(place)
    elif what in ("serve", "serve-detached"):
        serve(place, attached=what == "serve")
    elif what == "node":
        serve_node(place, rest[0])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main()
    except ClusterError as problem:
        sys.exit(f"error: {problem}")
