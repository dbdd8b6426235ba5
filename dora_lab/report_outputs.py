"""What the report's two adapters wrote on WinoGrande: its own raw outputs, fetched, verified, and read in two ways.

They are in the report's repository under `results/`, 1,267 for LoRA and as many for DoRA. `<cache>/report-outputs/` is
laid out as the repository is and can be filled by hand.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_lab.comparisons import Pairs, count_pairs
from dora_lab.fetch import TIMEOUT_S, cache_folder

REPOSITORY = "rolanrod/cs-4782-final-project"
COMMIT = "59829ebf7ae716c6747c37be13099527a77e8833"
BASE_URL = f"https://raw.githubusercontent.com/{REPOSITORY}/{COMMIT}/"
FILES = {  # method -> (path in the repository, SHA-256)
    "lora": (
        "results/LLaMA-7B-LoRA-winogrande.json",
        "911857b7b42baf4e411817dbbc2ef10fa607395c53f7cba879f0419f1509e450",
    ),
    "dora": (
        "results/LLaMA-7B-DoRA-winogrande.json",
        "f72b4e1467ddecb482753c82cea7d468776127dac6e3500036cc5f2266e1f66e",
    ),
}
_WORD = re.compile(r"option1|option2")
_STATED = re.compile(r"answer\s*(?:is|:)\s*(option[12])\b(?!\s*/)", re.IGNORECASE)
_LISTED = re.compile(r"option\d(?:/option\d)+|option\d/option$")


@dataclass(frozen=True)
class Output:
    """One question and what was written. `recorded` is the answer that the report's code read, "" for none."""

    id: str
    instruction: str
    gold: str
    text: str
    recorded: str


Parser = Callable[[str], str | None]


def outputs_folder() -> Path:
    """Where the files are kept; it need not exist yet."""
    return cache_folder() / "report-outputs"


def fetch_outputs(method: str, base_url: str | None = None) -> Path:
    """The local copy of one adapter's outputs, verified; downloaded if it is not there yet.

    Raises what `local_outputs` raises.
    """
    import pooch
    from requests.exceptions import RequestException

    path, sha256 = _file(method)
    base_url = base_url or BASE_URL
    if not (outputs_folder() / path).is_file():
        pooch.get_logger().setLevel("WARNING")
        store = pooch.create(outputs_folder(), base_url, registry={path: f"sha256:{sha256}"})
        try:
            store.fetch(path, downloader=pooch.HTTPDownloader(timeout=TIMEOUT_S))
        except RequestException as error:
            raise FileNotFoundError(_how_to_get(path, sha256, base_url, "cannot be fetched")) from error
    return local_outputs(method)


def local_outputs(method: str) -> Path:
    """The local copy, verified, without asking the network.

    Raises ValueError for a method without outputs or a file of another hash, FileNotFoundError, with the file, its
    address, hash and folder, if it is not there.
    """
    path, sha256 = _file(method)
    target = outputs_folder() / path
    if not target.is_file():
        raise FileNotFoundError(_how_to_get(path, sha256, BASE_URL, "is not here"))
    found = hashlib.sha256(target.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{target} is not the file of commit {COMMIT[:10]}: expected sha256 {sha256}, got {found}. Delete it and "
            f"get it from {BASE_URL}{path}"
        )
    return target


def _file(method: str) -> tuple[str, str]:
    if method not in FILES:
        raise ValueError(f"the report has outputs of {' and '.join(FILES)}, not of {method!r}")
    return FILES[method]


def _how_to_get(path: str, sha256: str, base_url: str, what: str) -> str:
    return (
        f"{path} of {REPOSITORY} {what}: `dora-lab claims --fetch` gets it once; by hand, get {base_url}{path} "
        f"(sha256 {sha256}) and put it into {(outputs_folder() / path).parent}"
    )


def read_outputs(method: str) -> list[Output]:
    """The outputs in the order of WinoGrande's test file; ids are those of `data.load_examples`.

    Raises what `local_outputs` raises.
    """
    records = json.loads(local_outputs(method).read_text(encoding="utf-8"))
    return [
        Output(f"winogrande-test-{i}", r["instruction"], r["answer"], r["output_pred"], r["pred"])
        for i, r in enumerate(records)
    ]


def first_match(text: str) -> str | None:
    """The report's way, which is the paper's: the first "option1" or "option2" anywhere, also in a list of both."""
    found = _WORD.search(text)
    return found and found.group()


def stated_answer(text: str) -> str | None:
    """The one option that the text gives as its answer; None where it gives none, or both.

    "answer is optionN" or "answer: optionN" counts; failing that, the only option that is named outside of a list such
    as "option1/option2". Case and what stands in front do not matter.
    """
    stated = set(_STATED.findall(text)) or set(re.findall(r"\boption[12]\b", _LISTED.sub("", text)))
    return stated.pop().lower() if len(stated) == 1 else None


def right_by_id(outputs: Sequence[Output], parser: Parser) -> dict[str, bool]:
    """{id: answered right}; an answer that the parser cannot read is wrong."""
    return {one.id: parser(one.text) == one.gold for one in outputs}


def unread_ids(outputs: Sequence[Output], parser: Parser) -> set[str]:
    """Ids of the outputs in which the parser finds no answer."""
    return {one.id for one in outputs if parser(one.text) is None}


def compare(
    first: Sequence[Output], second: Sequence[Output], parser: Parser, answered_only: bool = False
) -> tuple[Pairs, int]:
    """(counts of all questions, or of those where both outputs can be read; number of questions left out).

    Raises ValueError if the two are not of the same questions with the same right answers.
    """
    questions = {one.id: (one.instruction, one.gold) for one in first}
    if questions != {one.id: (one.instruction, one.gold) for one in second}:
        raise ValueError("the two files are not of the same questions: take both of one test file")
    out = unread_ids(first, parser) | unread_ids(second, parser) if answered_only else set()
    one, other = (
        {i: right for i, right in right_by_id(outputs, parser).items() if i not in out} for outputs in (first, second)
    )
    return count_pairs(one, other), len(out)


def kinds(outputs: Sequence[Output]) -> Counter:
    """How often each form of output occurs: the text with the number of the option left out, white space as one."""
    return Counter(" ".join(re.sub(r"option[12]", "optionN", one.text).split()) for one in outputs)
