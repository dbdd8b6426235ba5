"""The trusted side of a submission: cells go to the worker, its functions come back as stand-ins.

A test calls a stand-in like the function itself. The arguments travel to the worker, the result travels back, and so do
gradients: what the tests know (expected values, their random inputs' seeds, the reference) never leaves this process.
"""

import base64
import contextlib
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from dora_lab.assignments import sandbox
from dora_lab.assignments.worker import decode, encode

CELL_SECONDS = 20.0
MEMORY_BYTES = 2 * 2**30
LONGEST_REPLY = 64 * 2**20
STARTING_SECONDS = 120.0  # until torch is loaded
LARGEST_HOME = 512 * 2**20  # of all files in the worker's folder, those that were handed in among them
MOST_FILES = 20_000
WEIGHED_EVERY_S = 1.0


class SubmissionError(Exception):
    """What a student's code raised, told without the worker's own frames.

    names: what the cell that raised it had defined before, as `Submission.run` returns it.
    """

    def __init__(self, message: str, names: dict[str, object] | None = None):
        super().__init__(message)
        self.names = names or {}


class TimeLimit(SubmissionError):
    """A cell or a call that did not end in time."""


class WorkerDied(SubmissionError):
    """The worker ended: out of memory, or made to."""


class _Overfull(Exception):
    """The worker's folder holds too much."""


