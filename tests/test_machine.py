"""What the first chapter says of a machine: it answers whatever is missing."""

import builtins
import importlib.metadata
import os
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from dora_lab import machine
from dora_lab.profiles import PROJECT


def test_this_machine_is_described(tmp_path):
    found = machine.detect(tmp_path)
    assert found.processor and found.cores >= 1 and found.python.count(".") == 2
    assert found.memory_bytes > 1e8 and 0 < found.available_bytes <= found.memory_bytes
    assert found.free_disk_bytes > 0 and found.packages["torch"] and found.missing == []


def test_a_bare_machine_crashes_nothing(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise OSError("not here")

    def no_torch(name, *args, **kwargs):
        if name == "torch":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    def not_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    real_import = builtins.__import__
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(os, "sysconf", refuse)
    monkeypatch.setattr(machine.shutil, "disk_usage", refuse)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(builtins, "__import__", no_torch)
    monkeypatch.setattr(machine, "version", not_installed)
    found = machine.detect(tmp_path / "not" / "there")
    monkeypatch.undo()
    assert (found.memory_bytes, found.available_bytes, found.free_disk_bytes, found.gpus) == (None, None, None, ())
    assert found.missing == list(machine.PACKAGES) and found.cores >= 1
    assert machine.what_stops(found, machine.Opening("A", "a minute", "9000 GB", "a CPU")) == ""


def test_only_the_cores_that_this_process_may_use_count(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert (machine.cores(), machine.detect().cores) == (1, 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3, 4}, raising=False)
    assert [machine.runs_at_a_time(threads) for threads in (1, 2, 8)] == [5, 2, 1]


def test_the_disk_of_a_folder_that_is_not_yet_there_is_its_parent_s(tmp_path):
    assert machine.detect(tmp_path / "new" / "runs").free_disk_bytes > 0


@pytest.mark.parametrize("count, text", [(None, "unknown"), (15.6e9, "15.6 GB"), (420e6, "420 MB")])
def test_sizes_are_read_easily(count, text):
    assert machine.size(count) == text


def test_an_opening_cell_is_read():
    cell = "# 10 The cost\n\nYou will be able to: see.\n\nTakes half a minute and\n0.6 GB. Needs: a CPU, no network. A."
    assert machine.read_opening(cell) == machine.Opening("10 The cost", "half a minute", "0.6 GB", "a CPU, no network")
    assert machine.read_opening(cell).memory_bytes == 0.6e9 and not machine.read_opening(cell).needs_gpu
    assert machine.read_opening("# Alone") == machine.Opening("Alone", "", "", "")


@pytest.mark.parametrize("path", sorted((PROJECT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_chapter_s_opening_cell_can_be_read(path):
    opening = machine.read_opening(nbformat.read(path, as_version=4).cells[0].source)
    assert opening.title[:2] == path.name[:2] and opening.time and opening.memory_bytes > 0 and opening.needs


def test_too_little_memory_and_a_missing_gpu_are_told():
    found = replace(machine.detect(), available_bytes=int(0.5e9), gpus=())
    assert "1 GB, 500 MB are free" in machine.what_stops(found, machine.Opening("A", "", "1 GB", "a CPU"))
    assert "recorded" in machine.what_stops(found, machine.Opening("A", "", "1 GB", "a GPU with 40 GB"))
    with_gpu = replace(found, gpus=(("a card", 40 * 10**9),), available_bytes=None)
    assert machine.what_stops(with_gpu, machine.Opening("A", "", "1 GB", "a GPU with 40 GB")) == ""
