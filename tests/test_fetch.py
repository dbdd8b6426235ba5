"""The real files, from a server on this machine: fetched once, verified, refused when wrong, usable offline."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from dora_lab import fetch as fetching
from dora_lab.data import count_fetched, data_sha256, load_examples
from dora_lab.fetch import FILES, MIXTURE_FILE, RemoteFile, cache_folder, fetch, files_of, git_blob_id
from dora_lab.files import sha256_of
from dora_lab.profiles import load_profile
from dora_lab.specs import RunSpec
from dora_lab.tasks import TASKS, task

pytestmark = pytest.mark.filterwarnings("ignore:.*is taken on trust")

COMMAND = str(Path(sys.executable).with_name("dora-lab"))
NOWHERE = "http://127.0.0.1:9/"  # the discard port: no one listens
BOOLQ, PIQA = "dataset/boolq/test.json", "dataset/piqa/test.json"


def _record(question: str, words: str, answer: str) -> dict:
    instruction = f"{question}\n\nAnswer format: {words}"
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


def _records(of) -> list[dict]:
    """One item for each candidate of a task."""
    return [_record(f"question {i}?", "/".join(of.candidates), answer) for i, answer in enumerate(of.candidates)]


@pytest.fixture
def server():
    """`server.files`: path -> content, `server.asked`: the paths asked for, `server.cut`: send only so many bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path[1:])
            content = self.server.files.get(self.path[1:])
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: self.server.cut])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.asked, running.cut = {}, [], None
        running.url = f"http://127.0.0.1:{running.server_address[1]}/"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache; returns where the repository's files are kept in it."""
    monkeypatch.setenv("DORA_LAB_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetching, "BASE_URL", NOWHERE)
    return tmp_path / "cache" / "llm-adapters"


@pytest.fixture
def put(server, tmp_path, monkeypatch):
    """`put(path, records)`: the server has such a file, and where a hash is known it is this file's."""

    def make(path: str, records: list) -> bytes:
        content = json.dumps(records).encode()
        server.files[path] = content
        if FILES[path].expected:
            (tmp_path / "hashed").write_bytes(content)
            monkeypatch.setitem(FILES, path, RemoteFile(path, git_blob_id(tmp_path / "hashed")))
        return content

    return make


@pytest.fixture
def boolq(put) -> bytes:
    return put(BOOLQ, _records(task("boolq")))


# --- what is known ---


def test_of_several_that_want_a_file_one_downloads_it(server, cache, boolq):
    threads = [threading.Thread(target=fetch, args=(BOOLQ, server.url)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert server.asked == [BOOLQ] and (cache / BOOLQ).read_bytes() == boolq


def test_a_blob_id_is_gits(tmp_path):
    (tmp_path / "file").write_bytes(b"hello\n")
    assert git_blob_id(tmp_path / "file") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_every_task_has_its_two_files_and_the_mixture_the_tests_of_all():
    assert len(FILES) == 2 * 8 + 1
    assert [file.path for _, _, file in files_of("arc_easy")] == [
        f"dataset/ARC-Easy/{s}.json" for s in ("train", "test")
    ]
    mixture = [file.path for _, _, file in files_of("commonsense_170k")]
    assert mixture == [MIXTURE_FILE, *(f"dataset/{t.folder}/test.json" for t in TASKS.values())]
    assert FILES[MIXTURE_FILE].expected.startswith("git blob 529e426b")
    with pytest.raises(ValueError, match="unknown task 'bool-q': choose one of boolq, .*commonsense_170k"):
        files_of("bool-q")


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["boolq/train", "boolq/test", "winogrande/test"])
def test_the_known_hashes_are_the_real_files(real_data, name):
    path, known = real_data / "llm_adapters" / f"{name}.json", FILES[f"dataset/{name}.json"]
    assert git_blob_id(path) == known.blob and sha256_of(path) == known.sha256


def test_the_cache_is_where_the_variable_says_or_in_the_platforms_place(monkeypatch, tmp_path):
    monkeypatch.setenv("DORA_LAB_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("DORA_LAB_CACHE")
    assert cache_folder().name == "dora-lab"


# --- downloads ---


def test_a_file_is_fetched_once_and_then_read_without_a_server(cache, server, boolq):
    path = fetch(BOOLQ, server.url)
    assert path == cache / BOOLQ and path.read_bytes() == boolq
    assert fetch(BOOLQ, server.url) == fetch(BOOLQ, NOWHERE) == path
    assert server.asked == [BOOLQ]


def test_without_a_network_the_error_says_how_to_fill_the_cache_by_hand(cache, boolq):
    with pytest.raises(FileNotFoundError) as caught:
        fetch(BOOLQ)
    said = str(caught.value)
    assert "no connection" in said and FILES[BOOLQ].expected in said
    assert NOWHERE + BOOLQ in said and str(cache / "dataset" / "boolq") in said
    (cache / BOOLQ).write_bytes(boolq)
    assert fetch(BOOLQ) == cache / BOOLQ


def test_a_file_that_the_server_lacks_is_named(cache, server):
    with pytest.raises(FileNotFoundError, match=r"boolq/test.json .*the server answered 404 Not Found"):
        fetch(BOOLQ, server.url)


def test_an_interrupted_download_leaves_nothing_and_starts_anew(cache, server, boolq):
    server.cut = len(boolq) // 2
    with pytest.raises(FileNotFoundError, match="the connection broke off"):
        fetch(BOOLQ, server.url)
    assert list((cache / "dataset" / "boolq").iterdir()) == []
    server.cut = None
    assert fetch(BOOLQ, server.url).read_bytes() == boolq


def test_a_download_with_a_wrong_hash_is_refused_and_kept_aside(cache, server, boolq):
    server.files[BOOLQ] = boolq.replace(b"true", b"TRUE", 1)
    with pytest.raises(
        ValueError, match=rf"expected {FILES[BOOLQ].expected}, got \w{{40}}.*aside as test.json.refused"
    ):
        fetch(BOOLQ, server.url)
    assert not (cache / BOOLQ).exists()
    assert (cache / f"{BOOLQ}.refused").read_bytes() == server.files[BOOLQ]


def test_a_cached_file_that_has_changed_is_refused_and_fetched_again(cache, server, boolq):
    fetch(BOOLQ, server.url).write_bytes(boolq[:-10])
    with pytest.raises(ValueError, match="is not the file of commit 816657208a"):
        load_examples("llm-adapters", "boolq", "test")
    assert (cache / f"{BOOLQ}.refused").read_bytes() == boolq[:-10]
    assert fetch(BOOLQ, server.url).read_bytes() == boolq


def test_the_sha256_goes_before_the_blob_id(cache, server, boolq, monkeypatch):
    monkeypatch.setitem(FILES, BOOLQ, RemoteFile(BOOLQ, FILES[BOOLQ].blob, "0" * 64))
    with pytest.raises(ValueError, match="expected sha256 0000"):
        fetch(BOOLQ, server.url)


def test_where_no_hash_is_known_that_of_the_first_copy_holds(cache, server, put):
    content = put(PIQA, _records(task("piqa")))
    digest = hashlib.sha256(content).hexdigest()
    with pytest.warns(
        UserWarning, match=rf"test.json is taken on trust: no hash .*piqa.*SHA-256 is {digest}; it is kept"
    ):
        fetch(PIQA, server.url)
    assert (cache / f"{PIQA}.sha256").read_text().strip() == digest
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert fetch(PIQA).read_bytes() == content
    (cache / PIQA).write_bytes(content + b" ")
    with pytest.raises(ValueError, match=r"of the first copy, kept in test.json.sha256.*aside as test.json.refused"):
        fetch(PIQA)
    assert fetch(PIQA, server.url).read_bytes() == content


def test_a_page_in_place_of_a_file_is_refused_where_no_hash_is_known(cache, server):
    server.files[PIQA] = b"<html>please log in</html>"
    with pytest.raises(ValueError, match="test.json is cut off: .*aside as test.json.refused"):
        fetch(PIQA, server.url)
    assert not (cache / PIQA).exists() and not (cache / f"{PIQA}.sha256").exists()


def test_a_cache_that_cannot_be_written_is_named(cache, server, boolq):
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="cannot write .*DORA_LAB_CACHE"):
        fetch(BOOLQ, server.url)


# --- as a source of examples ---


def test_every_task_reads_through_the_one_loader(cache, server, put, monkeypatch):
    monkeypatch.setattr(fetching, "BASE_URL", server.url)
    for of in TASKS.values():
        for split in ("train", "test"):
            put(f"dataset/{of.folder}/{split}.json", _records(of))
        assert [e.answer for e in load_examples("llm-adapters", of.name, "test")] == list(of.candidates)
        train = load_examples("llm-adapters", of.name, "train", validation_examples=1)
        validation = load_examples("llm-adapters", of.name, "validation", validation_examples=1)
        assert (len(train), len(validation)) == (len(of.candidates) - 1, 1)


def test_the_mixture_trains_on_one_file_and_is_tested_on_eight(cache, server, put, monkeypatch):
    monkeypatch.setattr(fetching, "BASE_URL", server.url)
    put(MIXTURE_FILE, [record for of in TASKS.values() for record in _records(of)])
    for of in TASKS.values():
        put(f"dataset/{of.folder}/test.json", _records(of))
    train = load_examples("llm-adapters", "commonsense_170k", "train", validation_examples=2)
    test = load_examples("llm-adapters", "commonsense_170k", "test")
    assert len(train) == 23 and len(test) == 25 and len({e.id for e in test}) == 25
    assert {e.id.split("-")[0] for e in test} == set(TASKS)
    assert len(load_examples("llm-adapters", "commonsense_170k", "test", limit=11)) == 11
    assert len(server.asked) == 9  # each file once


@pytest.mark.parametrize("count", [3, 5])
def test_an_arc_item_may_have_three_or_five_options(cache, server, put, count):
    words = [f"answer{i + 1}" for i in range(count)]
    put("dataset/ARC-Challenge/test.json", [_record("q?", "/".join(words), words[-1])])
    fetch("dataset/ARC-Challenge/test.json", server.url)
    (example,) = load_examples("llm-adapters", "arc_challenge", "test")
    assert example.candidates == tuple(words)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "q"}, "field 'answer' is missing"),
        (_record("q", "solution1/solution2", "solution3"), "answer 'solution3' is not among"),
    ],
)
def test_a_bad_record_is_named_with_its_file_and_index(cache, server, put, record, message):
    put(PIQA, [*_records(task("piqa")), record])
    fetch(PIQA, server.url)
    with pytest.raises(ValueError, match=f"piqa/test.json, record 2: {message}"):
        load_examples("llm-adapters", "piqa", "test")


