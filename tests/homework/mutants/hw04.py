"""Plausible wrong answers to homework 04, and what the check must say of them."""

MUTANTS = {
    "thread": [
        (
            "did not rank best",
            'min(node["replies"], key=lambda reply: reply["rank"], default=None)',
            'node["replies"][0] if node["replies"] else None',
        ),
        (
            "nothing to learn behind it",
            '    while messages and messages[-1]["role"] != "assistant":\n        messages.pop()\n',
            "",
        ),
        ("ends too early", "return messages", "return messages[:2]"),
        ("a list of messages", '"content": node["text"]', '"text": node["text"]'),
    ],
    "best-step": [
        ("learns by heart", "min(held_out, key=lambda one: one[1])[0]", "held_out[training.index(min(training))][0]"),
        ("is wanted", "min(held_out, key=lambda one: one[1])[0]", "min(loss for step, loss in held_out)"),
        ("as good", "min(held_out, key=lambda one: one[1])[0]", "min(held_out, key=lambda one: (one[1], -one[0]))[0]"),
        (
            "place in the list",
            "return min(held_out, key=lambda one: one[1])[0]",
            "losses = [one[1] for one in held_out]\n    return losses.index(min(losses))",
        ),
    ],
    "learning-rate": [
        (
            "no warm-up",
            "    if step < warmup:\n        return peak * step / warmup\n",
            "    if step < warmup:\n        return peak\n",
        ),
        (
            "straight line down",
            "(1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2",
            "(1 - (step - warmup) / (total - warmup))",
        ),
        ("not end at zero", "math.pi * (step", "math.pi / 2 * (step"),
        ("from 0 to the peak", "peak * step / warmup", "peak * (step + 1) / warmup"),
        ("end at zero", "(step - warmup) / (total - warmup)", "(step - warmup) / total"),
    ],
    "verdict": [
        ("by the root of n", "variance / count", "variance"),
        ("the sign is wrong", "new - old", "old - new"),
        (
            "pair them",
            "    half =",
            "    mb, ma = sum(before) / count, sum(after) / count\n    variance = (sum((b - mb) ** 2 for b in before) + sum((a - ma) ** 2 for a in after)) / (count - 1)\n    half =",
        ),
        ("above the high end", "mean - half, mean + half", "mean + half, mean - half"),
        ("narrower", "1.96", "1.0"),
    ],
}
