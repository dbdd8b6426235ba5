"""The README's numbers are those of the recorded figures."""

import json

import pandas as pd

from dora_lab.bench import Setting
from dora_lab.profiles import PROJECT
from dora_lab.scaling import on_paper, table

README = (PROJECT / "README.md").read_text()


def table_under(heading: str) -> list[list[str]]:
    """Cells of the first table below a heading, header and rule left out."""
    lines = README.split(heading, 1)[1].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_results_are_those_of_the_results_table():
    recorded = (PROJECT / "figures" / "results.md").read_text()
    own = [line for line in recorded.splitlines() if line.startswith("| this run")]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in own] == table_under("## What came out")
    for line in recorded.splitlines():
        if line.startswith("- DoRA minus LoRA"):
            assert line in README


def test_what_the_report_only_names_is_on_its_pages():
    pages = " ".join((PROJECT / "figures" / f"{name}.md").read_text() for name in ("ranks", "hybrids", "faults"))
    section = README.split("### What the report only names")[1].split("###")[0]
    said = [" ".join(item.split()) for item in section.split("\n- ")[1:]]
    assert len(said) >= 6 and all(f"- {one}\n" in pages for one in said)


def test_costs_are_those_of_the_recorded_benchmark():
    costs = pd.read_csv(PROJECT / "figures" / "costs.csv").set_index(["setting", "variant"])
    plain, dropout = Setting(8, 128).name, Setting(8, 128, dropout=0.05).name
    of = {
        "DoRA": (plain, "dora"),
        "DoRA, dropout 0.05": (dropout, "dora"),
        "DoRA, four micro-batches a step": (Setting(8, 128, accumulation=4).name, "dora"),
        "DoRA, PEFT": (plain, "dora-peft"),
        "DoRA, PEFT, dropout 0.05": (dropout, "dora-peft"),
        "DoRA, PEFT sped up by `dora_lab.speed_up`": (plain, "dora-peft-sped-up"),
        "DoRA, PEFT sped up, dropout 0.05": (dropout, "dora-peft-sped-up"),
    }
    rows = {name: numbers for name, *numbers in table_under("### What DoRA costs")}
    assert set(rows) == set(of)
    for name, numbers in rows.items():
        own = costs.loc[of[name]]
        step = f"{own['step']:.2f} ({own['step_low']:.2f} to {own['step_high']:.2f})"
        assert numbers == [step, f"{own['evaluation']:.2f}", f"{own['saved']:.2f}"], name
    assert f"{costs.loc[(Setting(4, 64).name, 'dora'), 'step']:.2f} of LoRA's step" in README


def test_scaling_is_that_of_the_recorded_grid_and_of_the_planner():
    measured = json.loads((PROJECT / "data" / "results" / "scaling.json").read_text())
    assert table_under("### How a grid grows with its workers") == table(measured)
    for line in on_paper():
        assert line in " ".join(README.split())
