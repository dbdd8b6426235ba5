"""Controls for the tasks: what can be scored without knowing anything about the world.

Each of these should stay at chance. One that does not has found a shortcut in how the questions are written.
"""

import json
import re
from collections import Counter
from pathlib import Path

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from dora_lab.miniworld.questions import Record

# What a question asks, apart from its options: everything between the task's opening words and the options.
_ASKED = re.compile(r"(?<=question: ).*?(?=\?\n\n)|(?<=sentence: ).*?(?=\n\n)", re.DOTALL)


def without_question(record: Record) -> Record:
    """The record without its question (BoolQ) or sentence (HellaSwag, WinoGrande); options and format are kept."""
    instruction, removed = _ASKED.subn("", record["instruction"])
    if removed != 1:
        raise ValueError(f"no question found to take out of {record['instruction']!r}")
    return {**record, "instruction": instruction}


def write_without_question(source: Path, task: str, target: Path) -> Path:
    """Write `<target>/<task>/<split>.json`: the files of `source` without their questions. Returns `target`."""
    (target / task).mkdir(parents=True, exist_ok=True)
    for path in sorted((source / task).glob("*.json")):
        records = [without_question(record) for record in json.loads(path.read_text())]
        (target / task / path.name).write_text(json.dumps(records, indent=0) + "\n")
    return target


def majority_accuracy(train: list[Record], test: list[Record]) -> float:
    """Accuracy of always giving the commonest answer of `train`."""
    answer = Counter(record["answer"] for record in train).most_common(1)[0][0]
    return sum(record["answer"] == answer for record in test) / len(test)


def bag_of_words_accuracy(train: list[Record], test: list[Record]) -> float:
    """Test accuracy of a logistic regression on words and pairs of neighbouring words of the instruction."""
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"[a-z0-9_]+", binary=True)
    features = words.fit_transform(record["instruction"].lower() for record in train)
    classifier = LogisticRegression(max_iter=1000).fit(features, [record["answer"] for record in train])
    unseen = words.transform(record["instruction"].lower() for record in test)
    return float(classifier.score(unseen, [record["answer"] for record in test]))
