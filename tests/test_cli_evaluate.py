"""`course evaluate` as it is called, and what it says of wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from course_runner import Course

QUICK = ("--generate", "0", "--max-rows", "12")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonesuch", "--data", "sample:general_chat.json"], "model 'nonesuch' is unknown"),
        (["tiny"], "missing option '--data'"),
        (["tiny", "--data", "missing.jsonl"], "missing.jsonl"),
        (["tiny", "--data", "bad.jsonl"], "bad.jsonl: no row fits: 1 rows read, 0 kept"),
        (["tiny", "--data", "sample:general_chat.json", "--adapter", "nowhere"], "nowhere: no such folder"),
        (["tiny", "--data", "sample:general_chat.json", "--bits", "3"], "--bits 3: choose 4 or 8"),
        (["tiny", "--data", "sample:general_chat.json", "--max-rows", "0"], "--max-rows"),
        (["tiny", "--data", "sample:general_chat.json", "--generate", "-1"], "--generate"),
        (["tiny", "--data", "sample:general_chat.json", "--template", "chatm"], "chatm"),
        (["tiny", "--data", "sample:general_chat.json", "--format", "alpacca"], "did you mean alpaca"),
        (["tiny", "--data", "none.yaml"], "none.yaml: holds no rows out (data.held_out = 0)"),
    ],
)
def test_wrong_input_is_told_in_one_line(course: Course, tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"colour": "red"}\n')
    (tmp_path / "none.yaml").write_text("model: {name: tiny}\ndata: {path: bad.jsonl}\n")
    result = course("evaluate", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr
    assert result.stderr.splitlines()[-1].startswith("course: ")


def test_one_model_has_figures_for_both_sets(course: Course) -> None:
    result = course("evaluate", "tiny", "--data", "sample:general_chat.json", *QUICK, "--json")
    assert result.returncode == 0
    found = json.loads(result.stdout)
    assert set(found["held_out"]) == {"after"}
    assert len(found["held_out"]["after"]["rows"]) == 12
    assert set(found["general"]["after"]["metrics"]) == {"loss", "perplexity"}
    assert "12 rows read, 12 kept" in result.stderr


def test_an_adapter_is_compared_with_its_base_on_the_rows_a_recipe_holds_out(course: Course, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "model: {name: tiny}\n"
        "data: {path: 'sample:general_chat.json', max_rows: 100, held_out: 15}\n"
        "training: {max_steps: 3, lr: 1e-2, batch_size: 4}\n"
    )
    trained = course("train", str(recipe), "--work-dir", "run")
    assert trained.returncode == 0, trained.stderr
    adapter = trained.stdout.strip()
    options = ("--adapter", adapter, "--generate", "2", "--max-new-tokens", "4")
    result = course("evaluate", "tiny", "--data", str(recipe), *options, "--json")
    assert result.returncode == 0, result.stderr
    held_out = json.loads(result.stdout)["held_out"]
    change = held_out["changes"]["loss"]
    events = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    in_training = [event["loss"] for event in events if event["event"] == "HeldOutLoss"]
    assert len(held_out["before"]["rows"]) == 15
    assert [change["before"], change["after"]] == pytest.approx([in_training[0], in_training[-1]], rel=1e-4)
    assert change["significant"]
    text = course("evaluate", "tiny", "--data", str(recipe), *options).stdout
    assert text.startswith("held-out rows: 15 rows, ")
    assert "general knowledge: 40 rows, " in text
    assert "\nbefore " in text
    same = course(
        "evaluate", "tiny", "--data", str(recipe), *options[:2], "--compare-with", adapter, "--generate", "0", "--json"
    )
    assert json.loads(same.stdout)["held_out"]["changes"]["loss"]["difference"] == 0


def test_another_model_may_come_before(course: Course) -> None:
    arguments = ("evaluate", "tiny", "--data", "sample:general_chat.json", *QUICK, "--compare-with", "tiny", "--json")
    changes = json.loads(course(*arguments).stdout)["held_out"]["changes"]
    assert changes["loss"]["difference"] == 0
    assert not changes["loss"]["significant"]
