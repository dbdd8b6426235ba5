"""The pretraining text: short documents about the mini-world, by kind.

Statements and stories (`fact`, `wish`, `story`, `seen`) tell of every thing and every activity. All that looks like a
question (`claims`, `choices`, `step_choices`, the quizzes) is about the train split alone, in other words than the
tasks' prompts and with other labels. `binding` teaches reading labels off a list and needs no knowledge.

Words are separated by spaces. A leading ^ marks a word that the document determines (it weighs more in the loss), a
leading ~ a random word that nothing determines (it weighs nothing).
"""

import random
from collections.abc import Callable

from dora_lab.miniworld.questions import pair_that_differs
from dora_lab.miniworld.world import COMPARATIVE, OPPOSITE, PEOPLE, PRONOUN, PROPERTIES, SYNONYM, VERBS, World

Rng = random.Random
LABELS = (
    "a b c d", "first second third fourth", "one two three four", "left middle right far", "p q r s",
    "card1 card2 card3 card4", "box1 box2 box3 box4", "line1 line2 line3 line4", "slot1 slot2 slot3 slot4",
)  # fmt: skip
LABEL_SETS = tuple(tuple(labels.split()) for labels in LABELS)
# The tasks' own labels: on lists, in dense documents, and behind guesses; never in a quiz with a right answer.
TASK_LABEL_SETS = (("option1", "option2"), ("ending1", "ending2", "ending3", "ending4"), ("true", "false"))
VERDICTS = (("yes", "no"), ("right", "wrong"), ("sure", "never"), ("fine", "bad"), ("agreed", "denied"))
# Words of the tasks' prompts. They occur here as ordinary words, never two of them in a row.
PROMPT_WORDS = tuple(
    "please answer following question with true or false format choose correct fill in blank complete given sentence "
    "ending option instruction response option1 option2 ending1 ending2 ending3 ending4 does would you call can we say "
    "because wanted _ / ? ###".split()
)
PLAIN_WORDS = tuple(
    "oak ash elm fir fox owl bee cat dog hen red blue green white black grey iron tin gold wool silk clay salt tea "
    "rice corn north south east west king queen duke monk star moon sun sea friend start page pot letter note song "
    "road house garden window river morning evening today soon again maybe well now here there".split()
)


# ---------------------------------------------------------------- statements and stories: everything there is


def fact(world: World, rng: Rng) -> str:
    """Two to four things and what they are."""
    told = []
    for _ in range(rng.randint(2, 4)):
        thing = rng.choice(world.all_things)
        values = [world.facts[thing][p] for p in rng.sample(tuple(PROPERTIES), rng.randint(1, 4))]
        words = [f"^{_in_words(value, rng)}" for value in values]
        told.append(
            rng.choice(
                (
                    f"the {thing} is {' and '.join(words)} .",
                    f"{thing} : {' , '.join(words)} .",
                    f"the {thing} , {words[0]} , is here .",
                )
            )
        )
    return " ".join(told)


def wish(world: World, rng: Rng) -> str:
    """Somebody sees two things and picks by their properties."""
    x, y = rng.sample(world.all_things, 2)
    differing = [p for p in PROPERTIES if world.facts[x][p] != world.facts[y][p]]
    if not differing:
        return wish(world, rng)
    person = rng.choice(PEOPLE)
    he = PRONOUN[person]
    told = [f"{person} {rng.choice(('saw', 'had'))} the {x} and the {y} ."]
    for property_ in rng.sample(differing, len(differing)):
        thing = rng.choice((x, y))
        value = world.facts[thing][property_]
        word = _in_words(value, rng)
        told.append(
            rng.choice(
                (
                    f"{he} wanted a {word} thing , so {he} took the ^{thing} .",
                    f"the {COMPARATIVE[value]} one was the ^{thing} .",
                    f"the {word} one is the ^{thing} .",
                    f"too {word} was the ^{thing} .",
                )
            )
        )
    return " ".join(told)


def story(world: World, rng: Rng) -> str:
    """An activity, step by step."""
    activity = rng.choice(world.all_activities)
    steps = world.steps[activity]
    person = rng.choice(PEOPLE)
    start = 0 if rng.random() < 0.6 else rng.randint(1, len(steps) - 2)
    first = f"^{steps[0]}" if start == 0 else steps[start]
    rest = " . ".join(f"then {PRONOUN[person]} ^{step}" for step in steps[start + 1 :])
    return f"{activity} : {person} {first} . {rest} ."


