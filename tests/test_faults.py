"""The faults in miniature: one at a time, as large as in the real data, and read by the intervals alone."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from dora_lab.claims import mini_faults
from dora_lab.data import load_examples
from dora_lab.fault_figures import fault_lines, fault_lines_alt
from dora_lab.faults import (
    PLAIN,
    Answers,
    effects,
    effects_frame,
    fault_notes,
    read_answers,
    reference,
    shown_effects,
    uneven,
    write_faults,
)
from dora_lab.models import load_tokenizer
from dora_lab.pipeline import grid
from dora_lab.profiles import PROJECT, load_profile
from dora_lab.report_recipe import answers_lost, token_counts
from dora_lab.report_recipe import load_tokenizer as load_llamas
from dora_lab.statistics import Interval, paired_difference
from dora_lab.tasks import ANSWER_PREFIX, prompt

PROFILE = load_profile("mini-faults")
FIGURES = PROJECT / "figures"


# --- the faults themselves --------------------------------------------------------------------------------------------


def test_every_fault_is_read_against_the_runs_that_lack_it_alone():
    against = {name: reference(PROFILE, name) for name in PROFILE.variants}
    assert against["answers-cut"] == "prompt-loss" and against["generated-other-prompt-end"] == "generated"
    assert {against[name] for name in ("prompt-loss", "other-prompt-end", "generated", "best-of-few", "float16")} == {
        None
    }


def test_plain_runs_are_those_of_mini():
    """A record of `mini` serves: the same identity, so the same run."""
    plain, mini = grid(PROFILE, variants=[None]), grid(load_profile(PLAIN))
    assert [spec.run_id for spec in plain] == [spec.run_id for spec in mini]
    everything = [spec.run_id for spec in grid(PROFILE)]
    assert len(set(everything)) == len(everything) == len(plain) * (1 + len(PROFILE.variants))


def test_the_share_of_answers_cut_is_the_one_that_was_measured():
    row = next(line for line in (FIGURES / "claims.md").read_text().splitlines() if "answers_in_training" in line)
    measured = float(re.search(r"HellaSwag (\d+\.\d) %", row)[1])
    assert 100 * PROFILE.variants["answers-cut"]["answers_cut"] == pytest.approx(measured, abs=0.05)


@pytest.mark.real_data
def test_the_share_of_answers_cut_is_that_of_the_real_prompts(report_cache):
    dataset = report_cache.parent / "llm-adapters" / "dataset"
    lost = answers_lost(token_counts(load_llamas(), load_examples(str(dataset), "hellaswag", "test")))
    assert PROFILE.variants["answers-cut"]["answers_cut"] == pytest.approx(lost, abs=0.001)


def test_no_cut_off_takes_that_share_in_the_mini_world():
    """Why the answers that are cut are drawn: the mini-world's HellaSwag has two lengths."""
    tokenizer, examples = load_tokenizer("mini-world"), load_examples("mini-world", "hellaswag", "train")
    texts = [prompt(e, PROFILE.prompt) + ANSWER_PREFIX + e.answer for e in examples]
    counts = sorted(Counter(len(ids) for ids in tokenizer(texts)["input_ids"]).items())
    shares = [sum(n for length, n in counts if length > cutoff) / len(texts) for cutoff, _ in [(0, 0), *counts]]
    assert len(counts) == 2 and shares == pytest.approx([1, 0.328, 0], abs=0.001)
    assert PROFILE.cutoff_tokens >= counts[-1][0]


@pytest.mark.parametrize("task", PROFILE.tasks)
def test_the_other_prompt_end_changes_the_last_token_and_no_training_example_has_it_there(task):
    tokenizer, examples = load_tokenizer("mini-world"), load_examples("mini-world", task, "train", 300)
    own, other = (PROFILE.variant(name) for name in ("prompt-loss", "other-prompt-end"))
    trained = tokenizer([prompt(e, own.prompt) for e in examples])["input_ids"]
    asked = tokenizer([prompt(e, other.evaluation_prompt) for e in examples])["input_ids"]
    for one, another in zip(trained, asked, strict=True):
        assert one[:-1] == another[:-1] and one[-1] != another[-1]
    assert {ids[-1] for ids in trained}.isdisjoint(ids[-1] for ids in asked)


# --- what an effect says ----------------------------------------------------------------------------------------------


