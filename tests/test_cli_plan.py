"""`course plan` as it is called, and what it says of wrong input."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from course_runner import Course

from course_lib.recipe import load_recipe
from course_lib.sizes import in_gb, in_gib, parse_size

RECIPE = "qwen2_5_7b_instruct_qlora_alpaca_2048_e3"


@pytest.mark.parametrize("size", ["8 bananas", "8", "0GiB", "-8GiB", "GiB", "", "1e3GB", "8GiBs", "9" * 400 + "GB"])
def test_a_card_of_no_size_is_wrong_input(course: Course, size: str) -> None:
    result = course("plan", RECIPE, "--vram", size)
    assert result.returncode == 2
    assert result.stdout == ""
    assert f"--vram {size!r} is no size: write such as 500MB, 8GB (10⁹ bytes) or 8GiB (2³⁰)" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonesuch"], "recipe 'nonesuch' is unknown"),
        ([RECIPE, "--set", "model.name=nobody/nothing"], "run: course models fetch nobody/nothing"),
        ([RECIPE, "--set", "model.name=qwen2.5-7b"], "model 'qwen2.5-7b' is unknown; did you mean"),
        ([RECIPE, "--set", "lora.targets=[q_prj]"], "'q_prj' is no linear layer"),
        ([RECIPE, "--set", "lora=null", "--set", "model.dtype=bfloat16", "--fsdp"], "--fsdp needs the fused layers"),
        ([RECIPE, "--gpus", "0"], "--gpus"),
        ([RECIPE, "--set", "training.colour=red"], "unknown key 'training.colour'"),
    ],
)
def test_wrong_input_is_told_in_one_line(course: Course, arguments: list[str], said: str) -> None:
    result = course("plan", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_table_has_every_part_and_a_verdict_for_every_card(course: Course) -> None:
    result = course("plan", RECIPE)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    parts = ["weights", "embedding", "head", "adapters", "gradients", "optimizer", "activations", "workspace", "peak"]
    rows = {line.split()[0]: float(line.split()[1]) for line in lines if line.split()[:1] and line.split()[0] in parts}
    assert list(rows) == parts
    assert sum(rows.values()) == pytest.approx(2 * rows["peak"], abs=0.06)
    verdicts = {line.split()[0]: line for line in lines if line.split()[1:2] == ["GiB"]}
    assert list(verdicts) == ["6", "8", "12", "16", "24", "48", "80"]
    assert "does not fit; fits with --set" in verdicts["8"]
    assert "fits, " in verdicts["24"]


def test_the_settings_are_a_line_to_paste(course: Course) -> None:
    result = course("plan", RECIPE, "--vram", "8GiB")
    assert result.returncode == 0
    assert "8GiB (8.0 GiB): the recipe does not fit as it is" in result.stdout
    (line, *_) = [line for line in result.stdout.splitlines() if line.startswith("  --set")]
    again = course("plan", RECIPE, "--vram", "8GiB", "--json", *shlex.split(line))
    assert json.loads(again.stdout)["cards"][0]["fits"]


def test_a_gb_is_not_a_gib(course: Course) -> None:
    def vram(size: str) -> int:
        return json.loads(course("plan", RECIPE, "--vram", size, "--json").stdout)["cards"][0]["vram"]

    assert vram("8GB") == 8 * 10**9
    assert vram("8GiB") == vram("8 gib") == 8 * 2**30


def test_what_cannot_fit_is_an_answer_and_no_failure(course: Course) -> None:
    result = course("plan", RECIPE, "--vram", "700MB")
    assert result.returncode == 0
    assert "nor does it with any setting; take a smaller model" in result.stdout
    as_json = json.loads(course("plan", RECIPE, "--vram", "700MB", "--json").stdout)
    assert as_json["cards"] == [{"vram": 700 * 10**6, "fits": False, "candidates": []}]


def test_json_has_what_the_table_has(course: Course) -> None:
    result = json.loads(course("plan", RECIPE, "--json", "--gpus", "2", "--fsdp").stdout)
    assert result["peak"] == sum(result["parts"].values()) < result["needed"]
    assert (result["engine"], result["gpus"]) == ("fused", 2)
    assert len(result["cards"]) == 7
    for card in result["cards"]:
        assert card["fits"] == (result["needed"] <= card["vram"])
        for candidate in card["candidates"]:
            load_recipe(RECIPE, candidate["overrides"])


def test_an_estimate_is_called_one(course: Course) -> None:
    assert "counted tensor by tensor" in course("plan", RECIPE).stdout
    full = course("plan", RECIPE, "--set", "lora=null", "--set", "model.dtype=bfloat16").stdout
    assert "plain layers, estimated (full fine-tuning)" in full


def test_nothing_heavy_is_loaded(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.argv = ['course', 'plan', {RECIPE!r}, '--vram', '8GiB']\n"
        "from course_lib.cli import main; main()\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "size"), [("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("2tb", 2 * 10**12), (7, 7), ("3k", 3000)]
)
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_size(text, of="size") == size


def test_sizes_are_written() -> None:
    assert (in_gb(1_694_000_000), in_gib(8 * 2**30, 0)) == ("1.69 GB", "8 GiB")
