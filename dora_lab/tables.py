"""The report's Figure 2: published accuracies and those of run records in one table, each with what it rests on.

Accuracies are fractions in the records, percent in what is shown.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from dora_lab.comparisons import corrected_wording, difference_p_value, holm
from dora_lab.statistics import Interval, paired_draws, seed_interval, wording

METHOD_NAMES = {"lora": "LoRA", "dora": "DoRA", "full": "full fine-tuning", "dora-magnitude": "DoRA (m only)"}
TASK_NAMES = {
    "boolq": "BoolQ",
    "piqa": "PIQA",
    "social_i_qa": "SIQA",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}
REPORT_TASKS = ("boolq", "hellaswag", "winogrande")
PUBLISHED_MODEL, PUBLISHED_RANK = "LLaMA-7B", 32
PAPER, REPORT = "Liu et al. 2024", "rolanrod/cs-4782-final-project"


def read_published(path: str | Path | None = None) -> dict:
    """The published accuracies that ship as `data/published.json`."""
    path = Path(__file__).resolve().parents[1] / "data" / "published.json" if path is None else Path(path)
    return json.loads(path.read_text(encoding="utf-8"))


def published_accuracy(published: Mapping, source: str, where: str, method: str) -> tuple[dict[str, float], str]:
    """({task: percent}, the row's own note) of one LLaMA-7B row of rank 32.

    `source` is the beginning of the row's source, `where` its place in there.
    Raises LookupError unless exactly one row fits.
    """
    rows = [
        row
        for row in published["rows"]
        if row["source"].startswith(source)
        and (row["where"], row["model"], row["method"], row["rank"]) == (where, PUBLISHED_MODEL, method, PUBLISHED_RANK)
    ]
    if len(rows) != 1:
        raise LookupError(f"{len(rows)} published rows for {source!r}, {where!r}, {method!r}: expected one")
    return rows[0]["accuracy_pct"], rows[0].get("note", "")


def _in_report(whose: str, method: str) -> str:
    return f"Figure 2, row '{whose} {METHOD_NAMES[method]}'"


def quoted_rows(published: Mapping) -> list[dict]:
    """The paper's and the report's own rows for LoRA and DoRA: `row` (its name), `method`, `source`, `accuracy`."""
    rows = []
    for method in ("lora", "dora"):
        for who, source, where in (("paper", PAPER, "Table 1"), ("report", REPORT, _in_report("Our", method))):
            accuracy, _ = published_accuracy(published, source, where, method)
            name, source = f"{who} {METHOD_NAMES[method]}", f"{source}, {where.split(',')[0]}"
            rows.append({"row": name, "method": method, "source": source, "accuracy": accuracy})
    return rows


def results_table(
    records: Sequence, failures: Sequence[Mapping], published: Mapping, profile_name: str
) -> pd.DataFrame:
    """The report's Figure 2: rows paper, report, this run for LoRA, the same for DoRA, then this run's other methods.

    Columns `row`, `source`, `model`, `method`, `rank`; for every task `<task>` (percent), and for own rows
    `<task>_half_width_pp` (95 %, Student's t over seeds), `<task>_seeds`, `<task>_n` (answers in all),
    `<task>_unparsed_pct`, `<task>_chance_pct`, `<task>_failed` (seeds that failed). What was not run or not published
    stays empty. Only runs scored on the test split count.

    A variant of the profile has a row of its own, named in `row`.
    Raises ValueError if two records have the same task, method, rank, variant and seed: they are different experiments.
    """
    cells = cells_of(records, failures)
    tasks = tasks_of(cells)
    model = model_of(records, profile_name)
    rows = []
    for method in ("lora", "dora", "full", "dora-magnitude"):
        for quoted in quoted_rows(published):
            if quoted["method"] == method:
                accuracy = quoted.pop("accuracy")
                rows.append(
                    quoted | {"model": PUBLISHED_MODEL, "rank": PUBLISHED_RANK} | {t: accuracy.get(t) for t in tasks}
                )
        for kind in kinds_of(cells, method):
            name = "this run " + METHOD_NAMES[method] + ("" if kind[2] is None else f", {kind[2]}")
            row = {"row": name, "source": f"profile {profile_name}", "model": model}
            row |= {"method": method, "rank": kind[1]}
            for task in tasks:
                cell = cells.get((task, *kind))
                row |= {} if cell is None else {f"{task}{key}": value for key, value in _summary(cell).items()}
            rows.append(row)
    kinds = ("", "_half_width_pp", "_seeds", "_n", "_unparsed_pct", "_chance_pct", "_failed")
    columns = ["row", "source", "model", "method", "rank", *tasks]
    columns += [f"{task}{kind}" for task in tasks for kind in kinds[1:]]
    table = pd.DataFrame(rows).reindex(columns=columns)
    whole = ["rank", *[f"{task}{kind}" for task in tasks for kind in ("_seeds", "_n")]]
    return table.astype(dict.fromkeys(whole, "Int64")).astype({f"{t}_failed": "object" for t in tasks})


def shown_table(table: pd.DataFrame, brief: bool = False) -> pd.DataFrame:
    """The table as it is read: `accuracy ± half width (seeds × questions, unparsed answers)` in percent.

    `brief` leaves out the parenthesis.
    """
    tasks = _table_tasks(table)
    shown = table[["row", "model"]].copy()
    shown["rank"] = ["" if pd.isna(rank) else str(rank) for rank in table["rank"]]
    for task in tasks:
        shown[TASK_NAMES.get(task, task)] = [_cell_text(row, task, brief) for _, row in table.iterrows()]
    return shown


def results_notes(table: pd.DataFrame, published: Mapping | None = None) -> list[str]:
    """What has to be said beside the table: whose numbers these are, chance, intervals, failures, misquotations."""
    own = table[table["source"].str.startswith("profile ")]
    tasks, notes = _table_tasks(table), []
    if own.empty:
        notes.append("No run of this profile is finished or failed: the rows below are published ones only.")
    elif not _is_llama_7b(model := own["model"].iloc[0]):
        notes.append(
            f"Rows named 'this run' are {_owner(model)} small model on its own questions; paper and report rows are "
            f"{PUBLISHED_MODEL} on the real tasks. The two are not comparable: compare LoRA with DoRA within a model, "
            "never a number across models."
        )
    chance = {task: own[f"{task}_chance_pct"].dropna() for task in tasks}
    known = [f"{TASK_NAMES.get(task, task)} {values.iloc[0]:.1f}" for task, values in chance.items() if len(values)]
    if known:
        notes.append(
            "Own cells: mean accuracy in percent ± half the 95 % interval over seeds (Student's t; none for a single "
            "seed), seeds × questions, answers that could not be read. Guessing scores " + ", ".join(known) + "."
        )
    for _, row in own.iterrows():
        for task in tasks:
            if isinstance(row[f"{task}_failed"], str):
                rank = "" if pd.isna(row["rank"]) else f", rank {row['rank']}"
                what = f"{row['row']} on {TASK_NAMES.get(task, task)}{rank}"
                notes.append(
                    f"Failed: {what}, seeds {row[f'{task}_failed']}; a failed run is in no mean. "
                    "The reason is in `failure.json` of its folder."
                )
    for method in ("lora", "dora") if published else ():
        paper, _ = published_accuracy(published, PAPER, "Table 1", method)
        quoted, remark = published_accuracy(published, REPORT, _in_report("Paper's", method), method)
        other = [f"{TASK_NAMES[task]} {value}" for task, value in quoted.items() if paper[task] != value]
        if other:
            source = remark or "the values of the authors' README, which differ from the paper's Table 1 (version 6)"
            notes.append(f"The report quotes the paper's {METHOD_NAMES[method]} as {', '.join(other)}: {source}.")
    return notes


def difference_notes(answers: Mapping[tuple[str, str], Mapping[int, Mapping[str, bool]]]) -> list[str]:
    """What DoRA minus LoRA comes to on each task, paired by seed and question, in percentage points.

    A task is called ahead or behind only if it is with all tasks counted in, by Holm's correction.
    `answers`: (task, method) -> seed -> {example id: answered right}. Tasks that lack one of the two are passed over.
    """
    notes, draws = [], {}
    for task, name in TASK_NAMES.items():
        dora, lora = answers.get((task, "dora"), {}), answers.get((task, "lora"), {})
        if set(dora) & set(lora):
            draws[name] = paired_draws(dora, lora)
    intervals = {name: one.interval() for name, one in draws.items()}
    corrected = corrected_wording(intervals, holm({name: difference_p_value(one) for name, one in draws.items()}))
    for name, found in intervals.items():
        said = corrected[name] if corrected[name] == wording(found) else f"{corrected[name]}, all tasks counted in"
        runs = f"{found.seeds} seeds" if found.seeds > 1 else "1 seed: it speaks of two runs, not of two methods"
        notes.append(
            f"DoRA minus LoRA on {name}: {100 * found.estimate:+.1f} points, 95 % interval "
            f"{100 * found.low:+.1f} to {100 * found.high:+.1f} ({runs}, {found.items} questions): "
            f"{said if said.startswith('no') else f'DoRA is {said}'}."
        )
    return notes


def compared_with_recorded(live: Sequence, recorded: Sequence) -> list[str]:
    """How live runs stand to recorded ones of the same settings: a line for each task and kind of run that both have.

    Runs of the same seed repeat to the last answer on the same machine with the same versions; elsewhere rounding
    differs, and only the spread over seeds says whether the two agree.
    """
    ours, theirs = cells_of(live, ()), cells_of(recorded, ())
    lines = []
    for key in sorted(set(ours) & set(theirs), key=str):
        task, *kind = key
        now, then = ours[key]["accuracy"], theirs[key]["accuracy"]
        low, high = 100 * min(then.values()), 100 * max(then.values())
        mean, recorded_mean = (100 * sum(accuracy.values()) / len(accuracy) for accuracy in (now, then))
        common = sorted(set(now) & set(then))
        equal = sum(now[seed] == then[seed] for seed in common)
        where = "inside" if low <= mean <= high else "outside"
        lines.append(
            f"{kind_name(*kind)} on {TASK_NAMES[task]}: live {mean:.1f} "
            f"({len(now)} seeds), recorded {recorded_mean:.1f} ({len(then)} seeds from {low:.1f} to "
            f"{high:.1f}): {where} the recorded range; {equal} of {len(common)} common seeds equal"
        )
    return lines


def write_results(
    table: pd.DataFrame,
    folder: str | Path,
    published: Mapping | None = None,
    notes: Iterable[str] = (),
    sections: Mapping[str, tuple[str, pd.DataFrame]] | None = None,
) -> list[Path]:
    """Write `results.md` (to be read) and `results.csv` (all columns) and return their paths.

    `notes` are further sentences, set below the table. Published rows, if given, let the page name the misquotations.
    sections: heading -> (what has to be said, a further table), for the end of the page.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = [*results_notes(table, published), *notes] or [""]
    grid = markdown_table(shown_table(table), words=3)
    page = f"# Accuracy, percent\n\n{first}\n\n{grid}\n\n" + "".join(f"- {note}\n" for note in others)
    for heading, (said, rows) in (sections or {}).items():
        page += f"\n## {heading}\n\n{said}\n\n{markdown_table(rows, words=2)}\n"
    (folder / "results.md").write_text(page, encoding="utf-8")
    table.to_csv(folder / "results.csv", index=False, float_format="%.4g", lineterminator="\n")
    return [folder / "results.md", folder / "results.csv"]


def markdown_table(shown: pd.DataFrame, words: int | None = None) -> str:
    """The frame in Markdown; the first `words` columns, or all, are set to the left, the others to the right."""
    words = shown.shape[1] if words is None else words
    lines = [shown.columns, ["---"] * words + ["---:"] * (shown.shape[1] - words), *shown.to_numpy()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def cells_of(records: Sequence, failures: Sequence[Mapping]) -> dict[tuple, dict]:
    """{(task, method, rank, variant): accuracy by seed, and what else a cell shows}, of test runs and failures."""
    cells, seen = {}, {}

    def cell(*key):
        empty = {"accuracy": {}, "n": {}, "unparsed": {}, "chance": math.nan, "failed": {}}
        return cells.setdefault(key, empty)

    for record in sorted(records, key=lambda record: (record.spec.seed, record.spec.run_id)):
        spec, result = record.spec, record.result
        if getattr(spec, "split", "test") != "test":
            continue
        variant = getattr(spec, "variant", None)
        key = (spec.task, spec.method, spec.rank, variant, spec.seed)
        if key in seen:
            raise ValueError(
                f"two records of {kind_name(*key[1:4])} on {spec.task}, seed {spec.seed}: {seen[key]} and "
                f"{spec.run_id}. They differ in another parameter: give the records of one experiment, or move one away"
            )
        seen[key], own = spec.run_id, cell(*key[:4])
        own["accuracy"][spec.seed], own["n"][spec.seed] = result.accuracy, result.n
        own["unparsed"][spec.seed], own["chance"] = result.unparsed_rate, result.chance
    for failure in failures:
        own = cell(failure["task"], failure["method"], failure["rank"], failure.get("variant"))
        if failure["seed"] not in own["accuracy"]:
            own["failed"][failure["seed"]] = failure.get("error", "")
    return cells


def kinds_of(cells: Iterable[tuple], method: str | None = None) -> list[tuple]:
    """The kinds among keys (task, method, rank, variant), of one method or of all; plain runs before variants."""
    kinds = {key[1:] for key in cells if method in (None, key[1])}
    return sorted(kinds, key=lambda kind: (list(METHOD_NAMES).index(kind[0]), kind[2] or "", kind[1] or 0))


def kind_name(method: str, rank: int | None = None, variant: str | None = None) -> str:
    """How a kind of run is called in figures, for instance `DoRA, rank 2, truncated`."""
    parts = [METHOD_NAMES[method]] + ([] if rank is None else [f"rank {rank}"]) + ([] if variant is None else [variant])
    return ", ".join(parts)


def _summary(cell: Mapping) -> dict[str, float | int | str | None]:
    failed = ", ".join(str(seed) for seed in sorted(cell["failed"])) or None
    if not cell["accuracy"]:
        return {"_failed": failed, "_seeds": 0, "_n": 0}
    interval, n = percent_interval(cell), sum(cell["n"].values())
    unparsed = sum(cell["unparsed"][seed] * cell["n"][seed] for seed in cell["n"]) / n
    summary = {"": interval.estimate, "_half_width_pp": interval.half_width, "_seeds": len(cell["accuracy"]), "_n": n}
    return summary | {"_unparsed_pct": 100 * unparsed, "_chance_pct": 100 * cell["chance"], "_failed": failed}


def percent_interval(cell: Mapping) -> Interval:
    return seed_interval([100 * value for value in cell["accuracy"].values()])


def _cell_text(row: pd.Series, task: str, brief: bool) -> str:
    own, failed = row["source"].startswith("profile "), row[f"{task}_failed"]
    failed = failed if isinstance(failed, str) else ""
    if pd.isna(row[task]):
        return f"failed (seeds {failed})" if failed else "not run" if own else "not published"
    if not own:
        return f"{row[task]:.1f}"
    half = row[f"{task}_half_width_pp"]
    text = f"{row[task]:.1f}" + ("" if pd.isna(half) else f" ± {half:.1f}")
    if not brief:
        seeds, n = row[f"{task}_seeds"], row[f"{task}_n"]
        count = f"{seeds} × {n // seeds}" if n % seeds == 0 else f"{n} answers in {seeds} seeds"
        text += f" ({count}, {row[f'{task}_unparsed_pct']:.1f} % unparsed)"
    return text + (f"; failed: seeds {failed}" if failed else "")


def tasks_of(cells: Mapping[tuple, dict]) -> list[str]:
    found = {key[0] for key in cells} or set(REPORT_TASKS)
    return [task for task in TASK_NAMES if task in found] + sorted(found - set(TASK_NAMES))


def _table_tasks(table: pd.DataFrame) -> list[str]:
    return [name.removesuffix("_half_width_pp") for name in table if name.endswith("_half_width_pp")]


def model_of(records: Sequence, otherwise: str) -> str:
    return getattr(records[0].spec, "base_model", otherwise) if records else otherwise


def _owner(model: str) -> str:
    return "the mini-world's" if model == "mini-world" else f"those of {model}, a"


def _is_llama_7b(model: str) -> bool:
    return model.replace("_", "-").lower().rpartition("/")[2].startswith("llama-7b")
