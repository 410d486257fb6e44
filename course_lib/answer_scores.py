"""How near an answer is to a reference: ROUGE-L, chrF, and whether a short right answer stands in it."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

SHORT = 40  # characters: a longer reference is hardly ever met word for word, so exact match would say nothing

# Chinese and Japanese, without Hangul, which sets spaces: each character is a word
_IDEOGRAPH = "\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_IDEOGRAPH}]|[^\W_{_IDEOGRAPH}]+")


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, 0 to 1.

    The call is `RougeScorer(["rougeL"], tokenizer=WordTokenizer()).score(reference, answer)["rougeL"].fmeasure` of
    rouge-score. Its own tokenizer keeps ASCII letters and digits alone: of Chinese nothing is left, and the score is 0.
    """
    return _rouge().score(reference, answer)["rougeL"].fmeasure


def chrf(answer: str, reference: str) -> float:
    """chrF (Popović 2015): F2 of character n-grams up to 6, without white space, 0 to 100; it needs no words.

    The call is `CHRF().sentence_score(answer, [reference]).score` of sacrebleu.
    """
    return _chrf().sentence_score(answer, [reference]).score


def exact_match(answer: str, reference: str) -> bool | None:
    """Whether an answer is the reference, but for case, width, white space and the marks around it; None where the reference
    has more than `SHORT` characters."""
    return _plain(answer) == _plain(reference) if len(reference.strip()) <= SHORT else None


def contains_any(answer: str, accepted: Sequence[str]) -> bool:
    """Whether one of the accepted texts stands in an answer as words of their own, in any case."""
    return any(mentions(_folded(answer), _folded(text)) for text in accepted)


class WordTokenizer:
    """Words for ROUGE: runs of letters and digits of any script in lower case, and each Chinese or Japanese character.

    On ASCII text it gives what rouge-score's own tokenizer gives.
    """

    def tokenize(self, text: str) -> list[str]:
        """Return the words of a text."""
        return _WORD.findall(_folded(text))


def mentions(text: str, name: str) -> bool:
    """Whether a name stands in a text as a word of its own: Ada does not stand in "Canada", but does in "我是Ada的小助手".

    Chinese, Japanese and Korean set no spaces between words, so their characters may stand beside a name, and a name written in
    them may stand beside anything.
    """
    name, text = " ".join(name.split()), " ".join(text.split())
    before = rf"(?<!{_OF_A_WORD})" if re.match(_OF_A_WORD, name) else ""
    after = rf"(?!{_OF_A_WORD})" if re.search(rf"{_OF_A_WORD}\Z", name) else ""
    return bool(name) and re.search(before + re.escape(name) + after, text) is not None


# a letter or digit, but none of CJK and kana, Hangul, CJK compatibility, and CJK beyond the first plane
_OF_A_WORD = r"[^\W_\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"


def _folded(text: str) -> str:
    """One form for what looks or means the same: full width becomes half width, upper case lower case."""
    return unicodedata.normalize("NFKC", text).lower()


def _plain(text: str) -> str:
    words = " ".join(_folded(text).split())
    inside = [place for place, character in enumerate(words) if unicodedata.category(character)[0] not in "PZ"]
    return words[inside[0] : inside[-1] + 1] if inside else words


@functools.cache
def _rouge() -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=WordTokenizer())


@functools.cache
def _chrf() -> CHRF:
    from sacrebleu.metrics import CHRF

    return CHRF()