class Submission:
    """One student's code, run cell by cell in a worker; a worker that had to be ended is replaced, and its good cells
    are run again in the new one.
    """

    def __init__(
        self,
        folder: Path | None = None,
        seconds: float = CELL_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        uses_lab: bool = False,
        hidden: tuple[str, ...] = (),
        homes: Path | None = None,
    ):
        """folder: files that came with the notebook; the worker sees a copy. seconds: for a cell or a call. uses_lab,
        hidden: as for `sandbox.readable`. homes: where to make the worker's folder; the system's temporary one if None.
        """
        self.seconds, self.memory_bytes = seconds, memory_bytes
        self.uses_lab, self.hidden = uses_lab, hidden
        self.folder, self.homes = folder, homes
        self.home = self._new_home()
        self.process, self.unread = None, b""
        self.done: list[str] = []

    def __enter__(self) -> "Submission":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker and all that it started, and remove its folder."""
        self._end()
        shutil.rmtree(self.home, ignore_errors=True)

    def run(self, source: str, names: Iterable[str] = (), quiet: bool = False) -> dict[str, object]:
        """Run one cell; what `names` are then, those that are defined: stand-ins for what can be called, else values.

        Raises SubmissionError naming the student's exception, TimeLimit, WorkerDied. What the cell printed is printed,
        unless `quiet`.
        """
        try:
            reply = self._ask({"run": source, "names": list(names)}, quiet)
        except SubmissionError as problem:
            if problem.names:
                self.done.append(source)
            raise
        self.done.append(source)
        for picture in reply["figures"]:
            from IPython.display import Image, display

            display(Image(base64.b64decode(picture), format="png"))
        return self._values(reply["names"])

    def _values(self, found: dict[str, dict]) -> dict[str, object]:
        return {name: Function(self, name) if "function" in it else decode(it["value"]) for name, it in found.items()}

    def bind(
        self,
        source: str,
        names: Iterable[str],
        namespace: dict[str, object],
        typed: dict[str, object] | None = None,
    ) -> None:
        """Run a cell and put `names`, and nothing else of it, into `namespace`.

        A cell that fails leaves there what it had defined before the error. typed: the values themselves, where they
        are known from the cell's text; nothing that ran before can change those.
        """
        for name in names:
            namespace.pop(name, None)
        if typed is not None:
            namespace.update({name: typed[name] for name in names if name in typed})
            self.run(source)
            return
        try:
            found = self.run(source, names)
        except SubmissionError as problem:
            namespace.update(problem.names)
            raise
        namespace.update({name: found[name] for name in names if name in found})

    def _ask(self, request: dict, quiet: bool = False) -> dict:
        if self.process is None:
            self._begin()
        reply = self._exchange(request, self.seconds)
        if reply.get("printed") and not quiet:
            print(reply["printed"], end="")
        if "error" in reply:
            place = f" ({reply['line']} of the cell)" if reply["line"] else ""
            raise SubmissionError(f"{reply['kind']}: {reply['error']}{place}", self._values(reply.get("names", {})))
        return reply

    def _new_home(self) -> str:
        """A folder with what came with the notebook, and nothing else."""
        home = tempfile.mkdtemp(prefix="submission-", dir=self.homes)
        if self.folder is not None:
            shutil.copytree(self.folder, home, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.ipynb", "*.db"))
        return home

    def _begin(self) -> None:
        self.process = sandbox.start(Path(self.home), self.memory_bytes, self.uses_lab, self.hidden)
        self.unread = b""
        for source in ("", *self.done):
            self._exchange({"run": source, "names": []}, self.seconds if source else STARTING_SECONDS)

    def _exchange(self, request: dict, seconds: float) -> dict:
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            reply = json.loads(self._line(time.monotonic() + seconds))
            self._weigh()
            return reply
        except TimeoutError:
            self._end()
            raise TimeLimit(f"it did not end within {seconds:g} seconds and was stopped") from None
        except _Overfull as problem:
            self.close()
            self.home = self._new_home()
            raise WorkerDied(f"it was stopped: {problem}") from None
        except (OSError, ValueError) as problem:
            self._end()
            raise WorkerDied(
                f"the process that ran it ended ({problem}): out of memory, or ended by the code"
            ) from None
        except BaseException:  # interrupted from outside: what comes next in the pipe would answer another request
            self._end()
            raise

    def _line(self, deadline: float) -> bytes:
        pipe = self.process.stdout.fileno()
        while b"\n" not in self.unread:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([pipe], [], [], max(0.0, min(left, WEIGHED_EVERY_S)))
            if not ready:
                self._weigh()
                if left <= WEIGHED_EVERY_S:
                    raise TimeoutError
                continue
            chunk = os.read(pipe, 2**20)
            if not chunk:
                raise OSError("no reply")
            self.unread += chunk
            if len(self.unread) > LONGEST_REPLY:
                raise OSError("its reply is too long")
        line, _, self.unread = self.unread.partition(b"\n")
        return line

    def _weigh(self) -> None:
        """Raise _Overfull if the worker's folder holds more than it may."""
        files = size = 0
        for where, _, names in os.walk(self.home):
            files += len(names)
            for name in names:
                with contextlib.suppress(OSError):
                    size += os.lstat(os.path.join(where, name)).st_size
            if size > LARGEST_HOME or files > MOST_FILES:
                raise _Overfull(f"it wrote more than {LARGEST_HOME // 2**20} MiB or {MOST_FILES:,} files")

    def _end(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


class Function:
    """A student's function, called in the worker. Tensors that require gradients get them, through autograd."""

    def __init__(self, submission: Submission, name: str):
        self.submission, self.name = submission, name

    def __repr__(self) -> str:
        return f"<the submitted {self.name}>"

    def __call__(self, *args: object) -> object:
        """Arguments by position: numbers, texts and tensors. A tensor that the function changes in place is changed.
        Where it is called in `torch.inference_mode`, the function runs in it, too.
        """
        tracked = [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and arg.requires_grad]
        request = {"call": self.name, "args": [encode(arg) for arg in args], "tracked": tracked}
        request["inference"] = torch.is_inference_mode_enabled()
        reply = self.submission._ask(request)
        for place, value in reply["changed"].items():
            args[int(place)].data = decode(value)
        value = decode(reply["value"])
        if not reply["live"]:
            return value
        many = isinstance(value, tuple | list)
        parts = list(value) if many else [value]
        live = [parts[i] for i in reply["live"]]
        attached = _Attach.apply(self.submission, reply["call"], live, *(args[i] for i in tracked))
        for i, part in zip(reply["live"], attached, strict=True):
            parts[i] = part
        return type(value)(parts) if many else parts[0]


class _Attach(torch.autograd.Function):
    """Outputs that came from the worker, tied to the arguments they were made from."""

    @staticmethod
    def forward(ctx, submission: Submission, call: int, outputs: list, *leaves: torch.Tensor):
        ctx.submission, ctx.call = submission, call
        ctx.shapes = [leaf.shape for leaf in leaves]
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *upstream: torch.Tensor):
        request = {"backward": ctx.call, "gradients": [encode(g) for g in upstream]}
        gradients = [decode(g) for g in ctx.submission._ask(request)["gradients"]]
        for gradient, shape in zip(gradients, ctx.shapes, strict=True):
            if gradient is not None and (not isinstance(gradient, torch.Tensor) or gradient.shape != shape):
                raise SubmissionError("a gradient came back in the wrong shape")
        return (None, None, None, *gradients)
