"""The data files of LLM-Adapters: fetched once from one pinned commit, checked against a hash, kept in a cache folder.

`<cache>/llm-adapters/` is laid out as the repository is, so that it can be filled by hand: a checkout of that commit
serves as it is. The data's licence is ODC-By.
"""

import hashlib
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from dora_lab.files import sha256_of
from dora_lab.locks import locked
from dora_lab.tasks import MIXTURE, TASKS, Task, task

REPOSITORY = "AGI-Edgerunners/LLM-Adapters"
COMMIT = "816657208af4db747803f87ba40a4c71383fed7a"
BASE_URL = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/"
MIXTURE_FILE = "ft-training_set/commonsense_170k.json"
TIMEOUT_S = 60  # without a byte from the server


@dataclass(frozen=True)
class RemoteFile:
    """One file of the repository. A `blob` is git's own hash of it, SHA-1 of `"blob <bytes>\\0" + content`."""

    path: str
    blob: str | None = None
    sha256: str | None = None

    @property
    def expected(self) -> str | None:
        """`sha256 <hex>` where it is known, else `git blob <hex>`, else None."""
        if self.sha256:
            return f"sha256 {self.sha256}"
        return f"git blob {self.blob}" if self.blob else None


_KNOWN = (
    RemoteFile(
        "dataset/boolq/train.json",
        "87a7beee26b49f81c450641ef2ff84f55611321f",
        "5ccbaceebaddc69765e1c4a363632196b81851d303696672165ab59ec4e48c83",
    ),
    RemoteFile(
        "dataset/boolq/test.json",
        "6d7edb0a8e8a6566b546ccf0d98d24e48db3fdf3",
        "89df2397cbca81dc31adcc6f7f5b635821aa0565aafde46725b2b4bd39b4dfa9",
    ),
    RemoteFile("dataset/hellaswag/train.json", "ca68dc85fc2a2f73c9b1b8b0823cc41a8f669718"),
    RemoteFile("dataset/hellaswag/test.json", "183c4920415f83ba4b793c4873a33e7e10bd1be5"),
    RemoteFile("dataset/winogrande/train.json", "0b56375ac6b4464fa97abfb72812f15c772ba305"),
    RemoteFile(
        "dataset/winogrande/test.json",
        "21257263593dd4d00546e1918c88ca0f357b08ad",
        "6946f5209e7114c65c6d04f8f644c5a061af20d730b1cfe158fff3dc44076fb9",
    ),
    RemoteFile(MIXTURE_FILE, "529e426b33d4cdb1d0c4a275a1a7245ad081fd91"),
)
# Of the other five tasks no hash has been published: the SHA-256 of the first copy is kept beside it and holds from
# then on.
FILES = {
    file.path: file
    for file in (
        *(RemoteFile(f"dataset/{t.folder}/{split}.json") for t in TASKS.values() for split in ("train", "test")),
        *_KNOWN,
    )
}


def cache_folder() -> Path:
    """`DORA_LAB_CACHE`, or the platform's folder for caches."""
    import pooch

    given = os.environ.get("DORA_LAB_CACHE")
    return Path(given).expanduser() if given else Path(pooch.os_cache("dora-lab"))


def llm_adapters_folder() -> Path:
    """Where the repository's files are kept; it need not exist yet."""
    return cache_folder() / "llm-adapters"


def repository_path(of: Task, split: str) -> str:
    """The path of a task's `train` or `test` file inside the repository."""
    return MIXTURE_FILE if of.name == MIXTURE else f"dataset/{of.folder}/{split}.json"


def files_of(task_name: str) -> list[tuple[Task, str, RemoteFile]]:
    """(task, split, file) of what a task needs: its train file; its test file or, of a mixture, those of its parts.

    Raises ValueError for an unknown task.
    """
    wanted = task(task_name)
    tested = [task(part) for part in wanted.parts] or [wanted]
    needed = [(wanted, "train"), *((t, "test") for t in tested)]
    return [(of, split, FILES[repository_path(of, split)]) for of, split in needed]


