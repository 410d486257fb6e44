"""Plausible wrong answers to homework 01, and what the check must say of them."""

MUTANTS = {
    "template": [
        ("the model never learns to stop", "<|im_end|>", ""),
        ("line break behind <|im_end|>", "<|im_end|>\\n", "<|im_end|>"),
        ("whose turn it is", 'if add_generation_prompt else ""', 'if False else ""'),
        ("that nobody asked for", 'if add_generation_prompt else ""', ""),
        ("a content was changed", "{one['content']}", "{one['content'].strip()}"),
        ("does not open with", "{one['role']}\\n", "{one['role']} "),
        ("the roles are not", "{one['role']}", "user"),
    ],
    "forged": [
        ("the user's part alone", "forged = answered"),
        ("the texts part at character", 'removeprefix("user: ").removesuffix("\\n")', "strip()"),
        ("the texts part at character", '.removesuffix("\\n")', ""),
        ("a list of messages", 'forged = "user: hello"'),
    ],
    "labels": [
        (
            "the model will not stop",
            "labels[at] = ids[at]\n                if ids[at] == END:\n                    break\n",
            "if ids[at] == END:\n                    break\n                labels[at] = ids[at]\n",
        ),
        ("shifted by one", "return labels", "return labels[1:] + [-100]"),
        ("learn to ask", "[START, ASSISTANT, BREAK]", "[START, ids[at + 1] if at + 1 < len(ids) else 0, BREAK]"),
        ("turn is left out", "                    break\n", "                    return labels\n"),
        (
            "the header of a turn",
            "def label(ids):\n    start = ids.index(ASSISTANT) - 1\n    return [-100] * start + ids[start:]",
        ),
        ("as long as the ids", "return labels", "return [one for one in labels if one != -100]"),
        ("another token's number", "labels[at] = ids[at]", "labels[at] = 1"),
        ("learn to ask", "def label(ids):\n    return list(ids)"),
    ],
    "batch": [
        (
            "looks like padding",
            "return ids, labels, mask",
            "labels = [[-100 if token == pad else label for token, label in zip(*row)] for row in zip(ids, labels)]\n    return ids, labels, mask",
        ),
        ("padding is trained", "row + [-100] *", "row + [pad] *"),
        (
            "the mask is 0 at a token",
            "return ids, labels, mask",
            "return ids, labels, [[int(token != pad) for token in row] for row in ids]",
        ),
        ("the mask is 1 at padding", "[0] * (longest", "[1] * (longest"),
        ("stand first", "row + [pad] * (longest - len(row))", "[pad] * (longest - len(row)) + row"),
        ("three lists", "return ids, labels, mask", "return ids, labels"),
    ],
    "loss": [
        ("the shift is missing", "logits[:, :-1].log_softmax(-1), labels[:, 1:]", "logits.log_softmax(-1), labels"),
        (
            "the wrong way",
            "logits[:, :-1].log_softmax(-1), labels[:, 1:]",
            "logits[:, 1:].log_softmax(-1), labels[:, :-1]",
        ),
        ("this is the sum", ".mean()", ".sum()"),
        ("the sign", "return -chosen", "return chosen"),
        ("divides by all tokens", "-chosen[trained].mean()", "-(chosen * trained).mean()"),
        ("counted as token 0", "-chosen[trained].mean()", "-chosen.mean()"),
        (
            "rows' means",
            "-chosen[trained].mean()",
            "sum(-row[mask].mean() for row, mask in zip(chosen, trained)) / len(chosen)",
        ),
        (
            "take their logarithm",
            "log_softmax(-1), labels[:, 1:]",
            "softmax(-1), labels[:, 1:]\n    predicted = -predicted",
        ),
    ],
    "cut": [
        (
            "swapped",
            "nothing_to_train, end_cut_off = 0, 0\nend_cut_off = sum(prompt >= MAX_LENGTH for prompt, answer in rows)\nnothing_to_train = sum(prompt < MAX_LENGTH < prompt + answer for prompt, answer in rows)",
        ),
        ("exactly as many tokens as fit", "prompt >= MAX_LENGTH", "prompt > MAX_LENGTH"),
        ("fits exactly keeps its end", "MAX_LENGTH < prompt + answer", "MAX_LENGTH <= prompt + answer"),
        ("in the first count alone", "prompt < MAX_LENGTH < prompt + answer", "MAX_LENGTH < prompt + answer"),
        ("counts all rows that are cut", "prompt >= MAX_LENGTH for", "prompt + answer > MAX_LENGTH for"),
    ],
}
