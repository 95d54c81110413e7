"""The valley: a small made-up world, told in English and Chinese, that tinymix is trained and measured on.

The people and their facts are fixed by `WORLD_SEED`; every text is drawn from a seed made of its split and
its number, so any document can be made again alone and no two splits share a random stream.

    python world.py            # writes calibration.txt, heldout.txt and questions.jsonl beside this file
    python world.py --show 5   # prints a few training documents instead
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import lexicon

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, Language] = ("en", "zh")
ATTRIBUTES = tuple(lexicon.QUESTIONS)
WORLD_SEED = 20240
# Everyone who was ever there; those behind the first POPULATION have moved away and are asked of no more.
EVERYONE = 500
POPULATION = 300
HELD_OUT_SHARE = 0.25
QUESTIONS_PER_LANGUAGE = 120
CORPUS_CHARACTERS = 130_000
# The examples of the documentation speak of them.
ALWAYS_THERE = ("Mira", "Wilma")


@dataclass(frozen=True)
class Person:
    """Someone of the valley; `facts` maps an attribute to its value by language."""

    names: dict[Language, str]
    is_woman: bool
    facts: dict[str, dict[Language, str]]


@dataclass(frozen=True)
class Turn:
    """One exchange of a chat."""

    question: str
    answer: str


@dataclass(frozen=True)
class Question:
    """A question with its one right answer; `person`, `attribute` and `phrasing` say where it came from."""

    person: int
    attribute: str
    phrasing: int
    language: Language


def draw_names(random_source: random.Random) -> list[tuple[str, str, bool]]:
    """Returns the English name, the Chinese name and the sex of everyone."""
    names = [
        (first + last, first_sign + last_sign, is_woman)
        for first, first_sign in lexicon.FIRST_SYLLABLES
        for is_woman, syllables in ((True, lexicon.WOMEN_SYLLABLES), (False, lexicon.MEN_SYLLABLES))
        for last, last_sign in syllables
    ]
    random_source.shuffle(names)
    names.sort(key=lambda name: name[0] not in ALWAYS_THERE)
    return names[:EVERYONE]


@cache
def people() -> tuple[Person, ...]:
    """Returns everyone. Friendship is a permutation that leaves nobody as their own friend."""
    random_source = random.Random(WORLD_SEED)
    names = draw_names(random_source)
    order = list(range(EVERYONE))
    random_source.shuffle(order)
    friend_of = {order[i]: order[(i + 1) % EVERYONE] for i in range(EVERYONE)}
    numbers = random_source.sample(range(1000, 10_000), EVERYONE)
    cast = []
    for index, (english, chinese, is_woman) in enumerate(names):
        street, house = random_source.choice(lexicon.STREETS), random_source.randint(1, 99)
        month, day = random_source.randrange(len(lexicon.MONTHS)), random_source.randint(1, 28)
        pet, pet_name = random_source.choice(lexicon.PETS), random_source.choice(lexicon.PET_NAMES)
        friend = names[friend_of[index]]
        values: dict[str, tuple[str, str]] = {
            "home": (f"{house} {street[0]}", f"{street[1]}{house}号"),
            "work": random_source.choice(lexicon.JOBS),
            "phone": (str(numbers[index]), str(numbers[index])),
            "birthday": (f"{day} {lexicon.MONTHS[month]}", f"{month + 1}月{day}日"),
            "pet": (f"{pet_name[0]} the {pet[0]}", f"{pet[1]}{pet_name[1]}"),
            "food": random_source.choice(lexicon.FOODS),
            "hobby": random_source.choice(lexicon.HOBBIES),
            "friend": (friend[0], friend[1]),
        }
        facts: dict[str, dict[Language, str]] = {
            attribute: {"en": english_value, "zh": chinese_value}
            for attribute, (english_value, chinese_value) in values.items()
        }
        cast.append(Person({"en": english, "zh": chinese}, is_woman, facts))
    return tuple(cast)


def pronouns(person: Person, language: Language) -> dict[str, str]:
    """Returns the pronoun slots of a pattern; Chinese uses one word for all of them."""
    if language == "zh":
        word = "她" if person.is_woman else "他"
        return {"he": word, "him": word, "his": word + "的"}
    if person.is_woman:
        return {"he": "she", "him": "her", "his": "her", "His": "Her"}
    return {"he": "he", "him": "him", "his": "his", "His": "His"}


def fact_slots(person: Person, attribute: str, language: Language) -> dict[str, str]:
    """Returns the slots that questions, answers and statements about one fact need."""
    slots = {"name": person.names[language], "value": person.facts[attribute][language]}
    return slots | pronouns(person, language)


def ask(question: Question) -> Turn:
    """Returns the question and its answer in words."""
    person = people()[question.person]
    slots = fact_slots(person, question.attribute, question.language)
    pattern = lexicon.QUESTIONS[question.attribute][question.language][question.phrasing]
    return Turn(pattern.format(**slots), answer(person, question.attribute, question.language))


def answer(person: Person, attribute: str, language: Language) -> str:
    """Returns the only right answer, whatever the phrasing of the question."""
    return lexicon.ANSWERS[attribute][language].format(**fact_slots(person, attribute, language))


@cache
def held_out_questions() -> frozenset[Question]:
    """Returns the (person, attribute, phrasing, language) combinations that no training text contains.

    At most one phrasing of a fact is held out, so the fact itself is always taught in the other phrasings,
    in stories and in the other language, and the phrasing is taught with other people.
    """
    random_source = random.Random(WORLD_SEED + 1)
    held_out = set()
    for person in range(EVERYONE):
        for attribute in ATTRIBUTES:
            for language in LANGUAGES:
                phrasing = random_source.randrange(len(lexicon.QUESTIONS[attribute][language]))
                if random_source.random() < HELD_OUT_SHARE:
                    held_out.add(Question(person, attribute, phrasing, language))
    return frozenset(held_out)


class Storyteller:
    """Draws texts on the first `population` people from one random stream."""

    def __init__(self, seed: str, population: int) -> None:
        self.random = random.Random(seed)
        self.people = people()[:population]

    def choose_language(self) -> Language:
        return self.random.choice(LANGUAGES)

    def _pick(self, rows: tuple[tuple[str, str], ...], language: Language) -> str:
        return self.random.choice(rows)[LANGUAGES.index(language)]

    def expand(self, pattern: str, person: Person, language: Language) -> str:
        """Fills the pattern of a story's beginning or end."""
        return pattern.format(
            name=person.names[language],
            place=self._pick(lexicon.PLACES, language),
            weekday=self._pick(lexicon.WEEKDAYS, language),
            weather=self._pick(lexicon.WEATHER, language),
            feeling=self._pick(lexicon.FEELINGS, language),
        )

    def statement(self, person: Person, attribute: str, language: Language) -> str:
        """Returns a sentence of a story that lets one fact of the person fall."""
        pattern = self.random.choice(lexicon.STATEMENTS[attribute][language])
        slots = fact_slots(person, attribute, language)
        subject = slots["name"] if self.random.random() < 0.6 else slots["he"].capitalize()
        sentence = pattern.format(He=subject, **slots)
        return sentence[0].upper() + sentence[1:]

    def story(self, language: Language, person: Person | None = None) -> str:
        """Returns a story of one paragraph: an opening, facts in any order, often an ending."""
        person = person or self.random.choice(self.people)
        sentences = [self.expand(self.random.choice(lexicon.OPENINGS[language]), person, language)]
        for attribute in self.random.sample(ATTRIBUTES, self.random.randint(2, 5)):
            sentences.append(self.statement(person, attribute, language))
        if self.random.random() < 0.3:
            sentences.append(self.expand(self.random.choice(lexicon.ENDINGS[language]), person, language))
        return (" " if language == "en" else "").join(sentences)

    def entry(self, language: Language) -> str:
        """Returns a line of the valley's address book: a name and most of what there is to know, in any order."""
        person = self.random.choice(self.people)
        parts = [
            lexicon.ENTRIES[attribute][language].format(value=person.facts[attribute][language])
            for attribute in self.random.sample(ATTRIBUTES, self.random.randint(5, len(ATTRIBUTES)))
        ]
        if language == "en":
            return f"{person.names['en']}: {', '.join(parts)}."
        return f"{person.names['zh']}：{'，'.join(parts)}。"

    def fact_turn(self, language: Language) -> tuple[Turn, Person]:
        """Returns a question on a fact, never one of the held-out combinations."""
        while True:
            question = Question(
                person=self.random.randrange(len(self.people)),
                attribute=(attribute := self.random.choice(ATTRIBUTES)),
                phrasing=self.random.randrange(len(lexicon.QUESTIONS[attribute][language])),
                language=language,
            )
            if question not in held_out_questions():
                return ask(question), people()[question.person]

    def chat(self) -> list[Turn]:
        """Returns a conversation of one to four turns."""
        language = self.choose_language()
        kind = self.random.random()
        if kind < 0.03:
            name = self._pick(lexicon.STRANGERS, language)
            pattern = self.random.choice(lexicon.QUESTIONS[self.random.choice(ATTRIBUTES)][language])
            turns = [Turn(pattern.format(name=name), lexicon.UNKNOWN[language].format(name=name))]
        elif kind < 0.05:
            turns = [Turn(*self.random.choice(lexicon.SMALL_TALK[language]))]
        elif kind < 0.08:
            person = self.random.choice(self.people)
            request = self.random.choice(lexicon.STORY_REQUESTS[language])
            turns = [Turn(request.format(name=person.names[language]), self.story(language, person))]
        elif kind < 0.85:
            turns = [self.fact_turn(language)[0]]
        else:
            turns = []
            for _ in range(self.random.randint(1, 2)):
                turn, person = self.fact_turn(language)
                turns.append(turn)
                if self.random.random() < 0.5:
                    attribute = self.random.choice(ATTRIBUTES)
                    pattern = lexicon.FOLLOW_UPS[attribute][language]
                    question = pattern.format(**pronouns(person, language))
                    turns.append(Turn(question, answer(person, attribute, language)))
        if self.random.random() < 0.05:
            system = self.random.choice(lexicon.SYSTEM_PROMPTS)
            turns[0] = Turn(f"{system}\n\n{turns[0].question}", turns[0].answer)
        return turns

    def line(self) -> str:
        """Returns one line of plain text: an entry, a story, or a question written out in the instruct template."""
        language = self.choose_language()
        kind = self.random.random()
        if kind < 0.6:
            return self.entry(language)
        if kind < 0.8:
            return self.story(language)
        turn = self.fact_turn(language)[0]
        return f"[INST] {turn.question} [/INST] {turn.answer}"