def fetch(path: str, base_url: str | None = None) -> Path:
    """The local copy of a file of the repository, verified; downloaded if it is not there yet.

    A download goes to a temporary file and is moved into place when it is whole, so that an interrupted one starts
    anew; of several processes that want the file one downloads it. `base_url` is another place with the same layout,
    ending in a slash.
    Raises FileNotFoundError if it is neither there nor to be had, ValueError if its hash is wrong (the file is then
    renamed to `*.refused`), OSError if the cache cannot be written.
    """
    import pooch
    from requests.exceptions import RequestException

    remote, folder, base_url = FILES[path], llm_adapters_folder(), base_url or BASE_URL
    target = folder / path
    pooch.get_logger().setLevel("WARNING")
    store = pooch.create(folder, base_url, registry={path: None})  # None: pooch knows no blob ids, _verify does
    try:
        with _alone(target):
            store.fetch(path, downloader=pooch.HTTPDownloader(timeout=TIMEOUT_S))
    except RequestException as error:
        raise FileNotFoundError(
            f"{path} of {REPOSITORY} is not in the cache and cannot be fetched ({_reason(error)}). To fill the cache "
            f"by hand, get it from {base_url}{path} ({remote.expected or 'no hash is known'}) and put it into "
            f"{target.parent}"
        ) from error
    except OSError as error:
        raise OSError(
            f"cannot write {target} ({error.strerror or error}): free space there, or let DORA_LAB_CACHE name "
            "another folder"
        ) from error
    _verify(target, remote)
    return target


def _alone(target: Path) -> AbstractContextManager:
    """Hold the cache if the file has to be fetched; one that has it may be read-only."""
    if target.is_file():
        return nullcontext()
    folder = llm_adapters_folder()
    folder.mkdir(parents=True, exist_ok=True)
    return locked(folder)


def _verify(target: Path, remote: RemoteFile) -> None:
    """Raise ValueError, and set the file aside, unless it has the hash that is known or that it had at first."""
    expected, seal = remote.expected, target.with_name(target.name + ".sha256")
    of_first = ""
    if expected is None and seal.is_file():
        expected, of_first = f"sha256 {seal.read_text().strip()}", f" (of the first copy, kept in {seal.name})"
    if expected is None:
        _check_json_is_whole(target)
        digest, kept = sha256_of(target), f"it is kept in {seal.name}, and later copies must have it"
        try:
            seal.write_text(digest + "\n")
        except OSError as error:  # a cache that is read-only stays as it is
            kept = f"it could not be kept ({error.strerror}): compare it yourself"
        warnings.warn(
            f"{target} is taken on trust: no hash of {remote.path} is known. Its SHA-256 is {digest}; {kept}",
            stacklevel=3,
        )
        return
    kind, _, digest = expected.rpartition(" ")
    found = sha256_of(target) if kind == "sha256" else git_blob_id(target)
    if found != digest:
        raise ValueError(
            f"{target} is not the file of commit {COMMIT[:10]}: expected {expected}{of_first}, got {found}. "
            f"{_set_aside(target)}; fetch again with `dora-lab fetch`"
        )


def _check_json_is_whole(target: Path) -> None:
    """Of a file without a known hash at least the end must be there."""
    with target.open("rb") as file:
        file.seek(max(0, target.stat().st_size - 64))
        end = file.read().rstrip()
    if not end.endswith(b"]"):
        raise ValueError(f"{target} is cut off: it does not end in ']'. {_set_aside(target)}; fetch it again")


def _set_aside(target: Path) -> str:
    refused = target.with_name(target.name + ".refused")
    try:
        target.replace(refused)
    except OSError as error:
        return f"It could not be renamed ({error.strerror}): delete it"
    return f"It is kept aside as {refused.name}"


def git_blob_id(path: Path) -> str:
    """What `git hash-object` prints for the file."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    """What went wrong in a few words: requests wraps a connection's failure several times over."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"the server answered {response.status_code} {response.reason}"
    kind = type(error).__name__
    return "the connection broke off" if kind == "ChunkedEncodingError" else f"no connection: {kind}"
