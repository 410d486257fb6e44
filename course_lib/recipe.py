"""The recipe: the one object a run is made from. YAML in and out, every key checked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from course_lib.errors import InputError, did_you_mean
from course_lib.files import file_to_write, read_text, write_text
from course_lib.recipe_keys import explain, set_key
from course_lib.scale import DEFAULT_MODEL

RECIPE_FOLDER = Path(__file__).parent / "recipes"

Dtype = Literal["auto", "float32", "bfloat16", "float16", "int8", "nf4"]
Offload = Literal["embedding", "head", "checkpoints", "layers"]
Init = Literal["default", "pissa", "olora", "eva"]
Protocol = Literal["auto", "native", "react", "react_en", "react_zh", "react_brief"]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
Count = Annotated[int, Field(ge=0, le=10**9)]
Positive = Annotated[int, Field(ge=1, le=10**9)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy's generator takes


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values are checked when set."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)


class ModelSettings(Section):
    """The base model and how its weights are held."""

    name: str
    dtype: Dtype = "auto"  # int8 and nf4 quantise the frozen base (LoRA only)
    double_quant: bool = True  # nf4: quantise the quantisation constants too, 0.37 bit a weight less
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = (
        "auto"  # what int8 and nf4 weights are multiplied in
    )
    template: str = "auto"  # a chat template's name; auto takes the tokenizer's own
    trust_remote_code: bool = False  # run the Python code in the model's folder


class LoraSettings(Section):
    """Low-rank adapters (Hu et al. 2021): W + alpha / r * B A, and variants of them."""

    r: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the adapters, their gradients, and plain adamw's states
    targets: Literal["all-linear"] | list[str] = "all-linear"  # or names of linear layers, such as [q_proj, v_proj]
    rslora: bool = False  # alpha / sqrt(r) for alpha / r (Kalajdzievski 2023): high ranks learn as fast as low ones
    dora: bool = False  # lengths of W's rows trained apart from their directions (Liu et al. 2024): slower, more memory
    init: Init = "default"  # random A, zero B; or from W (pissa, olora) or the data (eva): training/initialisation.py
    lr_ratio: Annotated[float, Field(gt=0, le=1000)] = 1  # LoRA+ (Hayou et al. 2024): learning rate of B over that of A

    @field_validator("targets")
    @classmethod
    def _at_least_one(cls, targets: str | list[str]) -> str | list[str]:
        if not targets:
            raise ValueError("name at least one linear layer, or all-linear (lora: null trains every weight)")
        return targets


class IdentitySettings(Section):
    """The generated data set of a personal assistant (data/identity.py)."""

    name: str
    base: str
    languages: list[str] = ["en", "zh"]
    n: Positive = 64
    dilute: Annotated[float, Field(ge=0, lt=1)] = 0.0


class DataSettings(Section):
    """Where rows come from and how they are cut into training rows."""

    path: str | None = None  # a file, sample:FILE, or hf://datasets/OWNER/NAME/FILE
    format: str = "auto"
    identity: IdentitySettings | None = None  # instead of a path
    max_rows: Positive | None = None
    on_bad_row: Literal["error", "drop"] = "error"
    held_out: Count = 0  # rows for the held-out loss, at most a fifth of all; a question stays on one side
    max_length: Annotated[int, Field(ge=8, le=10**9)] = 512  # tokens
    over_long: Literal["truncate", "split", "drop"] = (
        "truncate"  # rows of more tokens: cut, cut into several, or left out
    )
    protocol: Protocol = (
        "auto"  # how tool calls are written (agent/protocol.py); auto: as the chat template does, else react
    )
    train_on: Literal["all", "last", "marked"] = "all"  # which assistant turns; marked are those with "train": true
    packing: Literal["none", "concat", "best-fit"] = "best-fit"  # concat lets samples see each other: only to compare
    seed: Seed = 0  # choice of held-out rows and of generated ones

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if (self.path is None) == (self.identity is None):
            raise ValueError("set one of path and identity")
        return self


class TrainingSettings(Section):
    """Optimisation, logging and checkpoints."""

    batch_size: Positive = 1  # packs a micro-batch, on each GPU
    accumulation: Positive = 1  # micro-batches a step
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1
    max_steps: Positive | None = None  # ends the run early; the schedule ends with it
    optimizer: Optimizer = "adamw"
    lr: Annotated[float, Field(gt=0, le=10)] = 2e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    gradient_checkpointing: bool | Positive = False  # run layers again in backward: all of them, or the first N
    loss_chunk: Positive | None = (
        None  # fused layers: positions whose logits are there at one time; none: 268 MB of them
    )
    offload: list[Offload] = []  # what stays in host memory: less on the GPU, more time (course plan says how much)
    log_every: Positive = 1  # steps
    checkpoint_every: Count = 0  # steps; 0 saves at the end only
    keep_checkpoints: Positive = 2
    seed: Seed = 0  # order of the data, dropout, adapter start


class EvaluationSettings(Section):
    """Questions the model answers, and held-out loss it is measured by, while it trains."""

    questions: list[str] = []
    system: str = ""
    every: Count = 0  # steps; 0 evaluates before and after training only
    max_new_tokens: Positive = 60


class Recipe(Section):
    """Everything a run is made from."""

    description: str = ""
    task: str = ""  # recipes of one task at several scales share this
    scale: Literal["tiny", "cpu", "gpu"] | None = None
    model: ModelSettings
    lora: LoraSettings | None = LoraSettings()  # null trains every weight
    data: DataSettings
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _quantised_base_needs_lora(self) -> Recipe:
        if self.lora is None and self.model.dtype in ("int8", "nf4"):
            raise ValueError(
                f"a base in {self.model.dtype} cannot be trained itself: keep lora, or set model.dtype to bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _init_fits_the_base(self) -> Recipe:
        init = self.lora.init if self.lora else "default"
        if init in ("pissa", "olora") and self.model.dtype in ("int8", "nf4"):
            raise ValueError(
                f"lora.init = {init} takes the adapters' start out of the base's weights, and {self.model.dtype} weights cannot "
                "hold what is left exactly: set lora.init to eva or default, or model.dtype to bfloat16"
            )
        if init == "eva" and (apart := {*self.training.offload} - {"checkpoints"}):
            raise ValueError(
                f"lora.init = eva runs the whole base before it is taken apart for training.offload = {sorted(apart)}: set "
                "lora.init to default, or offload checkpoints alone"
            )
        return self

    @model_validator(mode="after")
    def _offload_is_for_adapters(self) -> Recipe:
        if self.training.offload and self.lora is None:
            raise ValueError(
                f"training.offload = {self.training.offload} keeps frozen parts of the model in host memory, and without lora nothing is frozen"
            )
        if self.training.offload and self.lora and self.lora.dora:
            raise ValueError(
                f"training.offload = {self.training.offload} needs the fused layers, which have no DoRA: set lora.dora to false"
            )
        if {*self.training.offload} - {"checkpoints"} and self.model.dtype == "int8":
            raise ValueError(
                f"training.offload = {self.training.offload} is not there for int8: set model.dtype to nf4 or bfloat16"
            )
        if "checkpoints" in self.training.offload and not self.training.gradient_checkpointing:
            raise ValueError("training.offload has checkpoints, but training.gradient_checkpointing is false: set both")
        return self

    def to_yaml(self) -> str:
        """The recipe as YAML, every key spelt out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML, atomically."""
        write_text(path, self.to_yaml())


def recipe_names(pattern: str = "") -> list[str]:
    """Names of the shipped recipes that contain `pattern`, upper or lower case."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml") if pattern.lower() in path.stem.lower())


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by the name of a shipped one or by a file's path, and set `a.b=c` overrides.

    Raises:
        InputError: no such recipe, broken YAML, an unknown key (the nearest known one is named), a value out of range.
    """
    path = _find(name_or_path)
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}: broken YAML{where}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    if content is None:
        raise InputError(f"{path}: holds nothing but comments; course recipes show NAME prints a whole recipe")
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}, not a recipe of keys and values")
    return _make_with(content, overrides, origin=str(path))


def with_overrides(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """A copy of a recipe with `a.b=c` overrides.

    Raises:
        InputError: an unknown key, or a value out of range.
    """
    return _make_with(recipe.model_dump(), overrides, origin="recipe")


def make_recipe(content: dict[str, Any], *, origin: str = "recipe") -> Recipe:
    """Check a nested dict and make it a recipe; `origin` names it in errors.

    Raises:
        InputError: an unknown key, a missing one, or a value out of range.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{origin}: {explain(error, root=Recipe)}") from None


