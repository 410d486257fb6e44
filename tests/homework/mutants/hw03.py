"""Plausible wrong answers to homework 03, and what the check must say of them."""

MUTANTS = {
    "positions": [
        (
            "the positions run on",
            "[position for length in lengths for position in range(length)]",
            "list(range(sum(lengths)))",
        ),
        ("count from 0", "range(length)", "range(1, length + 1)"),
        (
            "numbers of the samples",
            "[position for length in lengths for position in range(length)]",
            "[n for n, length in enumerate(lengths) for _ in range(length)]",
        ),
        ("as many positions", "range(length)]", "range(length - 1)]"),
    ],
    "visible": [
        ("of another sample", "owner[query] == owner[key] and key <= query", "key <= query"),
        ("comes after it", " and key <= query", ""),
        ("does not see itself", "key <= query", "key < query"),
        ("rows and columns", "for query in places]", "for query in places[1:]]"),
    ],
    "packs": [
        ("are enough", "key=lambda one: -lengths[one]", "key=lambda one: lengths[one]"),
        ("tokens and", "room >= lengths[example]", "room > 0"),
        ("is lost", "return packs", "return packs[:-1]"),
        ("not their lengths", "packs[place].append(example)", "packs[place].append(lengths[example] + 100)"),
        ("are enough", "for place, room in enumerate(rooms):", "for place, room in list(enumerate(rooms))[-1:]:"),
        ("in two packs", "return packs", "return packs + packs[:1]"),
    ],
    "padding": [
        ("longest of all", "max(batch) * len(batch)", "max(lengths) * len(batch)"),
        ("take those away", " - sum(batch)", ""),
        ("sorted by length", "batches = [lengths[", "ordered = sorted(lengths)\nbatches = [ordered["),
    ],
    "step-loss": [
        (
            "means",
            "return total / sum(tokens for loss, tokens in parts)",
            "means = [loss / tokens for loss, tokens in parts if tokens]\n    return sum(means) / len(means)",
        ),
        ("number of micro-batches", "sum(tokens for loss, tokens in parts)", "len(parts)"),
        ("this is the sum", " / sum(tokens for loss, tokens in parts)", ""),
    ],
}
