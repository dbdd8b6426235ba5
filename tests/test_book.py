"""The printed book: pictures with their alt text, no widgets, working links, nothing from the network."""

import base64
import re
from html.parser import HTMLParser

import nbformat
import pytest
from nbformat import v4

from dora_lab import book

TABLE = "# Accuracy, percent\n\n| row | BoolQ |\n| --- | --- |\n| a | 1 |\n"
PIXEL = base64.b64encode(b"not looked at").decode()


def executed_chapter(title):
    picture = v4.new_output(
        "display_data",
        data={"image/png": PIXEL, "text/plain": "x"},
        metadata={"image/png": {"alt": 'LoRA 69.8, DoRA "71.2"'}},
    )
    panel = v4.new_output(
        "display_data", data={book.WIDGET: {"model_id": "1"}, "text/html": "<p>the panel's picture</p>"}
    )
    noise = v4.new_output("stream", name="stderr", text="a progress bar")
    injected = v4.new_code_cell("profile = 'mini'", metadata={"tags": ["injected-parameters"]})
    cells = [
        v4.new_markdown_cell(f"# {title}\n\nThe scale is $s = \\alpha / r$."),
        injected,
        v4.new_code_cell("draw()", outputs=[picture, panel, noise]),
    ]
    return v4.new_notebook(cells=cells, metadata={"widgets": {"state": {}}})


class Links(HTMLParser):
    """What a page loads (src of anything, href of <link>) and where it leads (href of <a>)."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.leads, self.alts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if "src" in found:
            self.loads.append(found["src"])
        if tag == "link" and found.get("rel") != "canonical":
            self.loads.append(found.get("href", ""))
        if tag == "a":
            self.leads.append(found.get("href", ""))
        if tag == "img":
            self.alts.append(found.get("alt"))


def check_site(pages):
    for page in pages.glob("*.html"):
        links = Links(page.read_text())
        for address in links.loads:
            assert not re.match(r"(https?:)?//", address), (page.name, address)
            if not address.startswith("data:"):
                assert (page.parent / re.split("[?#]", address)[0]).exists(), (page.name, address)
        for address in links.leads:
            file = re.split("[?#]", address)[0]
            assert re.match(r"(https?|mailto):", address) or not file or (page.parent / file).exists(), address


def test_what_a_page_cannot_show_is_left_out():
    made = book.printable(executed_chapter("One"))
    assert "widgets" not in made.metadata and len(made.cells) == 2
    picture, panel = made.cells[1].outputs
    assert 'alt="LoRA 69.8, DoRA &quot;71.2&quot;"' in picture["data"]["text/html"]
    assert panel["data"] == {"text/html": "<p>the panel's picture</p>"}


@pytest.mark.slow
def test_the_pages_have_pictures_links_the_table_and_need_no_network(tmp_path, monkeypatch):
    pytest.importorskip("myst_nb", reason="the book's packages are not installed: pip install -e '.[book]'")

    def run_chapters(profile, folder, report):
        (folder / "figures").mkdir(parents=True)
        (folder / "figures" / "results.md").write_text(TABLE)
        paths = [folder / f"{name}.ipynb" for name in ("00_one", "01_two")]
        for path in paths:
            nbformat.write(executed_chapter(path.stem), path)
        return paths

    monkeypatch.setattr(book, "run_chapters", run_chapters)
    index = book.build(tmp_path, report=lambda line: None)
    check_site(index.parent)
    links = Links(index.read_text())
    assert {"00_one.html", "01_two.html"} <= {re.split("#", address)[0] for address in links.leads}
    assert "The results table" in index.read_text() and "<td><p>a</p></td>" in index.read_text()
    page = (index.parent / "00_one.html").read_text()
    assert 'LoRA 69.8, DoRA "71.2"' in Links(page).alts and "the panel's picture" in page
    assert "mathjax/MathJax.js" in page and "a progress bar" not in page


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of two chapters; returns its folder and the list of chapters that are run, with their profiles."""
    for name in ("notebooks/00_one.ipynb", "notebooks/01_two.ipynb", "dora_lab/code.py", "data/numbers.csv"):
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    ran = []

    def run_chapter(name, output, profile, **parameters):
        ran.append((name, profile))
        output.write_text("half")
        if len(ran) == 2:
            raise KeyboardInterrupt
        output.write_text("whole")

    monkeypatch.setattr(book, "PROJECT", tmp_path / "project")
    monkeypatch.setattr(book, "run_chapter", run_chapter)
    return tmp_path / "project", ran