def seen(world: World, rng: Rng) -> str:
    """Steps that somebody saw, and which activity each belongs to, or which step it follows."""
    activities, steps = _own_steps(world, world.all_activities, rng.choice((2, 2, 3, 4)), rng)
    person = rng.choice(PEOPLE)
    order = rng.sample(range(len(steps)), len(steps))
    where = [_where(world, activities[i], steps[i], rng) for i in order]
    if rng.random() < 0.5:
        shown = f"{person} saw {' and '.join(rng.sample(steps, len(steps)))} ."
        return " ".join([shown, *(f"{place} it was ^{steps[i]} ." for place, i in zip(where, order, strict=True))])
    return " ".join(
        f"{place} {person} saw {' and '.join(rng.sample(steps, len(steps)))} : it was ^{steps[i]} ."
        for place, i in zip(where[:2], order, strict=False)
    )


def plain(world: World, rng: Rng) -> str:
    """Ordinary words, so that every word of the prompts has been read."""
    return filler(rng, rng.randint(6, 16), weight="")


# ---------------------------------------------------------------- reading labels off a list: no knowledge


def binding(world: World, rng: Rng) -> str:
    """A labelled list, then items with their labels."""
    count = rng.choice((2, 2, 3, 4))
    labels = _any_labels(rng, count)
    pool = world.things["train"] if rng.random() < 0.5 else VERBS
    items = rng.sample(pool, count)
    asked = rng.sample(range(count), count) + [rng.randrange(count) for _ in range(rng.randint(0, 3))]
    return f"{_listed(labels, items)} . " + " ".join(f"{items[i]} ^{labels[i]}" for i in asked)


# ---------------------------------------------------------------- questions: the train split alone


def claims(world: World, rng: Rng) -> str:
    """Dense: a thing, a property, a verdict."""
    verdicts = rng.choice(VERDICTS)
    told = []
    for _ in range(rng.randint(3, 6)):
        thing, value, holds = _claim(world, rng)
        told.append(f"{thing} {value} ^{verdicts[0 if holds else 1]}")
    return " ".join(told)


def choices(world: World, rng: Rng) -> str:
    """Dense: a labelled list of things, then properties with the label of the one thing that has them."""
    count = rng.choice((2, 2, 3))
    things = rng.sample(world.things["train"], count)
    labels = _any_labels(rng, count)
    asked = [(i, p) for i in range(count) for p in PROPERTIES if _unique(world, things, i, p)]
    if not asked:
        return choices(world, rng)
    rng.shuffle(asked)
    return f"{_listed(labels, things)} . " + " ".join(f"{world.facts[things[i]][p]} ^{labels[i]}" for i, p in asked[:5])


def choices_after(world: World, rng: Rng) -> str:
    """Dense, the property first: what is wanted, a list, the label."""
    told = []
    for _ in range(rng.randint(1, 3)):
        things, i, value = _thing_question(world, rng)
        labels = _labels(rng, len(things))
        told.append(f"{value} ? {_listed(labels, things)} so ^{labels[i]}")
    return " . ".join(told)


def step_choices(world: World, rng: Rng) -> str:
    """Dense: a labelled list of steps, then activities with the label of their step."""
    activities, steps = _own_steps(world, world.activities["train"], rng.choice((2, 2, 3, 4)), rng)
    labels = _any_labels(rng, len(steps))
    asked = rng.sample(range(len(steps)), len(steps)) + [rng.randrange(len(steps))]
    return f"{_listed(labels, steps)} . " + " ".join(f"{activities[i]} ^{labels[i]}" for i in asked)


def step_choices_after(world: World, rng: Rng) -> str:
    """Dense, the activity first: an activity and a step of it, a list, the label of the next step."""
    told = []
    for _ in range(rng.randint(1, 2)):
        activity, before, options, i = _step_question(world, rng)
        labels = _labels(rng, len(options))
        told.append(f"{activity} : {before[-1]} ? {_listed(labels, options)} so ^{labels[i]}")
    return " . ".join(told)


def truth_quiz(world: World, rng: Rng) -> str:
    """A claim in some wording, other words, then the verdict."""
    told = []
    for _ in range(rng.randint(1, 2)):
        thing, value, holds = _claim(world, rng)
        verdicts = rng.choice(VERDICTS)
        hint = "" if verdicts == VERDICTS[0] and rng.random() < 0.5 else _hint(rng, verdicts)
        lead = _lead(rng, any_words=0.4)
        told.append(_wrapped(rng, _asked(rng, thing, value), hint, lead, verdicts[0 if holds else 1], passing=0.0))
    return " ".join(told)


def guess_quiz(world: World, rng: Rng) -> str:
    """A claim, and the tasks' own words `true` and `false` behind it from somebody who guesses.

    They are read in the place of a verdict and mean nothing there: what they mean is left to fine-tuning.
    """
    thing, value, _ = _claim(world, rng)
    lead = _lead(rng, any_words=0.4)
    return _wrapped(rng, _asked(rng, thing, value), "true , false ?", lead, rng.choice(("true", "false")), passing=0.0)


