from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from course_lib.errors import InputError
from course_lib.recipe import load_recipe, make_recipe, with_overrides
from course_lib.training.memory_prediction import PARTS, predict_memory
from course_lib.widgets.memory_planner import MARGIN, MemoryPlanner

RECIPE = "qwen2_5_7b_instruct_qlora_alpaca_2048_e3"
GIB = 2**30


def choose(planner: MemoryPlanner, **values: str) -> None:
    """As the front end does when a control is changed."""
    planner.values = {**planner.values, **values}


def test_the_bar_shows_what_is_predicted() -> None:
    planner = MemoryPlanner(RECIPE, vram="8GiB")
    predicted = predict_memory(load_recipe(RECIPE), planner.shape)
    shown = {segment["part"]: segment["percent"] for segment in planner.view["segments"]}
    assert list(shown) == [*PARTS, MARGIN]
    scale = 8 * GIB / planner.view["card"]["percent"]
    assert {part: percent * scale for part, percent in shown.items() if part != MARGIN} == pytest.approx(
        predicted.parts
    )
    assert sum(shown.values()) * scale == pytest.approx(predicted.needed)
    assert not planner.view["fits"]
    assert repr(planner) == "MemoryPlanner: qwen2.5-7b-instruct: " + planner.view["headline"]


@pytest.mark.parametrize(
    ("values", "overrides"),
    [
        ({"vram": str(24 * GIB)}, []),
        ({"batch_size": "4"}, ["training.batch_size=4"]),
        ({"max_length": "512"}, ["data.max_length=512"]),
        ({"checkpointing": "7"}, ["training.gradient_checkpointing=7"]),
        ({"dtype": "bfloat16"}, ["model.dtype=bfloat16"]),
        ({"rank": "8", "adapters": "bfloat16"}, ["lora.r=8", "lora.dtype=bfloat16"]),
        ({"rank": "all"}, ["lora=null", "model.dtype=bfloat16"]),
        ({"optimizer": "adamw_8bit"}, ["training.optimizer=adamw_8bit"]),
        ({"offload": "head,checkpoints"}, ["training.offload=[head,checkpoints]"]),
        ({"offload": "head,checkpoints", "checkpointing": "false"}, None),
        ({"dtype": "int8", "offload": "layers"}, ["model.dtype=int8"]),
    ],
)
def test_every_control_is_a_setting_of_the_recipe(values: dict[str, str], overrides: list[str] | None) -> None:
    planner = MemoryPlanner(RECIPE, vram="8GiB")
    choose(planner, **values)
    assert planner.view["problem"] == ""
    if overrides is None:  # checkpointed inputs cannot be in host memory where there are none
        overrides = ["training.gradient_checkpointing=false", "training.offload=[head]"]
    assert planner.overrides == overrides
    assert planner.recipe == with_overrides(load_recipe(RECIPE), overrides)
    assert planner.prediction == predict_memory(planner.recipe, planner.shape)
    chosen = {control["name"]: control["value"] for control in planner.view["controls"]}
    assert {name: planner.values[name] for name in chosen} == chosen
    for control in planner.view["controls"]:
        assert control["value"] in [value for value, _ in control["options"]]
    assert planner.view["command"].count("--set") == len(overrides)


def test_settings_that_fit_fit() -> None:
    planner = MemoryPlanner(RECIPE, vram="8GiB")
    for suggestion in list(planner.view["suggestions"]):
        planner.values = suggestion["values"]
        assert planner.view["fits"], suggestion
    assert planner.overrides


def test_full_fine_tuning_goes_back_to_adapters() -> None:
    planner = MemoryPlanner(RECIPE)
    choose(planner, rank="all")
    assert "adapters" not in {control["name"] for control in planner.view["controls"]}
    assert "only for the fused layers" in planner.view["offload"]["why"]
    assert not any(allowed for *_, allowed in planner.view["offload"]["boxes"])
    choose(planner, rank="64", dtype="nf4")
    assert planner.overrides == []


@pytest.mark.parametrize("values", [{"batch_size": "0"}, {"optimizer": "sgd"}, {"vram": "much"}, {"rank": "-1"}])
def test_what_is_no_recipe_is_told_and_changes_nothing(values: dict[str, str]) -> None:
    planner = MemoryPlanner(RECIPE)
    before = {name: value for name, value in planner.view.items() if name != "problem"}
    choose(planner, **values)
    assert planner.view["problem"]
    assert {name: value for name, value in planner.view.items() if name != "problem"} == before


def test_wrong_arguments_are_told() -> None:
    with pytest.raises(InputError, match="vram '8 bananas' is no size"):
        MemoryPlanner(RECIPE, vram="8 bananas")
    with pytest.raises(InputError, match="is unknown"):
        MemoryPlanner("nonesuch")


def test_a_recipe_of_ones_own_and_a_size_in_bytes(tmp_path: Path) -> None:
    recipe = make_recipe({"model": {"name": "smollm2-135m-instruct"}, "data": {"path": "x"}})
    planner = MemoryPlanner(recipe, vram=6 * 10**9)
    assert planner.view["fits"]
    assert planner.view["card"]["label"] == "card of 6 GiB"
    recipe.save(tmp_path / "mine.yaml")
    assert MemoryPlanner(tmp_path / "mine.yaml", vram="12GB").overrides == []


def test_the_static_twin_has_every_part(read_html: Callable) -> None:
    planner = MemoryPlanner(RECIPE, vram="8GiB")
    bundle = planner._repr_mimebundle_()[0]
    elements, text = read_html(bundle["text/html"])
    assert bundle["text/plain"] == repr(planner)
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert planner.view["headline"] in text
    for segment in planner.view["segments"]:
        assert segment["part"] in text
        assert segment["size"] in text
    assert {tag for tag, _ in elements} <= {"div", "b", "p", "pre", "ul", "li", "code"}


def test_the_static_twin_escapes_names(read_html: Callable) -> None:
    planner = MemoryPlanner(RECIPE)
    planner.view = {**planner.view, "title": "<script>\"'"}
    elements, text = read_html(planner._repr_mimebundle_()[0]["text/html"])
    assert "script" not in {tag for tag, _ in elements}
    assert "<script>" in text


def test_the_state_a_browser_gets_is_plain_json() -> None:
    planner = MemoryPlanner(RECIPE)
    assert json.loads(json.dumps(planner.view, allow_nan=False))["headline"] == planner.view["headline"]
