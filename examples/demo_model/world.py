"""The village of Fernhollow: its facts, and every way the corpus asks about them.

Facts are fixed by WORLD_SEED. Knows nothing about chat formats.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass

from questions import QUESTIONS, STATEMENTS
from words import COLOURS, FOODS, HOBBIES, HOMES, INSTRUMENTS, JOBS, NAMES, PET_NAMES, PETS

WORLD_SEED = 7
VILLAGE = "Fernhollow"

PLACES = {
    "the market square": "fresh bread",
    "the stone bridge": "good echoes",
    "the pine forest": "wild mushrooms",
    "the lake": "silver fish",
    "the apple orchard": "sweet apples",
    "the library": "old maps",
    "the windy hill": "flying kites",
    "the clock tower": "a golden bell",
    "the herb garden": "mint and thyme",
    "the harbour": "painted boats",
    "the school": "loud singing",
    "the quiet meadow": "tall flowers",
}


@dataclass(frozen=True)
class Fact:
    """One thing that is true in the village: who or what, which relation, the words an answer must
    contain."""

    subject: str
    relation: str
    answer: tuple[str, ...]


def _assign() -> dict[str, dict[str, str]]:
    rng = random.Random(WORLD_SEED)
    columns = {
        key: rng.sample(pool, len(NAMES))
        for key, pool in (("job", JOBS), ("home", HOMES), ("pet_name", PET_NAMES))
    }
    columns["pet"] = rng.sample(PETS * 2, len(NAMES))
    for key, pool in (
        ("food", FOODS),
        ("colour", COLOURS),
        ("instrument", INSTRUMENTS),
        ("hobby", HOBBIES),
    ):
        columns[key] = rng.sample(pool * 3, len(NAMES))
    ring = rng.sample(NAMES, len(NAMES))
    friend = {name: ring[(place + 1) % len(ring)] for place, name in enumerate(ring)}
    return {
        name: {key: column[i] for key, column in columns.items()} | {"friend": friend[name]}
        for i, name in enumerate(NAMES)
    }


VILLAGERS = _assign()
_PLACE_NAMES = list(PLACES)
KEEPERS = dict(
    zip(_PLACE_NAMES, random.Random(WORLD_SEED + 1).sample(NAMES, len(PLACES)), strict=True)
)
NEIGHBOURS = {
    place: _PLACE_NAMES[(i + 5) % len(_PLACE_NAMES)] for i, place in enumerate(_PLACE_NAMES)
}


def facts() -> list[Fact]:
    """Every fact of the village, in a fixed order."""
    out = []
    for name, row in VILLAGERS.items():
        for relation in ("job", "home", "food", "colour", "friend", "instrument", "hobby"):
            out.append(Fact(name, relation, (row[relation],)))
        out.append(Fact(name, "pet", (row["pet"], row["pet_name"])))
        out.append(Fact(row["job"], "who_job", (name,)))
        out.append(Fact(row["home"], "who_home", (name,)))
    for place, known in PLACES.items():
        out.append(Fact(place, "keeper", (KEEPERS[place],)))
        out.append(Fact(place, "near", (NEIGHBOURS[place],)))
        out.append(Fact(place, "known", (known,)))
    return out


FACTS = facts()


def held_out(*key: object, one_in: int = 10) -> bool:
    """True for the share of keys that training never sees; stable across runs and machines."""
    return zlib.crc32("|".join(map(str, key)).encode()) % one_in == 0


def question_key(fact: Fact, template: int) -> tuple[str, str, str, str]:
    """What the held-out split hashes for a question."""
    return ("qa", fact.subject, fact.relation, str(template))


def articles(text: str) -> str:
    """ "a owl" -> "an owl"."""
    return re.sub(r"\b([Aa]) (?=[aeio]|umbrella)", r"\1n ", text)


def ask(fact: Fact, template: int) -> str:
    """The question in words."""
    return QUESTIONS[fact.relation][template].format(s=fact.subject)


def state(fact: Fact, variant: int = 0) -> str:
    """The fact as a sentence."""
    second = fact.answer[1] if len(fact.answer) > 1 else ""
    subject = fact.subject
    capital = subject[0].upper() + subject[1:]
    return articles(
        STATEMENTS[fact.relation][variant].format(s=subject, S=capital, a=fact.answer[0], b=second)
    )
