"""What a model writes where tools were given: words at once as far as they are sure, calls at the end, in OpenAI's form."""

from __future__ import annotations

import secrets
from typing import Any

from course_lib.agent.native import Native
from course_lib.agent.turns import write_arguments


class PlainWords:
    """An answer without tools: every piece is sure."""

    def words(self, piece: str) -> str:
        """Take the next piece; return the words that are sure by now."""
        return piece

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the words that were held back, and the calls."""
        return "", []


class WordsAndCalls(PlainWords):
    """A turn in the form of a template's tool calls. One that cannot be read is told as the words that it is.

    The pieces must hold the texts of special tokens, but not of the one that ends the turn.
    """

    def __init__(self, native: Native) -> None:
        self._native = native
        self._text = self._sent = ""

    def words(self, piece: str) -> str:
        self._text += piece
        words = self._native.so_far(self._turn())[1]
        words = words[: len(words.rstrip())]  # white space before a call belongs to neither
        new, self._sent = words[len(self._sent) :], max(words, self._sent, key=len)
        return new

    def end(self) -> tuple[str, list[dict[str, Any]]]:
        text = self._turn()
        turn = self._native.read_turn(text)
        calls = [
            {
                "id": secrets.token_hex(5)[:9],  # nine letters and digits, which Mistral's template asks for
                "type": "function",
                "function": {
                    "name": one["function"]["name"],
                    "arguments": write_arguments(one["function"]["arguments"]),
                },
            }
            for one in turn.calls
        ]
        rest = "" if calls else text[len(self._sent) :]
        return rest.rstrip() if self._native.strips else rest, calls

    def _turn(self) -> str:
        return self._text.lstrip() if self._native.strips else self._text
