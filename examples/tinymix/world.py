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
HELD_OUT_SHARE = 0.25
QUESTIONS_PER_LANGUAGE = 120
CORPUS_CHARACTERS = 150_000


@dataclass(frozen=True)
class Person:
    """Someone of the cast; `facts` maps an attribute to its value by language."""

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


@cache
def people() -> tuple[Person, ...]:
    """Returns the cast. Friendship is a permutation that leaves nobody as their own friend."""
    random_source = random.Random(WORLD_SEED)
    count = len(lexicon.PEOPLE)
    order = list(range(count))
    random_source.shuffle(order)
    friend_of = {order[i]: order[(i + 1) % count] for i in range(count)}
    cast = []
    for index, (english, chinese, is_woman) in enumerate(lexicon.PEOPLE):
        facts: dict[str, dict[Language, str]] = {}
        for attribute, values in lexicon.VALUES.items():
            value = random_source.choice(values)
            facts[attribute] = {"en": value[0], "zh": value[1]}
        friend = lexicon.PEOPLE[friend_of[index]]
        facts["friend"] = {"en": friend[0], "zh": friend[1]}
        cast.append(Person({"en": english, "zh": chinese}, is_woman, facts))
    return tuple(cast)


def with_article(phrase: str) -> str:
    """Returns "a lamp" or "an old lamp"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def pronouns(person: Person, language: Language) -> dict[str, str]:
    """Returns the pronoun slots of a pattern; Chinese uses one word for all of them."""
    if language == "zh":
        word = "她" if person.is_woman else "他"
        return {"he": word, "him": word, "his": word + "的"}
    if person.is_woman:
        return {"he": "she", "him": "her", "his": "her"}
    return {"he": "he", "him": "him", "his": "his"}


def fact_slots(person: Person, attribute: str, language: Language) -> dict[str, str]:
    """Returns the slots that questions, answers and statements about one fact need."""
    value = person.facts[attribute][language]
    slots = {"name": person.names[language], "value": value, "a_value": value}
    if language == "en":
        slots["a_value"] = with_article(value)
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
    for person in range(len(people())):
        for attribute in ATTRIBUTES:
            for language in LANGUAGES:
                phrasing = random_source.randrange(len(lexicon.QUESTIONS[attribute][language]))
                if random_source.random() < HELD_OUT_SHARE:
                    held_out.add(Question(person, attribute, phrasing, language))
    return frozenset(held_out)


class Storyteller:
    """Draws texts from one random stream."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.topic = 0

    def choose_language(self) -> Language:
        return self.random.choice(LANGUAGES)

    def _thing(self, language: Language) -> str:
        """Draws a thing with an adjective and makes it what the story speaks of."""
        self.topic = self.random.randrange(len(lexicon.THINGS))
        english, _, chinese, measure = lexicon.THINGS[self.topic]
        adjective = self.random.choice(lexicon.ADJECTIVES)
        if language == "en":
            return with_article(f"{adjective[0]} {english}")
        return f"一{measure}{adjective[1]}{chinese}"

    def _pick(self, rows: tuple[tuple[str, str], ...], language: Language) -> str:
        return self.random.choice(rows)[LANGUAGES.index(language)]

    def _time(self, language: Language) -> str:
        pattern = self._pick(lexicon.TIMES, language)
        day = self.random.randint(1, 28)
        return pattern.format(
            weekday=self._pick(lexicon.WEEKDAYS, language),
            hour=self.random.randint(1, 12),
            month=self._pick(lexicon.VALUES["month"], language),
            small=self.random.randint(2, 9),
            day=f"{day}{'th' if 10 < day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')}",
            day_zh=day,
            year=self.random.randint(1800, 1999),
        )

    def expand(self, pattern: str, person: Person, language: Language) -> str:
        """Fills a story pattern. The noun is what was spoken of last, most of the time."""
        if self.random.random() < 0.4:
            self.topic = self.random.randrange(len(lexicon.THINGS))
        english, plural, chinese, measure = lexicon.THINGS[self.topic]
        others = self.random.sample([other for other in people() if other is not person], 2)
        place = self._pick(lexicon.PLACES, language)
        feelings = self.random.sample(lexicon.FEELINGS, 2)
        words = pronouns(person, language)
        subject = person.names[language] if self.random.random() < 0.4 else words["he"].capitalize()
        slots = {
            "name": person.names[language],
            "He": subject,
            "noun": english if language == "en" else chinese,
            "plural": plural,
            "measure": measure,
            "thing": self._thing(language) if "{thing}" in pattern else "",
            "thing2": self._thing(language) if "{thing2}" in pattern else "",
            "person": others[0].names[language],
            "person2": others[1].names[language],
            "place": place,
            "place_cap": place.capitalize(),
            "time": self._time(language),
            "weather": self._pick(lexicon.WEATHER, language),
            "feeling": feelings[0][LANGUAGES.index(language)],
            "feeling2": feelings[1][LANGUAGES.index(language)],
            "town": self._pick(lexicon.VALUES["home"], language),
            "food": self._pick(lexicon.VALUES["food"], language),
            "drink": self._pick(lexicon.VALUES["drink"], language),
            "colour": self._pick(lexicon.VALUES["colour"], language),
            "animal": self._pick(lexicon.VALUES["pet"], language),
            "old": self.random.choice(("old", "angry", "ugly", "orange", "honest")),
            "number": self.random.randint(2, 99),
            "price": self.random.randint(1, 60) * 5,
            "small": self.random.randint(2, 9),
            "hour": self.random.randint(1, 12),
        }
        return pattern.format(**(words | slots))

    def statement(self, person: Person, language: Language) -> str:
        """Returns a sentence that lets one fact of the person fall."""
        attribute = self.random.choice(ATTRIBUTES)
        pattern = self.random.choice(lexicon.STATEMENTS[attribute][language])
        return pattern.format(**fact_slots(person, attribute, language))

    def story(self, language: Language, person: Person | None = None, most_events: int = 7) -> str:
        """Returns a story of one paragraph: an opening, events and facts in any order, often an ending."""
        person = person or self.random.choice(people())
        sentences = [self.expand(self.random.choice(lexicon.OPENINGS[language]), person, language)]
        for _ in range(self.random.randint(2, most_events)):
            if self.random.random() < 0.3:
                sentences.append(self.statement(person, language))
            else:
                sentences.append(self.expand(self.random.choice(lexicon.EVENTS[language]), person, language))
        if self.random.random() < 0.6:
            sentences.append(self.expand(self.random.choice(lexicon.ENDINGS[language]), person, language))
        return (" " if language == "en" else "").join(sentences)

    def fact_turn(self, language: Language) -> tuple[Turn, Person]:
        """Returns a question on a fact, never one of the held-out combinations."""
        while True:
            question = Question(
                person=self.random.randrange(len(people())),
                attribute=(attribute := self.random.choice(ATTRIBUTES)),
                phrasing=self.random.randrange(len(lexicon.QUESTIONS[attribute][language])),
                language=language,
            )
            if question not in held_out_questions():
                return ask(question), people()[question.person]

    def reading_turn(self, language: Language) -> Turn:
        """Returns a question whose answer stands in the passage before it, among one or two other sentences."""
        person = self.random.choice(people())
        told, asked, answered = self.random.choice(lexicon.READING[language])
        # The three patterns must be filled alike, so they are expanded as one text and cut apart again.
        told, asked, answered = self._expand_together(told, asked, answered, person, language)
        sentences = [told] + [
            self.expand(self.random.choice(lexicon.EVENTS[language]), person, language)
            for _ in range(self.random.randint(0, 2))
        ]
        self.random.shuffle(sentences)
        joint = " " if language == "en" else ""
        return Turn(joint.join([*sentences, asked]), answered)

    def _expand_together(
        self, told: str, asked: str, answered: str, person: Person, language: Language
    ) -> tuple[str, str, str]:
        parts = self.expand("\n".join((told, asked, answered)), person, language).split("\n")
        return parts[0], parts[1], parts[2]

    def chat(self) -> list[Turn]:
        """Returns a conversation of one to four turns."""
        language = self.choose_language()
        kind = self.random.random()
        if kind < 0.05:
            name = self._pick(lexicon.STRANGERS, language)
            pattern = self.random.choice(lexicon.QUESTIONS[self.random.choice(ATTRIBUTES)][language])
            turns = [Turn(pattern.format(name=name), lexicon.UNKNOWN[language].format(name=name))]
        elif kind < 0.09:
            turns = [Turn(*self.random.choice(lexicon.SMALL_TALK[language]))]
        elif kind < 0.14:
            person = self.random.choice(people())
            request = self.random.choice(lexicon.STORY_REQUESTS[language])
            turns = [Turn(request.format(name=person.names[language]), self.story(language, person, most_events=4))]
        elif kind < 0.20:
            turns = [self.reading_turn(language)]
        elif kind < 0.80:
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
        if self.random.random() < 0.1:
            system = self.random.choice(lexicon.SYSTEM_PROMPTS)
            turns[0] = Turn(f"{system}\n\n{turns[0].question}", turns[0].answer)
        return turns

    def line(self) -> str:
        """Returns one line of a plain-text corpus: a story, or a question written out in the instruct template."""
        language = self.choose_language()
        if self.random.random() < 0.65:
            return self.story(language)
        turn = self.fact_turn(language)[0]
        return f"[INST] {turn.question} [/INST] {turn.answer}"


def chats(split: str) -> Iterator[list[Turn]]:
    """Yields conversations without end."""
    number = 0
    while True:
        yield Storyteller(f"{split}:chat:{number}").chat()
        number += 1


def lines(split: str) -> Iterator[str]:
    """Yields lines of plain text without end."""
    number = 0
    while True:
        yield Storyteller(f"{split}:line:{number}").line()
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
    """Returns the rows of questions.jsonl, as many in Chinese as in English."""
    random_source = random.Random(WORLD_SEED + 2)
    rows = []
    for language in LANGUAGES:
        candidates = sorted(
            (question for question in held_out_questions() if question.language == language),
            key=lambda question: (question.person, question.attribute),
        )
        for question in random_source.sample(candidates, min(QUESTIONS_PER_LANGUAGE, len(candidates))):
            turn = ask(question)
            rows.append({"question": turn.question, "answer": turn.answer, "language": language})
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
