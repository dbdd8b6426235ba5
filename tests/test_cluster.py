"""The grid through Snakemake, here and on a Slurm of this machine: the plain runner's records, summary and resume."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dora_lab import cluster, pipeline, preflight
from dora_lab.profiles import load_profile
from dora_lab.records import is_done, read_failures, read_record, run_folder
from dora_lab.shapes import SHAPES
from dora_lab.specs import RunSpec

CONFIGURATION = Path("/etc/slurm/slurm.conf")  # where a job's own srun looks
MARK = "# Written by dora_lab's tests and taken away by them.\n"


@pytest.fixture
def snakemake() -> str:
    try:
        return cluster.find_snakemake()
    except RuntimeError as error:
        pytest.skip(str(error))


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture
def slurm(tmp_path):
    """A Slurm of one node, this machine, without munge and accounting; skips where there is none, or a real one."""
    for program in ("slurmctld", "slurmd", "sbatch"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if os.getuid() != 0:
        pytest.skip(f"only root may write {CONFIGURATION}")
    if CONFIGURATION.exists() and not CONFIGURATION.read_text().startswith(MARK):
        pytest.skip(f"{CONFIGURATION} is there already: a real cluster's is left alone")
    folder, host = tmp_path / "slurm", socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    control, node = free_ports(2)
    CONFIGURATION.parent.mkdir(exist_ok=True)
    CONFIGURATION.write_text(
        f"""{MARK}ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmdPort={node}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} RealMemory=6000 State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
    )
    daemons = []
    with (folder / "log").open("w") as log:
        try:
            for program in ("slurmctld", "slurmd"):
                daemons.append(subprocess.Popen([program, "-D", "-c"], stdout=log, stderr=log))
            began = time.monotonic()
            while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
                assert time.monotonic() - began < 60, (folder / "log").read_text()[-3000:]
                time.sleep(0.3)
            yield
        finally:
            subprocess.run(["scancel", "--user=root"], capture_output=True)
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(timeout=30)
            CONFIGURATION.unlink()


@pytest.fixture
def slurm_profile(tmp_path) -> Path:
    """The profile that ships, without second tries and with a quick look for what has ended."""
    folder = tmp_path / "quick"
    folder.mkdir()
    values = yaml.safe_load((cluster.PROFILES / "slurm" / "config.yaml").read_text())
    values |= {"retries": 0, "jobs": 2, "latency-wait": 5, "seconds-between-status-checks": 1}
    values |= {"slurm-init-seconds-before-status-checks": 1, "slurm-status-command": "squeue"}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def pid_of(spec: RunSpec) -> int:
    """The worker of a run, when it has come up."""
    began = time.monotonic()
    while time.monotonic() - began < 300:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode().split("\0")
            except OSError:
                continue
            if words[1:3] == ["-m", "dora_lab.worker"] and any(f"/{spec.run_id}/" in word for word in words):
                return int(path.parent.name)
        time.sleep(0.1)
    raise AssertionError(f"no worker of {spec.run_id} was started")


def cells(*named: tuple[str, str]) -> list[RunSpec]:
    return [RunSpec.from_profile(load_profile("smoke"), task, method) for task, method in named]


def grid_with_a_failure_and_a_kill(runs: Path, specs: list[RunSpec], kill, snakemake_profile: str):
    """(summary, what was said) of a grid whose first run cannot be written and whose second is killed.

    `kill(pid)` ends the worker; another process does that, as a scheduler would.
    """
    bad, victim = specs[:2]
    (run_folder(runs, bad) / "curve.jsonl").mkdir(parents=True)
    killer = os.fork()
    if not killer:
        try:
            kill(pid_of(victim))
        finally:
            os._exit(0)
    said: list[str] = []
    summary = cluster.run_grid("smoke", specs, runs, 2, said.append, snakemake_profile)
    os.waitpid(killer, 0)
    assert set(summary.failed) == {bad.run_id, victim.run_id}
    assert "curve.jsonl" in summary.failed[bad.run_id]
    assert (summary.done_before, summary.done_now) == (0, len(specs) - 2)
    noted = {failure["folder"]: failure["error"] for failure in read_failures(runs / "smoke")}
    assert noted.keys() == {str(run_folder(runs, spec)) for spec in (bad, victim)}
    assert len([line for line in said if line.startswith("[")]) == len(specs)
    (run_folder(runs, bad) / "curve.jsonl").rmdir()
    return summary, said


