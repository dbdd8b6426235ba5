"""The process in which a student's code runs: it knows the student's cells and nothing of the tests.

It stands alone (standard library and torch) and is started by `sandbox.start`. One JSON line in is a request, one JSON
line out is the reply:

    {"run": source, "names": [...]}                  run a cell; what those names are then, output, figures
    {"call": name, "args": [...], "tracked": [...]}  call a function; gradients wanted of arguments `tracked`;
                                                     "inference": in torch.inference_mode, without autograd
    {"backward": call, "gradients": [...]}           gradients of an earlier call's tracked arguments

Values travel as JSON (`encode`), so that nothing which comes back can run code or pose as something else.
"""

import ast
import base64
import builtins
import io
import json
import linecache
import os
import re
import resource
import sys
import traceback
import types
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress

import numpy  # noqa: F401 (before the guard: it may ask the system for its name)
import torch

KEPT_CALLS = 16  # graphs kept for a later backward
MOST_FIGURES = 4  # of one cell
SHOWN: list[tuple[object, str]] = []  # what the cell that runs displayed as pictures, and the PNG in base64
COMMAND = re.compile(r"^([ \t]*)(?:[%!?].*|[\w.]+\?\??[ \t]*)$", re.M)
LARGEST = 1_000_000  # numbers in one value that may travel
BLOCKED = ("peft", "dora_lab", "transformers", "accelerate", "torchtune", "loralib", "unsloth", "bitsandbytes")


def encode(value: object) -> object:
    """A value as JSON: numbers, texts, None, lists, tuples, dicts with text keys, tensors and arrays.

    Anything else becomes {"other": name of its type}. Raises ValueError for a tensor of more than LARGEST numbers.
    """
    if isinstance(value, torch.Tensor):
        if value.numel() > LARGEST:
            raise ValueError(f"a tensor of {value.numel():,} numbers is too large: at most {LARGEST:,} are compared")
        plain = value.detach().cpu()
        flat = (
            plain.reshape(-1).to(torch.complex128).real.tolist() if plain.is_complex() else plain.reshape(-1).tolist()
        )
        return {"tensor": str(plain.dtype).removeprefix("torch."), "shape": list(plain.shape), "values": flat}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [encode(part) for part in value]}
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {"dict": {key: encode(part) for key, part in value.items()}}
    if type(value).__module__ == "numpy":
        return encode(torch.as_tensor(value)) if getattr(value, "ndim", 0) else encode(value.item())
    return {"other": type(value).__name__}


