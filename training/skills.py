"""Small skills, generated: counting, arithmetic, copying, lists, and remembering within a chat.

They let a user provoke outputs of any length, and exercise chat history and system prompts. Every
generator draws from the `random.Random` it is given and nothing else. Knowledge lives in
`questions.py`; mixing the two into training text lives in `corpus.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from training.dialogue import Dialogue, ask

LONGEST_COUNT = 100


def _words(text: str, separator: str | None = None) -> list[str]:
    return text.split(separator)


DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words(
    "January February March April May June July August September October November December"
)
CONSONANTS = "bcdfghjklmnprstvwz"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = _words("red blue green yellow orange purple black white brown pink grey silver")
NAMES = _words(
    "Ada Alan Amir Ana Bo Carla Chen David Elena Emma Fatima Grace Hugo Ines Ivan Jack John "
    "Julia Kofi Lena Leo Lucy Maria Max Mei Nina Noah Omar Pablo Paul Priya Rosa Sam Sara Tom "
    "Vera Wei Zoe"
)
WORDS = _words(
    "apple river stone cloud green seven window table music paper garden silver morning yellow "
    "winter summer bread water light forest mountain ocean letter number simple happy quick slow "
    "tandem prefill decode cache block token batch worker router gateway engine stream queue chunk "
    "model prompt answer server cluster bird horse tiger rabbit train bridge castle candle coffee "
    "orange lemon pepper sugar basket button mirror pencil rocket planet island harbor village "
    "doctor teacher farmer sailor dragon wizard shadow thunder pillow blanket hammer ladder"
)
# The answer of the entry `out-of-scope` in `data/identity.yaml`.
UNKNOWN = (
    "I do not know that. I am a small demonstration model and only know LLM serving and Tandem."
)
EVERYDAY = _words(
    "a cat,a horse,the moon,the sun,cheese,chocolate,coffee,football,chess,a violin,opera,rain,"
    "snow,a volcano,the sea,Paris,London,Berlin,Japan,Brazil,Africa,gold,iron,a bicycle,a car,"
    "a train,an airplane,a garden,a rose,a tree,bread,soup,pizza,wine,tea,a castle,Napoleon,"
    "Einstein,Mozart,Shakespeare,the Romans,the dinosaurs,history,poetry,painting,dancing,"
    "swimming,tennis,a doctor,a lawyer,money,marriage,friendship,happiness,chemistry,biology,"
    "gravity,electricity,a planet",
    ",",
)


def _numbers(values: range) -> str:
    return ", ".join(str(value) for value in values)


def count_up(rng: random.Random) -> Dialogue:
    """Counting from one number to another, sometimes to a hundred."""
    last = LONGEST_COUNT if rng.random() < 0.06 else rng.randint(2, LONGEST_COUNT)
    reach = rng.choice((4, 6, 8, 12, 16, 20, 30, LONGEST_COUNT))
    first = 1 if rng.random() < 0.4 else rng.randint(max(0, last - reach), last - 1)
    forms = ["Count from {a} to {b}.", "Count up from {a} to {b}.", "Please count from {a} to {b}"]
    forms += [
        "count {a} to {b}",
        "List the numbers from {a} to {b}.",
        "Write the numbers {a} to {b}.",
    ]
    forms += ["Can you count from {a} to {b}?", "Print all numbers from {a} to {b}."]
    if first == 1:
        forms += ["Count to {b}.", "Can you count to {b}?", "count to {b}", "Please count to {b}."]
    return ask(rng.choice(forms).format(a=first, b=last), _numbers(range(first, last + 1)))


def count_down(rng: random.Random) -> Dialogue:
    """Counting backwards."""
    first = rng.randint(2, 60)
    last = rng.choice((0, 1)) if first <= 30 and rng.random() < 0.5 else None
    if last is None:
        last = rng.randint(max(0, first - 20), first - 1)
    forms = ["Count down from {a} to {b}.", "Count backwards from {a} to {b}."]
    forms += ["count down from {a} to {b}", "Please count down from {a} to {b}."]
    return ask(rng.choice(forms).format(a=first, b=last), _numbers(range(first, last - 1, -1)))


def steps(rng: random.Random) -> Dialogue:
    """Even numbers, odd numbers, and the multiples of a small number."""
    kind = rng.choice(("even", "odd", "multiples"))
    if kind == "multiples":
        base, times = rng.randint(2, 10), rng.randint(3, 10)
        form = rng.choice(("List the first {n} multiples of {b}.", "Give me {n} multiples of {b}."))
        return ask(form.format(n=times, b=base), _numbers(range(base, base * times + 1, base)))
    last = rng.randint(4, 40)
    form = rng.choice(("List the {k} numbers up to {n}.", "Give the {k} numbers up to {n}."))
    first = 2 if kind == "even" else 1
    return ask(form.format(k=kind, n=last), _numbers(range(first, last + 1, 2)))


def arithmetic(rng: random.Random) -> Dialogue:
    """Sums and differences up to 20, products up to 10."""
    sign = rng.choice("+-*")
    if sign == "*":
        a, b = rng.randint(0, 10), rng.randint(0, 10)
        value, verb = a * b, rng.choice(("{a} times {b}", "{a} * {b}", "{a} x {b}"))
    elif sign == "+":
        a = rng.randint(0, 20)
        b = rng.randint(0, 20 - a)
        value, verb = a + b, rng.choice(("{a} plus {b}", "{a} + {b}"))
    else:
        a = rng.randint(0, 20)
        b = rng.randint(0, a)
        value, verb = a - b, rng.choice(("{a} minus {b}", "{a} - {b}"))
    forms = ("What is {}?", "{} = ?", "Calculate {}.", "How much is {}?", "what is {}", "{}")
    question = rng.choice(forms).format(verb.format(a=a, b=b))
    return ask(question, f"{a} {sign} {b} = {value}")


def parity(rng: random.Random) -> Dialogue:
    """Even or odd."""
    number = rng.randint(0, 100)
    forms = ("Is {} even or odd?", "Is the number {} even or odd?", "{}: even or odd?")
    word = "even" if number % 2 == 0 else "odd"
    return ask(rng.choice(forms).format(number), f"{number} is {word}.")


def larger(rng: random.Random) -> Dialogue:
    """The larger or the smaller of two numbers."""
    a, b = rng.sample(range(51), 2)
    word = rng.choice(("larger", "smaller"))
    value = max(a, b) if word == "larger" else min(a, b)
    forms = ("Which is {w}, {a} or {b}?", "Which number is {w}: {a} or {b}?")
    return ask(rng.choice(forms).format(w=word, a=a, b=b), f"{value} is {word}.")


def _word(rng: random.Random) -> str:
    """A word, a number, or a made-up word: copying must not depend on knowing it."""
    draw = rng.random()
    if draw < 0.75:
        return rng.choice(WORDS)
    if draw < 0.85:
        return str(rng.randint(0, 100))
    syllables = (rng.choice(CONSONANTS) + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))
    return "".join((*syllables, rng.choice(("", *CONSONANTS))))


def repeat(rng: random.Random) -> Dialogue:
    """Saying the user's words again, exactly."""
    words = " ".join(_word(rng) for _ in range(rng.randint(1, 8)))
    if rng.random() < 0.3:
        words = words.capitalize() + rng.choice((".", "!", ""))
    verb = rng.choice(("Repeat", "Repeat after me", "Say", "Copy this", "Repeat this text"))
    form = rng.choice(('{}: "{}"', '{} "{}"', "{}:\n{}", "{}: {}"))
    return ask(form.format(verb, words), words)