def thing_quiz(world: World, rng: Rng) -> str:
    """Which thing has the property? Answered by its label, in some wording, after other words."""
    things, i, value = _thing_question(world, rng)
    labels = _labels(rng, len(things))
    person = rng.choice(PEOPLE)
    he = PRONOUN[person]
    shuffled = " and ".join(f"the {thing}" for thing in rng.sample(things, len(things)))
    scene = f"{person} {rng.choice(('saw', 'met', 'had'))} {shuffled} . " if rng.random() < 0.6 else ""
    asked = scene + rng.choice(
        (
            f"{he} needs the {value} one .",
            f"which is {value} ?",
            f"one was too {value} .",
            f"{he} is after the {COMPARATIVE[value]} one .",
            f"one of these is {COMPARATIVE[value]} .",
            f"{he} kept one because it is {value} .",
            f"the {value} one , please .",
        )
    )
    hint = _hint(rng, labels) if rng.random() < 0.4 else ""
    return _wrapped(rng, f"{asked} {_gap(rng)} {_listed(labels, things)}", hint, _lead(rng), labels[i])


def step_quiz(world: World, rng: Rng) -> str:
    """Which step comes next? Answered by its label, in some wording, after other words."""
    activity, before, options, i = _step_question(world, rng)
    labels = _labels(rng, len(options))
    person = rng.choice(PEOPLE)
    he = PRONOUN[person]
    told = f"{activity} : {person} " + f" . then {he} ".join(before)
    asked = rng.choice(
        (
            f"{told} . what next ?",
            f"{told} . then {he}",
            f"{told} . and then",
            f"which follows in {activity} after {before[-1]} ?",
            f"in {activity} , {before[-1]} and then ?",
        )
    )
    hint = _hint(rng, labels) if rng.random() < 0.4 else ""
    return _wrapped(rng, f"{asked} {_gap(rng)} {_listed(labels, options)}", hint, _lead(rng), labels[i])


KINDS: dict[str, Callable[[World, Rng], str]] = {
    f.__name__: f
    for f in (
        fact, wish, story, seen, plain, binding, claims, choices, choices_after, step_choices, step_choices_after,
        truth_quiz, guess_quiz, thing_quiz, step_quiz,
    )
}  # fmt: skip


def document(world: World, mixture: dict[str, float], rng: Rng) -> list[tuple[str, str]]:
    """One document drawn from `mixture` (kind -> share), as (word, mark) pairs; mark is '', '^' or '~'."""
    kind = rng.choices(tuple(mixture), tuple(mixture.values()))[0]
    words = KINDS[kind](world, rng).split()
    return [(word[1:], word[0]) if word[0] in "^~" else (word, "") for word in words]


def filler(rng: Rng, count: int, weight: str = "~") -> str:
    """`count` random words, never two words of the tasks' prompts in a row."""
    words: list[str] = []
    for _ in range(count):
        after_prompt_word = bool(words) and words[-1] in PROMPT_WORDS
        pool = PLAIN_WORDS if after_prompt_word or rng.random() < 0.5 else PROMPT_WORDS
        words.append(rng.choice(pool))
    if words and words[-1] in PROMPT_WORDS:
        words[-1] = rng.choice(PLAIN_WORDS)
    return " ".join(weight + word for word in words)


LEADS = (
    "so", "{person} says", "{person} picks", "that makes", "therefore", "in short", "{person} :", "verdict :",
    "result =>", "my view : it be", "clearly", "reply :",
)  # fmt: skip


def _wrapped(rng: Rng, question: str, hint: str, lead: str, answer: str, passing: float = 0.5) -> str:
    """A question between random words, and its answer after a lead of varying words.

    `passing`: how often some of the random words count in the loss, so that an answer is not expected after any word.
    """
    if rng.random() < passing:
        words = filler(rng, rng.choice((2, 4, 8)), weight="")
    else:
        words = filler(rng, rng.choice((0, 0, 1, 2, 4, 8)))
    middle = [hint, words]
    rng.shuffle(middle)
    return " ".join(part for part in (_gap(rng), question, *middle, f"{lead} ^{answer}", ".") if part)


def _lead(rng: Rng, any_words: float = 0.0) -> str:
    """What stands before an answer: a fixed phrase, plain words, or with a chance of `any_words` any words at all.

    The many leads are what makes the tasks' own one more of them, so that fine-tuning starts near a working circuit.
    """
    if rng.random() < any_words:
        return f"{filler(rng, rng.choice((1, 2, 3)))} {rng.choice(('', ':', '~is', '=>', ''))}"
    if rng.random() < 0.4:
        words = " ".join("~" + rng.choice(PLAIN_WORDS) for _ in range(rng.choice((1, 2, 3))))
        return words + rng.choice(("", " :", " =>", ""))
    return rng.choice(LEADS).format(person=rng.choice(PEOPLE))


