"""The command line: bad input ends in one line and exit status 2, failed work in 1, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from course_runner import Course, Result


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    rows = [{"instruction": f"q{number}", "output": "yes"} for number in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    path = tmp_path / "my.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name": "tiny", "dtype": "float32"},
                "lora": {"r": 2},
                "data": {"path": "rows.json", "max_length": 128},
                "training": {"max_steps": 2, "epochs": 2, "checkpoint_every": 1},
            }
        )
    )
    return path


def refused(result: Result, said: str, status: int = 2) -> None:
    """One line on stderr that says it, the exit status, nothing on stdout."""
    assert result.returncode == status, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("course:")]
    assert len(lines) == 1, result.stderr
    assert said in lines[0]
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "rows.json: no such file"),
        ("", "rows.json: is empty"),
        ('[{"instruction": "a", "output": "b"},\n {"instruction": }]', "broken JSON at line 2, column 18"),
        ('[{"instruction": "a"}]', "rows.json: row 1: row has no 'output'"),
        ('[{"messages": [{"role": "robot", "content": "x"}]}]', "row 1: message 1: unknown role 'robot'"),
        (b'[{"instruction": "caf\xe9", "output": "b"}]', "not UTF-8: byte 0xE9 at line 1, column 22"),
        ('[{"a": 1}]', "row 1: no known format"),
        ("instruction,output\na,b\n", "holds no JSON (line 1 begins 'instruction,output'); rows are read from JSON"),
        ('"instruction","output"\n"a","b"\n', "holds no JSON (line 1 begins"),
        (bytes(200), "holds NUL bytes at line 1"),
        ('[{"instruction": "a"}]'.encode("utf-16"), "is UTF-16 text; convert it: iconv -f utf-16 -t utf-8 rows.json"),
        ('[{"instruction": "a"}]'.encode("utf-16-le"), "is UTF-16 text"),
        (r'[{"instruction": "a\ud800", "output": "b"}]', "row 1: row: 'instruction' has the lone surrogate U+D800"),
    ],
)
def test_bad_data(course: Course, recipe_file: Path, content: str | bytes | None, said: str) -> None:
    rows = recipe_file.parent / "rows.json"
    rows.unlink()
    if content is not None:
        rows.write_bytes(content.encode() if isinstance(content, str) else content)
    refused(course("train", "my.yaml"), said)
    assert not (recipe_file.parent / "work_dirs").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.r=0", "lora.r = 0"),
        ("training.lr=-1", "training.lr = -1"),
        ("training.learn_rate=1", "unknown key 'training.learn_rate'"),
        ("model.name=qwen2.5-7b-instuct", "did you mean qwen2.5-7b-instruct"),
        ("model.template=chatmll", "did you mean chatml"),
        ("data.format=alpacca", "did you mean alpaca"),
        ("lora.targets=[q_prog]", "did you mean q_proj"),
    ],
)
def test_bad_recipes(course: Course, recipe_file: Path, override: str, said: str) -> None:
    refused(course("train", "my.yaml", "--set", override), said)
    assert not (recipe_file.parent / "work_dirs").exists()


def test_unknown_recipe_and_model(course: Course) -> None:
    refused(course("train", "smollm2_135m_lora_alpaca"), "did you mean smollm2_135m_lora_alpaca_512_e1")
    refused(course("chat", "smollm2-135m-instrct", "--once", "hi"), "did you mean smollm2-135m-instruct")
    refused(course("models", "fetch", "nothing-like-it"), "model 'nothing-like-it' is unknown")
    refused(course("chat", "./absent", "--once", "hi"), "no such folder")
    Path("afile").write_text("x")  # the fixture runs in an empty folder
    refused(course("chat", "afile", "--once", "hi"), "afile: is a file; name the folder that holds the model")


def test_no_network_and_nothing_cached(course: Course, tmp_path: Path) -> None:
    env = {
        "COURSE_HOME": str(tmp_path / "empty"),
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_RETRIES": "0",
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_FIND_LINKS": "",
    }
    refused(course("models", "fetch", "smollm2-135m-instruct", env=env), "pip cannot find the wheel", status=1)


def test_train_merge_chat_and_every_refusal_on_the_way(course: Course, recipe_file: Path) -> None:
    folder = recipe_file.parent
    trained = course("train", "my.yaml")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.strip() == "work_dirs/my/adapter"
    assert "4 rows read, 4 kept" in trained.stderr
    assert (folder / "work_dirs/my/loss.png").stat().st_size > 5_000
    refused(course("train", "my.yaml"), "already holds a run")
    resumed = course("train", "my.yaml", "--resume")
    assert resumed.returncode == 0, resumed.stderr

    merged = course("merge", "tiny", "work_dirs/my/adapter", "merged")
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.strip() == "merged"
    before = (folder / "merged/model.safetensors").read_bytes()
    refused(course("merge", "tiny", "work_dirs/my/adapter", "merged"), "merged")
    refused(course("merge", "tiny", "absent", "other"), "absent")
    assert (folder / "merged/model.safetensors").read_bytes() == before

    once = course("chat", "merged", "--once", "hi", "--max-new-tokens", "4")
    assert once.returncode == 0, once.stderr
    with_adapter = course(
        "chat", "tiny", "--adapter", "work_dirs/my/adapter", "--max-new-tokens", "4", stdin="hi\n/exit\n"
    )
    assert with_adapter.returncode == 0, with_adapter.stderr
    refused(course("chat", "tiny", "--bits", "3", "--once", "hi"), "choose 4 or 8")
    refused(course("chat", "tiny", "--adapter", "absent", "--once", "hi"), "absent")
    refused(course("chat", "tiny", "--temperature", "-1", "--once", "hi"), "temperature")
    refused(course("chat", "tiny", "--once", " "), "empty")


def test_an_adapter_of_another_base_is_refused(course: Course, recipe_file: Path) -> None:
    assert course("train", "my.yaml").returncode == 0
    record = recipe_file.parent / "work_dirs/my/adapter/course.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"base": "another", "base_fingerprint": "0" * 16}))
    refused(course("chat", "tiny", "--adapter", "work_dirs/my/adapter", "--once", "hi"), "was trained on another")
    refused(course("merge", "tiny", "work_dirs/my/adapter", "merged"), "was trained on another")
    assert not (recipe_file.parent / "merged").exists()


def test_recipes_list_show_copy(course: Course, tmp_path: Path) -> None:
    listed = course("recipes", "list", "-p", "alpaca")
    names = listed.stdout.split()
    assert names
    assert all("alpaca" in name for name in names)
    shown = course("recipes", "show", names[0], "--set", "training.lr=0.5")
    assert yaml.safe_load(shown.stdout)["training"]["lr"] == 0.5
    assert course("recipes", "copy", names[0]).returncode == 0
    refused(course("recipes", "copy", names[0]), "already exists")
    assert course("recipes", "list", "-p", "zzz").stdout == ""


def test_models_list_is_readable_by_a_script(course: Course) -> None:
    models = json.loads(course("models", "list", "--json").stdout)
    assert {"name", "parameters", "licence", "template", "languages", "cached"} <= models[0].keys()
    assert "smollm2-135m-instruct" in course("models", "list").stdout


def test_doctor_finds_no_fault_here(course: Course) -> None:
    result = course("doctor", "--json")
    checks = json.loads(result.stdout)
    assert result.returncode == 0, checks
    assert {check["name"] for check in checks} >= {"Python", "torch", "memory", "disk", "4-bit weights"}
    assert "Python" in course("doctor").stdout


def test_quickstart_at_the_tiny_scale(course: Course, tmp_path: Path) -> None:
    result = course("quickstart", "--name", "Grace", "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["name"] == "Grace"
    assert len(report["answers"]) == 6
    assert (tmp_path / report["merged"] / "model.safetensors").exists()
    again = course("quickstart", "--name", "Grace")
    assert again.returncode == 0, again.stderr
    assert "Before and after" in again.stdout
    assert "nothing to do" in again.stderr
    assert json.loads(course("quickstart", "--name", "Grace", "--json").stdout) == report
    refused(course("quickstart", "--name", "a\nb"), "cannot be used")
    refused(course("quickstart", "--scale", "huge"), "choose tiny, cpu or gpu")


def test_the_console_script_reports_an_error_in_one_line(tmp_path: Path) -> None:
    """In a process of its own, as a user starts it."""
    script = Path(sys.executable).with_name("course")
    ended = subprocess.run([script, "train", "absent.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("course: absent.yaml: no such file")
    assert ended.stderr.count("\n") == 1


def test_importing_the_library_is_quick() -> None:
    code = "import time; t = time.perf_counter(); import course_lib, course_lib.cli, sys; assert 'torch' not in sys.modules; print(time.perf_counter() - t)"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(imported.stdout) < 1.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "no such command 'trian'. Did you mean 'train'? (course --help shows what it takes)"),
        (["data", "chekc"], "no such command 'chekc'. Did you mean 'check'? (course data --help shows what it takes)"),
        (["train"], "missing argument 'recipe' (course train --help"),
        (["train", "a", "b", "c"], "got unexpected extra argument"),
        (["train", "a", "--nope"], "no such option: --nope"),
        (["chat", "tiny", "--bits", "x"], "invalid value for '--bits'"),
        (["chat", "tiny", "--bits"], "'--bits' requires an argument"),
    ],
)
def test_wrong_usage_is_one_line(course: Course, arguments: list[str], said: str) -> None:
    result = course(*arguments)
    refused(result, said)
    assert result.stderr.count("\n") == 1


def test_help_is_no_error(course: Course) -> None:
    assert course("train", "--help").returncode == 0
    assert "quickstart" in course("--help").stdout
    bare = course()
    assert bare.returncode == 2
    assert "quickstart" in bare.stdout + bare.stderr


def test_ctrl_c_is_told(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the training steps: while loading, tokenising, saving."""

    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("course_lib.models.fetch", press)
    result = course("models", "fetch", "tiny")
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "course: interrupted\n")


