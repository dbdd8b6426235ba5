"""The panels: a control changes figure and alt text, all are labelled, nothing is shared, no front end is needed."""

import asyncio
import base64
import json
import math
import re

import nbformat
import numpy as np
import pytest
import torch
from nbconvert import HTMLExporter

from dora_lab import geometry, power, widgets
from dora_lab.profiles import load_profile
from dora_lab.records import LIVE_CURVE, RunRecord, RunResult, read_record, write_record
from dora_lab.specs import RunSpec
from dora_lab.widgets import detectable, direction, live, panel, ranks, stepper

CHANGES = {
    "rank_explorer": {"rank": 30},
    "direction_explorer": {"length": 1.0, "angle": -90.0},
    "training_stepper": {"step": 40, "learning_rate": 0.5},
    "difference_calculator": {"questions": 3270, "discordant": 0.3, "difference_pp": 4.0},
    "live_curves": {"runs": ("mini/b",)},
    "memory_planner": {"rank": 128, "length": 1024},
    "results_browser": {"task": "winogrande", "kinds": (("full", None, None),), "seeds": (1, 2)},
}


@pytest.fixture
def runs(tmp_path):
    """Two finished curves, and one of a run that goes on."""
    for name, end in (("a", 0.5), ("b", 0.2)):
        folder = tmp_path / "runs" / "mini" / name
        folder.mkdir(parents=True)
        rows = [{"step": step, "loss": 3 * end ** (step / 10), "learning_rate": 0.001} for step in range(1, 21)]
        (folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "runs"


def write_run(folder, task, method, rank, seed, wrong, learning_rate=0.003, date="2030-01-01"):
    """A record of 20 answers, the first `wrong` of them wrong."""
    spec = RunSpec.from_profile(load_profile("mini"), task, method, rank, seed, learning_rate)
    n = 20
    result = RunResult(1 - wrong / n, n, n - wrong, 0.5, 0.0, 1, 1, 0.1, 1.0, 0.1, 1.0, 1, False)
    (folder / spec.run_id).mkdir(parents=True)
    rows = [
        {"id": f"{task}-test-{i}", "gold": "true", "prediction": "false" if i < wrong else "true"} for i in range(n)
    ]
    (folder / spec.run_id / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_record(folder / spec.run_id, RunRecord(spec, result, {"date": date}))


@pytest.fixture
def recorded(tmp_path):
    for task in ("hellaswag", "winogrande"):
        for method, rank, wrong in (("lora", 2, 0), ("dora", 2, 4), ("full", None, 1)):
            for seed in (0, 1, 2):
                write_run(tmp_path / "records", task, method, rank, seed, wrong + seed)
    return tmp_path / "records"


@pytest.fixture
def make(runs, recorded):
    folders = {"live_curves": [runs], "results_browser": [recorded]}
    return lambda name: getattr(widgets, name)(*folders.get(name, []))


@pytest.fixture(params=CHANGES)
def name(request):
    return request.param


def test_every_panel_is_tested():
    assert {*CHANGES, "Panel"} == set(widgets.__all__)


def test_each_control_changes_the_figure_and_its_alt_text(name, make):
    made = make(name)
    assert set(CHANGES[name]) <= set(made.controls)
    for control, value in CHANGES[name].items():
        image, alt = made.image_html, made.alt
        made.controls[control].value = value
        assert made.image_html != image and made.alt != alt, control
        assert made.widget.children[-1].value == made.image_html + made.below


def test_every_control_has_a_label_and_a_tooltip(name, make):
    for control in make(name).controls.values():
        assert control.description and control.tooltip
        assert not getattr(control, "disabled", False)


def test_two_panels_share_nothing(name, make):
    first, second = make(name), make(name)
    before = second.image_html, second.values()
    for control, value in CHANGES[name].items():
        first.controls[control].value = value
    assert (second.image_html, second.values()) == before
    assert not {*first.controls.values()} & {*second.controls.values()}


def test_the_picture_is_a_png_and_the_alt_text_is_its_own(name, make):
    made = make(name)
    found = re.search(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)"', made.image_html)
    assert base64.b64decode(found[2]).startswith(b"\x89PNG") and len(made.alt) > 60
    assert any(character.isdigit() for character in made.alt)


def test_without_a_front_end_there_is_the_picture_alone(name, make):
    made = make(name)
    assert made._repr_mimebundle_() == {"text/plain": made.alt, "text/html": made.image_html + made.below}


def test_a_front_end_gets_the_widget_and_a_page_printed_from_it_the_picture(name, make, monkeypatch):
    made = make(name)
    monkeypatch.setattr(panel, "has_front_end", lambda: True)
    bundle = made._repr_mimebundle_()
    assert bundle["text/html"] == made.image_html + made.below and bundle["text/plain"] == made.alt
    assert bundle[panel.WIDGET_VIEW]["model_id"] == made.widget.model_id
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("panel", outputs=[nbformat.v4.new_output("display_data", data=bundle)])]
    )
    page, _ = HTMLExporter().from_notebook_node(notebook)
    assert re.search('src="([^"]+)"', made.image_html)[1] in page and made.widget.model_id not in page


