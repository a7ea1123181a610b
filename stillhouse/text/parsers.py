"""Outputs of a large language model, split into a rationale and a label; and what came of it, counted.

A parser cuts a completion where the next demonstration begins, and splits it at a fixed phrase. The four forms are
those of the released data of Distilling Step-by-Step (Hsieh et al. 2023, arXiv 2305.02301).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from stillhouse.errors import UserError, did_you_mean
from stillhouse.text.arithmetic import evaluate, same_value


def option(text: str) -> str | None:
    """What stands behind an option letter: ``(c) gravity.`` → ``gravity``."""
    found = re.match(r"\s*\(\w\)\s*([^\n]*)", text)
    return found[1].strip().removesuffix(".").strip() if found else None


def bracketed(text: str) -> str | None:
    """From the first opening to the last closing bracket of a line: ``(8 * 35).`` → ``(8 * 35)``."""
    found = re.search(r"\(.*\)", text)
    return found[0] if found else None


def first_word(text: str) -> str | None:
    words = text.split()
    return words[0].rstrip(".,;") if words else None


def all_but_last(text: str) -> str | None:
    """The text without its last character, which is a full stop in completions that end well."""
    return text.strip()[:-1].strip() or None


@dataclass(frozen=True)
class Kind:
    """A kind of task: how completions of the teacher are read, and how answers are judged.

    Attributes:
        name: as in ``--task``.
        cut: where the next demonstration begins.
        phrase: between rationale and label.
        label: text behind the phrase → label, None where it has another form.
        arithmetic: answers are expressions and are compared by value.
    """

    name: str
    cut: str = ""
    phrase: str = ""
    label: Callable[[str], str | None] = str.strip
    arithmetic: bool = False

    def parse(self, raw: str) -> tuple[str, str]:
        """(rationale, label) of a completion. No phrase: both are empty. No label of the right form: it is empty.

        Example:
            >>> KINDS["cqa"].parse("It must fall. So the answer is (e) gravity.\\n\\nQ: next")
            ('It must fall.', 'gravity')
            >>> KINDS["cqa"].parse("It must fall.")
            ('', '')
        """
        if not self.phrase:
            raise UserError(f"completions have no form for task {self.name!r}; {did_you_mean('', PARSED)}")
        head, found, tail = raw.partition(self.cut)[0].partition(self.phrase)
        return (head.strip(), self.label(tail) or "") if found else ("", "")

    def right(self, said: str, label: str, value: float | None = None) -> bool:
        """Whether an answer is right: the same text but for blanks, or the same value.

        Args:
            said: the answer. label: the gold label.
            value: of the gold label where it is known; else it is evaluated.
        """
        if not self.arithmetic:
            return bool(said.strip()) and said.split() == label.split()
        return same_value(evaluate(said), evaluate(label) if value is None else value)


KINDS = {
    k.name: k
    for k in (
        Kind("text"),
        Kind("cqa", "Q:", "So the answer is", option),
        Kind("svamp", "Q:", "The answer is", bracketed, arithmetic=True),
        Kind("asdiv", "Q:", "The answer is", bracketed, arithmetic=True),
        Kind("esnli", "Premise", "Answer:", first_word),
        Kind("anli1", "Premise:", "So the answer is", all_but_last),
    )
}
PARSED = sorted(k for k, v in KINDS.items() if v.phrase)


def kind(name: str) -> Kind:
    """The kind of this name.

    Raises:
        UserError: there is none.
    """
    if name not in KINDS:
        raise UserError(f"no task {name!r}; {did_you_mean(name, KINDS)}")
    return KINDS[name]
