"""Scores of an answer beside a reference: the libraries' own figures, and Chinese that is not thrown away."""

from __future__ import annotations

import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu import sentence_chrf

from course_lib.answer_scores import WordTokenizer, chrf, contains_any, exact_match, mentions, rouge_l

ENGLISH = [
    ("The cat sat on the mat.", "A cat was sitting on the mat"),
    ("Don't use snake_case, it's 3.5 times worse", "do NOT use it: 3.5 times"),
    ("", "something"),
    ("same words here", "same words here"),
    ("*Take* one tablet twice-daily\nwith food.", "Take 1 tablet twice daily, with food"),
]


@pytest.mark.parametrize(("answer", "reference"), ENGLISH)
def test_english_scores_are_the_libraries_own(answer: str, reference: str) -> None:
    theirs = RougeScorer(["rougeL"], use_stemmer=False).score(reference, answer)["rougeL"].fmeasure
    assert rouge_l(answer, reference) == theirs
    assert WordTokenizer().tokenize(answer) == DefaultTokenizer(use_stemmer=False).tokenize(answer)
    assert chrf(answer, reference) == sentence_chrf(answer, [reference]).score


def test_chinese_counts_by_character() -> None:
    """法国首都巴黎 beside 法国的首都是巴黎: a common subsequence of 6 of 6 and 8 characters."""
    assert RougeScorer(["rougeL"]).score("法国的首都是巴黎", "法国首都巴黎")["rougeL"].fmeasure == 0  # why we do not
    assert rouge_l("法国首都巴黎。", "法国的首都是巴黎") == pytest.approx(2 * 6 / (6 + 8))
    assert 0 < chrf("法国首都巴黎", "法国的首都是巴黎") < 100


def test_words_of_every_script() -> None:
    words = WordTokenizer().tokenize("Élodie used ＧＰＴ: 我是Ada, カナ, 한국어 2024年")
    assert words == ["élodie", "used", "gpt", "我", "是", "ada", "カ", "ナ", "한국어", "2024", "年"]


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Paris.", "paris", True),
        (" “Paris” ", "Paris", True),
        ("New\nYork", "new york", True),
        ("４２", "42", True),
        ("北京。", "北京", True),
        ("It is Paris", "Paris", False),
        ("-5 C", "5 C", True),
        ("", "Paris", False),
        ("", "", True),
        ("anything", "a reference that is too long to be met word for word", None),
    ],
)
def test_exact_match(answer: str, reference: str, expected: bool | None) -> None:
    assert exact_match(answer, reference) is expected


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("The capital is PARIS!", ["Paris"], True),
        ("It is H₂O", ["water", "H2O"], True),
        ("It is 420", ["42"], False),
        ("中国的首都是北京。", ["北京"], True),
        ("", ["Paris"], False),
        ("Parisian", ["Paris"], False),
        ("anything", [], False),
    ],
)
def test_a_right_answer_contains_an_accepted_text(answer: str, accepted: list[str], expected: bool) -> None:
    assert contains_any(answer, accepted) is expected


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("I am Ada's personal assistant.", "Ada", True),
        ("Ada", "Ada", True),
        ("Ottawa is in Canada, and I use Adam.", "Ada", False),
        ("Adaptive things.", "Ada", False),
        ("Ada2 and 2Ada", "Ada", False),
        ("我是Ada的小助手，内在是小模型。", "Ada", True),
        ("我在Canada工作", "Ada", False),
        ("저는 Ada의 비서입니다", "Ada", True),
        ("我是李雷的小助手", "李雷", True),
        ("assistant李雷here", "李雷", True),
        ("我是韩梅梅的小助手", "李雷", False),
        ("I am Grace\nHopper's assistant", "Grace  Hopper", True),
        ("I am Graceful Hopper", "Grace", False),
        ("_Ada_ and *Ada*", "Ada", True),
        ("Élodie is here", "lodie", False),
        ("I help C++ (beta)", "C++ (beta)", True),
        ("nobody", "", False),
    ],
)
def test_a_name_is_found_as_a_word_of_its_own(text: str, name: str, expected: bool) -> None:
    assert mentions(text, name) is expected
