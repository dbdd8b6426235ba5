"""The mini-world: invented things with properties and invented activities with steps, drawn once from a fixed seed.

A thing has one of two values for each of four properties; an activity is a fixed sequence of four verbs. Both are
split into train, validation and test: only the train part may appear in anything that looks like a question.
"""

import random
from dataclasses import dataclass

SPLITS = ("train", "validation", "test")
N_THINGS = {"train": 150, "validation": 30, "test": 60}
N_ACTIVITIES = {"train": 280, "validation": 40, "test": 80}
N_STEPS = 4

# property -> the two values, each as (word, synonym, comparative)
PROPERTIES = {
    "weight": (("heavy", "weighty", "heavier"), ("light", "airy", "lighter")),
    "size": (("big", "vast", "bigger"), ("small", "tiny", "smaller")),
    "heat": (("hot", "fiery", "hotter"), ("cold", "icy", "colder")),
    "price": (("costly", "pricey", "costlier"), ("cheap", "frugal", "cheaper")),
}
SYNONYM = {value[0]: value[1] for pair in PROPERTIES.values() for value in pair}
COMPARATIVE = {value[0]: value[2] for pair in PROPERTIES.values() for value in pair}
OPPOSITE = {a[0]: b[0] for pair in PROPERTIES.values() for a, b in (pair, pair[::-1])}

PRONOUN = {
    "gina": "she",
    "hugo": "he",
    "ida": "she",
    "jack": "he",
    "kira": "she",
    "leo": "he",
    "mona": "she",
    "nils": "he",
}
PEOPLE = tuple(PRONOUN)
VERBS = tuple(
    "opens closes takes drops washes cuts paints lifts turns pulls pushes fills empties holds ties wipes moves checks "
    "breaks warms cools shakes rolls folds hides shows counts sells buys finds mixes bakes eats drinks pours stirs "
    "chops grinds boils fries sews knits weaves spins digs plants waters picks packs loads carries stacks sorts marks "
    "draws prints reads writes sings claps jumps runs walks climbs swims dives rows sails steers parks brakes rides "
    "feeds brushes combs trims shaves dries irons hangs sweeps mops dusts scrubs polishes sands saws drills nails "
    "glues screws bolts welds melts molds casts carves hunts traps aims throws catches kicks hits blocks scores bows "
    "rests sleeps wakes waits calls mails signs stamps seals wraps tapes weighs".split()
)


@dataclass(frozen=True)
class World:
    """What is true in the mini-world.

    things / activities: names by split. facts: thing -> property -> value word. steps: activity -> its four verbs.
    """

    things: dict[str, tuple[str, ...]]
    activities: dict[str, tuple[str, ...]]
    facts: dict[str, dict[str, str]]
    steps: dict[str, tuple[str, ...]]

    @property
    def all_things(self) -> tuple[str, ...]:
        return tuple(name for split in SPLITS for name in self.things[split])

    @property
    def all_activities(self) -> tuple[str, ...]:
        return tuple(name for split in SPLITS for name in self.activities[split])


def build_world(seed: int = 7) -> World:
    """Draw the world. The same seed gives the same world on every machine (only `random.Random` is used)."""
    rng = random.Random(seed)
    taken = set(VERBS) | set(PEOPLE) | {"the", "is", "a", "an", "it", "to"}
    things = _split(_invent(rng, sum(N_THINGS.values()), taken, ("n", "k", "r", "l", "t", "")), N_THINGS)
    activities = _split(_invent(rng, sum(N_ACTIVITIES.values()), taken, ("ing",)), N_ACTIVITIES)

    facts: dict[str, dict[str, str]] = {name: {} for names in things.values() for name in names}
    for property_, values in PROPERTIES.items():
        for names in things.values():  # balanced within each split
            drawn = [values[i % 2][0] for i in range(len(names))]
            rng.shuffle(drawn)
            for name, value in zip(names, drawn, strict=True):
                facts[name][property_] = value
    steps = {name: tuple(rng.sample(VERBS, N_STEPS)) for names in activities.values() for name in names}
    return World(things, activities, facts, steps)


def _invent(rng: random.Random, count: int, taken: set[str], endings: tuple[str, ...]) -> list[str]:
    """`count` new pronounceable words; `taken` grows so that no two words are the same."""
    first = "b d f g h j k l m n p r s t v z ch sh br dr gr kr pl st tr".split()
    vowels, inner = "aeiou", "bdfgklmnprstvxz"
    words: list[str] = []
    while len(words) < count:
        ending = rng.choice(endings)
        middle = "" if ending == "ing" else rng.choice(vowels)
        word = rng.choice(first) + rng.choice(vowels) + rng.choice(inner) + middle + ending
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def _split(names: list[str], sizes: dict[str, int]) -> dict[str, tuple[str, ...]]:
    parts, start = {}, 0
    for split in SPLITS:
        parts[split] = tuple(names[start : start + sizes[split]])
        start += sizes[split]
    return parts
