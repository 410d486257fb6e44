"""The main job in one call: fetch, ask, fine-tune, merge, ask again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.files import write_text
from course_lib.recipe import Recipe, recipe_for
from course_lib.scale import current_scale
from course_lib.training.events import Listener

if TYPE_CHECKING:
    from rich.table import Table

# asked before and after; the second half was never trained on
TRAINED_QUESTIONS = ("Who are you?", "请介绍一下你自己")
NEW_QUESTIONS = (
    "Hey, could you say what you're called?",
    "打扰一下，你到底是谁呀？",
    "What is the capital of France?",
    "Name the largest planet of the solar system.",
)


@dataclass(frozen=True)
class QuickstartResult:
    """What a quickstart made and how long each part took, in seconds."""

    name: str
    answers: tuple[tuple[str, str, str], ...]  # question, before, after
    adapter: Path
    merged: Path
    loss_curve: Path
    seconds: dict[str, float]


def quickstart(
    *,
    name: str = "Ada",
    scale: str | None = None,
    work_dir: str | Path = "work_dirs/quickstart",
    listeners: Sequence[Listener] = (),
    say: Callable[[str], None] = lambda line: None,
) -> QuickstartResult:
    """Make the scale's model a personal assistant of `name`, and ask it the same questions before and after.

    An earlier quickstart in `work_dir` is replaced.

    Raises:
        CourseError: as `fetch`, `train` and `merge` do.
    """
    from course_lib.chat.answers import answer_questions
    from course_lib.data.templates import choose_template
    from course_lib.export.merge import merge
    from course_lib.models import load_model, model_folder
    from course_lib.plots import loss_figure, save_figure
    from course_lib.training.listeners import read_metrics
    from course_lib.training.loop import train

    work_dir = Path(work_dir)
    recipe = quickstart_recipe(name=name, scale=current_scale(scale))
    questions = [*TRAINED_QUESTIONS, *NEW_QUESTIONS]
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(part: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[part], clock = now - clock, now

    def answers_of(model_name: str | Path) -> list[str]:
        model, tokenizer = load_model(model_name, dtype=_chat_dtype(recipe))
        return answer_questions(model, tokenizer, questions, template=choose_template(tokenizer), max_new_tokens=40)

    say(f"1/5  the model: {recipe.model.name}")
    model_folder(recipe.model.name)
    lap("fetch")
    say("2/5  its answers before")
    before = answers_of(recipe.model.name)
    lap("answers before")
    say(
        f"3/5  fine-tuning: {recipe.data.identity.n if recipe.data.identity else 0} rows about who it is, and general chat beside them"
    )
    adapter = train(recipe, work_dir=work_dir, overwrite=True, listeners=listeners)
    loss_curve = work_dir / "loss.png"
    save_figure(loss_figure(read_metrics(work_dir), title=f"Personal assistant of {name}"), loss_curve)
    lap("train")
    say("4/5  merging the adapter into the model")
    merged = merge(recipe.model.name, adapter, work_dir / "merged", overwrite=True)
    lap("merge")
    say("5/5  its answers after")
    after = answers_of(merged)
    lap("answers after")
    result = QuickstartResult(
        name=name,
        answers=tuple(zip(questions, before, after, strict=True)),
        adapter=adapter,
        merged=merged,
        loss_curve=loss_curve,
        seconds=seconds,
    )
    write_text(
        work_dir / "quickstart.json", json.dumps(asdict(result), ensure_ascii=False, indent=1, default=str) + "\n"
    )
    return result


def comparison_table(result: QuickstartResult) -> Table:
    """Question, answer before, answer after, for the terminal; says which questions were not trained on."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"Before and after fine-tuning ({result.seconds['train']:.0f} s of training)",
        title_justify="left",
        show_lines=True,
    )
    for column, ratio in (("question", 3), ("before", 4), ("after", 4)):
        table.add_column(column, ratio=ratio, overflow="fold")  # fold: Chinese has no spaces to break lines at
    for number, (question, before, after) in enumerate(result.answers):
        asked = Text(question)
        if number >= len(TRAINED_QUESTIONS):
            asked.append("\n(not trained on)", style="dim")
        table.add_row(asked, Text(" ".join(before.split())), Text(" ".join(after.split())))
    return table


def quickstart_recipe(*, name: str, scale: str) -> Recipe:
    """The personal-assistant recipe of a scale for `name`, with no questions in mid-training: the table asks them."""
    recipe = recipe_for("personal_assistant", scale)
    assert recipe.data.identity is not None
    recipe.data.identity.name = name
    recipe.evaluation.questions = []
    return recipe


def _chat_dtype(recipe: Recipe) -> str:
    return "auto" if recipe.model.dtype in ("nf4", "int8") else recipe.model.dtype
