"""The word lists of the corpus. Data only."""

from __future__ import annotations


def listed(text: str) -> list[str]:
    """ "a, b" -> ["a", "b"]."""
    return [word.strip() for word in " ".join(text.split()).split(",")]


NAMES = listed(
    """
    Mira, Tobin, Elsie, Corin, Hazel, Bram, Linnea, Otis, Poppy, Rowan, Saskia, Felix,
    Greta, Jonas, Ivy, Marlo, Nell, Quill, Tessa, Wren, Yara, Zeno, Abel, Dora
    """
)
JOBS = listed(
    """
    baker, miller, blacksmith, teacher, fisher, beekeeper, carpenter, gardener, potter,
    weaver, doctor, postman, clockmaker, shepherd, painter, librarian, cook, tailor,
    ferryman, glassblower, cobbler, cheesemaker, lamplighter, innkeeper
    """
)
HOMES = listed(
    """
    the old mill, the blue cottage, the lighthouse, the stone tower, the red barn, the
    boathouse, the attic above the bakery, the hut by the pond, the house with the green
    door, the treehouse, the cabin in the pines, the yellow farmhouse, the windmill, the
    narrow house on Bridge Street, the round house, the cottage under the oak, the
    houseboat, the white villa, the rooms behind the library, the shed by the orchard, the
    inn, the brick house on the hill, the wagon near the well, the chapel house
    """
)
PETS = listed(
    """
    cat, dog, goat, parrot, rabbit, tortoise, hedgehog, owl, donkey, duck, fox, mouse
    """
)
PET_NAMES = listed(
    """
    Pepper, Biscuit, Clover, Thimble, Sorrel, Button, Pickle, Juniper, Maple, Pebble,
    Nutmeg, Bramble, Tulip, Cobweb, Mango, Feather, Ginger, Turnip, Velvet, Acorn, Sprout,
    Cricket, Waffle, Domino
    """
)
FOODS = listed(
    """
    apple pie, mushroom soup, plum cake, cheese toast, pancakes, roasted carrots, pumpkin
    stew, blackberry jam, potato dumplings, honey bread, fish soup, cherry tart
    """
)
COLOURS = listed(
    """
    red, blue, green, yellow, purple, orange, silver, white, brown, pink
    """
)
INSTRUMENTS = listed(
    """
    flute, fiddle, drum, harp, trumpet, accordion, guitar, piano, whistle, cello
    """
)
HOBBIES = listed(
    """
    painting stones, growing roses, collecting shells, playing chess, baking pies, watching
    stars, knitting scarves, carving wood, reading maps, building kites, singing songs,
    climbing hills
    """
)
SEASONS = listed(
    """
    spring, summer, autumn, winter
    """
)
WEATHERS = listed(
    """
    sunny, foggy, rainy, windy, golden, frosty, quiet
    """
)
STRANGERS = listed(
    """
    Anna, Ben, Carla, David, Emma, Frank, Hugo, Irene, Kate, Leo, Maria, Nora, Oscar, Paul,
    Rosa, Sam, Tim, Uma, Vera, Will
    """
)
CITIES = listed(
    """
    Oslo, Paris, Berlin, Madrid, Lisbon, Vienna, Prague, Dublin, Athens, Cairo, Tokyo,
    Seoul, Lima, Quito, Boston, Denver, Dallas, Toronto, Montreal, Havana, Nairobi, Accra,
    Tunis, Delhi, Mumbai, Bangkok, Hanoi, Manila, Sydney, Perth, Helsinki, Riga, Warsaw,
    Zurich, Milan, Naples, Porto, Bergen, Malmo, Ghent, Lyon, Bristol, Leeds, Glasgow,
    Hamburg, Munich, Krakow, Seville, Austin, Chicago
    """
)
ITEMS = listed(
    """
    milk, bread, eggs, apples, butter, rice, soap, candles, tea, coffee, sugar, flour,
    carrots, potatoes, onions, cheese, honey, salt, lemons, pears, batteries, matches,
    string, nails, paper, pencils, olive oil, oat flakes, garden gloves, washing powder
    """
)
ROOMS = listed(
    """
    kitchen, bedroom, living room, bathroom, hallway, attic, cellar, garage, office, nursery
    """
)
DAYS = listed(
    """
    Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
    """
)
EVENTS = listed(
    """
    dentist, piano lesson, team meeting, picnic, book club, football match, haircut, dinner
    with Anna, garden party, choir practice, car repair, birthday party, chess evening,
    swimming, parents evening, tea with Leo
    """
)
LANGUAGES = listed(
    """
    French, German, Spanish, Italian, Swedish, Polish, Greek, Dutch, Japanese, Turkish
    """
)
PHRASES = listed(
    """
    good morning, thank you, see you soon, where is the station, I am hungry, the soup is
    hot, how are you, a glass of water, happy birthday, good night, I love this song, the
    bus is late, open the window, my name is Leo, two tickets please, the cat is asleep
    """
)
TOPICS = listed(
    """
    whales, volcanoes, old clocks, wild birds, space travel, chess, knitting, dragons,
    baking, trains, bees, castles, robots, gardening, pirates, the deep sea, mountain
    flowers, ancient Egypt
    """
)
GENRES = listed(
    """
    jazz, rock, folk, classical, pop
    """
)
CURRENCIES = listed(
    """
    dollars, euros, pounds, yen, francs, crowns
    """
)
TEXT_STARTS = listed(
    """
    I will be late, dinner is ready, the train leaves, we meet, please call me, I found your
    keys, the party starts, bring the map
    """
)
TEXT_ENDS = listed(
    """
    at noon, tonight, tomorrow, on Friday, at the station, in ten minutes, after work,
    before lunch, at six, near the bridge
    """
)
