"""The main job in one call: fetch, ask, fine-tune, merge, ask again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from course_lib.data.identity import identity_conversations
from course_lib.errors import InputError
from course_lib.files import lock, read_json, save_errors, take_place, write_text
from course_lib.recipe import Recipe, load_recipe, recipe_for
from course_lib.scale import current_scale
from course_lib.training.events import Listener
from course_lib.training.interrupt import Interrupted

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


RECORD_FILE = "quickstart.json"  # written last: what it stands beside is whole
UNFINISHED = "unfinished"  # the folder a quickstart works in; its files take their places when all of them stand
RESUME_HINT = "run the same command again and it goes on"


@dataclass(frozen=True)
class QuickstartResult:
    """What a quickstart made and how long each part took, in seconds."""

    name: str
    answers: tuple[tuple[str, str, str], ...]  # question, before, after
    adapter: Path
    merged: Path
    loss_curve: Path
    seconds: dict[str, float]

    def to_json(self) -> str:
        """All of it as JSON text."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1, default=str) + "\n"


def quickstart(
    *,
    name: str = "Ada",
    scale: str | None = None,
    work_dir: str | Path = "work_dirs/quickstart",
    listeners: Sequence[Listener] = (),
    say: Callable[[str], None] = lambda line: None,
) -> QuickstartResult:
    """Make the scale's model a personal assistant of `name`, and ask it the same questions before and after.

    A finished result of the same name and recipe in `work_dir` is returned as it is. Otherwise the work is done in
    `work_dir/unfinished`, where it goes on after an interruption; an earlier result is replaced when the new one is whole.

    Raises:
        InputError: the name cannot be used, `work_dir` holds what no quickstart wrote, or another one is at work there.
        Interrupted: Ctrl-C or SIGTERM.
        CourseError: as `fetch`, `train` and `merge` do.
    """
    work_dir = Path(work_dir)
    recipe = quickstart_recipe(name=name, scale=current_scale(scale))
    _check_folder(work_dir)
    with lock(work_dir):
        if (work_dir / UNFINISHED / RECORD_FILE).is_file():  # stopped while its files took their places
            _put_in_place(work_dir)
        earlier = _read_result(work_dir)
        if earlier and _has_recipe(work_dir, recipe):
            say(f"{work_dir} holds the assistant of {name} already: nothing to do (to make it anew, remove the folder)")
            return earlier
        if earlier:
            say(f"{work_dir} holds an assistant of {earlier.name}: replacing it when the new one is done")
        try:
            _make(recipe, name, work_dir / UNFINISHED, listeners, say)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {RESUME_HINT}") from None
        _put_in_place(work_dir)
        result = _read_result(work_dir)
        assert result is not None
        return result


def _make(recipe: Recipe, name: str, folder: Path, listeners: Sequence[Listener], say: Callable[[str], None]) -> None:
    """Do the work in `folder`, going on with what an interrupted quickstart of the same recipe left there."""
    from course_lib.chat.answers import answer_questions
    from course_lib.data.templates import choose_template
    from course_lib.export.merge import merge
    from course_lib.models import load_model, model_folder
    from course_lib.plots import loss_figure, save_figure
    from course_lib.training.checkpoint import checkpoints
    from course_lib.training.listeners import read_metrics
    from course_lib.training.loop import train

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

    if folder.exists() and not _has_recipe(folder, recipe):
        say("an unfinished run for another name or recipe is discarded")
        shutil.rmtree(folder)
    resume = bool(checkpoints(folder))
    if not resume:  # a run that was stopped before it had a checkpoint has nothing to go on from
        shutil.rmtree(folder, ignore_errors=True)
    recipe.save(folder / "recipe.yaml")
    say(f"1/5  the model: {recipe.model.name}")
    model_folder(recipe.model.name)
    lap("fetch")
    say("2/5  its answers before")
    before = answers_of(recipe.model.name)
    lap("answers before")
    rows = recipe.data.identity.n if recipe.data.identity else 0
    say(
        "3/5  fine-tuning: "
        + ("going on where it was stopped" if resume else f"{rows} rows about who it is, and general chat beside them")
    )
    adapter = train(recipe, work_dir=folder, resume=resume, listeners=listeners, resume_hint=RESUME_HINT)
    save_figure(loss_figure(read_metrics(folder), title=f"Personal assistant of {name}"), folder / "loss.png")
    lap("train")
    say("4/5  merging the adapter into the model")
    merged = merge(recipe.model.name, adapter, folder / "merged", overwrite=True)
    lap("merge")
    say("5/5  its answers after")
    after = answers_of(merged)
    lap("answers after")
    result = _result_in(folder.parent, name, zip(questions, before, after, strict=True), seconds)
    write_text(folder / RECORD_FILE, result.to_json())


def _result_in(
    folder: Path, name: str, answers: Iterable[Sequence[str]], seconds: dict[str, float]
) -> QuickstartResult:
    return QuickstartResult(
        name=name,
        answers=tuple((question, before, after) for question, before, after in answers),
        adapter=folder / "adapter",
        merged=folder / "merged",
        loss_curve=folder / "loss.png",
        seconds=seconds,
    )


def _read_result(folder: Path) -> QuickstartResult | None:
    """The result that stands whole in a folder; None where there is none, or a part of it is missing."""
    try:
        record = read_json(folder / RECORD_FILE)
        result = _result_in(folder, record["name"], record["answers"], record["seconds"])
    except (InputError, KeyError, TypeError, ValueError):
        return None
    whole = (result.adapter / "adapter_config.json", result.merged / "config.json", result.loss_curve)
    return result if all(path.is_file() for path in whole) else None


def _has_recipe(folder: Path, recipe: Recipe) -> bool:
    """Whether what stands in a folder was made from this very recipe, and so for this name."""
    try:
        return load_recipe(folder / "recipe.yaml") == recipe
    except InputError:
        return False


def _check_folder(work_dir: Path) -> None:
    with save_errors(work_dir):  # a file, or a name that is too long
        entries = [path.name for path in work_dir.iterdir()] if work_dir.exists() else []
    foreign = sorted(name for name in entries if not name.startswith("."))
    if foreign and RECORD_FILE not in entries and UNFINISHED not in entries:
        raise InputError(
            f"{work_dir}: holds {foreign[0]}, and nothing that a quickstart wrote; name an empty folder with --work-dir"
        )


def _put_in_place(work_dir: Path) -> None:
    """Move what is in `unfinished` over the earlier result, the record last: stopped in between, the next call goes on."""
    from course_lib.training.checkpoint import remove_checkpoints

    unfinished = work_dir / UNFINISHED
    with save_errors(work_dir):
        remove_checkpoints(unfinished)  # nothing goes on from a finished run
        remove_checkpoints(work_dir)
        made = [path for path in unfinished.iterdir() if not path.name.startswith(".")]
        for path in sorted(made, key=lambda path: path.name == RECORD_FILE):
            take_place(path, work_dir / path.name)
        shutil.rmtree(unfinished)


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
    """The personal-assistant recipe of a scale for `name`, with no questions in mid-training: the table asks them.

    Raises:
        InputError: the name cannot be used.
    """
    recipe = recipe_for("personal_assistant", scale)
    assert recipe.data.identity is not None
    recipe.data.identity.name = name
    recipe.evaluation.questions = []
    # made here to be checked: a name that cannot be used is told before anything is fetched or written
    identity_conversations(**recipe.data.identity.model_dump(), seed=recipe.data.seed)
    return recipe


def _chat_dtype(recipe: Recipe) -> str:
    return "auto" if recipe.model.dtype in ("nf4", "int8") else recipe.model.dtype