def test_the_identity_is_known_before_anything_is_fetched(cache):
    hashes = {name: data_sha256("llm-adapters", name) for name in (*TASKS, "commonsense_170k")}
    assert len(set(hashes.values())) == 9
    assert not cache.exists()


def test_a_profile_names_the_source(cache, tiny_profile, tmp_path):
    values = yaml.safe_load(tiny_profile.read_text()) | {"data": "llm-adapters", "evaluation": "generate"}
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(values))
    spec = RunSpec.from_profile(load_profile(tmp_path / "real.yaml"), "boolq", "dora")
    assert (spec.data, spec.evaluation) == ("llm-adapters", "generate")
    assert spec.data_sha256 == data_sha256("llm-adapters", "boolq")


# --- the command ---


def _call(*arguments, **environment) -> subprocess.CompletedProcess:
    offline = {"https_proxy": NOWHERE, "HTTPS_PROXY": NOWHERE, "no_proxy": "", "NO_PROXY": ""}
    return subprocess.run(
        [COMMAND, "fetch", *arguments], capture_output=True, text=True, env=os.environ | offline | environment
    )


def test_the_command_lists_addresses_hashes_and_places(tmp_path):
    done = _call("--list", DORA_LAB_CACHE=str(tmp_path))
    assert done.returncode == 0 and done.stdout.count("->") == 17
    for file in FILES.values():
        assert file.path in done.stdout and (file.expected or "no hash known") in done.stdout


def test_the_command_without_a_network_fails_with_what_to_do(tmp_path):
    done = _call("boolq", DORA_LAB_CACHE=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(tmp_path) in done.stderr and FILES["dataset/boolq/train.json"].expected in done.stderr
    assert _call("bool-q").returncode == 2


@pytest.mark.real_data
def test_the_command_checks_a_cache_that_was_filled_by_hand(real_data, tmp_path):
    target = tmp_path / "llm-adapters" / "dataset"
    target.mkdir(parents=True)
    (target / "boolq").symlink_to(real_data / "llm_adapters" / "boolq")
    done = _call("boolq", DORA_LAB_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "9427 records" in done.stdout and "3270 records" in done.stdout


def test_counting_checks_every_record(cache, server, boolq):
    fetch(BOOLQ, server.url)
    assert count_fetched(task("boolq"), "test") == 2