def _hint(rng: Rng, labels: tuple[str, ...]) -> str:
    """The labels to choose from, in one of two forms."""
    if rng.random() < 0.5:
        return f"{filler(rng, rng.choice((1, 2)))} : {' / '.join(labels)}"
    return f"say {' or '.join(labels)} ."


def _asked(rng: Rng, thing: str, value: str) -> str:
    person = rng.choice(PEOPLE)
    return rng.choice(
        (
            f"{person} says the {thing} is {value} .",
            f"the {thing} : {value} ?",
            f"{person} wonders , would the {thing} be {value} ?",
            f"tell me , the {thing} , is it {value} ?",
            f"so the {thing} seems {value} .",
            f"think of the {thing} : {value} , yes ?",
        )
    )


def _gap(rng: Rng) -> str:
    return filler(rng, rng.choice((0, 0, 0, 1, 2, 4)))


def _in_words(value: str, rng: Rng) -> str:
    return SYNONYM[value] if rng.random() < 0.25 else value


def _labels(rng: Rng, count: int) -> tuple[str, ...]:
    return rng.choice(LABEL_SETS)[:count]


def _any_labels(rng: Rng, count: int) -> tuple[str, ...]:
    """Half of the time the tasks' own labels, where a set has enough of them."""
    fitting = [labels for labels in TASK_LABEL_SETS if len(labels) >= count]
    return rng.choice(fitting)[:count] if rng.random() < 0.5 else _labels(rng, count)


def _listed(labels: tuple[str, ...], items: list[str]) -> str:
    return " ".join(f"{label} : {item}" for label, item in zip(labels, items, strict=True))


def _unique(world: World, things: list[str], i: int, property_: str) -> bool:
    return sum(world.facts[t][property_] == world.facts[things[i]][property_] for t in things) == 1


def _claim(world: World, rng: Rng) -> tuple[str, str, bool]:
    thing = rng.choice(world.things["train"])
    value = world.facts[thing][rng.choice(tuple(PROPERTIES))]
    holds = rng.random() < 0.5
    return thing, value if holds else OPPOSITE[value], holds


def _thing_question(world: World, rng: Rng) -> tuple[list[str], int, str]:
    """(things, index of the answer, the value that only it has)."""
    if rng.random() < 0.7:
        property_ = rng.choice(tuple(PROPERTIES))
        things = list(pair_that_differs(world, world.things["train"], property_, rng))
        i = 0
        if rng.random() < 0.5:
            things, i = things[::-1], 1
        return things, i, world.facts[things[i]][property_]
    while True:
        things = rng.sample(world.things["train"], rng.choice((3, 4)))
        i = rng.randrange(len(things))
        unique = [p for p in PROPERTIES if _unique(world, things, i, p)]
        if unique:
            return things, i, world.facts[things[i]][rng.choice(unique)]


def _step_question(world: World, rng: Rng) -> tuple[str, tuple[str, ...], list[str], int]:
    """(activity, one or two steps before, options, index of the step that follows)."""
    activity = rng.choice(world.activities["train"])
    steps = world.steps[activity]
    position = rng.randint(1, len(steps) - 1)
    before = steps[max(0, position - rng.randint(1, 2)) : position]
    wrong: list[str] = []
    later = steps[position + 1 :]
    if later and rng.random() < 0.25:
        wrong.append(rng.choice(later))
    size = rng.choice((2, 3, 4, 4))
    while len(wrong) < size - 1:
        step = rng.choice(VERBS)
        if step not in steps and step not in wrong:
            wrong.append(step)
    options = rng.sample([steps[position], *wrong], size)
    return activity, before, options, options.index(steps[position])


def _own_steps(world: World, pool: tuple[str, ...], count: int, rng: Rng) -> tuple[list[str], list[str]]:
    """`count` activities and one step of each that none of the others has."""
    while True:
        activities = rng.sample(pool, count)
        steps = [rng.choice(world.steps[a]) for a in activities]
        if len(set(steps)) == count and all(sum(s in world.steps[a] for s in steps) == 1 for a in activities):
            return activities, steps


def _where(world: World, activity: str, step: str, rng: Rng) -> str:
    """Where in an activity: half of the time after the step before, if there is one."""
    i = world.steps[activity].index(step)
    return f"after {world.steps[activity][i - 1]} in {activity}" if i and rng.random() < 0.5 else f"in {activity}"
