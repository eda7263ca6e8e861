"""The language of the reference bundle: a narrow spoken assistant, as data.

A sentence is a template with its slots filled; its answer is another template filled with the same
values, so the right answer to every sentence is known. This module makes text only; speech.py speaks it.
It is a test bed for speech alignment, not a model of conversation.

    python -m tiny_align.reference.corpus --sentences 20      # look at some
"""

import argparse
import random
import zlib
from dataclasses import dataclass

ANSWER_INSTRUCTIONS = (
    "Answer the user.",
    "Answer.",
    "Reply to the user.",
    "You are a helpful assistant.",
    "Do what the user asks.",
    "Give a short answer.",
)
REPEAT_INSTRUCTIONS = (
    "Repeat what the user says.",
    "Repeat.",
    "Repeat after the user.",
    "Write down what the user says.",
    "Transcribe the speech.",
    "Say the same words again.",
)

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEENS = [
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
MONTHS = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
]


def number(n: int) -> str:
    """0..100 in words, as a person says it."""
    if n < 20:
        return (DIGITS + TEENS)[n]
    if n == 100:
        return "one hundred"
    return TENS[n // 10 - 2] + (f" {DIGITS[n % 10]}" if n % 10 else "")


def _pairs(a: str, b: str, text: str) -> list[dict[str, str]]:
    """'x:y, z:w' -> [{a: x, b: y}, ...]: slots whose values belong together."""
    return [dict(zip((a, b), item.strip().split(":"), strict=True)) for item in text.split(",")]


def _words(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


def _pronouns(text: str) -> list[dict[str, str]]:
    """'my mother' in a request is 'your mother' in its answer."""
    return [{"person": p, "whom": p.replace("my ", "your ")} for p in _words(text)]


def _spell(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(DIGITS) for _ in range(rng.randint(low, high)))


def _count(rng: random.Random) -> dict[str, str]:
    low = rng.randint(0, 12)
    high = low + rng.randint(2, 4)
    return {
        "low": number(low),
        "high": number(high),
        "steps": " ".join(map(number, range(low, high + 1))),
    }


def _clock(rng: random.Random) -> dict[str, str]:
    hour = number(rng.randint(1, 12))
    minute = rng.choice(["", "", " fifteen", " thirty", " forty five", " twenty", " ten", " fifty"])
    return {"clock": hour + minute + rng.choice(["", "", " in the morning", " in the evening"])}


SLOTS = {
    "room": _words("kitchen, bedroom, bathroom, office, hall, garage, cellar, living room, dining room, attic"),
    "device": _words("light, lamp, fan, heater, radio, television, speaker, camera"),
    "state": ["on", "off"],
    "percent": [number(n) for n in range(10, 101, 5)],
    "degrees": [number(n) for n in range(15, 29)],
    "door": _words("front door, back door, garage door, garden gate, kitchen window, cellar door"),
    "moved": _pairs("move", "moved", "open:open, close:closed, lock:locked, unlock:unlocked, shut:shut"),
    "span": [f"{number(n)} minutes" for n in range(2, 61)]
    + [f"{number(n)} seconds" for n in range(5, 61, 5)]
    + [f"{number(n)} hours" for n in range(2, 13)]
    + ["one minute", "one hour"],
    "food": _words("pasta, rice, eggs, soup, bread, tea, coffee, cake, pizza, fish, chicken, potatoes"),
    "item": _words(
        "milk, butter, cheese, apples, oranges, bananas, sugar, salt, honey, water, paper, soap, onions, carrots"
    ),
    "city": _words("london, paris, berlin, rome, madrid, tokyo, boston, chicago, sydney, dublin, vienna, oslo, cairo"),
    "day": [*DAYS, "today", "tomorrow", "tonight", "this weekend"],
    "person": _pronouns(
        "anna, peter, mary, thomas, julia, david, laura, robert, my mother, my father, my sister, my brother, "
        "my doctor, my daughter, my son, the office"
    ),
    "genre": _words("jazz, rock, folk, blues, piano music, quiet music, dance music, the news, a story"),
    "task": _words(
        "water the plants, feed the cat, walk the dog, call the doctor, buy a ticket, take out the trash, "
        "pay the rent, wash the car, clean the house, read a book, check the oven, lock the door, drink some water"
    ),
    "pill": _words("red, blue, white, yellow, green, small, big"),
    "feeling": _words("tired, happy, sad, hungry, thirsty, cold, hot, sick, late, lost, busy, fine"),
    "country": _pairs(
        "country", "capital",
        "france:paris, germany:berlin, italy:rome, spain:madrid, japan:tokyo, ireland:dublin, austria:vienna, "
        "norway:oslo, egypt:cairo, england:london, greece:athens, poland:warsaw, portugal:lisbon, peru:lima, "
        "cuba:havana, sweden:stockholm",
    ),
    "contrast": _pairs(
        "word", "opposite",
        "hot:cold, big:small, up:down, left:right, fast:slow, young:old, happy:sad, early:late, open:closed, "
        "light:dark, full:empty, high:low, hard:soft, wet:dry, good:bad, near:far, clean:dirty, cold:hot, "
        "small:big, down:up, right:left, slow:fast, old:young, sad:happy, late:early, dark:light",
    ),
    "colored": _pairs(
        "thing", "color",
        "sky:blue, grass:green, snow:white, sun:yellow, night:black, blood:red, sea:blue, milk:white, coal:black, "
        "honey:golden, mouse:gray, tree:green, rose:red",
    ),
    "animal": _pairs("animal", "noise", "cow:moo, dog:woof, cat:meow, duck:quack, sheep:baa, bird:tweet, pig:oink"),
    "after": [{"first": a, "next": b} for names in (DAYS, MONTHS) for a, b in zip(names, names[1:] + names[:1])],
    "before": [{"last": b, "previous": a} for names in (DAYS, MONTHS) for a, b in zip(names, names[1:] + names[:1])],
    "unit": [
        {"unit": u, "whole": w, "amount": a}
        for u, w, a in (
            ("minutes", "an hour", "sixty"), ("hours", "a day", "twenty four"), ("days", "a week", "seven"),
            ("months", "a year", "twelve"), ("seconds", "a minute", "sixty"), ("legs", "a spider", "eight"),
            ("legs", "a dog", "four"), ("wheels", "a car", "four"), ("wheels", "a bicycle", "two"),
            ("fingers", "a hand", "five"), ("eggs", "a dozen", "twelve"), ("days", "june", "thirty"),
        )
    ],
    "polite": ["", "", "", "please ", "could you ", "can you "],
    "digits": lambda rng: {"digits": _spell(rng, 3, 6)},
    "phone": lambda rng: {"phone": _spell(rng, 3, 6)},
    "count": _count,
    "clock": _clock,
}  # fmt: skip


@dataclass(frozen=True)
class Intent:
    name: str
    asks: tuple[str, ...]  # templates of the sentence
    answer: str  # template of the answer
    weight: float = 1.0


INTENTS = (
    Intent("switch", ("{polite}turn {state} the {room} {device}", "{polite}turn the {room} {device} {state}",
                      "{polite}switch {state} the {device} in the {room}"), "the {room} {device} is now {state}", 2),
    Intent("dim", ("{polite}set the {room} {device} to {percent} percent",),
           "the {room} {device} is at {percent} percent", 1.5),
    Intent("warm", ("{polite}set the {room} to {degrees} degrees", "make the {room} {degrees} degrees warm",
                    "i want {degrees} degrees in the {room}"), "the {room} will be {degrees} degrees", 1.5),
    Intent("door", ("{polite}{move} the {door}", "is the {door} {moved}"), "the {door} is {moved}"),
    Intent("timer", ("{polite}set a timer for {span}", "start a timer for {span}", "{span} please"),
           "your timer is set for {span}", 1.5),
    Intent("cook", ("set a {food} timer for {span}", "i need to cook the {food} for {span}"),
           "the {food} will be ready in {span}", 1.5),
    Intent("alarm", ("wake me up at {clock}", "{polite}set an alarm for {clock}", "i have to get up at {clock}"),
           "your alarm is set for {clock}", 1.5),
    Intent("weather", ("what is the weather in {city} {day}", "how is the weather in {city} {day}",
                       "what will the weather be in {city} {day}"), "here is the weather in {city} for {day}", 1.5),
    Intent("rain", ("will it rain in {city} {day}", "do i need a coat in {city} {day}"),
           "i will check the rain in {city} for {day}"),
    Intent("call", ("{polite}call {person}", "i want to talk to {person}", "call {person} {day}"), "calling {whom}"),
    Intent("dial", ("{polite}dial {phone}", "call the number {phone}", "my number is {phone}"),
           "the number {phone} is dialed", 2),
    Intent("digits", ("{digits}",), "you said {digits}", 3),
    Intent("message", ("tell {person} that i am {feeling}", "send {person} a message that i am {feeling}"),
           "telling {whom} that you are {feeling}"),
    Intent("feeling", ("i am {feeling}", "i feel {feeling} {day}"), "i hear that you are {feeling}", 0.5),
    Intent("shop", ("add {item} and {food} to my list", "{polite}buy {item} and {food}", "we need {item} and {food}"),
           "{item} and {food} are on your list", 1.5),
    Intent("music", ("{polite}play {genre} in the {room}", "i want to hear {genre} in the {room}"),
           "playing {genre} in the {room}"),
    Intent("volume", ("{polite}set the volume to {percent}", "volume {percent} please"),
           "the volume is now {percent}", 0.5),
    Intent("remind", ("remind me to {task} {day}", "i must {task} {day}", "do not let me forget to {task} {day}"),
           "i will remind you to {task} {day}", 1.5),
    Intent("pill", ("i took the {pill} pill at {clock}", "did i take the {pill} pill at {clock}"),
           "you took the {pill} pill at {clock}", 1.5),
    Intent("capital", ("what is the capital of {country}", "tell me the capital of {country}"),
           "the capital of {country} is {capital}", 0.5),
    Intent("opposite", ("what is the opposite of {contrast}", "tell me the opposite of {contrast}"),
           "the opposite of {word} is {opposite}", 0.5),
    Intent("color", ("what color is the {colored}", "tell me the color of the {colored}"),
           "the {thing} is {color}", 0.5),
    Intent("animal", ("what does the {animal} say", "what sound does a {animal} make"),
           "the {animal} says {noise}", 0.5),
    Intent("calendar", ("what comes after {after}", "what is the next one after {after}"),
           "{next} comes after {first}", 0.5),
    Intent("backwards", ("what comes before {before}", "what was right before {before}"),
           "{previous} comes before {last}", 0.5),
    Intent("count", ("count from {low} to {high}", "{polite}count up from {low} to {high}"), "{steps}", 1),
    Intent("unit", ("how many {unit} are in {whole}", "tell me how many {unit} {whole} has"),
           "there are {amount} {unit} in {whole}", 0.5),
    Intent("hello", ("hello", "good morning", "good evening", "hello my name is {person}"),
           "hello how can i help you", 0.2),
    Intent("thanks", ("thank you", "thank you very much", "that is all for {day}"), "you are welcome", 0.2),
)  # fmt: skip

_SUPPLIERS = {  # which slot supplies a field that is not a slot's own name
    "whom": "person", "move": "moved", "capital": "country", "word": "contrast", "opposite": "contrast",
    "thing": "colored", "color": "colored", "noise": "animal", "first": "after", "next": "after", "last": "before",
    "previous": "before", "whole": "unit", "amount": "unit",
    "low": "count", "high": "count", "steps": "count",
}  # fmt: skip


@dataclass(frozen=True)
class Sentence:
    intent: str
    text: str
    answer: str


def _fill(intent: Intent, rng: random.Random) -> Sentence:
    ask = rng.choice(intent.asks)
    values: dict[str, str] = {}
    fields = [
        part.split("}")[0] for template in (ask, intent.answer) for part in template.split("{")[1:]
    ]
    for slot in dict.fromkeys(_SUPPLIERS.get(field, field) for field in fields):
        values.update(_draw(slot, rng))
    return Sentence(intent.name, ask.format(**values), intent.answer.format(**values))


def _draw(slot: str, rng: random.Random) -> dict[str, str]:
    source = SLOTS[slot]
    value = source(rng) if callable(source) else rng.choice(source)
    if isinstance(value, str):
        return {slot: value}
    return value | {slot: next(iter(value.values()))} if slot not in value else value


def is_held_out(text: str) -> bool:
    """One sentence in twelve belongs to the test split, decided by the sentence alone."""
    return zlib.crc32(text.encode()) % 12 == 0


def sentences(n: int, seed: int, *, held_out: bool = False, unique: bool = True) -> list[Sentence]:
    """`n` sentences of one split, drawn by intent weight; `unique` drops repeats of the same text."""
    rng = random.Random(f"{seed}-{held_out}")
    weights = [intent.weight for intent in INTENTS]
    found: dict[str, Sentence] = {}
    out: list[Sentence] = []
    while len(out) < n:
        sentence = _fill(rng.choices(INTENTS, weights)[0], rng)
        if is_held_out(sentence.text) != held_out or (unique and sentence.text in found):
            continue
        found[sentence.text] = sentence
        out.append(sentence)
    return out


def vocabulary() -> list[str]:
    """Every word a sentence or an answer can hold."""
    drawn = sentences(30_000, 0, unique=False) + sentences(3_000, 0, held_out=True, unique=False)
    return sorted({word for s in drawn for word in f"{s.text} {s.answer}".split()})


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for s in sentences(args.sentences, args.seed):
        print(f"{s.intent:10s} {s.text:60s} -> {s.answer}")
    print(f'{{"words": {len(vocabulary())}}}')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
