"""The widgets' JavaScript in a real browser, driven by clicks and keys, without a kernel: a stand-in for anywidget's model."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from course_lib.widgets.loss_chart import LossChart
from course_lib.widgets.mask_view import MaskView
from course_lib.widgets.memory_planner import MemoryPlanner
from course_lib.widgets.packing_view import PackingView

pytestmark = pytest.mark.browser
KINDS = (MaskView, PackingView, MemoryPlanner, LossChart)
HOSTILE = "<script>window.hurt=1</script><img src=x onerror=window.hurt=1>\"'"
OFFLINE = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")

PAGE = """<!doctype html><meta charset="utf-8"><style>%(css)s</style><div id="root"></div>
<script type="text/plain" id="widget">%(js)s</script>
<script type="module">
const state = %(state)s, listeners = {};
const model = {
  saved: 0,
  get: (name) => state[name],
  set(name, value) {
    if (state[name] === value) return;
    state[name] = value;
    (listeners["change:" + name] ?? []).slice().forEach((call) => call());
  },
  on: (name, call) => (listeners[name] ??= []).push(call),
  off: (name, call) => (listeners[name] = listeners[name].filter((other) => other !== call)),
  save_changes() { this.saved++; },
};
const all = (selector) => [...document.querySelectorAll("#root " + selector)];
const one = (selector) => all(selector)[0];
const text = (selector) => all(selector).map((node) => node.textContent);
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
let seen;
try {
  const source = document.getElementById("widget").textContent;
  const { default: widget } = await import(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
  const stop = widget.render({ model, el: document.getElementById("root") });
  seen = await (async () => { %(script)s })();
  stop();
  seen.listeners = Object.values(listeners).flat().length;
} catch (error) { seen = { error: String(error) }; }
document.body.replaceChildren(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
</script>"""


@pytest.fixture
def drive(tmp_path: Path, read_html: Callable) -> Callable:
    """Run a script against a widget's page; return what the script returns."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium on this machine")

    def run(view: Any, script: str) -> dict[str, Any]:
        kind = next(kind for kind in KINDS if isinstance(view, kind))
        traits = {name: getattr(view, name) for name in kind.class_own_traits(sync=True)}
        state = json.dumps(traits).replace("</", "<\\/")
        js, css = str(kind._esm), str(kind._css)
        page = tmp_path / "page.html"
        page.write_text(PAGE % {"css": css, "js": js, "state": state, "script": script}, encoding="utf-8")
        command = [chromium, "--headless", *OFFLINE, f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--window-size=1100,900", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        seen = json.loads(read_html(done.stdout.split('<pre id="seen">')[1].split("</pre>")[0])[1])
        assert "error" not in seen, seen
        return seen

    return run


@pytest.fixture
def mask(tokenizer: Any) -> MaskView:
    messages = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": "one\ntwo 🗼"}]
    return MaskView({"messages": messages}, tokenizer, templates=["auto", "chatml"])


def test_every_token_is_drawn_as_text_and_marked(drive: Callable, mask: MaskView) -> None:
    seen = drive(
        mask,
        """return {
          shown: text(".course-token[role=option] > .course-now"),
          trained: all(".course-token[role=option]").map((node) => node.classList.contains("course-trained")),
          labels: all(".course-token[role=option]").map((node) => node.getAttribute("aria-label")),
          underline: getComputedStyle(one(".course-tokens .course-trained > .course-now")).boxShadow,
          injected: all("script, img").length + (window.hurt ?? 0),
          stops: all(".course-tokens").map((list) => list.querySelectorAll("[tabindex='0']").length),
        };""",
    )
    cells = [cell for column in mask.columns for cell in column["cells"]]
    assert seen["shown"] == [cell["shown"] for cell in cells]
    assert seen["trained"] == [cell["trained"] for cell in cells]
    assert seen["labels"] == [cell["description"] for cell in cells]
    assert "inset" in seen["underline"]
    assert seen["injected"] == 0
    assert seen["stops"] == [1, 1]
    assert seen["listeners"] == 0  # none is left when the widget is taken away


def test_a_token_that_spells_markup_stays_text(drive: Callable, mask: MaskView) -> None:
    cell = {
        **mask.columns[0]["cells"][0],
        "shown": HOSTILE,
        "named": HOSTILE,
        "predicts": HOSTILE,
        "description": HOSTILE,
    }
    mask.columns = [{**mask.columns[0], "cells": [cell], "name": HOSTILE, "counts": HOSTILE, "error": HOSTILE}]
    seen = drive(
        mask,
        """one("button").click();
        one("[role=option]").focus();
        await new Promise((done) => setTimeout(done, 50));
        return { shown: text(".course-now").filter((words) => words.includes("script")), value: text(".course-value")[1],
                 title: text(".course-title span"), injected: all("script, img").length + (window.hurt ?? 0) };""",
    )
    assert (seen["shown"], seen["value"], seen["title"]) == ([HOSTILE] * 2, HOSTILE, [HOSTILE])
    assert seen["injected"] == 0


def test_arrow_keys_move_through_the_tokens_and_tell_what_they_are(drive: Callable, mask: MaskView) -> None:
    seen = drive(
        mask,
        """const cells = [...one(".course-tokens").querySelectorAll("[role=option]")];
        const at = () => cells.indexOf(document.activeElement);
        cells[0].focus();
        const path = [at()];
        for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "ArrowUp", "Home", "ArrowLeft", "ArrowDown"]) {
          press(key);
          path.push(at());
        }
        const line = (i) => cells[i].getBoundingClientRect().top;
        return { path, below: line(path[9]) - line(0), selected: cells.filter((node) => node.ariaSelected === "true").length,
                 stops: cells.filter((node) => node.tabIndex === 0).length, details: text(".course-details .course-value") };""",
    )
    last = len(mask.columns[0]["cells"]) - 1
    assert seen["path"][:6] == [0, 1, 2, 1, last, last]
    assert 0 < seen["path"][6] < last  # a line up
    assert seen["path"][7:9] == [0, 0]
    assert seen["below"] > 0
    assert (seen["selected"], seen["stops"]) == (1, 1)
    cell = mask.columns[0]["cells"][seen["path"][9]]
    assert seen["details"] == [str(cell["position"]), cell["named"], str(cell["id"]), str(cell["label"]), "no"]


def test_pointing_at_a_token_tells_its_id_and_label(drive: Callable, mask: MaskView) -> None:
    seen = drive(
        mask,
        """all("[role=option]")[3].firstChild.dispatchEvent(new PointerEvent("pointerover", { bubbles: true }));
        return { details: text(".course-details .course-value") };""",
    )
    cell = mask.columns[0]["cells"][3]
    assert seen["details"][:3] == [str(cell["position"]), cell["named"], str(cell["id"])]


def test_the_button_shows_what_each_position_is_scored_on(drive: Callable, mask: MaskView) -> None:
    seen = drive(
        mask,
        """const visible = () => all(".course-next").filter((node) => node.offsetParent !== null).length;
        const before = visible();
        one("button").click();
        return { before, after: visible(), pressed: one("button").ariaPressed, shift: model.get("shift"), saved: model.saved,
                 next: text(".course-next"), spoken: one("[role=option]").ariaLabel, status: text("[role=status]") };""",
    )
    cells = [cell for column in mask.columns for cell in column["cells"]]
    assert (seen["before"], seen["after"]) == (0, len(cells))
    assert (seen["pressed"], seen["shift"], seen["saved"]) == ("true", True, 1)
    ends = {len(mask.columns[0]["cells"]) - 1, len(cells) - 1}
    wanted = [cell["predicts"] or ("end" if i in ends else "–") for i, cell in enumerate(cells)]
    assert seen["next"] == wanted
    assert seen["spoken"].endswith("scored on nothing")
    assert "position t predicts token t + 1" in seen["status"][0]


LENGTHS = [20, 30, 40, 10, 60, 5, 44]


def test_the_strategy_changes_numbers_bars_and_mask(drive: Callable) -> None:
    view = PackingView(LENGTHS, max_length=64)
    seen = drive(
        view,
        """const read = () => ({ numbers: text(".course-numbers .course-value"), bars: text(".course-segment"), foreign: all(".foreign").length,
                               alternative: one(".course-attention svg").getAttribute("aria-label") });
        const views = {};
        for (const radio of all("input[type=radio]")) { radio.click(); views[model.get("strategy")] = read(); }
        return { views, saved: model.saved, status: text("[role=status]")[0] };""",
    )
    # the radio of the strategy that is shown already changes nothing, so "none" is read without a click's effect
    for rows in view.views:
        read = seen["views"][rows["strategy"]]
        assert read["numbers"] == [value for _, value in rows["shown"]]
        labels = [segment["label"] for pack in rows["packs"] for segment in pack["segments"]]
        assert [bar.strip("…") for bar in read["bars"]] == labels
        assert (read["foreign"] > 0) == (rows["strategy"] == "concat")
        assert read["alternative"] == f"Attention mask of pack 0. {rows['packs'][0]['sentence']}"
    assert seen["saved"] == 2
    assert seen["status"].startswith("best-fit: packs 4")
    assert seen["listeners"] == 0


def test_a_pack_is_chosen_by_click_and_found_by_keys(drive: Callable) -> None:
    view = PackingView(LENGTHS, max_length=64, strategies=["best-fit"])
    seen = drive(
        view,
        """const bars = all(".course-pack");
        bars[0].focus();
        press("ArrowDown"); press("ArrowDown");
        const focused = bars.indexOf(document.activeElement);
        document.activeElement.click();
        press("End"); press("ArrowDown");
        return { focused, last: bars.indexOf(document.activeElement), pack: model.get("pack"), saved: model.saved,
                 pressed: bars.map((bar) => bar.ariaPressed), heading: text(".course-attention-panel .course-heading")[0],
                 spoken: bars[2].ariaLabel, status: text("[role=status]")[0] };""",
    )
    packs = view.views[0]["packs"]
    assert (seen["focused"], seen["last"], seen["pack"], seen["saved"]) == (2, len(packs) - 1, 2, 1)
    assert seen["pressed"] == [str(i == 2).lower() for i in range(len(packs))]
    assert seen["heading"] == "What the tokens of pack 2 see"
    assert seen["status"] == f"Pack 2: {packs[2]['sentence']}"
    first = packs[2]["segments"][0]
    assert seen["spoken"].startswith(
        f"Pack 2, {packs[2]['tokens']} of 64 tokens. sample {first['label']}: {first['length']} tokens"
    )


def test_the_drawn_mask_is_the_mask_of_training(drive: Callable) -> None:
    """Areas of the picture, in cells, against the pairs a block-diagonal and a full causal mask let through."""
    view = PackingView([3, 4, 2], max_length=9, strategies=["concat", "best-fit"])
    seen = drive(
        view,
        """const cells = (kind) => all(kind).reduce((sum, node) => sum + node.width.baseVal.value * node.height.baseVal.value, 0) * (9 / 384) ** 2;
        const read = () => [cells(".own"), cells(".foreign")];
        const concat = read();
        all("input")[1].click();
        return { concat, isolated: read() };""",
    )
    own = 3 * 4 / 2 + 4 * 5 / 2 + 2 * 3 / 2
    assert seen["concat"] == pytest.approx([own, 9 * 10 / 2 - own])
    assert seen["isolated"] == pytest.approx([own, 0])


def test_no_samples_draw_without_an_error(drive: Callable) -> None:
    seen = drive(PackingView([], max_length=64), 'return { note: text(".course-packs-panel .course-note") };')
    assert seen["note"] == ["No samples."]


@pytest.mark.parametrize("width", [1100, 600, 380])
def test_large_content_scrolls_inside_the_widget(drive: Callable, tokenizer: Any, width: int) -> None:
    row = {"messages": [{"role": "user", "content": "w" * 900}, {"role": "assistant", "content": "ok " * 400}]}
    script = f"""document.getElementById("root").style.width = "{width - 40}px";
        await new Promise((done) => setTimeout(done, 50));
        return {{ beyond: document.documentElement.scrollWidth - innerWidth, height: one("section").offsetHeight,
                  right: one("section").getBoundingClientRect().right }};"""
    names = ["auto", "chatml", "llama3_chat", "gemma"]
    for view in (MaskView(row, tokenizer, names), PackingView([9] * 5000, max_length=512)):
        seen = drive(view, script)
        assert seen["beyond"] <= 0
        assert seen["right"] <= width
        assert seen["height"] < 1400


PLANNED = "qwen2_5_7b_instruct_qlora_alpaca_2048_e3"


def test_the_bar_is_as_long_as_the_memory_it_shows(drive: Callable) -> None:
    planner = MemoryPlanner(PLANNED, vram="8GiB")
    seen = drive(
        planner,
        """const bar = one(".course-memory-bar"), width = bar.clientWidth;
        return { widths: all(".course-part").map((node) => 100 * node.getBoundingClientRect().width / width),
                 edge: 100 * (one(".course-card-edge").getBoundingClientRect().left - bar.getBoundingClientRect().left) / width,
                 parts: text(".course-parts th"), sizes: text(".course-parts td"), alternative: bar.getAttribute("aria-label"),
                 verdict: text("[role=status]")[0], fits: one("[role=status]").classList.contains("course-fits"),
                 named: all("select, input").every((node) => node.closest("label")?.textContent.trim()) };""",
    )
    shown = planner.view["segments"]
    assert seen["widths"] == pytest.approx([segment["percent"] for segment in shown], abs=0.3)
    assert seen["edge"] == pytest.approx(planner.view["card"]["percent"], abs=0.3)
    assert seen["parts"] == [segment["part"] for segment in shown]
    assert seen["sizes"] == [segment["size"] for segment in shown]
    assert seen["alternative"] == seen["verdict"] == planner.view["headline"]
    assert seen["fits"] is False
    assert seen["named"] is True  # every input has a label
    assert seen["listeners"] == 0


def test_a_control_tells_python_and_keeps_the_focus(drive: Callable) -> None:
    planner = MemoryPlanner(PLANNED, vram="8GiB")
    seen = drive(
        planner,
        """const select = all("select").find((node) => node.closest("label").textContent.startsWith("Tokens"));
        select.focus();
        select.value = "512";
        select.dispatchEvent(new Event("change", { bubbles: true }));
        const asked = model.get("values");
        model.set("view", { ...model.get("view"), headline: "Fits.", fits: true });
        const after = { kept: document.activeElement === select, verdict: text("[role=status]")[0] };
        const box = all("input[type=checkbox]")[1];
        box.click();
        return { asked, ...after, offload: model.get("values").offload, saved: model.saved };""",
    )
    assert seen["asked"] == {**planner.values, "max_length": "512"}
    assert (seen["kept"], seen["verdict"]) == (True, "Fits.")
    assert (seen["offload"], seen["saved"]) == ("head", 2)


def test_settings_that_fit_are_taken_over_by_a_button(drive: Callable) -> None:
    planner = MemoryPlanner(PLANNED, vram="8GiB")
    seen = drive(
        planner,
        """const buttons = all(".course-fitting button");
        buttons[0].click();
        return { count: buttons.length, spoken: buttons[0].ariaLabel, values: model.get("values") };""",
    )
    first = planner.view["suggestions"][0]
    assert (seen["count"], seen["spoken"]) == (len(planner.view["suggestions"]), f"Use: {first['words']}")
    assert seen["values"] == first["values"]
    planner.values = seen["values"]
    assert planner.view["fits"]


def test_a_hostile_model_name_and_problem_stay_text(drive: Callable) -> None:
    planner = MemoryPlanner(PLANNED)
    planner.view = {**planner.view, "title": HOSTILE, "problem": HOSTILE, "details": HOSTILE, "command": HOSTILE}
    seen = drive(
        planner,
        """return { title: text(".course-heading")[0], problem: text("[role=alert]")[0],
                    injected: all("script, img").length + (window.hurt ?? 0) };""",
    )
    assert (seen["title"], seen["problem"], seen["injected"]) == (HOSTILE, HOSTILE, 0)


@pytest.mark.parametrize("width", [1100, 600, 380])
def test_the_planner_stays_inside_its_cell(drive: Callable, width: int) -> None:
    planner = MemoryPlanner(PLANNED, vram="6GiB")
    planner.values = {**planner.values, "rank": "all", "batch_size": "16"}
    seen = drive(
        planner,
        f"""document.getElementById("root").style.width = "{width - 40}px";
        await new Promise((done) => setTimeout(done, 50));
        const label = one(".course-card-label").getBoundingClientRect();
        return {{ beyond: document.documentElement.scrollWidth - innerWidth, left: label.left, right: label.right,
                  ends: one("section").getBoundingClientRect().right }};""",
    )
    assert seen["beyond"] <= 0
    assert 0 <= seen["left"] < seen["right"] <= seen["ends"] <= width


def test_pause_freezes_the_drawing_and_resume_draws_all_that_came(drive: Callable) -> None:
    chart = LossChart(points=[[1, 3.0], [2, 2.5]], held_out=[[0, 3.5]], total_steps=4, status="step 2 of 4")
    seen = drive(
        chart,
        """const button = one("button"), views = [];
        const look = () => views.push({ note: text(".course-note")[0], said: text("[role=status]")[0], button: button.textContent,
          line: one("polyline").getAttribute("points").split(" ").length, squares: all("rect.held-out").length,
          focused: document.activeElement === button });
        const come = (step) => {
          model.set("points", [...model.get("points"), [step, 2]]);
          model.set("held_out", [...model.get("held_out"), [step, 2]]);
          model.set("status", `step ${step} of 4`);
        };
        button.focus();
        look(); button.click(); look(); come(3); look(); button.click(); look(); come(4); look();
        return { views, saved: model.saved };""",
    )
    key = " (line: training rows; squares: held-out rows)"
    frozen = {"note": f"paused at step 2{key}", "said": f"paused at step 2{key}", "button": "Resume"}
    assert seen["views"] == [
        {"note": f"step 2 of 4{key}", "said": "", "button": "Pause", "line": 2, "squares": 1, "focused": True},
        {**frozen, "line": 2, "squares": 1, "focused": True},
        {**frozen, "line": 2, "squares": 1, "focused": True},
        {
            "note": f"step 3 of 4{key}",
            "said": f"step 3 of 4{key}",
            "button": "Pause",
            "line": 3,
            "squares": 2,
            "focused": True,
        },
        {
            "note": f"step 4 of 4{key}",
            "said": f"step 3 of 4{key}",
            "button": "Pause",
            "line": 4,
            "squares": 3,
            "focused": True,
        },
    ]
    assert seen["saved"] == 0  # Python is told nothing
    assert seen["listeners"] == 0


def test_a_chart_can_be_paused_before_the_first_step(drive: Callable) -> None:
    seen = drive(
        LossChart(),
        """const notes = text(".course-note");
        one("button").click();
        model.set("points", [[1, 2]]);
        notes.push(...text(".course-note"), all("svg").length);
        one("button").click();
        return { notes, drawn: all("svg").length };""",
    )
    assert seen["notes"] == ["waiting for the first step", "paused before the first step", 0]
    assert seen["drawn"] == 1
