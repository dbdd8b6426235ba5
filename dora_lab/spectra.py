"""Spectra of weights: singular values and two ranks made of them; of a matrix, or streamed from a checkpoint's files.

    stable rank     ‖W‖_F² / σ1²                                  how many directions as strong as the first
    effective rank  exp(-Σ p_i·log p_i), p_i = σ_i / Σ σ           exponential of the spectral entropy

The second is Roy and Vetterli's ("The effective rank", EUSIPCO 2007). For k equal singular values both are k.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22  # of a weight widened to float64 at a time
OVERSAMPLING, POWER_ITERATIONS = 20, 8  # of the randomised SVD (Halko et al., 2011), for spectra that hardly fall


def singular_values(weight: Tensor, components: int | None = None, seed: int = 0) -> Tensor:
    """Singular values of a matrix (out, in), largest first, float64: all min(out, in) of them, or the first few.

    All: from the eigenvalues of the smaller Gram matrix, summed in float64 a piece of the weight at a time, so that
    beside the weight only (min, min) numbers are held; what is below 1e-7 of the first is zero. `components`: the first
    so many by randomised SVD, of `seed` alone. Raises ValueError for what is no finite matrix of floating point.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} and type {weight.dtype} has no singular values here: "
            "give a matrix (out, in) of floating-point numbers, a quantised layer dequantised"
        )
    if not weight.isfinite().all():
        raise ValueError("the weight has entries that are not finite: it has no singular values")
    smaller = min(weight.shape)
    if components is not None and components + OVERSAMPLING < smaller:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            _, found, _ = torch.svd_lowrank(wide, components + OVERSAMPLING, POWER_ITERATIONS)
        return found[:components].double()  # (components,)
    wide = weight if weight.shape[0] >= weight.shape[1] else weight.T  # (larger, smaller)
    gram = torch.zeros(smaller, smaller, dtype=torch.float64, device=weight.device)
    for rows in wide.split(max(1, CHUNK_ELEMENTS // smaller)):
        rows = rows.double()  # (some, smaller)
        gram.addmm_(rows.T, rows)
    squares = torch.linalg.eigvalsh(gram).flip(0)  # (smaller,), largest first
    squares = torch.where(squares < squares[0] * 1e-14, 0.0, squares)
    return squares.sqrt()[:components]


def stable_rank(values: Tensor) -> float:
    """‖W‖_F² / σ1² from the singular values (n,): between 1 and the rank; 0 if all are zero."""
    squares = values.double().square()
    return (squares.sum() / squares.max()).item() if squares.any() else 0.0


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values (n,) as shares of their sum: between 1 and n; 0 if all are zero."""
    values = values.double()
    if values.sum() == 0:
        return 0.0
    shares = values / values.sum()  # (n,)
    return torch.special.entr(shares).sum().exp().item()


@dataclass(frozen=True)
class Row:
    """What is kept of one weight's spectrum; norms in the weight's own units."""

    module: str
    out_features: int
    in_features: int
    frobenius_norm: float
    spectral_norm: float
    stable_rank: float
    effective_rank: float


def spectrum_row(module: str, weight: Tensor) -> Row:
    """The row of a weight (out, in), from its whole spectrum."""
    values = singular_values(weight)
    norm = values.square().sum().sqrt().item()
    return Row(module, *weight.shape, norm, values[0].item(), stable_rank(values), effective_rank(values))


def weight_files(folder: Path, target_modules: Iterable[str]) -> dict[str, Path]:
    """{name of a linear layer: safetensors file that holds its weight} of a checkpoint's target modules, in order.

    Reads the files' headers alone. Raises FileNotFoundError for a folder or shard that is missing, ValueError for a
    target that the checkpoint has not, or files that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    folder, index = Path(folder), Path(folder) / "model.safetensors.index.json"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give one with a model's .safetensors files")
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing) or '.safetensors files'}: copy them there")
    found: dict[str, Path] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                found |= {name.removesuffix(".weight"): path for name in file.keys() if name.endswith(".weight")}
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}): copy it anew") from error
    targets = tuple(target_modules)
    for target in targets:
        if not any(name.rpartition(".")[2] == target for name in found):
            raise ValueError(f"{folder} has no weight of {target!r}: give target modules that the model has")
    kept = (name for name in found if name.rpartition(".")[2] in targets)
    return {name: found[name] for name in sorted(kept, key=_natural)}


def load_weight(path: Path, name: str) -> Tensor:
    """The weight (out, in) of one module. The file is closed behind it: what is mapped counts as memory."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(f"{name}.weight").clone()


def write_spectra(
    folder: Path, out: Path, target_modules: Iterable[str], report: Callable[[str], None] = print
) -> list[Row]:
    """The row of every target module of a checkpoint, written to the CSV file `out` as it comes. Resumes from `out`.

    What is there already is compared with the checkpoint by its first row, computed again. Raises what `weight_files`
    raises, and ValueError where `out` is of another checkpoint or no such file.
    """
    out, files = Path(out), weight_files(folder, target_modules)
    _drop_unfinished_line(out)
    rows = read_spectra(out) if out.exists() else []
    strange = [row.module for row in rows if row.module not in files]
    if strange:
        raise ValueError(f"{out} has {strange[0]}, which {folder} has not: delete it, or write to another file")
    if rows:
        again = spectrum_row(rows[0].module, load_weight(files[rows[0].module], rows[0].module))
        if not all(
            math.isclose(a, b, rel_tol=1e-6) for a, b in zip(astuple(again)[1:], astuple(rows[0])[1:], strict=True)
        ):
            raise ValueError(f"{out} is of another checkpoint than {folder}: delete it, or write to another file")
    done = {row.module for row in rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not rows:
            file.truncate(0)
            writer.writerow(field.name for field in fields(Row))
        for name, path in files.items():
            if name in done:
                continue
            row = spectrum_row(name, load_weight(path, name))
            rows.append(row)
            writer.writerow(astuple(row))
            file.flush()
            report(
                f"[{len(rows)}/{len(files)}] {name}: stable rank {row.stable_rank:.1f}, effective rank "
                f"{row.effective_rank:.1f} of {min(row.out_features, row.in_features)}"
            )
    return rows


def _drop_unfinished_line(path: Path) -> None:
    """What an interruption left of a row goes: it would be read as a whole one."""
    if path.is_file() and not (text := path.read_bytes()).endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def read_spectra(path: Path) -> list[Row]:
    """Rows of a file that `write_spectra` wrote. Raises ValueError for another or a damaged file."""
    kinds = {field.name: field.type for field in fields(Row)}
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            return [Row(**{name: kind(row[name]) for name, kind in kinds.items()}) for row in reader]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file of spectra, or damaged ({error}): delete it and run again") from error


def difference_spectra(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], components: int | None = None
) -> dict[str, Tensor]:
    """Singular values, or the first few, of after - before, module by module. Raises ValueError if modules differ."""
    if before.keys() != after.keys():
        raise ValueError(f"the two do not have the same modules: {sorted(before.keys() ^ after.keys())[:3]} differ")
    return {name: singular_values(after[name] - before[name], components) for name in before}


def _natural(name: str) -> list:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
