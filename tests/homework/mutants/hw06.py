"""Plausible wrong answers to homework 06, and what the check must say of them."""

MUTANTS = {
    "turn": [
        ("still text", 'json.loads(line.removeprefix("Action Input: "))', 'line.removeprefix("Action Input: ")'),
        (
            "you believed it",
            "    name = None\n",
            '    name = None\n    if "Final Answer:" in text:\n        return text.split("Final Answer:")[1].strip()\n',
        ),
        ("cut at its first line", 'rest = "\\n".join(text.split("\\n")[number:])', "rest = line"),
        ("returns nothing", "Final Answer:", "Answer:"),
    ],
    "result": [
        (
            "the agent stops with",
            '    try:\n        return str(tools[name](**arguments))\n    except Exception as error:\n        return f"{name} failed: {error}"',
            "    return str(tools[name](**arguments))",
        ),
        ("which tools there are", "if name not in tools:", "if name == '':"),
        ("which tools there are", "; there are {', '.join(tools)}", ""),
        ("what went wrong", "{name} failed: {error}", "error"),
        ("a result is text", "str(tools[name](**arguments))", "tools[name](**arguments)"),
    ],
    "loop": [
        ("its own calls", '        messages.append({"role": "assistant", "content": text})\n', ""),
        ("does not see a result", '        messages.append({"role": "user", "content": f"Response: {result}"})\n', ""),
        ("into the model's mouth", '"user", "content": f"Response', '"assistant", "content": f"Response'),
        (
            "ends before the model has answered",
            "        if is_answer:\n            return result",
            "        return result",
        ),
        ("return None", "    return None", "    return result"),
        ("max_turns is 3", "range(max_turns)", "range(10)"),
    ],
    "trained": [
        ("make results up", 'message["role"] == "assistant"', 'message["role"] != "system"'),
        ("never learn to call", 'message["role"] == "assistant"', '"Final Answer" in message["content"]'),
        ("an answer is not trained", 'message["role"] == "assistant"', '"Action" in message["content"]'),
    ],
}
