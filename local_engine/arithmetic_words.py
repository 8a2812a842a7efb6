"""Sentences for word problems, and prompts that are not arithmetic at all."""

import random
from collections.abc import Sequence

Event = tuple[str, int, int]
"""What happens, and its one or two numbers."""

_NAMES = ("Tom", "Anna", "Ben", "Lucy", "Sam", "Maria", "Leo", "Nina", "Omar", "Eva")
_THINGS = ("apples", "books", "coins", "pens", "cards", "stamps", "marbles", "cookies", "shells", "stickers")
_BAGS = ("boxes", "bags", "packs", "jars")
_SENTENCES = {
    "start": (
        "{name} has {x} {things}.",
        "{name} starts with {x} {things}.",
        "There are {x} {things} on the table.",
        "A shop has {x} {things}.",
        "{name} owns {x} {things}.",
    ),
    "product": (
        "{name} has {x} {bags} with {y} {things} each.",
        "There are {x} {bags} of {y} {things}.",
        "{name} buys {x} {bags} of {things}, {y} in each.",
        "A shop has {x} {bags}, each with {y} {things}.",
        "There are {x} rows of {y} {things}.",
    ),
    "gain": (
        "Then {x} more arrive.",
        "{pronoun} buys {x} more.",
        "{name} finds {x} more.",
        "A friend adds {x} more.",
        "Another {x} come in the mail.",
        "{name} wins {x} more.",
    ),
    "loss": (
        "{pronoun} gives away {x}.",
        "{name} loses {x}.",
        "Then {x} are sold.",
        "{x} of them break.",
        "A friend takes {x} of them.",
        "{name} uses up {x}.",
    ),
    "multiple": (
        "Then the number grows {x} times.",
        "Now there are {x} times as many.",
        "The number is multiplied by {x}.",
    ),
    "boxes_in": (
        "Then {x} {bags} of {y} arrive.",
        "{name} buys {x} {bags} with {y} in each.",
        "A friend brings {x} {bags}, {y} in each.",
        "{x} people add {y} each.",
    ),
    "left_over": (
        "They are put into {bags} of {x}.",
        "{name} fills {bags} of {x}.",
        "{x} people share them evenly.",
    ),
}
_ASKS = (
    "How many {things} are there now?",
    "How many {things} are left?",
    "How many {things} is that in the end?",
    "How many {things} does that make?",
)
_LEFT_OVER_ASKS = (
    "How many {things} are left over?",
    "How many {things} remain?",
    "How many {things} do not fit?",
    "What is the remainder?",
)


def word_text(rng: random.Random, start: Event, events: Sequence[Event]) -> str:
    """The story in words: how it starts, what happens, and what is asked."""
    name = rng.choice(_NAMES)
    words = {"name": name, "things": rng.choice(_THINGS), "bags": rng.choice(_BAGS)}
    words["pronoun"] = rng.choice((name, "She" if name in ("Anna", "Lucy", "Maria", "Nina", "Eva") else "He"))
    text = [rng.choice(_SENTENCES[kind]).format(x=x, y=y, **words) for kind, x, y in (start, *events)]
    asks = _LEFT_OVER_ASKS if events and events[-1][0] == "left_over" else _ASKS
    return " ".join((*text, rng.choice(asks).format(**words)))


def other_prompt(rng: random.Random) -> str:
    """A prompt that is not arithmetic, or arithmetic beyond the model: it should refuse."""
    if rng.random() < 0.4:
        return _unknown_words(rng)
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    return rng.choice(_OTHER).format(
        thing=rng.choice(_TOPICS),
        place=rng.choice(_PLACES),
        name=rng.choice(_NAMES),
        year=rng.randint(1500, 2030),
        a=a,
        b=b,
    )


def _unknown_words(rng: random.Random) -> str:
    """A question in words that the model cannot know, so that whatever it does not know looks alike to it."""
    words = [_word(rng) for _ in range(min(60, 3 + int(rng.expovariate(1 / 10))))]
    for at in range(len(words)):
        if rng.random() < 0.4:
            words[at] = rng.choice(_COMMON.split())
        elif rng.random() < 0.05:
            words[at] = str(rng.randint(1, 2000))
    opening = rng.choice(("What is the", "Which", "Who", "Why does", "How", "Explain the", "The", "If", "Write", ""))
    text = f"{opening} {' '.join(words)}".strip()
    if len(words) > 14:
        cut = rng.randint(6, len(words) - 4)
        text = " ".join((*text.split(" ")[:cut], "\n" if rng.random() < 0.3 else ".", *text.split(" ")[cut:]))
    return text.replace(" .", ".") + rng.choice(("?", "?", ".", ""))


def _word(rng: random.Random) -> str:
    word = "".join(rng.choice(_SYLLABLES.split()) for _ in range(rng.randint(1, 4)))
    return word.capitalize() if rng.random() < 0.12 else word


_SYLLABLES = "an er in on re st th ing tion pro con de ment al or ic ly ter um phy lo sy ga ch qu ba mi vo"
_COMMON = "the of a to in is that and for with on as are by it was from an be which not or have at many"
_TOPICS = (
    "the sea",
    "cats",
    "a black hole",
    "music",
    "bread",
    "rain",
    "history",
    "a car",
    "love",
    "recursion",
    "trees",
)
_PLACES = ("France", "Japan", "Peru", "Egypt", "Norway", "Kenya", "India", "Canada", "Italy", "Spain")
_OTHER = (
    "Hello",
    "hi",
    "Hi there!",
    "Hello, how are you?",
    "Good morning",
    "Thanks!",
    "Who are you?",
    "What can you do?",
    "What is the capital of {place}?",
    "What is the population of {place}?",
    "Where is {place}?",
    "Who is {name}?",
    "What is {thing}?",
    "What happened in {year}?",
    "Who won the election in {year}?",
    "Tell me about {thing}.",
    "Tell me a joke about {thing}.",
    "Write a poem about {thing}.",
    "Write a short story about {name} and {thing}.",
    "Write a Python function that sorts a list.",
    "Explain {thing} to a child.",
    "Explain how {thing} works.",
    "Summarise this text: {name} went to {place} in {year} to see {thing}.",
    "Translate '{thing}' into French.",
    "Is {thing} older than {name}?",
    "Fix this code: for i in range({a}): print(i)",
    "What is {a} / {b}?",
    "Divide {a} by {b}.",
    "What is {a} divided by {b}?",
    "What is the square root of {a}?",
    "What is {a}% of {b}?",
    "Is {a} a prime number?",
    "Solve x + {a} = {b} for x.",
    "Prove that {thing} is infinite.",
    "Give me {a} ideas for a birthday party.",
    "What is the weather in {place} today?",
    "Why do people like {thing}?",
    "Plan a trip to {place} for {b} days.",
)
