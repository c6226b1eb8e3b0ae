"""The sixteen tools of the corpus, one row each: names, schema, requests, results, answers.

Data only: `tools.py` draws from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from words import (
    CITIES,
    CURRENCIES,
    DAYS,
    EVENTS,
    FOODS,
    GENRES,
    ITEMS,
    LANGUAGES,
    NAMES,
    PET_NAMES,
    PHRASES,
    ROOMS,
    STRANGERS,
    TEXT_ENDS,
    TEXT_STARTS,
    TOPICS,
)
from world import PLACES

Draw = Callable[[random.Random], Any]

PEOPLE = NAMES + STRANGERS
TIMES = [f"{hour}:{minute:02d}" for hour in range(7, 22) for minute in (0, 15, 30, 45)]


def _message(rng: random.Random) -> str:
    return f"{rng.choice(TEXT_STARTS)} {rng.choice(TEXT_ENDS)}"


def _number(low: int, high: int) -> Draw:
    return lambda rng: rng.randint(low, high)


def _half(low: int, high: int) -> Draw:
    return lambda rng: rng.randint(low * 2, high * 2) / 2


def _one_of(pool: Iterable[Any]) -> Draw:
    return lambda rng: rng.choice(list(pool))


@dataclass(frozen=True)
class Param:
    """One argument: its name in the schema, its JSON type, how to draw a value."""

    name: str
    type: str
    draw: Draw
    enum: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tool:
    """A function, the ways to ask for it (a slot per argument it names), its results and how to
    report them."""

    names: tuple[str, ...]
    description: str
    params: dict[str, Param]
    requests: tuple[str, ...]
    results: dict[str, Any]
    answers: tuple[str, ...]
    optional: tuple[str, ...] = ()
    thought: str = ""


TOOLS: dict[str, Tool] = {
    "weather": Tool(
        ("get_weather", "weather", "check_weather"),
        "Weather in a city.",
        {
            "city": Param("city", "string", _one_of(CITIES)),
            "unit": Param(
                "unit",
                "string",
                _one_of(("celsius", "fahrenheit")),
                ("celsius", "fahrenheit"),
            ),
        },
        (
            "What is the weather in {city}?",
            "How is the weather in {city} today?",
            "Is it cold in {city}?",
            "Do I need a coat in {city}?",
            "Tell me the weather in {city} in {unit}.",
            "What is the temperature in {city} in {unit}?",
            "Check the weather for {city}, please.",
            "I am going to {city}. What is the weather there?",
        ),
        {
            "degrees": _number(-5, 35),
            "sky": _one_of(("sunny", "cloudy", "rainy", "windy", "foggy", "snowy")),
        },
        (
            "It is {degrees} degrees and {sky} in {city}.",
            "In {city} it is {sky} with {degrees} degrees.",
        ),
        ("unit",),
        "the weather",
    ),
    "timer": Tool(
        ("set_timer", "start_timer", "timer"),
        "Start a timer.",
        {
            "minutes": Param("minutes", "integer", _number(1, 90)),
            "label": Param(
                "label",
                "string",
                _one_of(
                    (
                        "tea",
                        "pasta",
                        "eggs",
                        "laundry",
                        "homework",
                        "nap",
                        "bread",
                        "reading",
                        "cake",
                        "walk",
                    )
                ),
            ),
        },
        (
            "Set a timer for {minutes} minutes.",
            "Start a {minutes} minute timer.",
            "Wake me in {minutes} minutes.",
            "Please count {minutes} minutes.",
            "Set a timer for {minutes} minutes called {label}.",
            "I need a {label} timer of {minutes} minutes.",
            "Remind me in {minutes} minutes.",
        ),
        {"status": _one_of(("started", "running"))},
        ("The timer runs for {minutes} minutes.", "Done, your timer is set to {minutes} minutes."),
        ("label",),
        "a timer",
    ),
    "music": Tool(
        ("play_music", "music_player", "start_music"),
        "Play music.",
        {
            "genre": Param("genre", "string", _one_of(GENRES), tuple(GENRES)),
            "volume": Param("volume", "integer", _number(1, 100)),
        },
        (
            "Play some {genre} music.",
            "I want to hear {genre}.",
            "Put on {genre}, please.",
            "Play {genre} at volume {volume}.",
            "Start {genre} music with volume {volume}.",
            "Some {genre} at level {volume} would be nice.",
        ),
        {
            "song": _one_of(
                (
                    "Blue River",
                    "Night Train",
                    "Golden Field",
                    "Paper Moon",
                    "Summer Rain",
                    "Little Star",
                )
            )
        },
        ("Now playing {song}.", "{song} is playing now."),
        ("volume",),
        "music",
    ),
    "message": Tool(
        ("send_message", "text_someone", "send_text"),
        "Send a message to a person.",
        {
            "to": Param("to", "string", _one_of(PEOPLE)),
            "text": Param("text", "string", _message),
        },
        (
            "Send {to} the message: {text}.",
            "Tell {to}: {text}.",
            "Write to {to}: {text}.",
            "Send a message to {to} saying {text}.",
            "Let {to} know: {text}.",
            "Text {to} that {text}.",
        ),
        {"status": _one_of(("sent", "delivered"))},
        ("Your message to {to} was {status}.", "Done, the message to {to} is {status}."),
        (),
        "a message",
    ),
    "currency": Tool(
        ("convert_currency", "exchange", "convert_money"),
        "Convert money.",
        {
            "amount": Param("amount", "number", _half(1, 200)),
            "source": Param("from", "string", _one_of(CURRENCIES), tuple(CURRENCIES)),
            "target": Param("target", "string", _one_of(CURRENCIES), tuple(CURRENCIES)),
        },
        (
            "Convert {amount} {source} to {target}.",
            "How much is {amount} {source} in {target}?",
            "What are {amount} {source} in {target}?",
            "Change {amount} {source} into {target}, please.",
            "I have {amount} {source}. How many {target} is that?",
        ),
        {"result": _half(1, 400)},
        ("{amount} {source} are {result} {target}.", "That is {result} {target}."),
        (),
        "money",
    ),
    "shopping": Tool(
        ("add_to_list", "add_item", "shopping_list"),
        "Add an item to the shopping list.",
        {
            "item": Param("item", "string", _one_of(ITEMS)),
            "count": Param("count", "integer", _number(2, 40)),
        },
        (
            "Add {item} to my list.",
            "Put {item} on the shopping list.",
            "We need {item}. Write it down.",
            "Add {count} {item} to the list.",
            "Put {count} packs of {item} on my shopping list.",
            "Please note that I must buy {item}.",
            "Remember to buy {count} times {item}.",
        ),
        {"items": _number(1, 20)},
        (
            "I added {item}. The list has {items} items.",
            "{item} is on the list, with {items} items in all.",
        ),
        ("count",),
        "the shopping list",
    ),
    "light": Tool(
        ("set_light", "switch_light", "light"),
        "Switch a light.",
        {
            "room": Param("room", "string", _one_of(ROOMS)),
            "on": Param("on", "boolean", _one_of((True, False))),
        },
        (
            "Turn {on} the light in the {room}.",
            "Switch {on} the {room} light.",
            "{room} light {on}, please.",
            "Please turn the {room} lamp {on}.",
            "Can you switch the light in the {room} {on}?",
        ),
        {"status": _one_of(("ok", "done"))},
        ("The light in the {room} is {on}.", "Done, the {room} light is {on} now."),
        (),
        "a light",
    ),
    "route": Tool(
        ("find_route", "directions", "plan_route"),
        "Find a way between two places.",
        {
            "start": Param("start", "string", _one_of(PLACES)),
            "end": Param("end", "string", _one_of(PLACES)),
            "mode": Param(
                "mode", "string", _one_of(("walk", "bike", "bus")), ("walk", "bike", "bus")
            ),
        },
        (
            "How do I get from {start} to {end}?",
            "Find the way from {start} to {end}.",
            "Show me a {mode} route from {start} to {end}.",
            "I want to go from {start} to {end} by {mode}.",
            "Plan a trip from {start} to {end}.",
        ),
        {"minutes": _number(3, 90)},
        (
            "It takes {minutes} minutes from {start} to {end}.",
            "The way to {end} takes {minutes} minutes.",
        ),
        ("mode",),
        "a route",
    ),
    "translate": Tool(
        ("translate", "translate_text", "translator"),
        "Translate a text.",
        {
            "text": Param("text", "string", _one_of(PHRASES)),
            "language": Param("language", "string", _one_of(LANGUAGES)),
        },
        (
            'Translate "{text}" into {language}.',
            'How do you say "{text}" in {language}?',
            'What is "{text}" in {language}?',
            'Please put "{text}" into {language}.',
            'I need "{text}" in {language}.',
        ),
        {"status": _one_of(("shown", "ready"))},
        (
            "The {language} translation is {status}.",
            "Your translation into {language} is {status}.",
        ),
        (),
        "a translation",
    ),
    "books": Tool(
        ("search_books", "find_books", "book_search"),
        "Search the library.",
        {
            "topic": Param("topic", "string", _one_of(TOPICS)),
            "limit": Param("limit", "integer", _number(2, 20)),
        },
        (
            "Find books about {topic}.",
            "I want to read about {topic}.",
            "Search the library for {topic}.",
            "Show me {limit} books about {topic}.",
            "Find at most {limit} books on {topic}.",
            "Are there any books about {topic}?",
        ),
        {"found": _number(1, 60)},
        ("I found {found} books about {topic}.", "There are {found} books about {topic}."),
        ("limit",),
        "books",
    ),
    "table": Tool(
        ("book_table", "reserve_table", "reservation"),
        "Reserve a table.",
        {
            "people": Param("people", "integer", _number(1, 14)),
            "time": Param("time", "string", _one_of(TIMES)),
            "day": Param("day", "string", _one_of(DAYS)),
        },
        (
            "Book a table for {people} at {time}.",
            "Reserve a table for {people} people at {time}.",
            "We are {people} and want to eat at {time} on {day}.",
            "Get me a table on {day} at {time} for {people}.",
            "A table for {people} guests at {time}, please.",
        ),
        {"table": _number(1, 30)},
        ("Table {table} is yours at {time}.", "Done, you have table {table} at {time}."),
        ("day",),
        "a table",
    ),
    "time": Tool(
        ("get_time", "world_clock", "local_time"),
        "Local time in a city.",
        {"city": Param("city", "string", _one_of(CITIES))},
        (
            "What time is it in {city}?",
            "What is the time in {city}?",
            "How late is it in {city}?",
            "Tell me the local time in {city}.",
            "Which time do they have in {city} now?",
        ),
        {"time": _one_of(TIMES)},
        ("It is {time} in {city}.", "The time in {city} is {time}."),
        (),
        "the time",
    ),
    "event": Tool(
        ("create_event", "add_event", "calendar_add"),
        "Add an event to the calendar.",
        {
            "title": Param("title", "string", _one_of(EVENTS)),
            "day": Param("day", "string", _one_of(DAYS)),
            "time": Param("time", "string", _one_of(TIMES)),
        },
        (
            "Add {title} on {day} at {time} to my calendar.",
            "I have {title} on {day} at {time}.",
            "Put {title} in the calendar for {day}.",
            "Plan {title} for {day} at {time}.",
            "Note {title} on {day}, please.",
            "Schedule {title} on {day} at {time}.",
        ),
        {"status": _one_of(("saved", "added"))},
        ("{title} is {status} for {day}.", "Done, {title} on {day} is {status}."),
        ("time",),
        "the calendar",
    ),
    "heating": Tool(
        ("set_temperature", "thermostat", "heat_room"),
        "Set a room's temperature.",
        {
            "degrees": Param("degrees", "number", _half(15, 26)),
            "room": Param("room", "string", _one_of(ROOMS)),
        },
        (
            "Set the heating to {degrees} degrees.",
            "Heat the {room} to {degrees} degrees.",
            "Make the {room} {degrees} degrees warm.",
            "I want {degrees} degrees in the {room}.",
            "Turn the heating to {degrees}.",
        ),
        {"now": _half(12, 22)},
        (
            "The heating is set to {degrees} degrees.",
            "It is {now} degrees now and will be {degrees} soon.",
        ),
        ("room",),
        "the heating",
    ),
    "dice": Tool(
        ("roll_dice", "dice", "throw_dice"),
        "Roll dice.",
        {
            "count": Param("count", "integer", _number(1, 30)),
            "sides": Param("sides", "integer", _one_of((4, 6, 8, 10, 12, 20, 100))),
        },
        (
            "Roll {count} dice with {sides} sides.",
            "Throw {count} dice of {sides} sides.",
            "Please roll {count} dice.",
            "I need {count} dice rolls with {sides} sides.",
            "Give me {count} random dice.",
        ),
        {"total": _number(2, 150)},
        ("The dice show {total}.", "You rolled {total} in all."),
        ("sides",),
        "dice",
    ),
    "feed": Tool(
        ("feed_pet", "feed", "give_food"),
        "Feed a pet of the village.",
        {
            "pet": Param("pet", "string", _one_of(PET_NAMES)),
            "food": Param(
                "food",
                "string",
                _one_of([*FOODS, "hay", "seeds", "fish", "carrots", "lettuce"]),
            ),
            "grams": Param("grams", "integer", _number(10, 400)),
        },
        (
            "Feed {pet} with {food}.",
            "Give {pet} {grams} grams of {food}.",
            "{pet} is hungry. Give {food}, please.",
            "Please give some {food} to {pet}.",
            "Put {grams} grams of {food} in the bowl of {pet}.",
        ),
        {"status": _one_of(("happy", "full", "asleep"))},
        ("{pet} is {status} now.", "Done. {pet} ate and is {status}."),
        ("grams",),
        "feeding a pet",
    ),
}
