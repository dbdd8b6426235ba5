"""A student's code runs apart: what it is refused, what it may do, and what is left when it ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dora_lab.assignments import fence, guard, isolation, sandbox
from dora_lab.assignments.build import cut, marking
from dora_lab.assignments.catalogue import find_assignment
from dora_lab.assignments.isolation import Function, Submission, SubmissionError, TimeLimit, WorkerDied

pytestmark = pytest.mark.slow  # some minutes of small cases, each with a process of its own

needs_landlock = pytest.mark.skipif(not fence.version(), reason="this kernel has no Landlock")


@pytest.fixture(scope="module")
def submission():
    with Submission(seconds=20, memory_bytes=2**29) as one:
        one.run("import torch")
        yield one


REFUSED = {
    "the network": ("import socket\nsocket.create_connection(('127.0.0.1', 9))", "socket"),
    "a process": ("import subprocess\nsubprocess.run(['true'])", "subprocess.Popen"),
    "a shell": ("import os\nos.system('true')", "os.system"),
    "another folder's file": ("open('/tmp/dora-lab-was-here', 'w')", "own folder"),
    "removing a file": ("import os\nos.remove('/etc/hostname')", "own folder"),
    "the chapters": (f"open({str(find_assignment('03').source)!r}).read()", "may not read"),
    "other processes": ("import os\nos.listdir('/proc')", "may not read"),
    "native code": ("import ctypes\nctypes.CDLL(None)", "may not use ctypes"),
    "native code of one's own": (
        "import sys\nopen('mine.so', 'wb').write(b'ELF')\nsys.path.append('.')\nimport mine",
        "native code along",
    ),
    "a folder's descriptor": ("import os\nos.open('/', os.O_RDONLY)", "may not read"),
    "a folder's descriptor below Python's": (
        "import os, sys\nos.open(sys.base_prefix, os.O_RDONLY)",
        "may not open the folder",
    ),
    "a file by way of another folder": (
        "import os\nos.makedirs('a/b')\nfd = os.open('a', os.O_RDONLY)\nos.chdir('a/b')\n"
        "os.open('..', os.O_RDONLY, dir_fd=fd)",
        "by way of another folder",
    ),
    "a link to look through": ("import os\nos.symlink('/etc', 'etc')", "may not use os.symlink"),
    "another file's mode": ("import os\nos.fchmod(os.open(os.__file__, os.O_RDONLY), 0o777)", "only files in its own"),
    "the hook's own variables": ("import gc\ngc.get_objects()", "may not use gc.get_objects"),
    "the project's text": (
        f"torch.from_file({str(find_assignment('03').source)!r}, size=9, dtype=torch.uint8)",
        "Permission denied" if fence.version() else "",
    ),
    "PEFT": ("import importlib\nimportlib.import_module('peft.tuners')", "may not be imported"),
    "too much memory": ("x = torch.zeros(2**30)", "alloc"),
}


@pytest.mark.parametrize("what", [what for what, (_, words) in REFUSED.items() if words])
def test_a_submission_is_refused(what, submission):
    source, words = REFUSED[what]
    with pytest.raises(SubmissionError, match=words):
        submission.run(source)


def test_a_submission_may_use_its_own_folder_and_notebook_commands(submission, capsys):
    source = "%matplotlib inline\nopen('mine.txt', 'w').write('ok')\nread = open('mine.txt').read()\nread"
    names = submission.run(source, ["read", "absent"])
    assert names == {"read": "ok"} and capsys.readouterr().out == "'ok'\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "problem"), [("while True: pass", TimeLimit), ("import os\nos._exit(0)", WorkerDied)]
)
def test_what_ends_the_worker_costs_its_own_cell_alone(source, problem):
    with Submission(seconds=2) as submission:
        submission.run("def double(x):\n    return 2 * x")
        with pytest.raises(problem):
            submission.run(source)
        assert Function(submission, "double")(4) == 8


def test_a_stand_in_gives_the_functions_values_gradients_and_changes(submission):
    source = "def f(x, m, k):\n    y = m * x**k\n    return y, x.detach().sum(), 'text', [None, (1, True)]\n\n"
    submission.run(source + "def change(x):\n    x.zero_()\n    return object()\n")
    x, m = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    y, total, *rest = Function(submission, "f")(x, m, 3)
    assert torch.equal(y, m * x**3) and total == x.sum() and rest == ["text", [None, (1, True)]]
    upstream = torch.randn_like(y)
    expected = torch.autograd.grad((m * x**3), [x, m], upstream)
    assert all(torch.allclose(a, b) for a, b in zip(torch.autograd.grad(y, [x, m], upstream), expected, strict=True))
    plain = torch.ones(2)
    assert repr(Function(submission, "change")(plain)) == "<a object>" and not plain.any()


def test_a_cell_defines_only_what_it_was_asked_for(submission):
    namespace = {"close": len, "torch": torch, "f": "an older one"}
    submission.bind("close = torch = print\n\n\ndef f(): return 1\n", ["f"], namespace)
    assert namespace["close"] is len and namespace["torch"] is torch and namespace["f"]() == 1
    submission.run("k = 20")
    submission.bind("k = 20", ["k"], namespace)  # the very same object
    assert namespace["k"] == 20
    with pytest.raises(SubmissionError, match="ZeroDivisionError: division by zero .line 2 of the cell"):
        submission.bind("x = 1\n1 / 0", ["f"], namespace)
    assert "f" not in namespace
    submission.run("import torch")


def test_a_cell_that_fails_leaves_what_it_had_defined_before():
    with Submission(seconds=5) as submission:
        namespace = {}
        submission.run("k = 3\ndef old(): return 0")
        with pytest.raises(SubmissionError, match="NameError"):
            submission.bind("def f(): return 1\ng = 2\nm\nh = 3", ["f", "g", "h", "k", "old"], namespace)
        assert set(namespace) == {"f", "g"} and namespace["f"]() == 1 and namespace["g"] == 2
        with pytest.raises(TimeLimit):
            submission.run("while True: pass")
        assert namespace["f"]() == 1  # in the new worker, too


def test_what_is_typed_in_is_taken_from_the_text(capsys):
    with Submission() as submission:
        namespace = {}
        submission.run(
            "import sys\ndef trace(frame, *_):\n    frame.f_globals['a'] = 7\n    return trace\nsys.settrace(trace)"
        )
        submission.bind("a = 1.5\nprint('typed')", ["a"], namespace, {"a": 1.5, "close": 2})
        assert namespace == {"a": 1.5} and capsys.readouterr().out == "typed\n"


# Figures

DRAW = "import matplotlib.pyplot as plt\nfigure, axes = plt.subplots()\naxes.plot([1, 2])\n"
FIGURES = {
    "left open": "",
    "the last expression": "figure",
    "closed, the last expression": "plt.close(figure)\nfigure",
    "closed, given to display": "plt.close(figure)\ndisplay(figure)",
    "open, given to display": "display(figure)\n7",
    "a figure of no window": "from matplotlib.figure import Figure\nplt.close(figure)\nFigure(figsize=(1, 1))",
}


@pytest.fixture
def pictures(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    return shown


@pytest.mark.parametrize("how", FIGURES)
def test_a_figure_is_shown_once(how, pictures, capsys):
    with Submission(seconds=60) as submission:
        submission.run(DRAW + FIGURES[how])
    assert [one.data[:4] for one in pictures] == [b"\x89PNG"] and "Figure" not in capsys.readouterr().out


def test_the_lessons_own_figure_is_shown(pictures):
    notebook = cut(find_assignment("04"))
    cells = {marking(cell)["grade_id"]: cell.source for cell in notebook.cells if marking(cell)}
    with Submission(seconds=120, uses_lab=True) as submission:
        submission.run("student_id, runs_dir = 'lesson', ''\n" + cells["a04-setup"], quiet=True)
        submission.run(cells["a04-runs"])
        submission.run(cells["a04-figure"])
    assert [one.data[:4] for one in pictures] == [b"\x89PNG"]


# The fence alone, and the hook alone

PATHS = """
import os, sys
folder, secret, readable, module = sys.argv[1:]
namespace = {"__name__": "layer"}
exec(compile(open(module).read(), module, "exec"), namespace)
os.chdir(folder)
"""
READABLE = "[readable, sys.prefix, sys.base_prefix, '/usr', '/lib', '/dev/urandom', '/sys/devices/system/cpu']"
RESTRICT = PATHS + f"namespace['restrict'](folder, {READABLE})\n"
HOOK = PATHS + f"namespace['install'](folder, {READABLE}, ())\n"
ATTACKS = {
    "reading": "open(secret)",
    "listing": "os.listdir(os.path.dirname(secret))",
    "by a folder's descriptor": (
        "os.open(os.path.basename(secret), os.O_RDONLY, dir_fd=os.open(os.path.dirname(secret), os.O_RDONLY))"
    ),
    "writing": "open(secret, 'a').write('x')",
    "writing by a folder's descriptor": ("os.open('../secret/text', os.O_WRONLY, dir_fd=os.open('.', os.O_RDONLY))"),
    "removing": "os.remove(secret)",
    "removing by a folder's descriptor": "os.unlink('../secret/text', dir_fd=os.open('.', os.O_RDONLY))",
    "removing, as a path": "import pathlib; pathlib.Path(secret).unlink()",
    "a file beside it": "open(secret + '2', 'w')",
    "a folder beside it": "os.mkdir(secret + '2')",
    "a link": "os.symlink(secret, 'link'); open('link').read()",
    "a hard link": "os.link(secret, 'link'); open('link').read()",
    "moving it here": "os.rename(secret, 'mine')",
    "truncating": "os.truncate(secret, 0)",
    "what it may read, changed": "open(readable + '/text', 'a').write('x')",
    "running a program": "os.execv('/usr/bin/env', ['env'])",
}
NATIVE = {
    "torch.from_file": "import torch; torch.from_file(secret, size=2, dtype=torch.uint8)",
    "torch.from_file, shared": (
        "import torch; torch.from_file(secret, shared=True, size=2, dtype=torch.uint8)[:] = 65"
    ),
    "torch.save": "import torch; torch.save(torch.zeros(2), secret)",
    "a device": "os.mknod('disk', 0o60600, os.makedev(259, 0))",
}


def attempt(layer, code, tmp_path):
    """What ended `code` under one layer alone: the last line of its traceback, "" if nothing did."""
    for name in ("own", "secret", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text("secret")
    module = {RESTRICT: fence, HOOK: guard}[layer].__file__
    paths = [tmp_path / "own", tmp_path / "secret" / "text", tmp_path / "open", module]
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", layer + code, *map(str, paths)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert (tmp_path / "secret" / "text").read_text() == (tmp_path / "open" / "text").read_text() == "secret"
    assert [path.name for path in (tmp_path / "secret").iterdir()] == ["text"]
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


@needs_landlock
@pytest.mark.parametrize("attack", ATTACKS | NATIVE)
def test_the_kernel_refuses_with_no_hook_in_place(attack, tmp_path):
    said = attempt(RESTRICT, (ATTACKS | NATIVE)[attack], tmp_path)
    assert "PermissionError" in said or "Permission denied" in said or "cross-device link" in said


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_hook_refuses_with_no_landlock_in_place(attack, tmp_path):
    assert "a submission may" in attempt(HOOK, ATTACKS[attack], tmp_path)


@pytest.mark.parametrize("layer", [pytest.param(RESTRICT, marks=needs_landlock), HOOK], ids=["kernel", "hook"])
def test_either_layer_leaves_ones_own_folder_and_the_libraries_open(layer, tmp_path):
    code = (
        "import json, shutil, tempfile\n"
        "open('a', 'w').write('1')\nos.rename('a', 'b')\nos.makedirs('c/d')\nos.rename('b', 'c/d/b')\n"
        "assert open('c/d/b').read() == '1' and open(readable + '/text').read() == 'secret'\n"
        "shutil.rmtree('c')\nos.environ['KMP_DUPLICATE_LIB_OK'] = 'TRUE'\nopen(os.devnull, 'w').write('x')\n"
        "with tempfile.TemporaryDirectory(dir='.') as there:\n    open(there + '/x', 'w')\n"
    )
    assert attempt(layer, code, tmp_path) == ""


def test_what_is_hidden_stays_hidden_below_what_may_be_read(tmp_path, monkeypatch):
    (tmp_path / "src" / "course" / "deep").mkdir(parents=True)
    (tmp_path / "src" / "other").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "way in").symlink_to(tmp_path / "src" / "course")
    monkeypatch.setattr(sandbox, "LIBRARIES", (str(tmp_path),))
    paths = sandbox.readable(False, (str(tmp_path / "src" / "course"),))
    assert {str(tmp_path / "bin"), str(tmp_path / "src" / "other")} <= set(paths)
    assert not any((tmp_path / "src" / "course").is_relative_to(path) or "way in" in path for path in paths)
    project = find_assignment("03").source.parents[1]
    assert not any((project / "notebooks").is_relative_to(path) for path in paths)


def test_a_submission_reads_neither_classmates_nor_course_nor_a_list_of_them(tmp_path):
    (tmp_path / "ada").mkdir()
    (tmp_path / "ada" / "work.ipynb").write_text("a solution")
    with Submission(seconds=20, hidden=(str(tmp_path),), homes=tmp_path) as one:
        for code in (f"open({str(tmp_path / 'ada' / 'work.ipynb')!r})", "import os\nos.listdir('..')"):
            with pytest.raises(SubmissionError, match="may not read"):
                one.run(code)
        names = one.run("import sys\nargs, main = sys.argv[1:], len(vars(sys.modules['__main__']))", ["args"])
        assert names["args"] == [] and Path(one.home).parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["ada"]


def test_the_line_about_the_sandbox_says_which_fence_holds(monkeypatch):
    said = sandbox.describe()
    assert ("files shut off by Landlock" in said) == bool(fence.version())
    monkeypatch.setattr(fence, "version", lambda: 0)
    assert "the Python audit hook only, no Landlock here" in sandbox.describe()


# What students do without a thought

HABITS = {
    "display": ("x = 1\ndisplay(x)", "1\n"),
    "an environment variable": ("import os\nos.environ['KMP_DUPLICATE_LIB_OK'] = 'TRUE'", ""),
    "help with ?": ("torch.norm?\nx = 2\nx", "2\n"),
    "help with ??": ("x = 3\ntorch.norm??", ""),
    "get_ipython": ("get_ipython().run_line_magic('matplotlib', 'inline')", ""),
    "a magic": ("%load_ext autoreload\n%autoreload 2\n!pip list\nx = 4\nx", "4\n"),
    "one's own source": (
        "import inspect\ndef g():\n    return 5\ninspect.getsource(g)",
        "'def g():\\n    return 5\\n'\n",
    ),
    "an optimiser": (
        "p = torch.nn.Parameter(torch.ones(2))\no = torch.optim.SGD([p], lr=0.5)\n(p**2).sum().backward()\no.step()\n"
        "float(p.detach().sum())",
        "0.0\n",
    ),
    "the main module": ("import __main__\nx = 6\n__main__.x", "6\n"),
    "a plot's font": ("import matplotlib.pyplot as plt\nplt.title('x')\nplt.close('all')", ""),
    "pandas": ("import pandas\nint(pandas.DataFrame({'a': [7]})['a'][0])", "7\n"),
}


@pytest.mark.parametrize("habit", HABITS)
def test_habits_of_notebooks_cost_nothing(habit, submission, capsys):
    source, printed = HABITS[habit]
    submission.run(source)
    assert capsys.readouterr().out == printed


# What is left behind

PARENT = """
import sys, threading, os
from pathlib import Path
from dora_lab.assignments.isolation import Submission
one = Submission(seconds=60, homes=Path(sys.argv[1]))
one.run("import os, time", quiet=True)
print(one.process.pid, flush=True)
threading.Timer(0.5, lambda: os._exit(1)).start()
one.run("while True: time.time()")
"""


def descendants(pid):
    """Process ids of `pid` and all below it that are alive."""
    found, parents = [], {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(entry.name)] = int(parent)
    waiting = [pid] if pid in parents else []
    while waiting:
        found.append(waiting.pop())
        waiting += [child for child, parent in parents.items() if parent == found[-1]]
    return found


@pytest.mark.skipif("--pdeathsig" not in sandbox.commands_around(), reason="no setpriv here")
def test_a_busy_worker_ends_when_the_process_that_holds_it_dies(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    workers = descendants(int(parent.stdout.readline()))
    assert workers
    parent.wait(timeout=30)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and (left := [pid for worker in workers for pid in descendants(worker)]):
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def test_a_submission_that_fills_the_disk_is_stopped_and_its_folder_emptied(monkeypatch, tmp_path):
    monkeypatch.setattr(isolation, "LARGEST_HOME", 2**20)
    monkeypatch.setattr(isolation, "WEIGHED_EVERY_S", 0.1)
    with Submission(seconds=20, homes=tmp_path) as one:
        one.run("def f():\n    return 1")
        with pytest.raises(WorkerDied, match="it wrote more than"):
            one.run("for i in range(3):\n    open(f'x{i}', 'wb').write(bytes(2**20))\nwhile True: pass")
        with pytest.raises(WorkerDied, match="it wrote more than"):
            one.run("for i in range(3):\n    open(f'x{i}', 'wb').write(bytes(2**20))")
        assert Function(one, "f")() == 1 and list(Path(one.home).iterdir()) == []
    assert list(tmp_path.iterdir()) == []
