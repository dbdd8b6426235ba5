"""Made-up records and geometry rows, for tests of tables and figures."""

from dataclasses import dataclass

import numpy as np

from dora_lab import tables

PUBLISHED = tables.read_published()
TASKS = {"boolq": 0.5, "hellaswag": 0.25, "winogrande": 0.5}


@dataclass(frozen=True)
class Spec:
    task: str
    method: str
    rank: int | None
    seed: int
    base_model: str = "mini-world"
    split: str = "test"

    @property
    def run_id(self):
        return f"{self.task}-{self.method}-r{self.rank}-s{self.seed}"


@dataclass(frozen=True)
class Result:
    accuracy: float
    n: int
    unparsed_rate: float
    chance: float


@dataclass(frozen=True)
class Record:
    spec: Spec
    result: Result


def make_records(methods=(("lora", 4), ("dora", 4), ("full", None)), seeds=3, base_model="mini-world"):
    generator = np.random.default_rng(0)
    level = {"lora": 0.74, "dora": 0.76, "full": 0.93, "dora-magnitude": 0.6}
    records = []
    for task, chance in TASKS.items():
        for method, rank in methods:
            for seed in range(seeds):
                accuracy = round(float(np.clip(generator.normal(level[method], 0.02), 0, 1)) * 600) / 600
                spec = Spec(task, method, rank, seed, base_model)
                records.append(Record(spec, Result(accuracy, 600, 0.0, chance)))
    return records


def make_geometry(methods=("full", "lora", "dora"), seeds=2):
    generator, sign = np.random.default_rng(1), {"full": -1, "lora": 1, "dora": -1, "dora-magnitude": 1}
    rows = []
    for method in methods:
        for seed in range(seeds):
            for step in (30, 60, 90, 120):
                for layer in range(6):
                    for module in ("q_proj", "v_proj"):
                        x = step / 120 * (1 + 0.2 * layer) * 1e-3
                        y = (0.01 + 4 * sign[method] * x) * (1 + 0.1 * generator.normal())
                        row = {"method": method, "seed": seed, "step": step, "layer": layer, "module": module}
                        rows.append(row | {"delta_magnitude": y, "delta_direction": x})
    return rows


RECORDS = make_records()
FAILURES = [{"task": "boolq", "method": "dora", "rank": 4, "seed": 3, "error": "OSError: No space left on device"}]
