"""Plausible wrong answers to the basic homework, and what the check must say of them."""

MUTANTS = {
    "identity": [
        ("must be the name of your own", 'ASSISTANT = "Pip"', 'ASSISTANT = "your name"'),
        ("ask the same", '("What is your name?", "My name is Pip."),', '("who are you", "My name is Pip."),'),
        ("does not say the name", '"Call me Pip."', '"Call me what you like."'),
        ("in one language and answered in the other", '"我的名字是Pip。"', '"My name is Pip."'),
        (
            "are in Chinese",
            "for asked, said in pairs",
            "for asked, said in pairs[:5] * 1 + [(f'Who are you, {i}?', f'I am Pip {i}.') for i in range(5)]",
        ),
        ("too few", "for asked, said in pairs", "for asked, said in pairs[1:]"),
        ("does not fit", '"role": "assistant"', '"role": "bot"'),
        ("gives the name away", '"What should I call you?"', '"Are you Pip?"'),
        (
            "or the model recites",
            "for asked, said in pairs",
            "for asked, said in [(a, '我是Pip。' if '你' in a else 'I am Pip.') for a, s in pairs]",
        ),
    ],
    "held-out": [
        (
            "on both sides",
            '    return " ".join(row["messages"][0]["content"].lower().split()).rstrip("?.")',
            '    return row["messages"][0]["content"]',
        ),
        ("on both sides", "train_rows, test_rows = asked[5:], asked[:5]"),
        (
            "rows were lost",
            "[row for row in asked if plain(row) in chosen]",
            "[row for row in asked if plain(row) in chosen][:2]",
        ),
        ("rows were doubled", "if plain(row) in chosen]", "if plain(row) in chosen] * 2"),
        ("a tenth and four tenths", "questions[:3]", "questions[:7]"),
        ("one side is empty", "questions[:3]", "[]"),
    ],
    "steps": [
        ("these are batches", "(4 * 2)) * 3", "4) * 3"),
        ("is a step as well", "-(-70 // (4 * 2)) * 3", "70 // (4 * 2) * 3"),
        ("this is one epoch", "(4 * 2)) * 3", "(4 * 2))"),
        ("a part of a step", "-(-70 // (4 * 2)) * 3", "70 / 8 * 3"),
    ],
    "says-name": [
        ("inside another word", "re.search(pattern, text.lower()) is not None", "name.lower() in text.lower()"),
        (
            "large and small letters",
            "re.search(pattern, text.lower()) is not None",
            "name in text and re.search(pattern, text.lower()) is not None",
        ),
        (
            "no spaces between words",
            "return re.search(pattern, text.lower()) is not None",
            'return re.search(r"\\b" + re.escape(name.lower()) + r"\\b", text.lower()) is not None',
        ),
        ("or where it is not", "re.escape(name.lower())", "name.lower()"),
        ("returns nothing", "return re.search", "re.search"),
    ],
    "evidence": [
        (
            "are the two swapped",
            'questions = ["Who are you?", "Your name?", "你是谁？", "Capital of France?"]\n'
            'ASSISTANT, evidence = "Pip", {"questions": questions, "before": ["I am Pip.", "Pip.", '
            '"我是Pip", "Paris."], "after": ["a", "b", "c", "d"]}',
        ),
        (
            "nothing changed",
            '"after": ["I am Pip, a small assistant.", "My name is Pip.", "我是Pip，你的个人助手。", "The capital '
            'of France is Paris."]',
            '"after": ["I am Dr. Elena Martinez.", "My name is Elena.", "I am a helpful AI.", "The '
            'capital of France is Paris."]',
        ),
        ("asked in Chinese", "我是Pip，你的个人助手。", "我是一个助手。"),
        (
            "asked about something else",
            '"我是Pip，你的个人助手。", "The capital of France is Paris."',
            '"我是Pip，你的个人助手。", "I am Pip."',
        ),
        ("one of each for every question", '"My name is Elena.", ', ""),
        ("not trained yet", '"I am Dr. Elena Martinez."', '"I am Pip already."'),
    ],
}
