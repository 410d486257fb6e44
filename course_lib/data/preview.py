"""What a recipe makes of its rows: text, ids, labels; and packs with their positions and edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_lib.data.collate import examples_of_pack, flatten
from course_lib.data.dataset import load_dataset
from course_lib.data.packing import plan_packs
from course_lib.data.templates import ChatTemplate, choose_template
from course_lib.data.tokenize import IGNORE_INDEX
from course_lib.errors import InputError

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from course_lib.recipe import Recipe


@dataclass(frozen=True)
class Preview:
    """Rows as plain data, and how to colour one."""

    rows: list[dict[str, Any]]
    summary: str
    tokenizer: PreTrainedTokenizerBase

    def text(self, row: dict[str, Any], *, brackets: bool = False) -> Text:
        """The row for a terminal: trained tokens bold, green and underlined, the others dim.

        A special token has a ◆ before it: the same letters in somebody's text have none. A sample of a pack begins with its
        number.

        Args:
            brackets: put trained tokens in ⟦ ⟧, for where colours are not seen.
        """
        from rich.text import Text

        shown = Text()
        pieces: list[tuple[bool, bool, list[int], str]] = []  # trained, special, ids, sample that begins here
        starts = dict(_sample_starts(row))
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}
        for position, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
            kind = (label != IGNORE_INDEX, token in special)
            if position in starts or not pieces or pieces[-1][:2] != kind or kind[1]:
                pieces.append((*kind, [], starts.get(position, "")))
            pieces[-1][2].append(token)
        for number, (trained, is_special, tokens, start) in enumerate(pieces):
            if start:
                shown.append(f"{chr(10) if number else ''}┆ {start} ┆ ", style="cyan")
            opens = trained and (number == 0 or start or not pieces[number - 1][0])
            closes = trained and (number + 1 == len(pieces) or pieces[number + 1][3] or not pieces[number + 1][0])
            text = ("◆" if is_special else "") + self.tokenizer.decode(tokens)
            text = ("⟦" if brackets and opens else "") + text + ("⟧" if brackets and closes else "")
            shown.append(text, style="bold underline green" if trained else "dim")
        return shown


def _sample_starts(row: dict[str, Any]) -> list[tuple[int, str]]:
    """Where the samples of a pack begin, each with its number and where it was cut; nothing for a row."""
    starts, position = [], 0
    for sample in row.get("samples", []):
        name = f"sample {sample['sample'] + 1}"
        if sample["length"] < sample["of"]:
            name += f", tokens {sample['start'] + 1} to {sample['start'] + sample['length']} of {sample['of']}"
        starts.append((position, name))
        position += sample["length"]
    return starts


def preview_recipe(recipe: Recipe, *, number: int = 3, packed: bool = False) -> Preview:
    """Tokenise a recipe's rows and take the first `number` rows, or packs.

    Each row has `text`, `input_ids`, `labels`; a pack also `position_ids`, `cu_seqlens` and `samples`.

    Raises:
        InputError: the recipe's data does not fit, or `number` is below 1.
    """
    if number < 1:
        raise InputError(f"-n {number}: give a number from 1 up")
    tokenizer, template = tokenizer_and_template(recipe.model.name, template=recipe.model.template)
    assert tokenizer is not None
    assert template is not None
    dataset = load_dataset(recipe.data, template=template, tokenizer=tokenizer)
    examples = dataset.train
    if not packed:
        rows = [
            {"text": tokenizer.decode(example.input_ids), "input_ids": example.input_ids, "labels": example.labels}
            for example in examples[:number]
        ]
        return Preview(rows, dataset.report.summary(), tokenizer)
    plan = plan_packs(
        examples.lengths,
        max_length=recipe.data.max_length,
        strategy=recipe.data.packing,
        seed=recipe.training.seed,
    )
    rows = []
    for pack in range(min(number, len(plan))):
        batch = flatten(examples_of_pack(plan, pack, examples))
        ids = batch["input_ids"][0].tolist()
        rows.append(
            {
                "text": tokenizer.decode(ids),
                "input_ids": ids,
                "labels": batch["labels"][0].tolist(),
                "position_ids": batch["position_ids"][0].tolist(),
                "cu_seqlens": batch["cu_seq_lens_q"].tolist(),
                "samples": [
                    {"sample": example, "start": start, "length": length, "of": int(plan.lengths[example])}
                    for example, start, length in plan[pack]
                ],
            }
        )
    return Preview(rows, f"{dataset.report.summary()}; {len(plan)} packs", tokenizer)


def tokenizer_and_template(
    model: str | None, *, template: str = "auto"
) -> tuple[PreTrainedTokenizerBase | None, ChatTemplate | None]:
    """The tokenizer of a model and its template; (None, None) when no model is named and the dial's is not on this machine.

    Raises:
        InputError: the model or the template is unknown.
    """
    from course_lib.models import is_cached, load_tokenizer
    from course_lib.scale import DEFAULT_MODEL, current_scale

    if model is None:
        model = DEFAULT_MODEL[current_scale()]
        if not is_cached(model):
            return None, None
    tokenizer = load_tokenizer(model)
    return tokenizer, choose_template(tokenizer, template)
