"""The chapters: stored clean, told in the house's form, and each runs headless."""

import re

import nbformat
import pytest

from dora_lab.book import chapter_parameters
from dora_lab.pipeline import run_chapter
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


# What a reader must find on the page, as regular expressions, one after the other in any order.
SEEN = {
    "00": [r"cores +\d+", r"memory +[\d.]+ .B"],
    "01": [r"20,480 numbers, 98\.05 % fewer", r"rank 10"],
    "02": [r"Eq\. 6 against autograd: \d\.\de-1[4-9]", r"Eq\. 11 against autograd: (0\.0e\+00|\d\.\de-1[4-9])"],
    "03": [r"relative difference 0\.\d{4}", r"PEFT 0\.\d+", r"DoRA, fast path +\d+\.\d\d MiB"],
    "04": [r"largest change of a logit: 0\.0\b", r"of 9 percentages round to the printed ones"],
    "05": [r"unparsed", r"questions with two different answers"],
    "06": [r"tasks: True", r"tokenizer: True", r"without its question: \d\d\.\d %"],
    "08": [r"DoRA minus LoRA on BoolQ: [+-]\d", r"recorded, not computed here: \d+ runs, 20\d\d-\d\d-\d\d"],
    "09": [r"dora  here [+-]\d\.\d\d, paper -0\.31", r"recorded, not computed here: \d+ runs, 20"],
    "10": [r"after step 3: 3 norms a layer", r"recorded, not computed here"],
    "11": [r"total +\d+\.\d\d GB", r"fits on 40 GB up to \d+ tokens", r"need [\d,]+ tokens a second:"],
    "12": [
        r"would have been called a win",
        r"With the fault, \d+ of \d+ single pairs of runs",
        r"does not hold +\d+",
        r"with gradient checkpointing: \d+\.\d GB",
    ],
    "13": [
        r"stable_rank +[\d,]+ parameters, .*: True",
        r"mini-ranks, recorded, not computed here: \d+ runs, 20",
        r"update spectrum minus its own ranks shuffled: ",
        r"full, all modules: rank correlation with the probe's ranks [+-]",
        r"dora: \d\d",
    ],
    "14": [
        r"0\.39 %; the paper prints 0\.39 %",
        r"[01] of 30 modules differ",
        r"mini-hybrids, recorded, not computed here: \d+ runs",
    ],
}


def text_of(notebook) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name[:2] != "07"])
def test_a_chapter_runs_headless_on_the_mini_profile(name, tmp_path):
    """07, the worker, is run by the pipeline's tests, and asks for a task and a method.

    The profile is given by its path, as one of a reader's own is; by its name it is every chapter's default.
    """
    profile = str(PROJECT / "data" / "profiles" / "mini.yaml")
    run_chapter(name, tmp_path / "out.ipynb", **chapter_parameters(name, profile, tmp_path))
    done = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert all(cell.execution_count for cell in done.cells if cell.cell_type == "code" and cell.source.strip())
    text = text_of(done)
    for pattern in SEEN[name[:2]]:
        assert re.search(pattern, text), (pattern, text)
    assert not re.search(r"Exercise [\d.]+: (right|wrong|error)", text)  # nothing is solved as it is handed out
    for cell in done.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert len(output["metadata"]["image/png"]["alt"]) > 40, cell.source
            for picture in re.findall(r"<img [^>]*>", output.get("data", {}).get("text/html", "")):
                assert re.search(r'alt="[^"]{40,}"', picture), cell.source
