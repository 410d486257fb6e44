"""What stands in a work dir is lost to no run, and two runs never share one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from course_lib.errors import InputError
from course_lib.files import lock
from course_lib.training.checkpoint import checkpoints, remove_checkpoints
from course_lib.training.events import StepDone
from course_lib.training.loop import train
from course_lib.training.work_dir import checkpoint_to_resume


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_resume_refuses_another_recipe(make: Any, tmp_path: Path) -> None:
    train(make(), work_dir=tmp_path / "run")
    with pytest.raises(InputError, match=r"training\.lr was 0\.005 and is 0\.1"):
        train(make(training={"lr": 0.1}), work_dir=tmp_path / "run", resume=True)


def test_an_earlier_run_is_not_overwritten_unasked(make: Any, tmp_path: Path) -> None:
    adapter = train(make(), work_dir=tmp_path / "run")
    before = adapter_bytes(adapter)
    with pytest.raises(InputError, match="already holds a run"):
        train(make(), work_dir=tmp_path / "run")
    assert adapter_bytes(adapter) == before


@pytest.mark.parametrize("result", ["adapter", "model"])
def test_a_result_alone_is_an_earlier_run(make: Any, tmp_path: Path, result: str) -> None:
    """Its checkpoints and metrics may have been removed to save room."""
    (tmp_path / "run" / result).mkdir(parents=True)
    with pytest.raises(InputError, match="already holds a run"):
        train(make(), work_dir=tmp_path / "run")
    with pytest.raises(InputError, match=f"{result}: has no checkpoint beside it"):
        train(make(), work_dir=tmp_path / "run", resume=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [result]


def test_resume_without_an_earlier_run_is_refused(make: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run to resume"):
        train(make(), work_dir=tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_a_run_stopped_before_its_first_checkpoint_begins_anew(make: Any, tmp_path: Path) -> None:
    def stop(event: object) -> None:
        if isinstance(event, StepDone):
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(make(), work_dir=tmp_path / "run", listeners=[stop])
    assert not checkpoints(tmp_path / "run")
    with pytest.raises(InputError, match="already holds a run"):
        train(make(), work_dir=tmp_path / "run")
    resumed = train(make(), work_dir=tmp_path / "run", resume=True)
    assert adapter_bytes(resumed) == adapter_bytes(train(make(), work_dir=tmp_path / "straight"))


def test_a_finished_run_without_checkpoints_is_not_trained_over(make: Any, tmp_path: Path) -> None:
    adapter = train(make(), work_dir=tmp_path / "run")
    before = adapter_bytes(adapter)
    remove_checkpoints(tmp_path / "run")
    with pytest.raises(InputError, match="has no checkpoint beside it"):
        train(make(), work_dir=tmp_path / "run", resume=True)
    assert adapter_bytes(adapter) == before


def test_two_runs_in_one_folder(make: Any, tmp_path: Path) -> None:
    with lock(tmp_path / "run"), pytest.raises(InputError, match="another run is at work here"):
        train(make(), work_dir=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert train(make(), work_dir=tmp_path / "run").is_dir()  # the lock file left behind blocks nobody


def test_of_two_runs_started_at_once_one_is_refused(make: Any, tmp_path: Path) -> None:
    make(training={"max_steps": 40, "epochs": 20}).save(tmp_path / "recipe.yaml")
    script = (
        "import sys\n"
        "from course_lib import CourseError, load_recipe, train\n"
        "try:\n"
        f"    train(load_recipe({str(tmp_path / 'recipe.yaml')!r}), work_dir={str(tmp_path / 'run')!r})\n"
        "except CourseError as error:\n"
        "    sys.exit(f'{error.exit_code} {error}')\n"
    )
    runs = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(run.communicate(timeout=120)[1] for run in runs)
    assert sorted(run.returncode for run in runs) == [0, 1]
    assert "2 " in said[1]
    assert "another run is at work" in said[1] or "already holds a run" in said[1]
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [40]


@pytest.mark.parametrize("name", ["x" * 300, "/proc/absent/run", "/dev/null/run"])
def test_folders_that_cannot_be(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        train(make(), work_dir=name)


def test_a_long_name_is_told_before_the_model_is_loaded() -> None:
    with pytest.raises(InputError, match="File name too long"):
        checkpoint_to_resume(Path("x" * 300), resume=False, overwrite=False)