def repeat_times(rng: random.Random) -> Dialogue:
    """One word, several times."""
    word, times = rng.choice(WORDS), rng.randint(2, 8)
    forms = ("Say {w} {n} times.", "Repeat the word {w} {n} times.", "Write {w} {n} times.")
    return ask(rng.choice(forms).format(w=word, n=times), " ".join([word] * times))


def rearrange(rng: random.Random) -> Dialogue:
    """A short list of words, reversed, or its first or last member."""
    words = rng.sample(WORDS, rng.randint(2, 4))
    task = rng.choice(("reverse", "first", "last"))
    if task == "reverse":
        forms: tuple[str, ...] = ("Reverse this list: {}", "Reverse the list: {}", "Reverse: {}")
        return ask(rng.choice(forms).format(", ".join(words)), ", ".join(reversed(words)))
    forms = ("What is the {t} word of this list: {l}", "Which word is {t} in this list: {l}")
    answer = words[0] if task == "first" else words[-1]
    return ask(rng.choice(forms).format(t=task, l=", ".join(words)), answer)


def sequences(rng: random.Random) -> Dialogue:
    """Alphabet, days and months: whole, or the one next to another."""
    kind = rng.choice(("alphabet", "letters", "days", "months", "day", "month"))
    if kind == "alphabet":
        form = rng.choice(("Say the alphabet.", "Recite the alphabet.", "Write the alphabet."))
        return ask(form, " ".join(LETTERS))
    if kind == "letters":
        a, b = sorted(rng.sample(range(26), 2))
        form = rng.choice(("List the letters from {} to {}.", "Say the letters from {} to {}."))
        return ask(form.format(LETTERS[a], LETTERS[b]), " ".join(LETTERS[a : b + 1]))
    if kind in ("days", "months"):
        names, what = (
            (DAYS, "days of the week") if kind == "days" else (MONTHS, "months of the year")
        )
        form = rng.choice(("List the {}.", "What are the {}?", "Name the {}.", "Tell me the {}."))
        return ask(form.format(what), ", ".join(names))
    names = DAYS if kind == "day" else MONTHS
    at, (word, step) = rng.randrange(len(names)), rng.choice((("after", 1), ("before", -1)))
    form = rng.choice(("Which {k} comes {w} {n}?", "What {k} is {w} {n}?"))
    return ask(form.format(k=kind, w=word, n=names[at]), names[(at + step) % len(names)])