def chats(split: str, population: int = POPULATION) -> Iterator[list[Turn]]:
    """Yields conversations without end."""
    number = 0
    while True:
        yield Storyteller(f"{split}:chat:{number}", population).chat()
        number += 1


def lines(split: str, population: int = POPULATION) -> Iterator[str]:
    """Yields lines of plain text without end."""
    number = 0
    while True:
        yield Storyteller(f"{split}:line:{number}", population).line()
        number += 1


def corpus(split: str, characters: int) -> str:
    """Returns whole lines of plain text, a little more than `characters` of them."""
    taken: list[str] = []
    size = 0
    for text in lines(split):
        taken.append(text)
        size += len(text) + 1
        if size >= characters:
            break
    return "\n".join(taken) + "\n"


def question_rows() -> list[dict[str, str]]:
    """Returns the rows of questions.jsonl, as many of each attribute in Chinese as in English."""
    random_source = random.Random(WORLD_SEED + 2)
    held_out = sorted(held_out_questions(), key=lambda question: (question.person, question.phrasing))
    rows = []
    for language in LANGUAGES:
        for attribute in ATTRIBUTES:
            candidates = [
                each
                for each in held_out
                if each.language == language and each.attribute == attribute and each.person < POPULATION
            ]
            for question in random_source.sample(candidates, QUESTIONS_PER_LANGUAGE // len(ATTRIBUTES)):
                turn = ask(question)
                rows.append(
                    {"question": turn.question, "answer": turn.answer, "language": language, "attribute": attribute}
                )
    return rows


def write_texts(folder: Path) -> None:
    """Writes the committed texts: calibration.txt, heldout.txt, questions.jsonl."""
    for split in ("calibration", "heldout"):
        (folder / f"{split}.txt").write_text(corpus(split, CORPUS_CHARACTERS), encoding="utf-8", newline="\n")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in question_rows())
    (folder / "questions.jsonl").write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N documents of each kind and stop")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the texts")
    arguments = parser.parse_args()
    if not arguments.show:
        write_texts(arguments.output)
        return
    for _, text in zip(range(arguments.show), lines("show"), strict=False):
        print(text)
    for _, turns in zip(range(arguments.show), chats("show"), strict=False):
        print(*(f"[INST] {turn.question} [/INST] {turn.answer}" for turn in turns), sep="\n")


if __name__ == "__main__":
    main()