class Shell:
    """An IPython shell in a kernel whose request has this metadata."""

    def __init__(self, metadata):
        self.kernel, self.metadata = self, metadata

    def get_parent(self, channel):
        return {"metadata": self.metadata}


@pytest.mark.parametrize("shell, expected", [(None, False), (Shell({}), False), (Shell({"cellId": "a"}), True)])
def test_a_front_end_is_known_by_the_cell_it_names(monkeypatch, shell, expected):
    monkeypatch.setattr(panel, "get_ipython", lambda: shell)
    assert panel.has_front_end() is expected


def test_several_values_are_drawn_once():
    drawn = []

    def draw(length, angle):
        drawn.append((length, angle))
        return panel.Drawing(direction.direction_figure(length, angle), "")

    made = panel.Panel(widgets.direction_explorer().controls, draw)
    made.set(length=1.0, angle=20.0)
    assert drawn == [(2.8, 50.0), (1.0, 20.0)]
    with pytest.raises(KeyError):
        made.set(height=1.0)
    made.controls["angle"].value = 30.0
    assert drawn[-1] == (1.0, 30.0)


def test_a_control_that_cannot_be_drawn_says_so_and_collection_goes_on():
    import gc

    def draw(angle):
        raise ValueError("no figure")

    with pytest.raises(ValueError, match="no figure"):
        panel.Panel({"angle": widgets.direction_explorer().controls["angle"]}, draw)
    assert gc.isenabled()


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_rank_errors_are_those_of_the_truncated_svd_and_of_least_squares():
    update = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    errors = ranks.rank_errors(update, seed=1)
    u, s, vt = torch.linalg.svd(update, full_matrices=False)
    rows = torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).T  # A, (8, in)
    for rank in range(9):
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        assert errors.bound[rank] == pytest.approx(((update - best).norm() / update.norm()).item(), abs=1e-7)
        a = rows[:rank]
        fitted = update @ torch.linalg.pinv(a) @ a if rank else torch.zeros_like(update)
        expected = ((update - fitted).norm() / update.norm()).item()
        assert errors.random_rows[rank] == pytest.approx(expected, abs=1e-6)
    assert (errors.bound <= errors.random_rows + 1e-7).all()


def test_the_example_has_the_report_s_size_and_saving():
    errors = ranks.rank_errors(ranks.example_update())
    assert errors.shape == (1024, 1024) and errors.parameters(10) == 20_480
    assert "20,480 parameters of 1,048,576, a saving of 98.05 %" in ranks.rank_alt(errors, 10)
    assert "1.17 times as many" in ranks.rank_alt(errors, 600)


def test_a_zero_update_has_no_relative_error():
    with pytest.raises(ValueError, match="not all zero"):
        ranks.rank_errors(torch.zeros(4, 4))


def test_the_rank_slider_ends_at_a_small_matrix_s_own_rank():
    made = widgets.rank_explorer(torch.randn(6, 9))
    assert made.controls["rank"].max == made.controls["rank"].value == 6


# --- direction and stepper --------------------------------------------------------------------------------------------


