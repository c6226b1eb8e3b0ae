"""Short stories from a small grammar: a wish, a trouble, a helper, an ending, all set in the
village.

Knows the world; knows nothing about chat formats.
"""

from __future__ import annotations

import random

from words import COLOURS, NAMES, SEASONS, WEATHERS
from world import PLACES, VILLAGERS, articles, held_out

# thing: (wishes, troubles, remedies); the first remedy is for the first trouble, the second for
# the second
THINGS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "lantern": (
        ["light the dark path to {p}", "read one more page after sunset"],
        ["the flame went out in every gust of wind", "the glass was black with soot"],
        [
            "cut a new wick and shut the little door well",
            "polished the glass and poured in fresh oil",
        ],
    ),
    "kite": (
        ["fly it high above {p}", "send a letter up to the clouds"],
        [
            "the string was tied in a hundred knots",
            "the tail was torn and the kite fell like a leaf",
        ],
        [
            "made a new tail from ribbons and wound a new string",
            "sewed the cloth and picked the knots apart",
        ],
    ),
    "boat": (
        ["row across to the far shore", "catch the moon in the water"],
        ["water came in through a small crack", "one oar had floated away in the night"],
        ["sealed the planks with wax and carved a new oar", "brought pitch, rope and a spare oar"],
    ),
    "bell": (
        ["ring it at the summer festival", "call everyone home for supper"],
        ["it made no sound at all", "it only went clunk like a wooden bowl"],
        [
            "found a bird's nest inside and moved it gently to a tree",
            "hung a new clapper inside it",
        ],
    ),
    "map": (
        ["find the spring behind {p}", "follow the dotted line to its end"],
        ["the ink had faded to almost nothing", "half of the paper was missing"],
        [
            "held it over a candle until the lines came back",
            "remembered the missing half and drew it anew",
        ],
    ),
    "key": (
        ["open the chest in the attic", "find the door it belonged to"],
        ["it was too rusty to turn", "it did not fit any door in the village"],
        ["rubbed it with oil and sand until it shone", "knew of a little gate behind the roses"],
    ),
    "drum": (
        ["play it in the spring parade", "wake the sleepy frogs of {p}"],
        ["the skin was as slack as an old sock", "the sticks had been chewed by the goats"],
        [
            "warmed it by the fire and tied it tight",
            "stretched the skin and whittled two new sticks",
        ],
    ),
    "book": (
        ["read it aloud at {p}", "learn how the tale ended"],
        ["the last page was gone", "it was written in letters nobody knew"],
        ["had learned the ending by heart as a child", "sat down and read it slowly, word by word"],
    ),
    "clock": (
        ["hear it strike twelve again", "wake before the birds"],
        ["it ran backwards every afternoon", "a wheel inside had lost a tooth"],
        ["turned one tiny screw and smiled", "made a new wheel, no bigger than a pea"],
    ),
    "cake": (
        ["bring it to the birthday at {p}", "bake the tallest cake in the village"],
        ["it sank in the middle like a tired hat", "there was not a single egg left"],
        ["filled the hollow with berries and cream", "came with six eggs in a warm cap"],
    ),
    "umbrella": (
        ["walk to {p} without getting wet", "keep the rain off the new kittens"],
        ["the wind turned it inside out", "it leaked in three places"],
        ["bent the ribs back and patched the cloth", "sewed three stars over the three holes"],
    ),
    "ladder": (
        ["pick the highest apple", "look over the wall at {p}"],
        ["two rungs were broken", "it was one step too short"],
        ["nailed on two new rungs", "held it firmly and added one more step"],
    ),
    "basket": (
        ["fill it with mushrooms from {p}", "carry eggs to market"],
        ["the bottom had a hole as big as a fist", "the handle came off at the gate"],
        ["wove fresh willow through the gap", "tied it up with strong red string"],
    ),
    "hat": (
        ["wear it to the dance", "keep it through the windy season"],
        ["the wind carried it off to {p}", "a hen had laid an egg in it"],
        ["climbed up and brought it back with a bow", "laughed and brought a soft nest instead"],
    ),
    "seed": (
        ["grow the tallest flower in the village", "see what would come out of it"],
        ["the birds kept looking at it hungrily", "nothing grew for three long weeks"],
        ["put a little glass roof over the pot", "said to wait, and to water it with patience"],
    ),
    "letter": (
        ["send it across the sea", "deliver it before nightfall"],
        ["rain had washed the name away", "the road to {p} was flooded"],
        ["knew the handwriting at once", "carried it over the water in a tin box"],
    ),
    "wagon": (
        ["bring pumpkins to {p}", "roll down the long hill"],
        ["a wheel rolled off into the ditch", "the donkey would not move"],
        [
            "lifted the wheel back and fixed it with a pin",
            "offered the donkey a carrot and a kind word",
        ],
    ),
    "bottle": (
        ["send a message down the river", "keep a little of the sunset in it"],
        ["the cork had swollen and would not come out", "it slipped and rolled under {p}"],
        ["pulled the cork with a clever twist", "reached it with a long spoon and a longer arm"],
    ),
    "telescope": (
        ["see the rings of a far planet", "count the stars over {p}"],
        ["a spider had spun a web over the lens", "all it showed was grey fog"],
        ["moved the spider to a rose and wiped the lens", "waited with tea until the fog was gone"],
    ),
    "scarf": (
        ["finish it before the first snow", "make it long enough for two"],
        ["the wool ran out near the end", "the cat had played with it all night"],
        ["found a ball of wool in the same shade", "untangled every thread with quick fingers"],
    ),
}
OPENINGS = [
    "One {season} morning, {h} found an old {t} near {p}.",
    "{h} the {job} had always wanted a {t}.",
    "On a {weather} day in {season}, {h} carried a {t} to {p}.",
    "There was once a {t} that belonged to {h}, the {job} of Fernhollow.",
    "Early one {weather} morning, {h} took the {t} down from the shelf.",
    "In the week of the {season} fair, {h} bought a {c} {t} at the market.",
    "{h} kept a {c} {t} under the bed and told nobody about it.",
    "When {season} came to Fernhollow, {h} was given a {t} as a present.",
]
WISHES = [
    "{h} wanted to {wish}.",
    "More than anything, {h} hoped to {wish}.",
    '"Today I will {wish}," said {h}.',
    "The plan was simple: {wish}.",
    "For a whole week {h} had dreamed of one thing, to {wish}.",
]
TROUBLES = [
    "But {trouble}.",
    "There was only one problem: {trouble}.",
    "Then things went wrong, for {trouble}.",
    "Sadly, {trouble}.",
    '"Oh no," said {h}, because {trouble}.',
]
FEELINGS = [
    "{h} sat down on a stone and sighed.",
    "{pet} the {kind} looked up and tilted its head.",
    "{h} tried again and again, but it was no use.",
    "Even {pet} the {kind} did not know what to do.",
    "{h} counted to ten and tried not to cry.",
    "A crow laughed from the roof.",
]
ARRIVALS = [
    "Just then {f} came by, humming a song.",
    "So {h} went to see {f}, the {fjob}.",
    "{f} heard about it and came at once.",
    "That afternoon {f} knocked at the door with a bag of tools.",
    '"Let me have a look," said {f}, the {fjob}.',
]
REMEDIES = [
    "{f} {remedy}.",
    "Without many words, {f} {remedy}.",
    "{f} thought for a while and then {remedy}.",
    "With a smile, {f} {remedy}.",
]
SUCCESSES = [
    "Soon {h} could {wish} after all.",
    "And at last {h} was able to {wish}.",
    "Before the evening bell, it was possible to {wish}.",
    "It worked, and {h} went off to {wish}.",
]
THANKS = [
    "To say thank you, {h} made {food} for two.",
    "They shared {food} and talked until the stars came out.",
    "{h} played a tune on the {instrument}, and {f} danced.",
    "{pet} the {kind} ran in circles for joy.",
    "{f} would take no money, only a slice of bread and a good joke.",
    "They laughed about it all the way home.",
]
ENDINGS = [
    "Since that day, {h} and {f} have been the best of neighbours.",
    "That night {h} slept very well.",
    "And the {t} still stands by the window today.",
    "From then on, {h} never kept a problem secret again.",
    "Everyone in Fernhollow agrees that it is the finest {t} of all.",
    "{h} learned that two heads are better than one.",
    "And if you visit in {season}, you may see it yourself.",
    "It was a good day in Fernhollow.",
]
PROMPTS_BOTH = [
    "Tell me a story about {h} and a {t}.",
    "Write a short story about {h} and a {t}.",
    "Can you tell me a story with {h} and a {t} in it?",
    "I would like a bedtime story about {h} and a {t}.",
    "Please tell a tale about {h} and the {t}.",
]
PROMPTS_HERO = [
    "Tell me a story about {h}.",
    "Write a little story about {h}.",
    "Do you know a story about {h}?",
]
PROMPTS_THING = ["Tell me a story about a {t}.", "Write a story with a {t} in it."]
PROMPTS_FREE = [
    "Tell me a story.",
    "Tell me a bedtime story.",
    "Write a short story.",
    "Do you know a good story?",
]