def test_ctrl_c_in_a_training_names_the_option_to_go_on(
    course: Course, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from course_lib.training import loop

    launch = loop._launch

    def press(run: object, number: int) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return launch(run, number)

    monkeypatch.setattr(loop, "_launch", press)
    stopped = course("train", "my.yaml")
    refused(stopped, "stopped after step 1 of 2; go on with the same command and --resume (checkpoint in", status=130)
    monkeypatch.undo()
    monkeypatch.chdir(recipe_file.parent)
    assert course("train", "my.yaml", "--resume").returncode == 0


def test_resume_without_a_run(course: Course, recipe_file: Path) -> None:
    refused(course("train", "my.yaml", "--resume"), "work_dirs/my: holds no run to resume")
    assert not (recipe_file.parent / "work_dirs").exists()


@pytest.mark.parametrize("folder", ["x" * 300, "/proc/absent/run"])
def test_a_work_dir_that_cannot_be_made(course: Course, recipe_file: Path, folder: str) -> None:
    refused(course("train", "my.yaml", "--work-dir", folder), "cannot be written")


def test_held_out_rows_are_told(course: Course, recipe_file: Path) -> None:
    rows = [{"instruction": f"q{number}", "output": "yes"} for number in range(10)]
    (recipe_file.parent / "rows.json").write_text(json.dumps(rows))
    refused(course("train", "my.yaml", "--set", "data.held_out=3"), "set data.held_out=2 or less")
    trained = course("train", "my.yaml", "--set", "data.held_out=2")
    assert trained.returncode == 0
    assert "2 rows held out of 10" in trained.stderr


LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["chat", LONG, "--once", "hi"],
        ["chat", "tiny", "--adapter", LONG, "--once", "hi"],
        ["merge", "tiny", LONG, "out"],
        ["merge", LONG, "out", "out"],
        ["data", "check", LONG],
        ["data", "preview", LONG],
        ["data", "convert", "rows.json", LONG],
        ["data", "split", LONG],
        ["train", LONG],
        ["train", "my.yaml", "--set", f"data.path={LONG}"],
        ["train", "my.yaml", "--set", f"model.name={LONG}"],
        ["recipes", "copy", "smollm2_135m_lora_alpaca_512_e1", LONG],
        ["quickstart", "--work-dir", LONG],
    ],
)
def test_a_name_too_long_for_any_file(course: Course, recipe_file: Path, arguments: list[str]) -> None:
    refused(course(*arguments), "File name too long")