def test_length_moves_the_magnitude_alone_and_the_turn_the_direction_alone():
    base = direction.row(direction.BASE_LENGTH, direction.BASE_ANGLE)
    longer, turned = direction.row(3.0, direction.BASE_ANGLE), direction.row(direction.BASE_LENGTH, 90)
    assert geometry.delta_direction(longer, base) == pytest.approx(0, abs=1e-12)
    assert geometry.delta_magnitude(turned, base) == pytest.approx(0, abs=1e-12)
    assert "ΔM = 1.00, ΔD = 0.000" in direction.direction_alt(3.0, 0)
    assert "ΔM = 0.00, ΔD = 1.000" in direction.direction_alt(2.0, 90)


def test_the_toy_fit_starts_at_w0_and_goes_downhill():
    history = stepper.toy_fit(0.2)
    assert len(history) == stepper.STEPS + 1
    start = history[0].magnitude[:, None] * history[0].direction
    torch.testing.assert_close(start, stepper.START)
    assert all(later.loss < earlier.loss for earlier, later in zip(history, history[1:], strict=False))
    assert history[-1].loss < history[0].loss / 20


def test_the_stepper_s_buttons_move_one_step_and_stop_at_the_ends():
    made = widgets.training_stepper(step=1)
    for button, expected in (("forward", 2), ("back", 1), ("back", 0), ("back", 0)):
        made.controls[button].click()
        assert made.controls["step"].value == expected
    made.controls["step"].value = stepper.STEPS
    made.controls["forward"].click()
    assert made.controls["step"].value == stepper.STEPS


# --- detectable differences -------------------------------------------------------------------------------------------


