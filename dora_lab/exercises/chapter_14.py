"""Exercises of chapter 14: what a hybrid trains, and how a budget is spent."""

from dora_lab.exercises.engine import Exercise, Malformed, Misconception, function
from dora_lab.hybrids import MAGNITUDE, UPDATE, Part, choose_methods, parameters_of

MODULES = ((160, 160, "lora"), (432, 160, "dora"), (160, 432, "dora-magnitude"), (160, 160, "frozen"))
RANK = 2
COSTS, GAINS, BUDGET = (10, 4, 6, 3, 9, 12), (50.0, 8.0, 21.0, 1.0, 36.0, 40.0), 22


def _count(out, inside, rank, method):
    parts = [Part("it", UPDATE, rank * (out + inside), 0.0), Part("it", MAGNITUDE, out, 0.0)]
    return parameters_of({"it": method}, parts)


def _has_pair(method):
    return method in ("lora", "dora")


def _has_m(method):
    return method in ("dora", "dora-magnitude")


def _observe_counts(answer):
    counts = [function(answer, "out, inside, rank, method")(out, inside, RANK, m) for out, inside, m in MODULES]
    return None if all(count is None or count is ... for count in counts) else tuple(counts)


def _observe_choice(answer):
    chosen = function(answer, "costs, gains, budget")(COSTS, GAINS, BUDGET)
    if chosen is None or chosen is ...:
        return None
    if not isinstance(chosen, list | tuple | set) or not all(isinstance(i, int) for i in chosen):
        raise Malformed("Give the indices as a list of whole numbers.")
    return tuple(sorted(chosen))


def _greedy(order, costs, budget, go_on=True):
    taken = []
    for i in order:
        if costs[i] <= budget:
            taken.append(i)
            budget -= costs[i]
        elif not go_on:
            break
    return taken


def _by_worth(costs, gains):
    return sorted(range(len(costs)), key=lambda i: -gains[i] / costs[i])


def _chosen():
    parts = [Part(str(i), UPDATE, cost, gain) for i, (cost, gain) in enumerate(zip(COSTS, GAINS, strict=True))]
    return tuple(int(name) for name, method in choose_methods(parts, BUDGET).items() if method == "lora")


EXERCISES = (
    Exercise(
        id="14.1",
        question='Write a function (out, inside, rank, method), method "lora", "dora", "dora-magnitude" or "frozen", '
        "that counts what one module trains.",
        observe=_observe_counts,
        expected=lambda: tuple(_count(out, inside, RANK, method) for out, inside, method in MODULES),
        misconceptions=(
            Misconception(
                "size of the product",
                lambda out, inside, rank, method: out * inside * _has_pair(method) + out * _has_m(method),
                "B·A has as many numbers as W0, but nobody trains them one by one.",
            ),
            Misconception(
                "m over the inputs",
                lambda out, inside, rank, method: rank * (out + inside) * _has_pair(method) + inside * _has_m(method),
                "m scales what comes out of a module: count the rows of its (out, in) weight.",
            ),
            Misconception(
                "one m for a module",
                lambda out, inside, rank, method: rank * (out + inside) * _has_pair(method) + _has_m(method),
                "A single factor would stretch the whole weight; each row has a length of its own.",
            ),
            Misconception(
                "m forgotten in DoRA",
                lambda out, inside, rank, method: (
                    rank * (out + inside) * _has_pair(method) + out * (method == "dora-magnitude")
                ),
                "With this count DoRA would be LoRA. What does it train beside A and B?",
            ),
            Misconception(
                "frozen counted",
                lambda out, inside, rank, method: (
                    out * inside if method == "frozen" else _count(out, inside, rank, method)
                ),
                "A frozen weight is there and is read, but no optimizer touches it.",
            ),
        ),
        hints=(
            "Two questions for each method: does it have A and B, and does it have m?",
            "A is (rank, in), B is (out, rank), and m has one entry for each row of the (out, in) weight.",
        ),
    ),
    Exercise(
        id="14.2",
        question="Write a function (costs, gains, budget) that gives the indices which the rule of this chapter takes.",
        observe=_observe_choice,
        expected=_chosen,
        misconceptions=(
            Misconception(
                "largest gain first",
                lambda costs, gains, budget: _greedy(sorted(range(len(costs)), key=lambda i: -gains[i]), costs, budget),
                "A large part may gain much and still be a poor buy. What is scarce here?",
            ),
            Misconception(
                "cheapest first",
                lambda costs, gains, budget: _greedy(sorted(range(len(costs)), key=lambda i: costs[i]), costs, budget),
                "This fills the budget with many small parts, whatever they promise.",
            ),
            Misconception(
                "stopped at the first that does not fit",
                lambda costs, gains, budget: _greedy(_by_worth(costs, gains), costs, budget, go_on=False),
                "What is left of the budget may still buy something smaller.",
            ),
            Misconception(
                "budget passed",
                lambda costs, gains, budget: next(
                    order[: k + 1]
                    for order in [_by_worth(costs, gains)]
                    for k in range(len(order))
                    if sum(costs[i] for i in order[: k + 1]) >= budget
                ),
                "The last part that you took costs more than was left.",
            ),
        ),
        hints=(
            "By what do you rank things that cost differently?",
            "One that does not fit is passed over, not the end.",
        ),
    ),
)
