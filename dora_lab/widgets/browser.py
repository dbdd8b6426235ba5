"""The results browser: pick a task, methods and seeds → their accuracies, and the questions on which they differ."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import ipywidgets
from matplotlib.figure import Figure

from dora_lab.data import data_sha256, load_examples
from dora_lab.figures import METHOD_COLOURS
from dora_lab.profiles import PROJECT
from dora_lab.records import RunRecord, read_predictions, read_records
from dora_lab.specs import RunSpec
from dora_lab.tables import TASK_NAMES, kind_name, kinds_of
from dora_lab.widgets.panel import LABEL_WIDTH, WIDE, Drawing, Panel, canvas, slider, table_html

Kind = tuple[str, int | None, str | None]  # method, rank, variant
MARKERS = {"lora": "o", "dora": "s", "full": "^", "dora-magnitude": "D"}


def latest_records(records: Sequence[RunRecord]) -> dict[tuple[str, Kind, int], RunRecord]:
    """{(task, kind, seed): record} of the test split; of several the one that was made last."""
    tested = [record for record in records if record.spec.split == "test"]
    tested.sort(key=lambda record: record.environment.get("date", ""))
    return {(r.spec.task, r.spec.kind, r.spec.seed): r for r in tested}


def seed_accuracies(records: Sequence[RunRecord]) -> dict[str, dict[int, float]]:
    """{name of method, rank and variant: {seed: accuracy in percent}}."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        of_kind = found.setdefault(kind_name(*record.spec.kind), {})
        of_kind[record.spec.seed] = 100 * record.result.accuracy
    return found


def accuracy_figure(records: Sequence[RunRecord]) -> Figure:
    """A row for each method, rank and variant: a mark for every seed, a stroke at the mean, chance dotted."""
    found = seed_accuracies(records)
    methods = {kind_name(*r.spec.kind): r.spec.method for r in records}
    figure, (axes,) = canvas(7.2, 1.0 + 0.36 * max(2, len(found)))
    for place, (name, accuracies) in enumerate(found.items()):
        values, method = list(accuracies.values()), methods[name]
        axes.plot(values, [place] * len(values), MARKERS[method], mec=METHOD_COLOURS[method], mfc="none", ms=7, mew=1.5)
        axes.plot([sum(values) / len(values)] * 2, [place - 0.3, place + 0.3], color="black", lw=1.5)
    for record in records[:1]:
        axes.axvline(100 * record.result.chance, color="black", ls=":", lw=1)
    axes.set(yticks=range(len(found)), yticklabels=list(found), ylim=(max(2, len(found)) - 0.5, -0.5), xlim=(0, 102))
    axes.set_xlabel("accuracy (%): marks are seeds, strokes their mean, dotted is chance")
    if not found:
        axes.text(50, 0.5, "no record of this choice", ha="center")
    height = figure.get_figheight()
    figure.subplots_adjust(left=0.24, right=0.98, top=1 - 0.08 / height, bottom=0.5 / height)
    return figure


def accuracy_alt(records: Sequence[RunRecord], differing: int) -> str:
    """Alt text of `accuracy_figure`: every seed's accuracy, and the number of questions the runs differ on."""
    parts = [
        f"{name}: mean {sum(values.values()) / len(values):.1f} ("
        + ", ".join(f"seed {seed} {value:.1f}" for seed, value in values.items())
        + ")"
        for name, values in seed_accuracies(records).items()
    ]
    if not parts:
        return "Accuracy by method: no record of this choice."
    task = TASK_NAMES[records[0].spec.task]
    return f"Accuracy on {task} in percent. {'; '.join(parts)}. The runs differ on {differing} questions."


def differing_questions(records: Sequence[RunRecord], answers: Mapping[str, Mapping[str, dict]]) -> list[str]:
    """Ids that some of the runs answer right and others wrong; those on which they are most divided first.

    `answers`: run id → example id → row of `predictions.jsonl`.
    """
    if len(records) < 2:
        return []
    runs = [answers[record.spec.run_id] for record in records]
    shared = set.intersection(*(set(run) for run in runs))
    right = {id: sum(run[id]["prediction"] == run[id]["gold"] for run in runs) for id in shared}
    divided = [id for id, count in right.items() if 0 < count < len(runs)]
    return sorted(divided, key=lambda id: (abs(right[id] - len(runs) / 2), int(id.rpartition("-")[2])))


