"""Exercises of chapter 06: what can be scored without knowing anything."""

import pandas as pd

from dora_lab.exercises.engine import Exercise, Misconception, function

TRAIN = ["true"] * 5 + ["false"] * 8 + ["maybe"] * 3
TEST = ["true"] * 9 + ["false"] * 4 + ["maybe"] * 2
FORMS = ["asks", "asks", "asks", "asks", "asks", "claims", "claims", "claims", "denies", "denies"]
LABELS = ["yes", "yes", "yes", "no", "no", "no", "no", "yes", "no", "no"]


def _expected_majority():
    from dora_lab.miniworld.controls import majority_accuracy  # loads scikit-learn

    return majority_accuracy(_records(TRAIN), _records(TEST))


def _records(answers):
    return [{"answer": answer} for answer in answers]


def _share(answers, answer):
    return answers.count(answer) / len(answers)


def _commonest(answers):
    return max(sorted(set(answers)), key=answers.count)


def _by_form(forms, labels):
    return [[label for form, label in zip(forms, labels, strict=True) if form == kind] for kind in sorted(set(forms))]


EXERCISES = (
    Exercise(
        id="06.1",
        question="Write a function (train, test), lists of answers: the accuracy of always giving one and the same.",
        observe=lambda answer: function(answer, "train, test")(list(TRAIN), list(TEST)),
        expected=_expected_majority,
        misconceptions=(
            Misconception(
                "majority of the test split",
                lambda train, test: _share(test, _commonest(test)),
                "The rule was chosen by looking at the answers it is scored on.",
            ),
            Misconception(
                "scored on the training split",
                lambda train, test: _share(train, _commonest(train)),
                "The accuracy that counts is on questions that the rule was not chosen on.",
            ),
            Misconception(
                "chance instead of majority",
                lambda train, test: 1 / len(set(train)),
                "This is what guessing evenly gets. Answers need not be evenly spread.",
            ),
            Misconception(
                "count instead of share",
                lambda train, test: test.count(_commonest(train)),
                "This is how many are right; an accuracy is a share of all.",
            ),
            Misconception(
                "rarest instead of commonest",
                lambda train, test: _share(test, min(sorted(set(train)), key=train.count)),
                "The one answer given should be the one most often right in training.",
            ),
        ),
        hints=("Two splits, two roles: one chooses the answer, the other scores it.", "Choose the commonest answer."),
    ),
    Exercise(
        id="06.2",
        question=(
            "Write a function (forms, labels): the best accuracy of a rule that sees only the form of each prompt. "
            "A label that depends on the form can be scored without the question."
        ),
        observe=lambda answer: function(answer, "forms, labels")(list(FORMS), list(LABELS)),
        expected=lambda: pd.crosstab(FORMS, LABELS).max(axis=1).sum() / len(LABELS),
        misconceptions=(
            Misconception(
                "form ignored",
                lambda forms, labels: _share(labels, _commonest(labels)),
                "One answer is given whatever the form is. The rule may answer each form in its own way.",
            ),
            Misconception(
                "mean over forms without their weights",
                lambda forms, labels: (
                    sum(_share(own, _commonest(own)) for own in _by_form(forms, labels)) / len(set(forms))
                ),
                "Every form counts the same here, and every question should.",
            ),
            Misconception(
                "the best form alone",
                lambda forms, labels: max(_share(own, _commonest(own)) for own in _by_form(forms, labels)),
                "This is the accuracy on the form that gives most away. The rule has to answer all questions.",
            ),
            Misconception(
                "count instead of share",
                lambda forms, labels: sum(own.count(_commonest(own)) for own in _by_form(forms, labels)),
                "This is how many are right; an accuracy is a share of all.",
            ),
            Misconception(
                "chance", lambda forms, labels: 1 / len(set(labels)), "The form says something; use what it says."
            ),
        ),
        hints=(
            "Sort the questions by form. What is the best answer to all those of one form?",
            "Add up how many each form gets right, then divide once, by all questions.",
        ),
    ),
)
