"""What is said when memory runs out: settings that fit, and never another error."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import torch

from course_lib.errors import CourseError, InputError
from course_lib.model_shape import ModelShape
from course_lib.recipe import Recipe, make_recipe, with_overrides
from course_lib.training import memory
from course_lib.training.memory import memory_errors
from course_lib.training.memory_prediction import predict_memory

PLAIN = "memory ran out: lower training.batch_size"


def recipe(**model: Any) -> Recipe:
    return make_recipe(
        {
            "model": {"name": "internlm-7b", "dtype": "nf4", **model},
            "lora": {"r": 64},
            "data": {"path": "x", "max_length": 2048},
            "training": {"batch_size": 2, "optimizer": "adamw_8bit"},
        }
    )


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that the process can have so many GiB of a GPU."""
    return lambda gib: monkeypatch.setattr(memory, "_memory_of_gpu", lambda: round(gib * 2**30))


def said_of(error: BaseException, asked: Recipe, **arguments: Any) -> str:
    with pytest.raises(CourseError) as caught, memory_errors(asked, **arguments):
        raise error
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 268.00 MiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
@pytest.mark.parametrize("gib", [6, 12, 24])
def test_settings_that_fit_are_named(card: Any, error: Exception, gib: float) -> None:
    card(gib)
    asked, shape = recipe(), ModelShape.of("internlm-7b")
    said = said_of(error, asked)
    words = shlex.split(said.partition(" with ")[2].partition(" (course plan")[0])
    assert words[::2] == ["--set"] * (len(words) // 2)
    fits = predict_memory(with_overrides(asked, words[1::2]), shape)
    assert fits.needed - fits.libraries <= gib * 2**30  # what the libraries take is gone already
    assert fits.needed < predict_memory(asked, shape).needed


def test_a_run_that_should_have_fitted_is_given_less_than_it_took(card: Any) -> None:
    card(80)
    said = said_of(torch.OutOfMemoryError("CUDA out of memory"), recipe())
    assert "--set" in said


def test_a_model_that_cannot_fit_is_told(card: Any) -> None:
    card(0.5)
    assert said_of(torch.OutOfMemoryError(""), recipe()).endswith("no setting makes it fit: take a smaller model.name")


def test_what_the_loader_says_of_memory_ends_with_the_settings_too(card: Any) -> None:
    card(8)
    error = CourseError("/models/x: too large for the memory of cuda as bfloat16; try nf4 or a smaller model")
    error.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
    assert "model.dtype=nf4" in said_of(error, recipe(dtype="bfloat16"))


@pytest.mark.parametrize("broken", ["no GPU", "no model", "no prediction"])
def test_advice_that_cannot_be_given_is_the_plain_words(card: Any, monkeypatch: Any, broken: str) -> None:
    asked = recipe()
    if broken != "no GPU":
        card(8)
    if broken == "no model":
        asked = recipe(name="nobody/nothing")
    if broken == "no prediction":
        monkeypatch.setattr("course_lib.training.memory_plan.plan_within", lambda *_, **__: 1 / 0)
    assert said_of(torch.OutOfMemoryError("CUDA out of memory"), asked).startswith(PLAIN)


def test_the_systems_memory_and_deepspeeds_are_not_planned(card: Any) -> None:
    card(8)
    assert said_of(MemoryError(), recipe()).startswith(PLAIN)
    assert said_of(RuntimeError("DefaultCPUAllocator: can't allocate memory"), recipe()).startswith(PLAIN)
    assert said_of(torch.OutOfMemoryError(""), recipe(), foretold=False).startswith(PLAIN)


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes"), InputError("no rows"), CourseError("disk full")]
)
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), memory_errors(recipe()):
        raise error
