"""Spectra: closed forms, the randomised against the exact, and a checkpoint streamed within one matrix's memory."""

import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from dora_lab.spectra import (
    difference_spectra,
    effective_rank,
    read_spectra,
    singular_values,
    spectrum_row,
    stable_rank,
    weight_files,
    write_spectra,
)


def orthogonal(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[
        0
    ]


@pytest.mark.parametrize(
    ("weight", "stable", "effective"),
    [
        (torch.eye(7), 7, 7),
        (orthogonal(24), 24, 24),
        (torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 8)), 1, 1),
        (torch.diag(torch.tensor([2.0, 1.0, 1.0])), 6 / 4, math.exp(0.5 * math.log(2) + 0.5 * math.log(4))),
        (torch.diag(torch.tensor([3.0, 3.0, 0.0])), 2, 2),
        (torch.zeros(4, 6), 0, 0),
    ],
    ids=["identity", "orthogonal", "rank one", "diagonal", "diagonal with a zero", "zeros"],
)
def test_ranks_of_matrices_that_are_known(weight, stable, effective):
    assert stable_rank(singular_values(weight)) == pytest.approx(stable, rel=1e-6)
    assert effective_rank(singular_values(weight)) == pytest.approx(effective, rel=1e-6)
    row = spectrum_row("one", weight)
    assert (row.stable_rank, row.effective_rank) == pytest.approx((stable, effective), rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (1, 5), (5, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_values_are_those_of_the_svd(shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(singular_values(weight), exact, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(singular_values(weight.T.contiguous()), exact, rtol=1e-7, atol=1e-7)


def test_ranks_do_not_depend_on_scale_or_rotation():
    weight = torch.randn(24, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    turned = 3.7 * orthogonal(24, 3) @ weight @ orthogonal(50, 4)
    assert stable_rank(singular_values(turned)) == pytest.approx(stable_rank(singular_values(weight)))
    assert effective_rank(singular_values(turned)) == pytest.approx(effective_rank(singular_values(weight)))


def test_the_randomised_values_are_the_first_of_the_exact_and_leave_the_random_state():
    falling = torch.diag(0.9 ** torch.arange(120, dtype=torch.float64))
    weight = orthogonal(120, 5) @ falling @ orthogonal(120, 6)
    before = torch.get_rng_state()
    first = singular_values(weight.float(), components=12)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first, singular_values(weight)[:12], rtol=1e-4, atol=0)
    assert torch.equal(first, singular_values(weight.float(), components=12))


@pytest.mark.parametrize(
    "weight",
    [torch.ones(3), torch.ones(2, 2, dtype=torch.int8), torch.zeros(0, 3), torch.tensor([[1.0, math.nan]])],
    ids=["vector", "integers", "empty", "not finite"],
)
def test_what_has_no_spectrum_is_refused(weight):
    with pytest.raises(ValueError, match="singular values"):
        singular_values(weight)


def test_differences_are_of_the_same_modules():
    one = {"a": torch.zeros(3, 3)}
    assert difference_spectra(one, {"a": 2 * torch.eye(3)})["a"].tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match=r"\['b'\] differ"):
        difference_spectra(one, one | {"b": torch.zeros(3, 3)})


# --- a checkpoint's files ---


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tiny_base):
    """(folder of a sharded checkpoint of 12 layers, the model)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoModelForCausalLM.from_pretrained(tiny_base).config
    config.num_hidden_layers = 12
    model = AutoModelForCausalLM.from_config(config)
    folder = tmp_path_factory.mktemp("sharded")
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder, model


def test_a_sharded_checkpoint_gives_the_models_own_spectra_layer_by_layer(sharded, tmp_path):
    folder, model = sharded
    said = []
    rows = write_spectra(folder, tmp_path / "out.csv", ["q_proj", "down_proj"], said.append)
    own = [(n, m.weight.detach()) for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))]
    assert [int(row.module.split(".")[2]) for row in rows] == sorted(2 * list(range(12))) and len(said) == 24
    assert {row.module: row for row in rows} == {name: spectrum_row(name, weight) for name, weight in own}
    assert read_spectra(tmp_path / "out.csv") == rows


def test_spectra_that_were_interrupted_go_on(sharded, tmp_path):
    folder, _ = sharded
    whole = write_spectra(folder, tmp_path / "out.csv", ["q_proj"], lambda _: None)
    lines = (tmp_path / "out.csv").read_text().splitlines(keepends=True)
    for left in ("".join(lines[:5]), "".join(lines[:5]) + lines[5][:-3], lines[0][:10]):  # the last row cut short
        (tmp_path / "out.csv").write_text(left)
        said = []
        assert write_spectra(folder, tmp_path / "out.csv", ["q_proj"], said.append) == whole
        assert len(said) == len(whole) - max(0, left.count("\n") - 1)
        assert "".join(lines) == (tmp_path / "out.csv").read_text()


def test_files_that_do_not_serve_are_named(sharded, tmp_path):
    folder, _ = sharded
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        weight_files(tmp_path / "nowhere", ["q_proj"])
    with pytest.raises(FileNotFoundError, match="lacks .safetensors files"):
        weight_files(tmp_path, ["q_proj"])
    with pytest.raises(ValueError, match="no weight of 'w_proj'"):
        weight_files(folder, ["q_proj", "w_proj"])
    (tmp_path / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read .*copy it anew"):
        weight_files(tmp_path, ["q_proj"])
    (tmp_path / "model.safetensors.index.json").write_text((folder / "model.safetensors.index.json").read_text())
    with pytest.raises(FileNotFoundError, match=r"lacks model-00001-of-.*copy them there"):
        weight_files(tmp_path, ["q_proj"])


def test_another_models_or_a_damaged_file_of_spectra_is_not_gone_on_with(sharded, tmp_path):
    folder, _ = sharded
    save_file({"other.q_proj.weight": torch.eye(4)}, tmp_path / "model.safetensors")
    write_spectra(tmp_path, tmp_path / "out.csv", ["q_proj"], lambda _: None)
    with pytest.raises(ValueError, match="out.csv has other.q_proj, which .* has not"):
        write_spectra(folder, tmp_path / "out.csv", ["q_proj"], lambda _: None)
    save_file({"other.q_proj.weight": torch.diag(torch.tensor([2.0, 1, 1, 1]))}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="out.csv is of another checkpoint than"):  # of the same names
        write_spectra(tmp_path, tmp_path / "out.csv", ["q_proj"], lambda _: None)
    (tmp_path / "out.csv").write_text("module,stable_rank\nother.q_proj,much\n")
    with pytest.raises(ValueError, match="out.csv is no file of spectra, or damaged"):
        read_spectra(tmp_path / "out.csv")


PEAK = """
import re, sys
from pathlib import Path
import torch
from dora_lab.spectra import singular_values, write_spectra

def peak():  # of this program alone: getrusage's would begin with that of the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

singular_values(torch.randn(64, 64))  # what the libraries take for themselves
before = peak()
write_spectra(Path(sys.argv[1]), Path(sys.argv[1]) / "out.csv", ["up_proj"], lambda _: None)
print(peak() - before)
"""
only_linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")


def peak_growth_bytes(folder) -> int:
    done = subprocess.run([sys.executable, "-c", PEAK, folder], capture_output=True, text=True, check=True)
    return int(done.stdout)


@only_linux
def test_one_matrix_at_a_time_is_in_memory(tmp_path):
    one = torch.randn(2048, 512)  # 4 MiB
    for shard in range(4):
        weights = {f"layers.{8 * shard + i}.up_proj.weight": one + i for i in range(8)}
        save_file(weights, tmp_path / f"model-{shard}.safetensors")
    growth = peak_growth_bytes(tmp_path)
    print(f"{growth / 2**20:.0f} MiB")
    assert growth < 12 * one.nbytes, f"{growth / 2**20:.0f} MiB for {32 * one.nbytes / 2**20:.0f} MiB of weights"


@pytest.mark.slow
@only_linux
def test_the_largest_matrix_of_llama_7b_takes_less_than_four_gigabytes(tmp_path):
    shape = (11008, 4096)
    weights = {f"layers.{i}.up_proj.weight": torch.randn(shape, dtype=torch.bfloat16) for i in range(2)}
    save_file(weights, tmp_path / "model.safetensors")
    growth = peak_growth_bytes(tmp_path)
    print(f"{growth / 1e9:.2f} GB")
    assert growth < 3e9  # Python and PyTorch themselves take less than 1 GB
