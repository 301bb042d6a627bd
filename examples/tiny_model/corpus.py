"""Writes endless short stories from grammar.txt, the text the tiny model learns.

Every story depends on (seed, number) alone, so that any part of the corpus can be made again.
Run it to print a few stories: `python corpus.py --seed 1 --count 3`.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import Pool
from pathlib import Path

GRAMMAR = Path(__file__).with_name("grammar.txt")
TRAIN_SEED = 1
HELDOUT_SEED = 2

Node = tuple[str, object]
Rule = list[list[Node]]

SUBJECT = {"f": "she", "m": "he"}
OBJECT = {"f": "her", "m": "him"}
POSSESSIVE = {"f": "her", "m": "his"}
STRANGER_PLOTS = {"p_new", "p_help"}  # plots in which the friend is met, not known
SENTENCE_ENDS = (".", "!", "?", '."', '!"', '?"')
FIRST_LETTER = re.compile(r'^"?[a-z]')
PLAIN_SENTENCE = re.compile(
    r'(?!(?:[^,]*,){2})(?:(?! (?:while|as|because|though) )[^".!?:\n]){10,90}\.'
)
OPENABLE = re.compile(r"(?:she|he|they|the|[A-Z][a-z]+) ")
EMBELLISHED = 0.65  # share of the plain sentences that get a subordinate clause
APPOSITION = 0.15  # share of the named subjects that are told more of
GATED = {"open", "habit"}
VOWEL_SOUND = re.compile(r"\b([Aa]) (?=(?!(?:one|use|uni|u[a-z]i|eu)\b)[aeiouAEIOU])")


def parse(text: str) -> list[list[Node]]:
    """The alternatives of `a <rule> {x|y} [h.o]`, split at the top-level bars."""
    position = 0

    def sequence(closing: bool) -> list[list[Node]]:
        nonlocal position
        alternatives: list[list[Node]] = [[]]
        literal = ""

        def flush() -> None:
            nonlocal literal
            if literal:
                alternatives[-1].append(("text", literal))
                literal = ""

        while position < len(text):
            char = text[position]
            position += 1
            if char in "<[":
                flush()
                end = text.index(">" if char == "<" else "]", position)
                name, _, detail = text[position:end].partition(":" if char == "<" else ".")
                alternatives[-1].append(("rule" if char == "<" else "slot", (name, detail)))
                position = end + 1
            elif char == "{":
                flush()
                alternatives[-1].append(("choice", sequence(True)))
            elif closing and char == "|":
                flush()
                alternatives.append([])
            elif closing and char == "}":
                flush()
                return alternatives
            else:
                literal += char
        flush()
        if closing:
            raise ValueError(f"missing }} in {text!r}")
        return alternatives

    return sequence(False)


def read_grammar(path: Path = GRAMMAR) -> dict[str, Rule]:
    """Rule name -> alternatives; a word list is a rule whose alternatives are single words."""
    rules: dict[str, Rule] = {}
    current: Rule = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("  "):
            current.extend(parse(line.strip().replace("\\n", "\n")))
        elif " = " in line:
            name, words = line.split(" = ", 1)
            rules[name] = [[("text", word)] for word in words.split(", ")]
        else:
            current = rules.setdefault(line.strip(), [])
    return rules


@dataclass
class Character:
    """Somebody in a story, with what the reader knows of them so far."""

    name: str
    sex: str
    kind: str
    adjective: str
    introduced: bool = False


@dataclass
class Story:
    """The state of one story while it is being told."""

    rules: dict[str, Rule]
    rng: random.Random
    people: dict[str, Character] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)
    current: dict[str, Character] = field(default_factory=dict)  # sex -> whom a pronoun means
    latest: dict[str, list[Node]] = field(default_factory=dict)
    stranger: bool = False

    def word(self, name: str) -> str:
        """A random word of a list."""
        return str(self.rng.choice(self.rules[name])[0][1])

    def cast(self) -> None:
        """Chooses who and what the story is about."""
        sexes = self.rng.choice(["fm", "mf"])
        kinds: set[str] = set()
        names: set[str] = set()
        for role, sex in (("h", sexes[0]), ("f", sexes[1]), ("r", self.rng.choice("fm"))):
            while True:
                dice = self.rng.random()
                child = "girl" if sex == "f" else "boy"
                kind = self.word("animal" if dice < 0.6 else "job_word") if dice < 0.75 else child
                name = self.word("girlname" if sex == "f" else "boyname")
                if kind not in kinds and name not in names:
                    break
            kinds.add(kind)
            names.add(name)
            furry = dice < 0.6 and self.rng.random() < 0.5
            self.people[role] = Character(name, sex, kind, self.word("coat" if furry else "age"))
        for name in ("obj", "food_word", "made", "skill", "sound", "stuck", "contest"):
            self.words[name.removesuffix("_word")] = self.word(name)

    def mention(self, role: str, form: str) -> str:
        """A character's name, pronoun or description."""
        who = self.people[role]
        known = self.current.get(who.sex) is who
        if form == "k":
            return who.kind
        if form == "B":
            return who.name
        if form == "A":
            article = "the" if who.introduced else "a"
            who.introduced = True
            self.current[who.sex] = who
            return f"{article} {who.adjective} {who.kind}"
        introduced, who.introduced = who.introduced, True
        self.current[who.sex] = who
        if form == "M":
            return who.name
        if form == "N":
            return who.name if introduced else f"{who.name} the {who.kind}"
        if form == "K":
            return f"the {who.kind}"
        if not introduced:
            full = f"{who.name} the {who.kind}"
            return full + "'s" if form == "p" else full
        pronoun = known and self.rng.random() < (0.8 if form == "" else 0.95)
        if pronoun:
            return {"": SUBJECT, "o": OBJECT, "p": POSSESSIVE}[form][who.sex]
        name = f"the {who.kind}" if form == "" and self.rng.random() < 0.25 else who.name
        if form == "" and self.rng.random() < APPOSITION:
            name += ", who " + self.rule("who", role) + ","
        return name + "'s" if form == "p" else name

    def expand(self, nodes: list[Node], role: str = "h") -> str:
        """The text of one alternative; `role` is whom [$] means."""
        out: list[str] = []
        for kind, value in nodes:
            if kind == "text":
                out.append(str(value))
                if "\n" in str(value):  # a new paragraph names people again
                    self.current.clear()
            elif kind == "choice":
                out.append(self.expand(self.rng.choice(value), role))  # type: ignore[arg-type]
            elif kind == "rule":
                name, detail = value  # type: ignore[misc]
                out.append(self.rule(name, detail or role))
            else:
                name, detail = value  # type: ignore[misc]
                name = role if name == "$" else name
                if name in self.people:
                    out.append(self.mention(name, detail))
                else:
                    out.append(self.words[name])
        return "".join(out)

    def rule(self, name: str, role: str) -> str:
        """A random alternative of a rule, told so that nobody is introduced twice."""
        if name == "meetf" and self.people["f"].introduced:
            name = "meetf_again"
        while True:
            alternative = self.rng.choice(self.rules[name])
            gated = self.stranger and name in GATED
            if gated and any(node[0] == "slot" and node[1][0] == "f" for node in alternative):
                continue
            if len(self.rules[name]) > 2 and self.latest.get(name) is alternative:
                continue  # the same word twice in a row reads badly
            self.latest[name] = alternative
            text = self.expand(alternative, role)
            if PLAIN_SENTENCE.fullmatch(text) and self.rng.random() < EMBELLISHED:
                text = text[:-1] + self.rule("tail", role) + "."
                if OPENABLE.match(text) and self.rng.random() < EMBELLISHED:
                    text = self.rule("when", role) + ", " + text
            if text.endswith(SENTENCE_ENDS):
                text = FIRST_LETTER.sub(lambda match: match.group(0).upper(), text, count=1)
            return text


