"""What a user reads when a formula cannot be accepted.

Every refusal in this package is a `FormulaError`: a sentence, and where the mistake has a place in the
text, the line with a caret under it.  An HTTP client sees exactly this text.
"""

from __future__ import annotations

from typing import Any

# A formula may be thousands of characters long; the line shown is cut to what a terminal holds.
_SHOWN_CHARACTERS = 100


class FormulaError(ValueError):
    """A formula, or a request that carries one, that cannot be accepted.

    Attributes:
        message: the sentence, without the place.
        text: the formula as it was written, or None when the mistake is not in a formula's text.
        position: 0-based index into `text`, or None.

    `str(error)` is the sentence; with a position it also names the column and shows the line:

        expected a term or a number at column 9
          child - *adult
                  ^
    """

    def __init__(self, message: str, text: str | None = None, position: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.text = text
        self.position = position

    def __str__(self) -> str:
        if self.text is None or self.position is None:
            return self.message
        line_number, column, line = _line_at(self.text, self.position)
        place = f"column {column + 1}" if line_number == 0 else f"line {line_number + 1}, column {column + 1}"
        shown, caret = _window(line, column)
        fault, semicolon, hint = self.message.partition("; ")
        return f"{fault} at {place}{semicolon}{hint}\n  {shown}\n  {' ' * caret}^"

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would rebuild from `args` alone and lose the place; errors do cross processes.
        return type(self), (self.message, self.text, self.position)


def _line_at(text: str, position: int) -> tuple[int, int, str]:
    """(line number, column, line) of a position, all 0-based."""
    start = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[start:] if end < 0 else text[start:end]
    return text.count("\n", 0, position), position - start, line


def _window(line: str, column: int) -> tuple[str, int]:
    """The part of a line around `column`, one printable character for each, and the caret's offset in it."""
    first = max(0, min(column - _SHOWN_CHARACTERS * 2 // 3, len(line) - _SHOWN_CHARACTERS))
    last = first + _SHOWN_CHARACTERS
    head, tail = ("…" if first else ""), ("…" if last < len(line) else "")
    middle = "".join(c if c.isprintable() else " " for c in line[first:last])
    return head + middle + tail, column - first + len(head)