def test_power_is_what_simulated_tests_find():
    from scipy.stats import binomtest

    questions, discordant, difference = 200, 0.2, 0.1
    generator = np.random.default_rng(0)
    shares = [(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant]
    draws = generator.multinomial(questions, shares, size=2000)
    found = np.mean([binomtest(int(first), int(first + second)).pvalue <= 0.05 for first, second, _ in draws])
    assert power.mcnemar_power(questions, discordant, difference) == pytest.approx(found, abs=0.03)


def test_power_grows_with_the_difference_and_stays_below_the_level_without_one():
    powers = power.mcnemar_power(500, 0.1, np.linspace(0, 0.1, 11))
    assert powers[0] <= 0.05 and (np.diff(powers) >= 0).all() and powers[-1] > 0.999


@pytest.mark.parametrize("questions, discordant", [(100, 0.3), (1267, 0.2), (20000, 0.05)])
def test_the_smallest_difference_has_the_power_asked_for(questions, discordant):
    smallest = power.smallest_detectable_difference(questions, discordant)
    assert power.mcnemar_power(questions, discordant, smallest) >= 0.8
    assert power.mcnemar_power(questions, discordant, smallest - 2e-5) < 0.8


def test_few_discordant_questions_show_nothing():
    assert math.isnan(power.smallest_detectable_difference(50, 0.05))
    found = detectable.detectable(50, 0.05, 3.0)
    assert "no possible difference is found with 80 %" in detectable.detectable_alt(found)
    detectable.detectable_figure(found)


def test_questions_needed_agrees_with_the_smallest_difference():
    needed = power.questions_needed(0.1, 0.02)
    assert power.mcnemar_power(needed, 0.1, 0.02) >= 0.8
    assert power.smallest_detectable_difference(needed, 0.1) == pytest.approx(0.02, rel=0.02)


@pytest.mark.parametrize(
    "arguments, said",
    [((0, 0.1, 0.0), "questions >= 1"), ((10, 0.0, 0.0), "0 < discordant"), ((10, 0.1, 0.2), "between 0 and")],
)
def test_what_cannot_be_is_an_error(arguments, said):
    with pytest.raises(ValueError, match=said):
        power.mcnemar_power(*arguments)
    with pytest.raises(ValueError):
        power.questions_needed(0.1, 0.0)


def test_a_difference_above_the_discordant_share_is_cut_to_it():
    assert detectable.detectable(1000, 0.05, 10.0).difference_pp == pytest.approx(5.0)


# --- live curves ------------------------------------------------------------------------------------------------------


def goes_on(folder, *rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LIVE_CURVE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_that_goes_on_is_read_up_to_its_last_whole_line(runs):
    rows = [{"step": step, "loss": 1 / step, "learning_rate": 0.1} for step in (2, 4)]
    goes_on(runs / "mini" / "c", *rows)
    with (runs / "mini" / "c" / LIVE_CURVE).open("a") as file:
        file.write('{"step": 6, "lo')
    assert live.read_curve(runs / "mini" / "c") == rows
    assert live.run_states(runs)["mini/c"] == "going on"
    (runs / "mini" / "c" / "record.json").write_text("{}")
    assert live.run_states(runs)["mini/c"] == "done"


def test_looking_again_finds_new_rows_and_new_runs(runs):
    made = widgets.live_curves(runs)
    before = made.alt
    goes_on(runs / "mini" / "c", {"step": 5, "loss": 2.5, "learning_rate": 0.1})
    made.controls["refresh"].click()
    assert "mini/c: 2.500 at step 5" in made.alt and made.alt != before and "mini/c" in made.controls["runs"].value


def test_the_timer_looks_again_and_stops_when_it_is_switched_off(runs):
    async def scene():
        made = widgets.live_curves(runs, every_s=0.01)
        made.controls["timer"].value = True
        goes_on(runs / "mini" / "c", {"step": 5, "loss": 2.5, "learning_rate": 0.1})
        for _ in range(200):
            await asyncio.sleep(0.01)
            if "mini/c" in made.alt:
                break
        made.controls["timer"].value = False
        await asyncio.sleep(0.05)
        return made, len(asyncio.all_tasks())

    made, tasks = asyncio.run(scene())
    assert "mini/c: 2.500 at step 5" in made.alt and tasks == 1


def test_without_an_event_loop_the_timer_stays_off(runs):
    made = widgets.live_curves(runs)
    made.controls["timer"].value = True
    assert made.controls["timer"].value is False


def test_a_folder_without_runs_is_said_to_be_empty(tmp_path):
    made = widgets.live_curves(tmp_path / "none")
    assert "No run with a curve yet" in made.alt and made.controls["runs"].options == ()


# --- results browser --------------------------------------------------------------------------------------------------


def test_the_questions_shown_are_those_on_which_the_runs_differ(recorded):
    made = widgets.results_browser(recorded, questions=3)
    made.set(task="hellaswag", seeds=(0,))
    assert "The runs differ on 4 questions" in made.alt and "differ on 4 questions; 3 of them" in made.below
    assert made.below.count("<tr>") == 1 + 2 + 1 + 3 and "choose the correct ending" in made.below
    assert "LoRA, rank 2: mean 100.0 (seed 0 100.0); DoRA, rank 2: mean 80.0" in made.alt


def test_of_two_runs_with_one_name_the_later_is_shown(recorded):
    write_run(recorded, "hellaswag", "dora", 2, 0, wrong=10, learning_rate=0.5, date="2031-01-01")
    made = widgets.results_browser(recorded)
    made.set(task="hellaswag", seeds=(0,))
    assert "DoRA, rank 2: mean 50.0" in made.alt


def test_questions_of_other_data_are_named_by_their_ids(recorded):
    for path in recorded.glob("hellaswag-*/record.json"):
        values = json.loads(path.read_text())
        values["spec"]["data_sha256"] = "0" * 64
        path.write_text(json.dumps(values))
    for folder in recorded.glob("hellaswag-*"):
        folder.rename(recorded / read_record(folder).spec.run_id)
    made = widgets.results_browser(recorded)
    made.set(task="hellaswag", seeds=(0,))
    assert "choose the correct ending" not in made.below and "hellaswag-test-0" in made.below


def test_one_run_or_none_is_not_compared(recorded):
    made = widgets.results_browser(recorded)
    made.controls["kinds"].value = made.controls["kinds"].value[:1]
    assert "Choose two runs or more" in made.below
    made.controls["kinds"].value = ()
    assert "no record of this choice" in made.alt


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no finished run"):
        widgets.results_browser(tmp_path)


def test_text_from_files_is_escaped():
    assert panel.table_html(["<b>"], [["<script>"]]).count("&lt;") == 2
    assert '<img alt="a &quot;quoted&quot;' in panel._image(direction.direction_figure(1, 1), 'a "quoted" text')