def tidy(text: str) -> str:
    """Capital letters, articles and spaces put right."""
    text = re.sub(r" +", " ", text)
    text = re.sub(r" ?\n ?", "\n", text).strip()
    text = re.sub(r" ([,.!?])", r"\1", text)
    text = re.sub(r",(?=[,.!?])", "", text)
    text = VOWEL_SOUND.sub(r"\1n ", text)

    def upper(match: re.Match[str]) -> str:
        return match.group(0).upper()

    text = re.sub(r'(?:^|\n)"?[a-z]', upper, text)
    text = re.sub(r'[.!?] "?[a-z]', upper, text)
    text = re.sub(r'[.!?]" "[a-z]|\." [a-z]', upper, text)
    return re.sub(r'(?<=: )"[a-z]|(?<=said, )"[a-z]', upper, text)


def story(rules: dict[str, Rule], seed: int, number: int) -> str:
    """Story `number` of the corpus `seed`."""
    teller = Story(rules, random.Random(seed * 1_000_003_000 + number))
    teller.cast()
    plot = str(teller.rng.choice(rules["plot"])[0][1][0])  # type: ignore[index]
    teller.stranger = plot in STRANGER_PLOTS
    return tidy(teller.rule(plot, "h"))


def batch(numbers: range, seed: int) -> list[str]:
    """The stories of a range of numbers."""
    rules = read_grammar()
    return [story(rules, seed, number) for number in numbers]


def stories(seed: int, count: int, processes: int = 1, step: int = 2000) -> Iterator[str]:
    """Stories 0 .. count - 1 of the corpus `seed`, in order."""
    ranges = [range(start, min(start + step, count)) for start in range(0, count, step)]
    if processes == 1:
        for numbers in ranges:
            yield from batch(numbers, seed)
        return
    with Pool(processes) as pool:
        for texts in pool.imap(partial(batch, seed=seed), ranges):
            yield from texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=TRAIN_SEED)
    parser.add_argument("--count", type=int, default=3)
    arguments = parser.parse_args()
    print("\n\n".join(stories(arguments.seed, arguments.count)))


if __name__ == "__main__":
    main()
