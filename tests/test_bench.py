"""The benchmark: what it counts, on a Llama of one small layer. Times are not looked at."""

import pytest

from dora_lab.bench import VARIANTS, Setting, build, run


def test_every_variant_is_measured_and_the_norm_is_taken_once_a_step():
    found = run((Setting(2, 16, accumulation=2, hidden=64, layers=1, rank=4),), turns=2, report=lambda line: None)
    rows = {row["variant"]: row for row in found["rows"]}
    assert tuple(rows) == VARIANTS
    assert rows["dora"]["norms_per_step"] == 1 and rows["lora"]["norms_per_step"] is None
    assert rows["base"]["saved_bytes"] < rows["lora"]["saved_bytes"] < rows["dora"]["saved_bytes"]
    assert rows["dora"]["saved_bytes"] < rows["dora-peft"]["saved_bytes"]
    assert all(row["peak_bytes"] >= row["saved_bytes"] for row in rows.values())


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="unknown variant 'qdora'"):
        build("qdora", Setting(1, 4))
