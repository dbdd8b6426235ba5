"""The skeleton: one list of packages in three files, light imports, and make targets that do not install twice."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[1]
META = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = META["dependencies"] + [line for extra in META["optional-dependencies"].values() for line in extra]


def name_of(requirement):
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


def pins():
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))


def as_tuple(version):
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def admits(requirement, version):
    """Whether every clause of a requirement (only >= and < are used) admits the version."""
    version, held = as_tuple(version), []
    for sign, bound in re.findall(r"(>=|<)([\d.]+)", requirement):
        held.append(version >= as_tuple(bound) if sign == ">=" else version < as_tuple(bound))
    return bool(held) and all(held)


def test_environment_yml_is_pyproject_in_condas_words():
    environment = yaml.safe_load((PROJECT / "environment.yml").read_text())
    assert environment["name"] == META["name"]
    python, pip, section = environment["dependencies"]
    assert admits(META["requires-python"], python.removeprefix("python=")) and pip == "pip"
    expected = META["dependencies"] + META["optional-dependencies"]["test"]
    assert section["pip"] == ["-c constraints.txt", *expected, "-e ."]


def test_every_direct_dependency_is_pinned_and_nothing_else():
    assert sorted(pins()) == sorted(name_of(requirement) for requirement in REQUIREMENTS)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=name_of)
def test_ranges_admit_the_pinned_version(requirement):
    assert admits(requirement, pins()[name_of(requirement)])


@pytest.mark.parametrize(
    "package, versions",
    {"torch": ["2.11.0", "2.13.0"], "transformers": ["5.17.0", "5.23.0"], "peft": ["0.21.0"]}.items(),
)
def test_ranges_admit_what_is_promised(package, versions):
    requirement = next(r for r in REQUIREMENTS if name_of(r) == package)
    assert all(admits(requirement, version) for version in versions)


def test_pins_are_nowhere_else():
    for name in ("pyproject.toml", "environment.yml", "Makefile", ".pre-commit-config.yaml", ".ci/run"):
        assert "==" not in (PROJECT / name).read_text(), f"{name} pins a version: constraints.txt is the place"


def test_importing_the_package_loads_no_torch():
    code = "import dora_lab, sys; print(dora_lab.__version__, 'torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\d+\.\d+\.\d+ False False\n", done.stdout)


def test_licence_is_the_whole_apache_licence():
    text = (PROJECT / "LICENSE").read_text()
    assert META["license"] == "Apache-2.0" and "Version 2.0, January 2004" in text
    assert all(re.search(rf"^\s+{number}\. ", text, re.M) for number in range(1, 10))


def test_ci_runs_the_quick_tests_and_then_all():
    script = PROJECT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^make (\S+)$", script.read_text(), re.M) == ["test", "test-all"]


@pytest.fixture
def bare_clone(tmp_path):
    """The Makefile in a folder of its own, with a `python3` that only pretends to make the environment."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(PROJECT / name, tmp_path)
    fake = tmp_path / "fake-python"
    fake.write_text(
        '#!/bin/sh\necho "python $*" >> calls\n'
        'if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp "$0" .venv/bin/ruff; fi\n'
    )
    fake.chmod(0o755)
    return tmp_path


def make(folder, *arguments):
    return subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True)


def installs(folder):
    return (folder / "calls").read_text().count("pip install")


def test_a_second_make_does_not_install_again(bare_clone):
    python = f"PYTHON={bare_clone / 'fake-python'}"
    assert make(bare_clone, "lint", python).returncode == 0 and installs(bare_clone) == 1
    assert make(bare_clone, "lint", python).returncode == 0 and installs(bare_clone) == 1
    later = (bare_clone / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(bare_clone / "constraints.txt", (later, later))
    assert make(bare_clone, "lint", python).returncode == 0 and installs(bare_clone) == 2


def test_a_failed_install_is_tried_again(bare_clone):
    fake = bare_clone / "fake-python"
    working = fake.read_text()
    fake.write_text(working + 'case "$*" in *"pip install"*) exit 1;; esac\n')
    assert make(bare_clone, "lint", f"PYTHON={fake}").returncode != 0
    fake.write_text(working)
    assert make(bare_clone, "lint", f"PYTHON={fake}").returncode == 0 and installs(bare_clone) == 2


def test_an_old_python_is_named(bare_clone):
    fake = bare_clone / "fake-python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 1); $2"\n')
    done = make(bare_clone, "lint", f"PYTHON={fake}")
    assert done.returncode != 0 and "Python 3.11 or newer is needed" in done.stderr and "3.9" in done.stderr