def results_browser(records_dir: str | Path = PROJECT / "data" / "results" / "mini", questions: int = 5) -> Panel:
    """Panel over the records in one folder, live (`runs/mini`) or recorded (`data/results/mini`, the default).

    At most `questions` of the questions on which the chosen runs differ are shown with every run's answer. Where the
    task's files are not the ones that were answered, questions are named by their ids alone. Raises ValueError if the
    folder has no finished run.
    """
    records_dir = Path(records_dir)
    latest = latest_records(read_records(records_dir)[0])
    records = list(latest.values())
    if not records:
        raise ValueError(f"{records_dir} has no finished run: give a folder of records, for instance runs/mini")

    @functools.cache
    def answers(run_id: str) -> dict[str, dict]:
        return {row["id"]: row for row in read_predictions(records_dir / run_id)}

    @functools.cache
    def texts(task: str) -> dict[str, str]:
        return _question_texts(next(r.spec for r in records if r.spec.task == task))

    tasks = [task for task in TASK_NAMES if any(r.spec.task == task for r in records)]
    kinds = kinds_of((task, *kind) for task, kind, _ in latest)
    seeds = sorted({r.spec.seed for r in records})
    several = "; hold Ctrl or Shift with the arrow keys to choose several"
    controls = {
        "task": slider(
            ipywidgets.Dropdown,
            "task",
            "The task whose runs are compared",
            options=[(TASK_NAMES[task], task) for task in tasks],
        ),
        "kinds": ipywidgets.SelectMultiple(
            description="methods",
            tooltip="Methods, ranks and variants to compare" + several,
            options=[(kind_name(*kind), kind) for kind in kinds],
            value=_first_choice(kinds),
            rows=min(5, len(kinds)),
            style=LABEL_WIDTH,
            layout=WIDE,
        ),
        "seeds": ipywidgets.SelectMultiple(
            description="seeds",
            tooltip="Seeds to compare" + several,
            options=seeds,
            value=tuple(seeds[:1]),
            rows=min(5, max(1, len(seeds))),
            style=LABEL_WIDTH,
            layout=WIDE,
        ),
    }

    def draw(task: str, kinds: tuple[Kind, ...], seeds: tuple[int, ...]) -> Drawing:
        chosen = [latest[key] for kind in kinds for seed in seeds if (key := (task, kind, seed)) in latest]
        found = {record.spec.run_id: answers(record.spec.run_id) for record in chosen}
        differing = differing_questions(chosen, found)
        below = _runs_table(chosen) + _questions_table(chosen, found, differing, texts(task), questions)
        return Drawing(accuracy_figure(chosen), accuracy_alt(chosen, len(differing)), below)

    return Panel(controls, draw)


def _first_choice(kinds: Sequence[Kind]) -> tuple[Kind, ...]:
    """LoRA and DoRA at the largest rank that both have, else the first two there are."""
    shared = [kind[1] for kind in kinds if kind[0] == "lora" and kind[2] is None and ("dora", *kind[1:]) in kinds]
    return (("lora", max(shared), None), ("dora", max(shared), None)) if shared else tuple(kinds[:2])


def _question_texts(spec: RunSpec) -> dict[str, str]:
    try:
        if data_sha256(spec.data, spec.task) != spec.data_sha256:
            return {}
        return {example.id: example.instruction for example in load_examples(spec.data, spec.task, "test")}
    except (OSError, ValueError):
        return {}


def _run_name(spec: RunSpec) -> str:
    return f"{kind_name(*spec.kind)}, seed {spec.seed}"


def _runs_table(records: Sequence[RunRecord]) -> str:
    rows = [
        [_run_name(r.spec), f"{100 * r.result.accuracy:.1f} %", f"{r.result.correct} of {r.result.n}"] for r in records
    ]
    return table_html(["run", "accuracy", "right"], rows)


def _questions_table(
    records: Sequence[RunRecord], answers: Mapping, differing: list[str], texts: Mapping[str, str], limit: int
) -> str:
    if len(records) < 2:
        return "<p>Choose two runs or more to see the questions on which they differ.</p>"
    rows = []
    for id in differing[:limit]:
        row = answers[records[0].spec.run_id][id]
        said = [answers[record.spec.run_id][id]["prediction"] for record in records]
        rows.append([" ".join(texts.get(id, id).split()), row["gold"], *said])
    shown = f"<p>They differ on {len(differing)} questions; {len(rows)} of them, the most divided first:</p>"
    return shown + table_html(["question", "right answer", *[_run_name(r.spec) for r in records]], rows)
