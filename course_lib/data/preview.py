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

    def text(self, row: dict[str, Any]) -> Text:
        """The row for a terminal: trained tokens bold, green and underlined, the others dim."""
        from rich.text import Text

        shown = Text()
        pieces: list[tuple[bool, list[int]]] = []
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            trained = label != IGNORE_INDEX
            if not pieces or pieces[-1][0] != trained:
                pieces.append((trained, []))
            pieces[-1][1].append(token)
        for trained, tokens in pieces:
            shown.append(self.tokenizer.decode(tokens), style="bold underline green" if trained else "dim")
        return shown


def preview_recipe(recipe: Recipe, *, number: int = 3, packed: bool = False) -> Preview:
    """Tokenise a recipe's rows and take the first `number` rows, or packs.

    Each row has `text`, `input_ids`, `labels`; a pack also `position_ids` and `cu_seqlens`.

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
