"""The loss chart while a model trains: a real JupyterLab in a real browser, whose cell runs on while the drawing is paused."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from lab_in_browser import JupyterLab, new_page, serious_faults, start_all, wait_until_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]
STEPS, HELD_AT = 60, (20, 40)

SHOW = """
from course_lib.widgets.loss_chart import LossChart

chart = LossChart()
chart
"""
# At two steps the run is held until the test has done its part, so that each press comes while the cell runs.
TRAIN = f"""
import json, time
from pathlib import Path

from course_lib import train
from course_lib.recipe import make_recipe
from course_lib.training.events import StepDone

rows = [{{"instruction": "question " + "x" * number, "output": "answer " * (1 + number % 4)}} for number in range(12)]
Path(f"{{name}}.jsonl").write_text("\\n".join(map(json.dumps, rows)))
recipe = make_recipe({{
    "model": {{"name": "tiny", "dtype": "float32"}},
    "lora": {{"r": 4, "alpha": 8}},
    "data": {{"path": f"{{name}}.jsonl", "max_length": 256, "packing": "none", "held_out": 2}},
    "training": {{"batch_size": 2, "lr": 5e-3, "max_steps": {STEPS}, "epochs": {STEPS}}},
    "evaluation": {{"every": 15}},
}})

def slow(event):
    if isinstance(event, StepDone):
        time.sleep(0.02)  # twenty steps last longer than the chart waits between two updates
        if event.step in {HELD_AT}:
            print("held at", event.step)
            while not Path(f"{{name}}_goes_on_at_{{event.step}}").exists():
                time.sleep(0.05)

train(recipe, work_dir=Path(name), listeners=[chart, slow])
print("the cell ended")
"""


class Chart:
    """The chart on the page."""

    def __init__(self, page: Page) -> None:
        self.page, self.root = page, page.locator(".course-loss-chart")
        self.button = self.root.get_by_role("button")

    def picture(self) -> str:
        return self.root.locator("svg").evaluate("node => node.outerHTML")

    def note(self) -> str:
        return self.root.locator(".course-note").inner_text()

    def steps(self) -> int:
        """How many steps the line shows."""
        return len((self.root.locator("polyline").get_attribute("points") or "").split())

    def wait_for_output(self, words: str) -> None:
        """The chart's updates come on the same channel: all that were sent before these words are there with them."""
        self.page.wait_for_selector(f".jp-OutputArea-output:has-text('{words}')", state="attached")


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_pause_stops_the_drawing_and_not_the_run(lab: JupyterLab, browser: Browser, pictures: Path, theme: str) -> None:
    lab.use_theme(theme)
    name = f"loss_chart_{theme.split()[-1].lower()}"
    lab.write(f"{name}.ipynb", f"name = {name!r}", SHOW, TRAIN)
    go_on = {step: lab.root / "files" / f"{name}_goes_on_at_{step}" for step in HELD_AT}
    with new_page(browser) as page:
        lab.open(page, f"{name}.ipynb")
        start_all(page)
        chart = Chart(page)
        chart.wait_for_output("held at 20")
        chart.button.focus()
        page.keyboard.press("Enter")
        chart.root.get_by_role("button", name="Resume").wait_for()
        frozen, steps, note = chart.picture(), chart.steps(), chart.note()
        assert 1 < steps <= 20
        assert note.startswith(f"paused at step {steps} ")
        assert chart.root.locator("[role=status]").text_content() == note
        go_on[20].touch()
        chart.wait_for_output("held at 40")  # the run goes on
        assert (chart.picture(), chart.note()) == (frozen, note)
        assert serious_faults(page, ".course-loss-chart") == []
        chart.root.screenshot(path=pictures / f"{name}_paused.png")

        page.keyboard.press("Space")  # the button kept the focus
        chart.root.get_by_role("button", name="Pause").wait_for()
        assert 20 < chart.steps() <= 40
        assert chart.note().startswith(f"step {chart.steps()} of {STEPS}, loss ")
        assert page.evaluate("window.ran") is None  # all this while the cell runs

        chart.button.click()
        frozen = chart.picture()
        go_on[40].touch()
        chart.wait_for_output("the cell ended")
        wait_until_run(page)
        assert chart.picture() == frozen
        chart.button.click()
        assert chart.steps() == STEPS
        assert (
            chart.root.locator("svg").get_attribute("aria-label").startswith(f"Training loss, {STEPS} of {STEPS} steps")
        )
        assert chart.note().startswith(f"done: {STEPS} steps in ")
        assert chart.root.locator("rect.held-out").count() == 1 + STEPS // 15
        assert page.evaluate("document.body.dataset.jpThemeName") == theme
        assert serious_faults(page, ".course-loss-chart") == []
        chart.root.screenshot(path=pictures / f"{name}_done.png")