def decode(value: object) -> object:
    """What `encode` wrote; {"other": …} comes back as `Other`. Raises ValueError for what `encode` never writes."""
    if not isinstance(value, dict):
        if isinstance(value, list):
            raise ValueError("a bare list is no encoded value")
        return value
    if "tensor" in value:
        dtype = getattr(torch, str(value["tensor"]), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown tensor type {value['tensor']!r}")
        return torch.tensor(value["values"], dtype=dtype).reshape(value["shape"])
    if "tuple" in value or "list" in value:
        parts = [decode(part) for part in value.get("tuple", value.get("list"))]
        return tuple(parts) if "tuple" in value else parts
    if "dict" in value:
        return {str(key): decode(part) for key, part in value["dict"].items()}
    return Other(str(value.get("other")))


class Other:
    """Stands for a value that cannot be compared, by the name of its type."""

    def __init__(self, kind: str):
        self.kind = kind

    def __repr__(self) -> str:
        return f"<a {self.kind}>"


def _display(*values: object, raw: bool = False, **_: object) -> None:
    """A notebook's `display`: figures and other pictures as pictures, the rest in text."""
    for value in values:
        picture = value.get("image/png") if raw and isinstance(value, dict) else _picture(value)
        if picture is None:
            print(repr(value))
        else:
            SHOWN.append((value, picture if isinstance(picture, str) else base64.b64encode(picture).decode()))


def _picture(value: object) -> bytes | str | None:
    """A figure of matplotlib's as PNG, or what else has a picture of itself."""
    figures = sys.modules.get("matplotlib.figure")
    if figures and isinstance(value, figures.Figure):
        picture = io.BytesIO()
        value.savefig(picture, format="png", dpi=80)
        return picture.getvalue()
    drawn = getattr(type(value), "_repr_png_", None)
    picture = drawn(value) if drawn else None
    return picture[0] if isinstance(picture, tuple) else picture  # with metadata


class _Notebook:
    """What `get_ipython()` gives here: any command of a notebook's, doing nothing."""

    def __getattr__(self, name: str):
        return lambda *_, **__: None


class Worker:
    """Runs cells in one namespace and calls what they define."""

    def __init__(self) -> None:
        self.module = types.ModuleType("__main__")  # what `import __main__` finds, as in a notebook
        self.namespace = vars(self.module)
        self.namespace.update(__builtins__=builtins, display=_display, get_ipython=_Notebook)
        self.calls: dict[int, tuple[list, list]] = {}  # call -> (outputs with their graph, tracked arguments)
        self.count = 0
        self.cells = 0

    def answer(self, request: dict) -> dict:
        """The reply to one request; an exception of the student's code becomes {"error", "kind", "line", "names"}."""
        printed, before = io.StringIO(), dict(self.namespace)
        with redirect_stdout(printed), redirect_stderr(printed):
            try:
                run = "run" in request
                reply = self._run(request["run"], request["names"]) if run else self._calculate(request)
            except BaseException as problem:  # SystemExit and KeyboardInterrupt are a student's to raise, too
                reply = {"error": f"{problem}"[:500], "kind": type(problem).__name__, "line": _line_of(problem)}
                reply["names"] = self._changed(request.get("names", []), before)
        return reply | {"printed": printed.getvalue()[-5000:]}

    def _run(self, source: str, wanted: list[str]) -> dict:
        self.cells += 1
        SHOWN.clear()
        name = f"<submission {self.cells}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for inspect.getsource
        try:
            tree = ast.parse(source, name)
        except SyntaxError:  # notebook commands, %matplotlib or !ls or torch.norm?, are no Python and are left out
            tree = ast.parse(COMMAND.sub(r"\1pass", source), name)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), self.namespace)
        shown = None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), self.namespace)
        if shown is not None:
            _display(shown)
        found = {name: self.namespace[name] for name in wanted if name in self.namespace}
        return {"names": {name: _told(value) for name, value in found.items()}, "figures": _open_figures()}

    def _changed(self, wanted: list[str], before: dict[str, object]) -> dict:
        """Of the wanted names, those that a cell which failed had defined until then: other objects than before it."""
        found = {}
        for name in wanted:
            value = self.namespace.get(name)
            if name in self.namespace and value is not before.get(name, self):
                with suppress(Exception):  # a value that cannot travel
                    found[name] = _told(value)
        return found

    def _calculate(self, request: dict) -> dict:
        if "backward" in request:
            outputs, leaves = self.calls[request["backward"]]
            weights = [decode(g) for g in request["gradients"]]
            gradients = torch.autograd.grad(outputs, leaves, weights, allow_unused=True, retain_graph=True)
            return {"gradients": [encode(g) for g in gradients]}
        args = [decode(arg) for arg in request["args"]]
        before = [arg.clone() if isinstance(arg, torch.Tensor) else None for arg in args]
        leaves = [args[i].requires_grad_() for i in request["tracked"]]
        with _without_autograd() if request["inference"] else nullcontext():
            value = self.namespace[request["call"]](*args)
        self.count += 1
        parts = value if isinstance(value, tuple | list) else [value]
        live = [i for i, part in enumerate(parts) if isinstance(part, torch.Tensor) and part.requires_grad]
        if live and leaves:
            self.calls[self.count] = ([parts[i] for i in live], leaves)
            self.calls.pop(self.count - KEPT_CALLS, None)
        changed = {
            str(i): encode(arg)
            for i, arg in enumerate(args)
            if before[i] is not None and not (arg.shape == before[i].shape and torch.equal(arg, before[i]))
        }
        return {"value": encode(value), "call": self.count, "live": live if leaves else [], "changed": changed}


