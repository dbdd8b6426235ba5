"""The printed book: every chapter run headless and set as one static site that needs no network.

The chapters are run by papermill and set by Sphinx with MyST-NB. MathJax comes from a package and is copied into the
site. What only a live kernel can show (widgets) is left out; the picture that each panel shows without one stays.
"""

import hashlib
import html
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat

from dora_lab.cells import absolute
from dora_lab.files import sha256_of, write_text
from dora_lab.pipeline import RECORDED, RESULT_CHAPTERS, run_chapter
from dora_lab.profiles import PROJECT, load_profile

WORKER = "07_fine_tune"  # one run: shown as it stands, because a run is not a chapter to print
RANKS = "13_choosing_ranks"
WRITE_FIGURES = (*RESULT_CHAPTERS, "10_the_cost_of_dora", "12_auditing_the_report", RANKS, "14_hybrid_adapters")
WIDGET = "application/vnd.jupyter.widget-view+json"
CONFIGURATION = """\
project = "DoRA Lab"
html_title = "DoRA Lab"
extensions = ["myst_nb", "sphinx.ext.mathjax"]
html_theme = "furo"
html_static_path = ["_static"]
html_show_sourcelink = False
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_update_mathjax = False
mathjax_path = "mathjax/MathJax.js?config=TeX-AMS_CHTML-full"
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header", "misc.highlighting_failure"]
"""


def run_chapters(profile: str, folder: Path, report: Callable[[str], None] = print) -> list[Path]:
    """Run every chapter headless with `profile` into `folder`; returns the notebooks, in order.

    The worker, 07, is not run. Results are read from the recorded runs; what is drawn anew goes to folder/figures.
    A chapter that was run to its end has a stamp beside it, and is not run again while profile, notebook, package and
    data are those of the stamp. Raises RuntimeError naming a chapter that fails.
    """
    loaded, folder = load_profile(profile), folder.resolve()
    shared = {"profile": hashlib.sha256(repr(loaded).encode()).hexdigest()}
    shared |= {name: _digest(PROJECT / name) for name in ("dora_lab", "data")}
    folder.mkdir(parents=True, exist_ok=True)
    done = []
    sources = sorted((PROJECT / "notebooks").glob("*.ipynb"))
    for number, source in enumerate(sources, 1):
        target, stamp = folder / source.name, folder / f"{source.stem}.stamp.json"
        made_of = json.dumps({"notebook": sha256_of(source)} | shared, indent=1)
        if source.stem == WORKER:
            shutil.copy2(source, target)
        elif not (target.exists() and stamp.exists() and stamp.read_text() == made_of):
            report(f"[{number}/{len(sources)}] {source.stem}")
            stamp.unlink(missing_ok=True)
            partial = target.with_suffix(".partial.ipynb")  # papermill writes it cell by cell
            run_chapter(source.stem, partial, **chapter_parameters(source.stem, absolute(profile), folder))
            partial.replace(target)
            write_text(stamp, made_of)
        done.append(target)
    return done


def _digest(folder: Path) -> str:
    """Hash of the names and contents of all files below the folder, but for hidden ones and Python's caches."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in name.parts):
            digest.update(f"{name}\0{sha256_of(path)}".encode())
    return digest.hexdigest()


def chapter_parameters(name: str, profile: str, folder: Path) -> dict[str, str]:
    """What papermill gives a chapter so that all that it writes goes below `folder`."""
    parameters = {"profile": profile}
    if name in WRITE_FIGURES:
        parameters["figures_dir"] = str(folder / "figures")
    elif name == "06_the_mini_world":
        parameters["runs_dir"] = str(folder / "runs")
    if name == RANKS:
        parameters["live_dir"] = str(folder / "runs")
    return parameters


def printable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without what a page cannot show: parameters cells that papermill injected, widgets, progress bars.

    Pictures become HTML with the alt text that they carry.
    """
    notebook.metadata.pop("widgets", None)
    notebook.metadata.pop("papermill", None)
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [_printable(output) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def _printable(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    data = output.get("data", {})
    data.pop(WIDGET, None)
    alt = output.get("metadata", {}).get("image/png", {}).get("alt")
    if alt and "image/png" in data:
        picture = data["image/png"].replace("\n", "")
        output["data"] = {
            "text/html": f'<img alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{picture}">'
        }
    return output


def build(out: Path, profile: str = "mini", report: Callable[[str], None] = print) -> Path:
    """Run the chapters and write the site to `out`; returns its index.html. A second call runs what has changed.

    Raises RuntimeError for a chapter that fails, for missing packages and for a page that cannot be set, saying what to
    do.
    """
    try:
        import jupyter_server_mathjax
        import myst_nb  # noqa: F401
        import sphinx  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"{error.name} is missing: install the book's packages, pip install -e '.[book]'") from None
    work = out / "_work"
    notebooks = run_chapters(profile, work / "executed", report)
    source = work / "source"
    shutil.rmtree(source, ignore_errors=True)
    (source / "_static").mkdir(parents=True)
    mathjax = Path(jupyter_server_mathjax.__file__).parent / "static"
    shutil.copytree(mathjax, source / "_static" / "mathjax")
    (source / "conf.py").write_text(CONFIGURATION)
    for path in notebooks:
        nbformat.write(printable(nbformat.read(path, as_version=4)), source / path.name)
    name = load_profile(profile).name
    (source / "index.md").write_text(_index([path.stem for path in notebooks], work / "executed" / "figures", name))
    report("setting the pages")
    pages = out / "html"
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-E", str(source), str(pages)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or "ERROR" in done.stderr:
        raise RuntimeError(f"the pages could not be set: {done.stderr.strip()[-2000:]}")
    return pages / "index.html"


def _index(chapters: list[str], figures: Path, profile: str) -> str:
    table = (figures / "results.md").read_text().replace("# Accuracy, percent", "## The results table", 1)
    kept = RECORDED / profile
    source = f"the runs recorded in `{kept.relative_to(PROJECT)}`" if kept.exists() else "no runs"
    listed = "\n".join(chapters)
    return (
        "# DoRA Lab\n\nA workbook to understand, check and teach DoRA (weight-decomposed low-rank adaptation).\n\n"
        f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n\n{table}\nMade from {source}.\n"
    )
