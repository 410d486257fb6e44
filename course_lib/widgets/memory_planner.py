"""A training's GPU memory as a bar against a card's, and what every setting does to it. Nothing is loaded: all of it is predicted."""

from __future__ import annotations

import html
import shlex
from pathlib import Path
from typing import Any, TypedDict

import traitlets

from course_lib.errors import InputError
from course_lib.model_shape import ModelShape
from course_lib.recipe import Recipe, load_recipe, with_overrides
from course_lib.sizes import in_gib, parse_size
from course_lib.training.memory_plan import CARDS, Candidate, plan_within
from course_lib.training.memory_prediction import MemoryPrediction, predict_memory, why_plain
from course_lib.widgets.base import CourseWidget, script

_SUGGESTIONS = 3
_TEXT_WIDTH = 40  # characters of the longest bar in the static twin
_TICKS = 6  # on the axis, at most
ALL_WEIGHTS = "all"  # the rank of full fine-tuning

PARTS = {  # what each part is, in the words of its tooltip
    "weights": "the frozen layers",
    "embedding": "the table of the input tokens",
    "head": "the table of the output tokens",
    "adapters": "what is trained, and its copy in the type of the products",
    "gradients": "one for every trained number",
    "optimizer": "two averages for every trained number",
    "activations": "what forward keeps for backward",
    "workspace": "what a product needs while it runs: dequantised weights, logits",
}
MARGIN = "margin"
SETTINGS = {  # of the controls, by their key in a recipe
    "rank": "lora.r",
    "adapters": "lora.dtype",
    "dtype": "model.dtype",
    "batch_size": "training.batch_size",
    "accumulation": "training.accumulation",
    "max_length": "data.max_length",
    "optimizer": "training.optimizer",
    "checkpointing": "training.gradient_checkpointing",
    "offload": "training.offload",
}
OFFLOADS = {"embedding": "embedding", "head": "head", "checkpoints": "checkpointed inputs", "layers": "all layers"}


class Segment(TypedDict):
    """A stretch of the bar: `percent` is its width on the bar's scale, `words` what is read out and shown on pointing at it."""

    part: str
    size: str
    percent: float
    words: str


class Control(TypedDict):
    """A choice among (value, text)."""

    name: str
    label: str
    options: list[tuple[str, str]]
    value: str


class MemoryPlanner(CourseWidget):
    """Show a recipe's memory by part against a card's, with controls for what changes it, and the settings that fit.

    Example:
        `MemoryPlanner("qwen2_5_7b_instruct_qlora_alpaca_2048_e3", vram="8GiB")` as the last line of a cell. Afterwards
        `planner.overrides` is what was set, as `load_recipe` takes it.

    Raises:
        InputError: no such recipe or model, or `vram` is no size.
    """

    _esm = script("memory_planner.js")

    values = traitlets.Dict().tag(sync=True)  # of every control, as text: what the reader chose
    view = traitlets.Dict().tag(sync=True)  # what is drawn

    def __init__(self, recipe: Recipe | str | Path, *, vram: str | int = "8GiB") -> None:
        self.given = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        self.shape = ModelShape.of(self.given.model.name)
        self.recipe, self.prediction = self.given, predict_memory(self.given, self.shape)
        self._settled: dict[str, str] = {}
        super().__init__()
        self.observe(self._update, names="values")
        self.values = {**_values_of(self.given), "vram": str(parse_size(vram, of="vram"))}

    @property
    def overrides(self) -> list[str]:
        """What differs from the recipe that was given, as `--set` takes it."""
        before, now = _values_of(self.given), _values_of(self.recipe)
        return [_override(name, now[name]) for name in SETTINGS if now[name] != before[name] and _applies(name, now)]

    def _update(self, change: Any) -> None:
        """Predict with what was chosen. Where that is no recipe, say why and leave the bar as it is."""
        if change["new"] == self._settled:
            return
        try:
            vram = parse_size(change["new"].get("vram", ""), of="vram")
            self.recipe = _recipe_of(self.given, change["new"], self.shape)
            self.prediction = predict_memory(self.recipe, self.shape)
        except InputError as error:
            self.view = {**self.view, "problem": str(error)}
            return
        self._settled = {**_values_of(self.recipe), "vram": str(vram)}
        self.view = self._drawn(vram, suggestions=None)  # at once; settings that fit take longer to find
        self.view = self._drawn(vram, suggestions=plan_within(self.recipe, self.shape, vram))
        self.values = self._settled  # as a recipe holds them: what cannot be together is gone

    def _drawn(self, vram: int, *, suggestions: list[Candidate] | None) -> dict[str, Any]:
        predicted = self.prediction
        fits = predicted.needed <= vram
        scale = 1.04 * max(vram, predicted.needed)
        others = [candidate for candidate in suggestions or [] if candidate.overrides][:_SUGGESTIONS]
        return {
            "title": f"{self.shape.name}: {self.shape.parameters / 1e9:,.2f} billion parameters",
            "fits": fits,
            "headline": _headline(predicted, vram),
            "details": _details(predicted),
            "segments": segments(predicted, scale),
            "card": {"percent": 100 * vram / scale, "label": f"card of {in_gib(vram, 0)}"},
            "ticks": _ticks(scale),
            "controls": controls(self.recipe, self.shape, vram),
            "offload": _offload_choices(self.recipe, self.shape),
            "suggestions": [self._suggestion(candidate, vram) for candidate in others],
            "searched": suggestions is not None,
            "command": " ".join(f"--set {shlex.quote(override)}" for override in self.overrides),
            "problem": "",
        }

    def _suggestion(self, candidate: Candidate, vram: int) -> dict[str, Any]:
        new = with_overrides(self.recipe, candidate.overrides)
        words = f"{candidate.slow_down:.2f}× the time, {in_gib(candidate.prediction.needed)}"
        if candidate.prediction.host:
            words += f", {in_gib(candidate.prediction.host)} of host memory"
        if not candidate.trains_the_same:
            words += ", and trains something else"
        return {
            "words": words,
            "changes": list(candidate.overrides),
            "values": {**_values_of(new), "vram": str(vram)},
        }

    def __repr__(self) -> str:
        vram = int(self.values["vram"])
        return f"MemoryPlanner: {self.shape.name}: {_headline(self.prediction, vram)}"

    def twin(self) -> str:
        """The live widget, and for pages without a kernel the bar as a table, as it is now."""
        return static_html(self.view)