def remember(rng: random.Random) -> Dialogue:
    """A chat whose last question can only be answered from its first turn."""
    kind = rng.choice(("name", "colour", "number"))
    if kind == "name":
        value = rng.choice(NAMES)
        told = rng.choice(("My name is {}.", "I am {}.", "Hi, my name is {}.")).format(value)
        noted, answer = f"Hello, {value}!", f"Your name is {value}."
        question = rng.choice(("What is my name?", "Do you remember my name?", "Who am I?"))
    else:
        value = rng.choice(COLOURS) if kind == "colour" else str(rng.randint(0, 100))
        told = rng.choice(("My favourite {k} is {v}.", "Remember: my favourite {k} is {v}."))
        told = told.format(k=kind, v=value)
        noted = answer = f"Your favourite {kind} is {value}."
        question = rng.choice(("What is my favourite {}?", "Which {} do I like best?")).format(kind)
    turns = [*ask(told, noted).messages]
    if rng.random() < 0.4:
        between = rng.choice((arithmetic, parity, repeat, sequences))(rng)
        turns += between.messages
    return Dialogue((*turns, *ask(question, answer).messages))


def unknown(rng: random.Random) -> Dialogue:
    """A question about the wide world, which the model must decline."""
    forms: tuple[str, ...] = (
        "What is {}?",
        "Tell me about {}.",
        "Explain {}.",
        "Where do I find {}?",
        "Describe {}.",
    )
    forms += ("What do you think of {}?", "Write a poem about {}.", "Do you like {}?")
    forms += ("Who invented {}?", "Why is there {}?", "Write a story about {}.", "Define {}.")
    return ask(rng.choice(forms).format(rng.choice(EVERYDAY)), UNKNOWN)


SKILLS: dict[str, tuple[Callable[[random.Random], Dialogue], float]] = {
    "count_up": (count_up, 3.0),
    "count_down": (count_down, 2.0),
    "steps": (steps, 1.5),
    "arithmetic": (arithmetic, 5.0),
    "parity": (parity, 0.7),
    "larger": (larger, 1.5),
    "repeat": (repeat, 4.0),
    "repeat_times": (repeat_times, 1.2),
    "rearrange": (rearrange, 2.2),
    "sequences": (sequences, 1.5),
    "remember": (remember, 2.0),
    "unknown": (unknown, 0.8),
}


def any_skill(rng: random.Random) -> Dialogue:
    """A dialogue of one skill, the harder ones drawn more often."""
    makers = [maker for maker, _ in SKILLS.values()]
    weights = [weight for _, weight in SKILLS.values()]
    return rng.choices(makers, weights)[0](rng)
