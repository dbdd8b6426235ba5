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
