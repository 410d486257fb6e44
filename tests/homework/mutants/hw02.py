"""Plausible wrong answers to homework 02, and what the check must say of them."""

MUTANTS = {
    "forward": [
        ("alpha has no effect", "alpha / rank * ", ""),
        ("by alpha alone", "alpha / rank", "alpha"),
        ("upside down", "alpha / rank", "rank / alpha"),
        ("the adapter alone", "x @ weight.T + ", ""),
        ("root of the rank", "alpha / rank", "alpha / rank**0.5"),
        ("stopped with", "x @ weight.T", "x @ weight"),
    ],
    "start": [
        ("both are zero", "torch.randn(rank, inputs) / inputs**0.5", "torch.zeros(rank, inputs)"),
        ("another one before the first step", "torch.zeros(outputs, rank)", "torch.randn(outputs, rank)"),
        (
            "A is zero and B random",
            "def new_adapter(rank, inputs, outputs):\n    return torch.zeros(rank, inputs), torch.randn(outputs, rank)",
        ),
        ("A is (rank, inputs)", "torch.randn(rank, inputs)", "torch.randn(inputs, rank)"),
        ("learn the same", "torch.randn(rank, inputs) / inputs**0.5", "torch.ones(rank, inputs)"),
    ],
    "parameters": [
        ("the full matrices", "rank * inputs + outputs * rank", "outputs * inputs"),
        ("A alone", "rank * inputs + outputs * rank", "rank * inputs"),
        ("never kept", "rank * inputs + outputs * rank", "rank * inputs * outputs"),
        ("the rank is missing", "rank * inputs + outputs * rank", "inputs + outputs"),
    ],
    "merge": [
        ("the scale is forgotten", "scale * ", ""),
        ("wrong way round", "b @ a", "(b @ a).T"),
        ("by alpha alone", "alpha / a.shape[0]", "alpha"),
        ("adds the adapter again", "return weight + scale * (b @ a)", "weight += scale * (b @ a)\n    return weight"),
    ],
    "quantise": [
        ("one scale for all", "values.view(-1, block)", "values.view(1, -1)"),
        ("is zero", "    step[step == 0] = 1\n", ""),
        ("towards zero", ".round()", ".trunc()"),
        ("scale them back", ".round() * step", ".round()"),
        ("7 on each side", "/ 7", "/ 8"),
        ("negative one is forgotten", "blocks.abs().amax", "blocks.amax"),
    ],
    "memory": [
        ("the scales are forgotten", ' + case["weights"] / 64 * 4', ""),
        ("there are four", "* 4 * 4", "* 4"),
        ("half of one", 'case["weights"] / 2 +', 'case["weights"] +'),
        ("the adapter is forgotten", ' + case["adapter"] * 4 * 4', ""),
    ],
}
