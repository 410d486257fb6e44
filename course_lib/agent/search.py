"""Search: the web by serper.dev where `SERPER_API_KEY` is set, else BM25 over the course's small encyclopedia, offline."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from course_lib.data.readers import read_rows
from course_lib.data.sources import SAMPLE_FOLDER

SERPER = "https://google.serper.dev/search"  # source of the form: https://serper.dev, POST with the header X-API-KEY
SECONDS = 10.0
LARGEST_ANSWER = 2_000_000  # bytes read from the server
CORPUS = SAMPLE_FOLDER / "encyclopedia.jsonl"
_K1, _B = 1.2, 0.75  # Robertson and Zaragoza 2009, the usual values
_WORD = re.compile(r"[a-z0-9]+|[\u3400-\u4dbf\u4e00-\u9fff]+")
_COMMON = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "by",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "how",
        "in",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "that",
        "the",
        "this",
        "to",
        "was",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "whose",
        "why",
        "will",
        "with",
    ]
) | frozenset("的了是在和有什么多少吗呢")


class SearchError(Exception):
    """The web search failed; the message is for the model, and holds no key."""


def search(query: str, limit: int = 3) -> list[str]:
    """The best answers to a query, best first, as "title: text"; an empty list where nothing fits.

    Raises:
        SearchError: serper.dev cannot be reached, refuses the key, or answers in another form.
    """
    key = os.environ.get("SERPER_API_KEY", "")
    return search_web(query, limit, key=key) if key else search_corpus(query, limit)


def search_corpus(query: str, limit: int = 3, *, corpus: Path = CORPUS) -> list[str]:
    """Search the offline encyclopedia; what matches less than half as well as the best is left out."""
    documents, index = _index(corpus)
    scores = index.scores(query)
    best = sorted((-score, number) for number, score in scores.items())[:limit]
    return [
        _line(documents[number]["title"], documents[number]["text"])
        for score, number in best
        if -score * 2 >= -best[0][0]
    ]


def search_web(query: str, limit: int, *, key: str) -> list[str]:
    """Search Google by serper.dev. Raises SearchError."""
    import httpx2

    try:
        with (
            httpx2.Client(timeout=SECONDS) as client,
            client.stream("POST", SERPER, json={"q": query, "num": limit}, headers={"X-API-KEY": key}) as response,
        ):
            body = bytearray()
            for piece in response.iter_bytes():
                body += piece
                if len(body) > LARGEST_ANSWER:
                    raise SearchError(f"the web search answered with more than {LARGEST_ANSWER} bytes")
            if response.status_code != 200:
                hint = "; check SERPER_API_KEY" if response.status_code in (401, 403) else ""
                raise SearchError(f"the web search answered with status {response.status_code}{hint}")
    except httpx2.HTTPError as error:
        raise SearchError(f"the web search cannot be reached ({type(error).__name__})") from None
    return _read_answer(bytes(body))[:limit]


def _read_answer(body: bytes) -> list[str]:
    import json

    try:
        answer: dict[str, Any] = json.loads(body)
        box, organic = answer.get("answerBox") or {}, answer.get("organic") or []
        direct = [_line(box.get("title", ""), text) for text in [box.get("answer") or box.get("snippet")] if text]
        return direct + [_line(one.get("title", ""), one["snippet"]) for one in organic if one.get("snippet")]
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        raise SearchError("the web search answered in a form that is not known") from None


def _line(title: object, text: object) -> str:
    return " ".join(f"{title}: {text}".split()) if title else " ".join(str(text).split())


class BM25:
    """Okapi BM25 (Robertson and Zaragoza 2009, section 3.4) over texts held in memory."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(terms(text)) for text in texts]
        lengths = [sum(count.values()) for count in counts]
        mean = sum(lengths) / max(len(lengths), 1)
        frequency = Counter(term for count in counts for term in count)
        self._weights: dict[str, dict[int, float]] = {term: {} for term in frequency}
        for number, count in enumerate(counts):
            norm = _K1 * (1 - _B + _B * lengths[number] / mean)
            for term, times in count.items():
                rare = math.log(1 + (len(texts) - frequency[term] + 0.5) / (frequency[term] + 0.5))
                self._weights[term][number] = rare * times * (_K1 + 1) / (times + norm)

    def scores(self, query: str) -> dict[int, float]:
        """Text number -> score, for the texts that share a term with the query."""
        found: Counter[int] = Counter()
        for term in {*terms(query)}:
            found.update(self._weights.get(term, {}))
        return dict(found)


def terms(text: str) -> list[str]:
    """Words in lower case without a plural s, common ones left out; of Chinese, every two neighbouring characters."""
    found: list[str] = []
    for word in _WORD.findall(text.lower()):
        if word[0].isascii():
            if word not in _COMMON:
                found.append(word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word)
        else:
            found += (
                [word]
                if len(word) == 1
                else [word[i : i + 2] for i in range(len(word) - 1) if not {*word[i : i + 2]} & _COMMON]
            )
    return found


@cache
def _index(corpus: Path) -> tuple[list[dict[str, str]], BM25]:
    documents = read_rows(corpus)
    return documents, BM25([f"{one['title']} {one['title']} {one['text']}" for one in documents])