@contextmanager
def _without_autograd():
    """torch.inference_mode, in which autograd records nothing; torch.func, which works there too, is refused."""

    def refused(*_, **__):
        raise RuntimeError("this function is to be written without autograd")

    places = ((torch.autograd, "grad"), (torch.autograd, "backward"), (torch.autograd.forward_ad, "make_dual"))
    kept = [(module, name, getattr(module, name)) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, refused)
        with torch.inference_mode():
            yield
    finally:
        for module, name, function in kept:
            setattr(module, name, function)


def _told(value: object) -> dict:
    """What a name is, as JSON."""
    return {"function": True} if callable(value) else {"value": encode(value)}


def _open_figures() -> list[str]:
    """What the cell displayed and what matplotlib has open besides, as PNG in base64; closed afterwards."""
    plt = sys.modules.get("matplotlib.pyplot")
    there = [plt.figure(number) for number in plt.get_fignums()] if plt else []
    for figure in there:
        if len(SHOWN) < MOST_FIGURES and not any(value is figure for value, _ in SHOWN):
            _display(figure)
    if plt:
        plt.close("all")
    return [picture for _, picture in SHOWN[:MOST_FIGURES]]


def _line_of(problem: BaseException) -> str:
    if isinstance(problem, SyntaxError):
        return f"line {problem.lineno}"
    frames = [
        frame for frame in traceback.extract_tb(problem.__traceback__) if frame.filename.startswith("<submission ")
    ]
    return f"line {frames[-1].lineno}" if frames else ""


def _beside(name: str) -> types.ModuleType:
    """The module of this folder, found by its path (the package is not there) and given builtins of its own, so that
    what a submission does to `isinstance` does not reach it.
    """
    module = types.ModuleType(name)
    module.__dict__["__builtins__"] = dict(vars(builtins))
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"{name}.py")
    with open(path, encoding="utf-8") as file:
        exec(compile(file.read(), path, "exec"), module.__dict__)
    return module


def main() -> None:
    """Serve requests from standard input until it ends. The first line is how to be shut in:

    folder, to work in; readable: paths below which a submission may read; memory_bytes: what may be allocated from now
    on (where the system can limit it); uses_lab: whether adapter libraries may be imported, this one too, from project.
    """
    replies = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0), "r")
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what native code prints must not be taken for a reply
        os.dup2(quiet, stream)
    terms = json.loads(requests.readline())
    os.chdir(terms["folder"])
    torch.set_num_threads(1)
    used = (
        os.sysconf("SC_PAGE_SIZE") * int(open("/proc/self/statm").read().split()[0]) if sys.platform == "linux" else 0
    )
    limits = {resource.RLIMIT_AS: used + terms["memory_bytes"], resource.RLIMIT_CPU: 1800}
    for kind, limit in (limits | {resource.RLIMIT_FSIZE: 64 * 2**20}).items():
        try:
            resource.setrlimit(kind, (limit, limit))
        except (ValueError, OSError):  # macOS knows no RLIMIT_AS
            pass
    if terms["uses_lab"]:  # -I leaves out PYTHONPATH
        sys.path.insert(0, terms["project"])
        with suppress(ImportError):  # what draws figures there asks IPython for `display`
            import IPython.display

            IPython.display.display = IPython.core.display_functions.display = _display
    fence, guard = _beside("fence"), _beside("guard")
    if fence.version():
        fence.restrict(terms["folder"], terms["readable"])
    guard.install(terms["folder"], terms["readable"], () if terms["uses_lab"] else BLOCKED)
    del fence, guard, terms
    worker = Worker()
    sys.modules["__main__"] = worker.module
    for line in requests:
        reply = json.dumps(worker.answer(json.loads(line)))
        replies.write(reply + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
