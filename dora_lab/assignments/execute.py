"""nbgrader's Execute, the student's cells sent elsewhere: set-up and tests run in the kernel, answers in the worker.

`repair` says in each cell's metadata where it runs. What a test writes to stderr costs nothing, and a failed test shows
its message and not the hidden lines around it.
"""

from nbformat import NotebookNode
from nbgrader.preprocessors import Execute, NbGraderPreprocessor
from traitlets import Bool, Float, Integer, List, Unicode

from dora_lab.assignments import isolation
from dora_lab.assignments.build import HIDDEN, is_test
from dora_lab.assignments.repair import ROLE

PRELUDE = """\
from pathlib import Path as _Path
from dora_lab.assignments import isolation as _isolation
from dora_lab.assignments.repair import literals as _literals
_homes = _Path.cwd().parents[2] / "work" / _Path.cwd().parent.name
_homes.mkdir(parents=True, exist_ok=True)
_submission = _isolation.Submission(_Path.cwd(), {seconds!r}, {memory!r}, {uses_lab!r}, {hidden!r}, _homes)
import atexit as _atexit
_atexit.register(_submission.close)
"""


class IsolatedExecute(Execute):
    """Runs a repaired submission. `timeout`, seconds, is for a whole cell; `submission_seconds` for one cell or call of
    the student's code.
    """

    submission_seconds = Float(isolation.CELL_SECONDS, help="Seconds for one cell or call of submitted code").tag(
        config=True
    )
    memory_bytes = Integer(isolation.MEMORY_BYTES, help="What submitted code may allocate").tag(config=True)
    uses_lab = Bool(False, help="Whether submitted code may import dora_lab").tag(config=True)

    hidden = List(Unicode(), help="Folders that submitted code may read in no case").tag(config=True)

    def preprocess_cell(self, cell: NotebookNode, resources: dict, index: int) -> tuple[NotebookNode, dict]:
        """Execute what stands for the cell, then put the cell's own text back."""
        if cell.cell_type != "code" or not cell.source.strip():
            return cell, resources
        shown = cell.source
        cell.source = self._to_run(cell)
        try:
            cell, resources = super().preprocess_cell(cell, resources, index)
        finally:
            cell.source = shown
        cell.outputs = [_calm(output) for output in cell.outputs]
        return cell, resources

    def preprocess(self, nb: NotebookNode, *args, **kwargs) -> tuple:
        self._begun = False
        return super().preprocess(nb, *args, **kwargs)

    def _to_run(self, cell: NotebookNode) -> str:
        role = cell.metadata.get(ROLE, {"run": "submission", "names": []})
        terms = {"seconds": self.submission_seconds, "memory": self.memory_bytes, "uses_lab": self.uses_lab}
        prelude = "" if self._begun else PRELUDE.format(**terms, hidden=tuple(self.hidden))
        self._begun = True
        if role["run"] == "test":
            return prelude + cell.source
        if role["run"] == "both":
            return f"{prelude}{cell.source}\n_ = _submission.run({cell.source!r}, quiet=True)"
        typed = f", _literals({cell.source!r})" if role.get("literal") else ""  # what is typed in comes from the text
        return f"{prelude}_submission.bind({cell.source!r}, {list(role['names'])!r}, globals(){typed})"


def _calm(output: NotebookNode) -> NotebookNode:
    """stderr as stdout, and of an error its name and message."""
    if output.output_type == "stream":
        output.name = "stdout"
    if output.output_type == "error":
        output.traceback = [f"{output.ename}: {output.evalue}"]
    return output


class HideTests(NbGraderPreprocessor):
    """For feedback: the tests as the student knows them."""

    def preprocess_cell(self, cell: NotebookNode, resources: dict, cell_index: int) -> tuple[NotebookNode, dict]:
        if is_test(cell):
            cell.source = HIDDEN.sub("", cell.source)
        return cell, resources
