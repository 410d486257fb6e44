from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from course_lib.recipe import Recipe, make_recipe


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Twelve rows of different lengths."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": f"question {number} " + "x" * number, "output": "answer " * (1 + number % 4)}
        for number in range(12)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def make(tiny: Path, rows_file: Path) -> Any:
    """Make a recipe on the tiny model; keyword arguments are the sections."""

    def recipe(**sections: dict) -> Recipe:
        content = {
            "model": {"name": "tiny", "dtype": "float32"},
            "lora": {"r": 4, "alpha": 8},
            "data": {"path": str(rows_file), "max_length": 256, "packing": "none"},
            "training": {"batch_size": 2, "lr": 5e-3, "max_steps": 6, "epochs": 4},
        }
        for name, values in sections.items():
            content[name] = None if values is None else {**(content.get(name) or {}), **values}
        return make_recipe(content)

    return recipe