def answers_of(shares, seeds=3, items=400, asked=None):
    """Answers on BoolQ: {(variant, method): share right}, drawn anew for every one; `asked`: a variant's questions."""
    generator, answers = np.random.default_rng(0), Answers()
    for (variant, method), share in shares.items():
        key = (variant, "boolq", method)
        for seed in range(seeds):
            right = generator.random(items) < share
            count = (asked or {}).get(variant, items)
            answers.right[key][seed] = {f"q-{i}": bool(right[i]) for i in range(count)}
            answers.unread[key][seed] = {f"q-{i}" for i in range(count) if not right[i] and i % 2}
    return answers


def profile_with(*variants):
    return replace(PROFILE, tasks=["boolq"], variants={name: PROFILE.variants[name] for name in variants})


HIT = {(None, "lora"): 0.8, (None, "dora"): 0.8, ("prompt-loss", "lora"): 0.5, ("prompt-loss", "dora"): 0.8}


def test_a_fault_that_costs_one_method_makes_a_difference():
    answers, profile = answers_of(HIT), profile_with("prompt-loss")
    (one,) = effects(answers, profile)
    assert (one.fault, one.against, one.seeds, one.items) == ("prompt-loss", "plain", (0, 1, 2), 400)
    assert one.verdict == "no difference shown → DoRA ahead" and one.wins == {False: (0, 0), True: (3, 0)}
    for method in ("lora", "dora"):
        keys = ("prompt-loss", "boolq", method), (None, "boolq", method)
        assert one.change[method] == paired_difference(*(answers.right[key] for key in keys))
        assert one.accuracy[method, True] - one.accuracy[method, False] == pytest.approx(one.change[method].estimate)
    assert one.turn.estimate == pytest.approx(one.change["dora"].estimate - one.change["lora"].estimate)
    assert uneven([one]) == [(one, one.turn_p)] and one.turn_p < 0.05
    notes = " ".join(fault_notes([one], answers, profile))
    assert "one with it, by the intervals: prompt-loss on BoolQ (DoRA ahead); of 1 rows" in notes
    assert (
        "With the fault, 3 of 3 single pairs of runs would have been called a win for DoRA, 0 a win for LoRA" in notes
    )


def test_a_fault_that_costs_both_the_same_makes_none():
    shares = HIT | {("prompt-loss", "dora"): 0.5}
    answers, profile = answers_of(shares), profile_with("prompt-loss")
    (one,) = effects(answers, profile)
    assert one.verdict == "no difference shown" and uneven([one]) == []
    assert all(change.high < 0 for change in one.change.values())
    assert "one with it, by the intervals: none" in fault_notes([one], answers, profile)[0]


def test_one_seed_speaks_of_two_runs():
    answers, profile = answers_of(HIT, seeds=1), profile_with("prompt-loss")
    found = effects(answers, profile)
    assert found[0].verdict.endswith(", two runs")
    assert any(note.startswith("One seed only: prompt-loss") for note in fault_notes(found, answers, profile))


def test_a_reference_is_read_on_the_questions_of_the_fault():
    shares = {(v, m): 0.7 for v in (None, "generated") for m in ("lora", "dora")}
    answers, profile = answers_of(shares, asked={"generated": 150}), profile_with("generated")
    (one,) = effects(answers, profile)
    assert one.items == 150
    plain = answers.right[None, "boolq", "lora"]
    assert one.accuracy["lora", False] == pytest.approx(
        np.mean([[r[f"q-{i}"] for i in range(150)] for r in plain.values()])
    )
    unread = [len([i for i in ids if int(i[2:]) < 150]) / 150 for ids in answers.unread[None, "boolq", "lora"].values()]
    assert one.unread["lora", False] == pytest.approx(np.mean(unread))
    with pytest.raises(ValueError, match="were not asked 'q-1"):
        effects(answers_of(shares, asked={None: 100}), profile)


def test_what_failed_or_is_missing_is_said():
    answers, profile = answers_of(HIT), profile_with("prompt-loss", "float16")
    answers.failed["float16", "boolq", "lora"][0] = "ValueError: the loss is nan at step 7"
    notes = fault_notes(effects(answers, profile), answers, profile)
    assert "Failed: float16 on BoolQ, LoRA, seeds 0: ValueError: the loss is nan at step 7" in notes
    assert notes[-1].endswith("all four kinds of run have: float16 on BoolQ.")


def test_a_failed_seed_takes_the_verdict_from_those_that_are_left():
    answers, profile = answers_of(HIT), profile_with("prompt-loss")
    del answers.right["prompt-loss", "boolq", "lora"][1]
    answers.failed["prompt-loss", "boolq", "lora"][1] = "ValueError: the loss is nan at step 7"
    (one,) = effects(answers, profile)
    assert one.seeds == (0, 2) and one.failed == {"lora": (1,), "dora": ()}
    assert one.verdict == "LoRA failed with seeds 1: nothing said of those that are left"