def same_but_for_time(one: Path, other: Path) -> None:
    """Two records of one run: everything that is not a time, or memory, is equal, and every prediction is."""
    records = [dataclasses.asdict(read_record(folder)) for folder in (one, other)]
    for record in records:
        for name in [n for n in record["result"] if n.endswith("_s") or n == "peak_memory_bytes"]:
            del record["result"][name]
        del record["environment"]["date"]
    assert records[0] == records[1]
    for name in ("predictions.jsonl", "geometry.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.slow
def test_what_snakemake_began_the_plain_runner_ends_with_the_same_records(snakemake, tmp_path):
    specs = cells(("winogrande", "lora"), ("winogrande", "dora"), ("boolq", "dora"))
    killed, _ = grid_with_a_failure_and_a_kill(
        tmp_path / "runs", specs, lambda pid: os.kill(pid, signal.SIGKILL), "local"
    )
    assert "exit code 137" in killed.failed[specs[1].run_id]
    done = run_folder(tmp_path / "runs", specs[2]) / "record.json"
    before = done.stat().st_mtime_ns
    again = pipeline.run_grid("smoke", specs, tmp_path / "runs", 2, lambda line: None)
    assert (again.done_before, again.done_now, again.failed) == (1, 2, {})
    assert done.stat().st_mtime_ns == before

    plain = pipeline.run_grid("smoke", specs[2:], tmp_path / "plain", 1, lambda line: None)
    assert plain.done_now == 1
    same_but_for_time(done.parent, run_folder(tmp_path / "plain", specs[2]))
    said: list[str] = []
    finished = cluster.run_grid("smoke", specs, tmp_path / "runs", 2, said.append)
    assert (finished.done_before, finished.done_now) == (3, 0) and done.stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute or two, where nobody else has the cores
def test_the_smoke_grid_through_slurm(snakemake, slurm, slurm_profile, tmp_path):
    specs = cells(*((task, method) for task in ("boolq", "hellaswag", "winogrande") for method in ("lora", "dora")))

    def cancel(pid: int) -> None:
        environment = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        job = next(word.partition("=")[2] for word in environment if word.startswith("SLURM_JOB_ID="))
        subprocess.run(["scancel", job], check=True)

    killed, _ = grid_with_a_failure_and_a_kill(tmp_path / "runs", specs, cancel, str(slurm_profile))
    assert "Slurm says CANCELLED" in killed.failed[specs[1].run_id]
    again = cluster.run_grid("smoke", specs, tmp_path / "runs", 2, lambda line: None, str(slurm_profile))
    assert (again.done_before, again.done_now, again.failed) == (4, 2, {})
    assert all(is_done(run_folder(tmp_path / "runs", spec)) for spec in specs)


@pytest.mark.slow
def test_reproduce_with_snakemake_ends_in_the_same_report(snakemake, tiny_profile, tmp_path):
    values = yaml.safe_load(tiny_profile.read_text()) | {"name": "two", "tasks": ["boolq"], "seeds": [0]}
    values |= {"methods": ["lora", "dora"]}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    call = [str(Path(sys.executable).with_name("dora-lab")), "reproduce", "--profile", "two.yaml"]
    said = {}
    for engine in ("snakemake", "local"):
        done = subprocess.run(
            [*call, "--engine", engine, "--runs-dir", engine], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        said[engine] = done.stdout.replace(f"/{engine}/", "/")
    lines = {engine: text.splitlines() for engine, text in said.items()}
    assert lines["snakemake"][0].startswith("2 runs: 0 done before, 2 to do, by Snakemake with profile local")
    progress = [sorted(line.split("]")[1].split(";")[0] for line in text[1:3]) for text in lines.values()]
    assert progress[0] == progress[1] and lines["snakemake"][3:] == lines["local"][3:]


def test_a_large_cell_asks_the_scheduler_for_its_gpu(snakemake, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "_shape", lambda spec: SHAPES["llama-7b"])
    profile = load_profile("llama-7b")
    spec = RunSpec.from_profile(profile, "boolq", "dora")
    grid = cluster.write_grid("llama-7b", profile, [spec], tmp_path)
    wanted = json.loads(grid.read_text())["cells"][spec.run_id]
    log = tmp_path / "log"
    with log.open("w") as said:
        options = ["--dry-run", "--cores=4", "--resources=gpu=1"]
        command = cluster._command(grid, cluster.PROFILES / "local", options, "grid")
        assert subprocess.run(command, stdout=said, stderr=subprocess.STDOUT).returncode == 0
    planned = log.read_text()
    assert f"output: {spec.run_id}/record.json" in planned and "threads: 4" in planned
    for resource in ("gpu=1", f"mem_mb={wanted['memory_mb']}", f"runtime={wanted['minutes']}"):
        assert resource in planned, resource


def test_profiles_that_ship_agree_that_a_record_is_done():
    """Whatever else differs, no profile lets Snakemake delete a record or do one again."""
    shipped = {path.parent.name: yaml.safe_load(path.read_text()) for path in cluster.PROFILES.glob("*/config.yaml")}
    assert set(shipped) == {"local", "slurm"} and shipped["slurm"]["executor"] == "slurm"
    for values in shipped.values():
        assert values["rerun-triggers"] == ["mtime"]
        assert all(values[name] for name in ("keep-going", "keep-incomplete", "ignore-incomplete", "nolock"))


def test_what_is_missing_or_unknown_is_named(tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="unknown Snakemake profile 'slrum': choose one of local, slurm, or give a folder"
    ):
        cluster.find_profile("slrum")
    monkeypatch.setattr(cluster, "PROJECT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="`make snakemake` sets it up"):
        cluster.find_snakemake()


def test_how_a_cell_ended_is_read_from_its_own_error_alone(tiny_spec):
    one, other = tiny_spec(), tiny_spec(method="lora", rank=2, alpha=4.0)
    log = (
        "Error in rule cell:\n    message: SLURM-job '3' failed, SLURM status is: 'TIMEOUT'. Reason\n    jobid: 1\n"
        f"    output: {one.run_id}/record.json\n\n[Wed]\nFinished jobid: 4\n"
    )
    assert cluster._ending(log, one) == "Slurm says TIMEOUT"
    assert "before it could note why" in cluster._ending(log, other)
