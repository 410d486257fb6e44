"""Plausible wrong answers to homework 05, and what the check must say of them."""

MUTANTS = {
    "row": [
        ("the word for nothing", '"" if line[key] is None else str(line[key]).strip()', "str(line[key]).strip()"),
        ("white space at the ends", "str(line[key]).strip()", "str(line[key])"),
        ("stopped with", "str(line[key]).strip()", "line[key].strip()"),
        ("a conversation is wanted", '("user", "assistant"), texts', '("user", "bot"), texts'),
        ("is kept", "if not all(texts)", "if not texts"),
    ],
    "split": [
        ("on both sides", ".lower().split()", ".split()"),
        ("on both sides", '.rstrip("?!. ")', ""),
        (
            "on both sides",
            "def split(rows, share):\n    cut = int(share * len(rows))\n    return rows[cut:], rows[:cut]",
        ),
        ("lost, doubled", "setdefault(key, []).append(row)", "__setitem__(key, [row])"),
        ("far from three tenths", "share * len(rows)", "0.8 * len(rows)"),
        (
            "another call",
            "for key in sorted(groups):",
            "import random\n    keys = random.SystemRandom().sample(sorted(groups), len(groups))\n    for key in keys:",
        ),
    ],
    "similar": [
        ("the larger set", "len(one | two) if", "max(len(one), len(two)) if"),
        ("the first alone", "len(one | two) if", "len(one) if"),
        ("make a difference", "text.lower()", "text"),
        ("make a difference", '.strip("?!.,")', ""),
        ("stopped with ZeroDivisionError", " if one | two else 1.0", ""),
    ],
    "f1": [
        ("precision alone", "return 2 * precision * recall / (precision + recall)", "return precision"),
        ("recall alone", "return 2 * precision * recall / (precision + recall)", "return recall"),
        ("harmonic", "2 * precision * recall / (precision + recall)", "(precision + recall) / 2"),
        ("stopped with ZeroDivisionError", "    if common == 0:\n        return 0.0\n", ""),
        (
            "counts once only",
            "Counter(said.split()), Counter(right.split())",
            "Counter(set(said.split())), Counter(set(right.split()))",
        ),
    ],
}