def test_a_difference_that_comes_without_a_turn_says_so():
    interval = Interval(0.02, -0.01, 0.05), Interval(0.03, 0.01, 0.05)
    (one,) = effects(answers_of(HIT), profile_with("prompt-loss"))
    moved = replace(one, lead=dict(zip((False, True), interval, strict=True)), turn=Interval(0.01, -0.02, 0.04))
    assert moved.verdict == "no difference shown → DoRA ahead, the turn itself not shown"


def test_without_runs_there_is_no_effect_and_no_verdict(monkeypatch, tmp_path):
    assert effects(read_answers(tmp_path)) == []
    monkeypatch.setattr(mini_faults, "_effects", list)
    for test, claimed in ((mini_faults.comparison_stays, STAYS), (mini_faults.lowers_accuracy, LOSS)):
        with pytest.raises(mini_faults.NotHere, match="reproduce --profile mini-faults"):
            test(claimed)


STAYS = {"level": 0.05, "within_points": 1}
LOSS = {"fault": "prompt-loss", "method": "lora"}


def outcomes_of(monkeypatch, found, tasks=("boolq",)):
    monkeypatch.setattr(mini_faults, "_effects", lambda: found)
    monkeypatch.setattr(mini_faults, "load_profile", lambda name: replace(PROFILE, tasks=list(tasks)))
    return mini_faults.comparison_stays(STAYS).verdict, mini_faults.lowers_accuracy(LOSS).verdict


@pytest.mark.parametrize(
    ("dora", "verdicts"), [(0.8, ("does not hold", "holds")), (0.5, ("depends", "holds"))], ids=["one", "both"]
)
def test_the_claims_verdicts_follow_the_effects(monkeypatch, dora, verdicts):
    found = effects(answers_of(HIT | {("prompt-loss", "dora"): dora}), profile_with("prompt-loss"))
    assert outcomes_of(monkeypatch, found) == verdicts
    assert outcomes_of(monkeypatch, found, PROFILE.tasks)[1] == "depends"  # two tasks are missing


def test_one_seed_decides_no_claim(monkeypatch):
    found = effects(answers_of(HIT, seeds=1), profile_with("prompt-loss"))
    monkeypatch.setattr(mini_faults, "_effects", lambda: found)
    assert mini_faults.lowers_accuracy(LOSS).verdict == "depends"
    with pytest.raises(mini_faults.NotHere, match="no fault has runs of several seeds"):
        mini_faults.comparison_stays(STAYS)


# --- table and figure -------------------------------------------------------------------------------------------------


def test_table_and_figure_hold_every_effect(tmp_path):
    shares = {(v, m): 0.7 for v in (None, "prompt-loss", "answers-cut") for m in ("lora", "dora")}
    answers, profile = answers_of(shares), profile_with("prompt-loss", "answers-cut")
    found = effects(answers, profile)
    page, numbers = write_faults(found, answers, tmp_path, profile)
    assert page.read_text().count("\n| ") == len(found) + 2
    assert list(pd.read_csv(numbers)["fault"]) == ["prompt-loss", "answers-cut"]
    row = shown_effects(found).iloc[1]
    assert row["against"] == "prompt-loss" and row["LoRA"].startswith(
        f"{100 * found[1].accuracy['lora', False]:.1f} → "
    )
    alt = fault_lines_alt(found)
    assert all(f"{one.fault} on BoolQ" in alt for one in found)
    panels = fault_lines(found).axes
    assert [label.get_text() for label in panels[0].get_yticklabels()] == [
        "prompt loss\n3 seeds",
        "answers cut\n3 seeds",
    ]
    drawn = [float(line.get_xdata()[0]) for line in panels[0].lines if len(line.get_xdata()) == 1]
    assert drawn == pytest.approx([100 * one.change[method].estimate for one in found for method in ("lora", "dora")])


@pytest.mark.slow
def test_the_committed_table_is_what_the_recorded_runs_say():
    answers = read_answers()
    found = effects(answers)
    committed = pd.read_csv(FIGURES / "faults.csv")
    pd.testing.assert_frame_equal(committed, effects_frame(found), rtol=1e-3, check_dtype=False)
    assert [
        note for note in fault_notes(found, answers) if f"- {note}\n" not in (FIGURES / "faults.md").read_text()
    ] == []
    assert (FIGURES / "faults.png").is_file() and (FIGURES / "faults.svg").is_file()