def story_key(hero: str, thing: str) -> tuple[str, str, str]:
    """What the held-out split hashes for a story prompt."""
    return ("story", hero, thing)


def prompt(rng: random.Random, hero: str, thing: str) -> str:
    """A request that names the hero, the thing, both, or (rarely) neither."""
    kind = rng.choices((PROMPTS_BOTH, PROMPTS_HERO, PROMPTS_THING, PROMPTS_FREE), (7, 2, 1, 1))[0]
    return articles(rng.choice(kind).format(h=hero, t=thing))


def pair(rng: random.Random) -> tuple[str, str]:
    """A hero and a thing that training may see together."""
    while True:
        hero, thing = rng.choice(NAMES), rng.choice(list(THINGS))
        if not held_out(*story_key(hero, thing)):
            return hero, thing


def story(rng: random.Random, hero: str, thing: str) -> str:
    """About 80 to 200 tokens in two or three paragraphs."""
    me = VILLAGERS[hero]
    friend = (
        me["friend"] if rng.random() < 0.5 else rng.choice([name for name in NAMES if name != hero])
    )
    wishes, troubles, remedies = THINGS[thing]
    words = {
        "h": hero,
        "t": thing,
        "f": friend,
        "p": rng.choice(list(PLACES)),
        "c": rng.choice(COLOURS),
        "job": me["job"],
        "fjob": VILLAGERS[friend]["job"],
        "pet": me["pet_name"],
        "kind": me["pet"],
        "food": me["food"],
        "instrument": me["instrument"],
        "season": rng.choice(SEASONS),
        "weather": rng.choice(WEATHERS),
    }
    words["wish"] = rng.choice(wishes).format(**words)
    trouble, remedy = rng.choice(list(zip(troubles, remedies, strict=True)))
    words |= {"trouble": trouble.format(**words), "remedy": remedy.format(**words)}
    first = [OPENINGS, WISHES, TROUBLES] + ([FEELINGS] if rng.random() < 0.7 else [])
    second = [ARRIVALS, REMEDIES, SUCCESSES]
    third = ([THANKS] if rng.random() < 0.8 else []) + [ENDINGS]
    parts = (
        " ".join(rng.choice(pool).format(**words) for pool in part)
        for part in (first, second, third)
    )
    return articles("\n\n".join(parts))