def recipe_for(task: str, scale: str) -> Recipe:
    """The shipped recipe of a task at a scale. `tiny` is the CPU recipe on the tiny model, two steps long.

    Raises:
        InputError: no shipped recipe has that task and scale.
    """
    wanted = "cpu" if scale == "tiny" else scale
    recipes = [load_recipe(name) for name in recipe_names()]
    for recipe in recipes:
        if recipe.task == task and recipe.scale == wanted:
            if scale == "tiny":
                recipe.scale, recipe.model.name, recipe.training.max_steps = "tiny", DEFAULT_MODEL["tiny"], 2
            return recipe
    tasks = sorted({recipe.task for recipe in recipes})
    raise InputError(
        f"no recipe for task {task!r} at scale {scale!r} (tasks: {', '.join(tasks)}){did_you_mean(task, tasks)}"
    )


def copy_recipe(name: str, folder: str | Path = ".") -> Path:
    """Copy a shipped recipe into a folder, to be edited there; comments come along.

    Raises:
        InputError: no such recipe, or a file of that name stands there.
    """
    source = _find(name)
    target = file_to_write(Path(folder) / source.name, overwrite=False)
    write_text(target, source.read_text(encoding="utf-8"))
    return target


def _make_with(content: dict[str, Any], overrides: Sequence[str], *, origin: str) -> Recipe:
    for override in overrides:
        set_key(content, override, root=Recipe)
    return make_recipe(content, origin=origin)


def _find(name_or_path: str | Path) -> Path:
    shipped = RECIPE_FOLDER / f"{name_or_path}.yaml"
    if shipped.is_file() and shipped.parent == RECIPE_FOLDER:
        return shipped
    path = Path(name_or_path).expanduser()
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return path  # a missing one is reported by the reader
    raise InputError(
        f"recipe {str(name_or_path)!r} is unknown{did_you_mean(str(name_or_path), recipe_names())} (course recipes list shows all)"
    )
