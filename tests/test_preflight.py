"""What is found before anything is fetched or trained: no access, no weights, no room; each with what to do."""

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml

from dora_lab import pipeline, preflight, training
from dora_lab.preflight import check_base, check_memory, plan_of
from dora_lab.profiles import load_profile
from dora_lab.shapes import SHAPES
from dora_lab.specs import RunSpec

GIB = 2**30


@pytest.fixture
def spec(monkeypatch, tmp_path) -> RunSpec:
    """A run of the shipped profile; its base is in no cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return RunSpec.from_profile(load_profile("llama-7b"), "boolq", "dora")


def hub(monkeypatch, error=None, files=()):
    """Let the hub answer with an error, or with these files and sizes."""
    from huggingface_hub import HfApi

    def auth_check(self, repo_id):
        if error is not None:
            raise error

    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files]
    monkeypatch.setattr(HfApi, "auth_check", auth_check)
    monkeypatch.setattr(HfApi, "model_info", lambda self, *a, **kw: SimpleNamespace(siblings=siblings))


def refusal(name):
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co"))
    return getattr(errors, name)("no", response=response)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "GatedRepoError",
            r"is gated: accept its licence at https://huggingface.co/\S+ and log in with `hf auth login`",
        ),
        ("RepositoryNotFoundError", "is not on the hub, or not for you to see: check the name"),
        ("RevisionNotFoundError", "has no revision 'abc': see https://huggingface.co/"),
    ],
)
def test_a_base_that_the_hub_does_not_give_is_named(spec, monkeypatch, name, message):
    hub(monkeypatch, refusal(name))
    with pytest.raises(ValueError, match=f"base model huggyllama/llama-7b {message}"):
        check_base(replace(spec, revision="abc"))


def test_without_a_network_it_says_how_to_bring_the_base_along(spec, monkeypatch):
    hub(monkeypatch, ConnectionError("no route to host"))
    with pytest.raises(
        FileNotFoundError, match=r"cannot be asked \(no route to host\): fetch it elsewhere with `hf down"
    ):
        check_base(spec)


def test_a_base_without_safetensors_and_a_full_disk_are_named(spec, monkeypatch):
    hub(monkeypatch, files=[("pytorch_model.bin", 13 * GIB), ("config.json", 500)])
    with pytest.raises(ValueError, match="huggyllama/llama-7b has no .safetensors weights"):
        check_base(spec)
    hub(monkeypatch, files=[("model-1.safetensors", 9 * GIB), ("model-2.safetensors", 4 * GIB)])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 10 * 10**9))
    with pytest.raises(
        OSError, match=r"has 14\.0 GB of weights, .* has 10\.0 GB free: free space there, or let HF_HOME"
    ):
        check_base(spec)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 20 * 10**9))
    check_base(spec)


def test_a_base_in_the_cache_asks_nobody(spec, monkeypatch, tmp_path):
    hub(monkeypatch, ConnectionError("asked"))
    paths = {"model.safetensors.index.json": tmp_path / "index.json", "a.safetensors": tmp_path / "a.safetensors"}
    paths["model.safetensors.index.json"].write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda repo, name, revision=None: str(paths.get(name, "")) or None
    )
    check_base(spec)
    del paths["a.safetensors"]  # half of a download
    with pytest.raises(FileNotFoundError, match="asked"):
        check_base(spec)


def test_a_gpu_that_is_too_small_is_named_with_what_would_change_it(spec, monkeypatch):
    monkeypatch.setattr(preflight, "_shape", lambda spec: SHAPES["llama-7b"])
    monkeypatch.setattr(preflight, "memory", lambda: (24 * 10**9, 8 * 10**9))
    assert preflight._room("cpu") == ("this machine's memory", 8 * 10**9)  # what others have taken is not free
    monkeypatch.setattr(preflight, "_room", lambda device: ("the GPU", 12 * 10**9))
    with pytest.raises(ValueError, match=r"needs \d\d\.\d GB, the GPU has 12\.0 GB free: what would.*base in NF4 \(\d"):
        check_memory(spec, 512)
    monkeypatch.setattr(preflight, "_room", lambda device: ("the GPU", 40 * 10**9))
    check_memory(spec, 512)
    check_memory(replace(spec, quantisation="nf4", micro_batch_size=2))


def test_of_a_sharded_base_each_process_holds_its_part(spec, monkeypatch):
    monkeypatch.setattr(preflight, "_shape", lambda spec: SHAPES["llama-7b"])
    monkeypatch.setattr(preflight, "_room", lambda device: ("the GPU", 16 * 10**9))
    with pytest.raises(ValueError, match=r"needs (19|20)\.\d GB"):
        check_memory(spec, 512)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("dora_lab.processes.count", lambda: 4)
    check_memory(spec, 512)


def test_a_cut_off_that_is_not_known_yet_refuses_nothing_that_could_fit(spec, monkeypatch):
    monkeypatch.setattr(preflight, "_shape", lambda spec: SHAPES["llama-7b"])
    assert plan_of(spec).job.length == preflight.SHORTEST_TOKENS
    assert plan_of(replace(spec, cutoff_tokens=256)).job.length == 256
    assert plan_of(spec, tokens=300).job.length == 300
    assert plan_of(spec, micro=4).job.accumulation == 4


def test_the_planner_is_not_asked_about_what_it_does_not_know(tiny_spec):
    assert plan_of(tiny_spec(rank=1000, alpha=1.0)) is None  # attaching says which module it does not fit


def test_small_bases_are_not_planned(tiny_spec, monkeypatch):
    monkeypatch.setattr(preflight, "plan_of", None)
    check_memory(tiny_spec())
    check_memory(tiny_spec(base_model="mini-world"))


def test_a_run_is_refused_before_its_data_is_read(spec, monkeypatch, tmp_path):
    hub(monkeypatch, refusal("GatedRepoError"))
    monkeypatch.setattr(training, "load_examples", None)
    with pytest.raises(ValueError, match="is gated"):
        training.finetune(spec, tmp_path, progress=False)


def test_a_grid_is_refused_before_any_of_its_runs(spec, monkeypatch, tmp_path):
    hub(monkeypatch, refusal("GatedRepoError"))
    with pytest.raises(ValueError, match="is gated"):
        pipeline.preflight(tmp_path, [spec])


def test_a_grid_that_does_not_fit_is_refused_before_any_of_its_runs(tiny_profile, tmp_path):
    values = yaml.safe_load(tiny_profile.read_text())
    values |= {"base_model": "random:llama-13b", "tokenizer": "mini-world", "batch_size": 4096}
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(values | {"name": "large"}))
    specs = pipeline.grid(load_profile(tmp_path / "large.yaml"), [0], ["lora"])
    with pytest.raises(ValueError, match="random:llama-13b with LoRA.* needs .* GB"):
        pipeline.preflight(tmp_path, specs)


def test_the_shipped_profiles_fit_where_they_say(monkeypatch):
    """The planner's word for it: 16 GB for `small`, 40 GB for LLaMA-7B as mended and as in the paper."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, shape, gigabytes in (("small", "tinyllama-1.1b", 16), ("llama-7b", "llama-7b", 40)):
        monkeypatch.setattr(preflight, "_shape", lambda spec, shape=shape: SHAPES[shape])
        profile = load_profile(name)
        for task in profile.tasks:
            for method in profile.methods:
                assert plan_of(RunSpec.from_profile(profile, task, method), 512).fits[gigabytes]
    reported = load_profile("llama-7b-as-reported")
    fits = plan_of(RunSpec.from_profile(reported, "hellaswag", "dora")).fits
    assert not fits[40] and fits[80]
