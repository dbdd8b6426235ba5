"""One holder of a folder at a time, here and where the file system has no locks; a killed one does not block."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from dora_lab import locks
from dora_lab.locks import locked
from dora_lab.profiles import load_profile
from dora_lab.records import read_predictions, read_record, run_folder
from dora_lab.specs import RunSpec

NO_FLOCK = """
import errno, fcntl
def refuse(file, how):
    raise OSError(errno.ENOLCK, "no locks available")
fcntl.flock = refuse
"""


@pytest.fixture(params=["flock", "lease alone"])
def file_system(request, monkeypatch):
    """With the kernel's lock, and as a file system that has none answers."""
    if request.param == "lease alone":

        def refuse(file, how):
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr(locks.fcntl, "flock", refuse)


@pytest.fixture
def quick(monkeypatch):
    """The same lock with shorter waits."""
    for name, seconds in {"BEAT_S": 0.05, "STALE_S": 0.4, "POLL_S": 0.02, "SETTLE_S": 0.1}.items():
        monkeypatch.setattr(locks, name, seconds)


def test_a_locked_folder_lets_one_in_at_a_time(tmp_path, file_system, quick):
    order, inside = [], threading.Event()

    def second():
        inside.wait()
        with locked(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with locked(tmp_path):
        inside.set()
        thread.join(timeout=0.3)
        assert thread.is_alive()
        order.append("first")
    thread.join(timeout=5)
    assert order == ["first", "second"]


def test_nothing_is_left_of_a_lock_but_its_empty_file(tmp_path, file_system):
    with pytest.raises(RuntimeError), locked(tmp_path):
        assert (tmp_path / ".lease").read_text().startswith(socket.gethostname())
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_a_killed_process_held_is_free_at_once(tmp_path):
    code = "import sys, time\nfrom dora_lab.locks import locked\nfrom pathlib import Path\n"
    code += "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert (tmp_path / ".lease").exists()
    began = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - began < 5 < locks.STALE_S


def test_a_lease_of_another_machine_holds_while_it_is_renewed_and_not_longer(tmp_path, quick):
    """As where flock is each machine's own: this one gets it, and another holds the folder all the same."""
    lease, ended = tmp_path / ".lease", threading.Event()
    lease.write_text("elsewhere 1 abc")
    beat = threading.Thread(target=locks._beat, args=(lease, "elsewhere 1 abc", ended))
    beat.start()
    entered = threading.Event()

    def wait_for_it():
        with locked(tmp_path):
            entered.set()

    waiting = threading.Thread(target=wait_for_it)
    waiting.start()
    assert not entered.wait(3 * locks.STALE_S)
    ended.set()  # the other machine is switched off
    beat.join()
    assert entered.wait(10)
    waiting.join()


def test_a_refusal_for_another_reason_is_not_taken_for_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path):
        pass


@pytest.mark.slow
def test_two_workers_with_the_same_cell_on_a_file_system_without_locks(tiny_profile, tmp_path):
    """One does it, the other waits and reads it."""
    code = NO_FLOCK + "import sys\nfrom dora_lab.training import main\nmain(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--profile", str(tiny_profile), "--task", "boolq", "--method", "dora"]
    both = [
        subprocess.Popen([*command, "--runs-dir", str(tmp_path)], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("step 12 of 12" in text for text in said) == [False, True]
    folder = run_folder(tmp_path, RunSpec.from_profile(load_profile(tiny_profile), "boolq", "dora"))
    assert len(read_predictions(folder)) == read_record(folder).result.n == 24
    assert not list(folder.glob("*.partial"))
