"""The chapters: stored clean, told in the house's form, and each runs headless."""

import re

import nbformat
import pytest

from dora_lab.pipeline import RESULT_CHAPTERS, run_chapter
from dora_lab.profiles import PROJECT

CHAPTERS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in CHAPTERS]


@pytest.fixture(params=CHAPTERS, ids=NAMES)
def chapter(request):
    return nbformat.read(request.param, as_version=4)


def test_chapters_are_numbered_and_no_number_is_taken_twice():
    numbers = [re.fullmatch(r"(\d\d)_[a-z0-9_]+", name)[1] for name in NAMES]
    assert numbers and len(set(numbers)) == len(numbers)


def test_a_chapter_is_committed_without_outputs_and_with_cell_ids(chapter):
    nbformat.validate(chapter)
    assert chapter.metadata.kernelspec.name == "python3" and "papermill" not in chapter.metadata
    ids = [cell.id for cell in chapter.cells]
    assert len(set(ids)) == len(ids)
    for cell in chapter.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


def test_a_chapter_opens_with_what_it_gives_what_it_takes_and_what_it_needs(chapter):
    opening = chapter.cells[0]
    assert opening.cell_type == "markdown" and opening.source.startswith("# ")
    for words in ("You will be able to", "Needs:", "Takes"):
        assert words in opening.source
    assert re.search(r"Takes [^.]*(second|minute)[^.]* and [^.]*(\d\.\d )?(GB|MB)", " ".join(opening.source.split()))


def test_every_code_cell_but_the_last_is_followed_by_a_sentence(chapter):
    for cell, following in zip(chapter.cells, chapter.cells[1:], strict=False):
        if cell.cell_type == "code":
            assert following.cell_type == "markdown", cell.source


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name[:2] != "07"])
def test_a_chapter_runs_headless_on_the_mini_profile(name, tmp_path):
    """07, the worker, is run by the pipeline's tests, and asks for a task and a method."""
    parameters = {"profile": "mini"}
    if name in RESULT_CHAPTERS:
        parameters["figures_dir"] = str(tmp_path / "figures")
    elif name == "06_the_mini_world":
        parameters["runs_dir"] = str(tmp_path / "runs")
    run_chapter(name, tmp_path / "out.ipynb", **parameters)
    done = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code" and cell.source.strip())
