"""What starts processes takes them along: however it is stopped, none of them is left behind."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dora_lab import children
from dora_lab.children import Children, Terminated

SLEEPS = "['sh', '-c', 'echo $$ > new; mv new pid; exec sleep 60']"
SPEC = """
from pathlib import Path
from dora_lab import cluster, pipeline
from dora_lab.profiles import load_profile
from dora_lab.specs import RunSpec
profile = load_profile('smoke')
specs = [RunSpec.from_profile(profile, 'boolq', 'dora')]
runs = Path('runs').resolve()
(runs / 'smoke').mkdir(parents=True)
script = Path('snakemake').resolve()
script.write_text('#!/bin/sh\\necho $$ > pid; exec sleep 60')
script.chmod(0o755)
cluster.find_snakemake = lambda: str(script)
"""
STARTS = {
    "children": f"from dora_lab.children import Children\nwith Children() as c: c.start({SLEEPS}).wait()",
    "grid": f"{SPEC}\npipeline.cell_command = lambda *_: {SLEEPS}\npipeline.run_grid('smoke', specs, runs)",
    "chapter": f"{SPEC}\npipeline.papermill = lambda *_: {SLEEPS}\npipeline.run_chapter('08_results', runs / 'x')",
    "snakemake's grid": f"{SPEC}\ncluster.run_grid('smoke', specs, runs)",
    "snakemake's results": f"{SPEC}\ncluster.draw_results('smoke', profile, specs, runs)",
}


def _as_in_a_shell() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # a job in the background ignores them
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("what", "number"),
    [
        ("children", signal.SIGINT),
        ("children", signal.SIGTERM),
        ("children", signal.SIGHUP),
        ("grid", signal.SIGTERM),
        pytest.param("grid", signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param("chapter", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("snakemake's grid", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("snakemake's results", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("snakemake's results", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_process_leaves_none_of_its_own_behind(tmp_path, what, number):
    noted = tmp_path / "pid"
    process = subprocess.Popen(
        [sys.executable, "-c", STARTS[what]], cwd=tmp_path, preexec_fn=_as_in_a_shell, stderr=subprocess.DEVNULL
    )
    began = time.monotonic()
    while not (noted.exists() and noted.read_text().strip()):
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int(noted.read_text()), signal.SIGKILL)


def test_what_does_not_end_when_asked_is_killed():
    with pytest.raises(ValueError), Children(patience_s=0.1) as own:
        process = own.start(["sh", "-c", "trap '' TERM; echo; exec sleep 60"], stdout=subprocess.PIPE)
        process.stdout.readline()  # from here on it ignores SIGTERM
        raise ValueError
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


def test_a_signal_that_comes_while_a_process_starts_ends_that_one_too(monkeypatch):
    start = subprocess.Popen

    def signalled(*arguments, **options):
        process = start(*arguments, **options)
        signal.raise_signal(signal.SIGTERM)
        return process

    with pytest.raises(Terminated), Children() as own:
        assert signal.getsignal(signal.SIGTERM) == own._signalled
        monkeypatch.setattr(children.subprocess, "Popen", signalled)
        own.start(["sleep", "60"])
    assert [process.returncode for process in own.started] == [-signal.SIGTERM]


def test_what_ends_by_itself_is_left_alone_and_so_are_others_handlers():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with Children() as own:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            process = own.start(["sleep", "60"])
        assert process.poll() is None and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
        process.kill()
        process.wait()


def test_a_thread_starts_processes_without_handlers():
    codes = []

    def work():
        with Children() as own:
            codes.append(own.start(["true"]).wait())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0]