def segments(predicted: MemoryPrediction, scale: float) -> list[Segment]:
    """The parts in their order, and last the margin, as stretches of a bar that is `scale` bytes long."""
    margin = predicted.needed - predicted.peak
    sizes = [*((part, size, PARTS[part]) for part, size in predicted.parts.items()), (MARGIN, margin, predicted.margin)]
    return [
        Segment(
            part=part, size=in_gib(size, 2), percent=100 * size / scale, words=f"{part}, {in_gib(size, 2)}: {meaning}",
        )
        for part, size, meaning in sizes
    ]  # fmt: skip


def controls(recipe: Recipe, shape: ModelShape, vram: int) -> list[Control]:
    """The choices, each with the recipe's own value among them."""
    values, layers = _values_of(recipe), shape.layers
    cards = [(str(size), in_gib(size, 0)) for size in sorted({*CARDS, vram})]
    shares = sorted({layers // 4, layers // 2, 3 * layers // 4} - {0, layers})
    checkpointed = [("false", "no layer"), *((str(n), f"first {n} layers") for n in shares), ("true", "every layer")]
    made = [
        Control(name="vram", label="Card", options=cards, value=str(vram)),
        _numbers("batch_size", "Rows a batch", [1, 2, 4, 8, 16], values),
        _numbers("max_length", "Tokens a row", [512, 1024, 2048, 4096, 8192], values),
        _choice("checkpointing", "Gradient checkpointing", checkpointed, values),
        _choice("dtype", "Weights in", [(name, name) for name in ("nf4", "int8", "bfloat16")], values),
        _choice("rank", "Adapter rank", [(ALL_WEIGHTS, "no adapters"), *_texts([4, 8, 16, 32, 64, 128])], values),
        _choice(
            "optimizer", "Optimizer", [(name, name) for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")], values
        ),
    ]
    if recipe.lora:
        made.append(_choice("adapters", "Adapters in", [(name, name) for name in ("float32", "bfloat16")], values))
    return made


def _texts(numbers: list[int]) -> list[tuple[str, str]]:
    return [(str(number), f"{number:,}") for number in numbers]


def _numbers(name: str, label: str, numbers: list[int], values: dict[str, str]) -> Control:
    return _choice(name, label, _texts(sorted({*numbers, int(values[name])})), values)


def _choice(name: str, label: str, options: list[tuple[str, str]], values: dict[str, str]) -> Control:
    value = values[name]
    if value not in [known for known, _ in options]:
        text = f"first {value} layers" if name == "checkpointing" else value
        options = [*options[:-1], (value, text), options[-1]] if name == "checkpointing" else [*options, (value, text)]
    return Control(name=name, label=label, options=options, value=value)


def _offload_choices(recipe: Recipe, shape: ModelShape) -> dict[str, Any]:
    """Check boxes: (value, text, checked, can be chosen), and why some cannot."""
    reason = why_plain(recipe, shape)
    why = f"only for the fused layers, which do not apply: {reason}" if reason else ""
    if not why and not recipe.training.gradient_checkpointing:
        why = "checkpointed inputs: only where layers run again"
    return {
        "why": why,
        "boxes": [
            (part, text, part in recipe.training.offload, not reason and (part != "checkpoints" or not why))
            for part, text in OFFLOADS.items()
        ],
    }


def _values_of(recipe: Recipe) -> dict[str, str]:
    """What the controls show of a recipe."""
    training, lora = recipe.training, recipe.lora
    return {
        "rank": str(lora.r) if lora else ALL_WEIGHTS,
        "adapters": lora.dtype if lora else "float32",
        "dtype": "bfloat16" if recipe.model.dtype == "auto" else recipe.model.dtype,
        "batch_size": str(training.batch_size),
        "accumulation": str(training.accumulation),
        "max_length": str(recipe.data.max_length),
        "optimizer": training.optimizer,
        "checkpointing": str(training.gradient_checkpointing).lower(),
        "offload": ",".join(training.offload),
    }


def _recipe_of(given: Recipe, values: dict[str, str], shape: ModelShape) -> Recipe:
    """The recipe that was given, with what the controls say. A quantised base, or parts in host memory, go where they cannot be."""
    values = {**_values_of(given), **{name: value for name, value in values.items() if name in SETTINGS}}
    if values["rank"] == ALL_WEIGHTS and values["dtype"] in ("nf4", "int8"):
        values["dtype"] = "bfloat16"
    parts = [part for part in values["offload"].split(",") if part]
    if values["checkpointing"] == "false":
        parts = [part for part in parts if part != "checkpoints"]
    values["offload"] = ""
    recipe = with_overrides(given, [_override(name, value) for name, value in values.items() if _applies(name, values)])
    if parts and not why_plain(recipe, shape):
        recipe = with_overrides(recipe, [_override("offload", ",".join(parts))])
    return recipe


def _applies(name: str, values: dict[str, str]) -> bool:
    """Whether a control says something: adapters that are not there have no type."""
    return name != "adapters" or values["rank"] != ALL_WEIGHTS


def _override(name: str, value: str) -> str:
    if name == "rank" and value == ALL_WEIGHTS:
        return "lora=null"
    return f"{SETTINGS[name]}=[{value}]" if name == "offload" else f"{SETTINGS[name]}={value}"


def _headline(predicted: MemoryPrediction, vram: int) -> str:
    left = vram - predicted.needed
    verdict = f"Fits, {in_gib(left)} to spare" if left >= 0 else f"Does not fit: {in_gib(-left)} too much"
    return f"{verdict}. {in_gib(predicted.needed)} needed of {in_gib(vram)}."


def _details(predicted: MemoryPrediction) -> str:
    how = "counted tensor by tensor" if predicted.engine == "fused" else f"estimated ({predicted.reason})"
    host = f" In host memory: {in_gib(predicted.host)}." if predicted.host else ""
    return (
        f"{predicted.engine.capitalize()} layers, {how}. Most is allocated at: {predicted.moment}.{host} "
        f"The margin is {predicted.margin}."
    )


def _ticks(scale: float) -> list[dict[str, Any]]:
    """Marks of the axis at round numbers of GiB; the end of the axis has the unit."""
    gib = scale / 2**30
    step = next(step for step in (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 10**9) if gib / step <= _TICKS)
    return [
        {"percent": 100 * number * step / gib, "label": f"{number * step:g}"}
        for number in range(int(0.93 * gib / step) + 1)
    ]


# GitHub takes the style sheet and all classes away; text in <pre> stays, so the bar is drawn with characters.
def static_html(view: dict[str, Any]) -> str:
    """The bar as HTML without script: its parts as lines of text, and the settings that fit."""
    longest = max(segment["percent"] for segment in view["segments"])
    lines = [
        f"{segment['part']:<12}{segment['size']:>10}  {'█' * round(_TEXT_WIDTH * segment['percent'] / longest)}"
        for segment in view["segments"]
    ]
    shown = [
        f"<li>{html.escape(one['words'])}: <code>{html.escape(', '.join(one['changes']))}</code></li>"
        for one in view["suggestions"]
    ]
    fitting = f"<p>Settings that fit, the fastest first:</p><ul>{''.join(shown)}</ul>" if shown else ""
    return (
        f"<div><b>{html.escape(view['title'])}</b><p>{html.escape(view['headline'])} {html.escape(view['details'])}</p>"
        f"<pre>{html.escape(chr(10).join(lines))}</pre>{fitting}</div>"
    )