def test_a_chapter_that_was_interrupted_is_not_taken_as_done(project, tmp_path):
    ran = project[1]
    with pytest.raises(KeyboardInterrupt):
        book.run_chapters("mini", tmp_path / "out", str)
    assert not (tmp_path / "out" / "01_two.ipynb").exists()
    paths = book.run_chapters("mini", tmp_path / "out", str)
    assert [name for name, _ in ran] == ["00_one", "01_two", "01_two"]
    assert [path.read_text() for path in paths] == ["whole", "whole"]
    assert book.run_chapters("mini", tmp_path / "out", str) == paths and len(ran) == 3


def test_a_chapter_is_run_again_when_profile_notebook_package_or_data_have_changed(project, tmp_path):
    folder, ran = project
    own = tmp_path / "own.yaml"
    own.write_text("extends: smoke\nname: own\n")
    ran += [None] * 3  # nothing is interrupted

    def run_again(profile="mini"):
        before = len(ran)
        book.run_chapters(profile, tmp_path / "out", str)
        return ran[before:]

    assert len(run_again()) == 2 and not run_again()
    assert run_again("smoke") == [("00_one", "smoke"), ("01_two", "smoke")] and len(run_again()) == 2
    (folder / "notebooks" / "01_two.ipynb").write_text("other cells")
    assert run_again() == [("01_two", "mini")]
    for changed in ("dora_lab/code.py", "data/more.csv"):
        (folder / changed).write_text("changed")
        assert len(run_again()) == 2 and not run_again(), changed
    (folder / "dora_lab" / "__pycache__").mkdir()
    (folder / "dora_lab" / "__pycache__" / "code.pyc").write_text("made by Python")
    assert not run_again()
    assert len(run_again(str(own))) == 2 and not run_again(str(own))
    own.write_text("extends: smoke\nname: own\nbatch_size: 2\n")
    assert len(run_again(str(own))) == 2


@pytest.mark.slow
def test_a_profile_given_by_its_path_is_found_by_chapters_and_named_in_the_index(project, tmp_path, monkeypatch):
    ran = project[1]
    (tmp_path / "own.yaml").write_text("extends: smoke\nname: own\n")
    monkeypatch.chdir(tmp_path)
    ran += [None] * 3
    book.run_chapters("own.yaml", tmp_path / "out", str)
    assert ran[-1] == ("01_two", str(tmp_path / "own.yaml"))
    monkeypatch.undo()

    def run_chapters(profile, folder, report):
        (folder / "figures").mkdir(parents=True)
        (folder / "figures" / "results.md").write_text(TABLE)
        return []

    pytest.importorskip("myst_nb", reason="the book's packages are not installed: pip install -e '.[book]'")
    monkeypatch.setattr(book, "run_chapters", run_chapters)
    index = book.build(tmp_path / "book", str(tmp_path / "own.yaml"), report=str)
    assert "Made from no runs." in index.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_whole_book(tmp_path):
    pytest.importorskip("myst_nb", reason="the book's packages are not installed: pip install -e '.[book]'")
    index = book.build(tmp_path, report=lambda line: None)
    check_site(index.parent)
    chapters = sorted(path.stem for path in (book.PROJECT / "notebooks").glob("*.ipynb"))
    assert [(index.parent / f"{name}.html").exists() for name in chapters] == [True] * len(chapters)
    alts = [alt for name in chapters for alt in Links((index.parent / f"{name}.html").read_text()).alts]
    assert len(alts) > 10 and all(alt is not None for alt in alts)
