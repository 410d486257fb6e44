"""The model card of a run: what was trained on what, how well, under which licence, and how to load it.

Everything in it is read from the run's recipe.yaml and metrics.jsonl. Format: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from course_lib.models import ModelInfo
from course_lib.recipe import Recipe, load_recipe
from course_lib.training.listeners import METRICS_FILE, read_metrics

RECIPE_FILE = "recipe.yaml"
PICTURE = "loss.png"
PAGES = {
    "hf": "https://huggingface.co/",
    "modelscope": "https://modelscope.cn/models/",
    "openxlab": "https://huggingface.co/",
}
# the catalogue's licence -> the Hub's name for it (https://huggingface.co/docs/hub/repositories-licenses)
LICENCES = {
    "Apache-2.0": "apache-2.0",
    "Llama 3.1 Community licence": "llama3.1",
    "Llama 3.2 Community licence": "llama3.2",
    "Qwen Research licence (no commercial use)": "other",
}


@dataclass(frozen=True)
class Run:
    """A training's recipe and events, oldest first."""

    recipe: Recipe
    events: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind, such as StepDone."""
        return [event for event in self.events if event["event"] == kind]


def find_run(work_dir: Path) -> Run | None:
    """The run of a work dir; None where there is none."""
    if not (work_dir / RECIPE_FILE).is_file() or not (work_dir / METRICS_FILE).is_file():
        return None
    return Run(load_recipe(work_dir / RECIPE_FILE), read_metrics(work_dir))


def loss_picture(run: Run) -> bytes:
    """The loss curve as PNG."""
    import io

    from course_lib.plots import loss_figure

    buffer = io.BytesIO()
    loss_figure(run.events).savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


def model_card(
    repository: str,
    *,
    place: str,
    base: str,
    info: ModelInfo | None,
    adapter: dict[str, Any] | None,
    template: str,
    run: Run | None,
) -> str:
    """The text of README.md.

    `place` is where the repository is: hf, modelscope or openxlab. `base` is the base's repository, `info` its catalogue entry
    where it has one, `adapter` an adapter's adapter_config.json (None: a whole model), `template` the named chat template it was
    trained with, or auto.
    """
    what = f"A {_method(adapter)} adapter for" if adapter else "A fine-tuned model, made from"
    parts = [
        _front_matter(base, info, page=PAGES[place] + base, whole=adapter is None),
        f"# {repository.split('/')[-1]}",
        f"{what} [{base}]({PAGES[place]}{base}).",
        "## How to load it",
        _loading(repository, place, base, adapter, template),
    ]
    if run is not None:
        parts += ["## What it was trained on", _table(_training_facts(run, adapter))]
        parts += ["## How it went", _table(_results(run)), f"![Loss by step]({PICTURE})", *_answers(run)]
    parts += ["## Licence", _licence(base, info, page=PAGES[place] + base)]
    if run is not None:
        parts += ["## Recipe", f"```yaml\n{without_paths(run.recipe).to_yaml()}```"]
    return "\n\n".join(parts) + "\n"


def without_paths(recipe: Recipe) -> Recipe:
    """The recipe without the folders of this machine: of a local file or model, its name remains."""
    copy = recipe.model_copy(deep=True)
    copy.data.path = _shown(copy.data.path) if copy.data.path else None
    copy.model.name = Path(copy.model.name).name if Path(copy.model.name).is_absolute() else copy.model.name
    return copy


def _shown(path: str) -> str:
    return path if path.startswith(("sample:", "hf://")) else Path(path).name


def _front_matter(base: str, info: ModelInfo | None, *, page: str, whole: bool) -> str:
    facts: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "finetune" if whole else "adapter",
        "library_name": "transformers" if whole else "peft",
        "pipeline_tag": "text-generation",
    }
    if info is not None:
        facts["license"] = LICENCES.get(info.licence, "other")
        if facts["license"] == "other":
            facts["license_name"] = "as-the-base"
            facts["license_link"] = page
        if info.languages:
            facts["language"] = list(info.languages)
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)}---"


def _method(adapter: dict[str, Any] | None) -> str:
    if adapter is None:
        return "all weights"
    return "DoRA" if adapter.get("use_dora") else "rsLoRA" if adapter.get("use_rslora") else "LoRA"


def _loading(repository: str, place: str, base: str, adapter: dict[str, Any] | None, template: str) -> str:
    fetched = {"hf": "huggingface_hub", "modelscope": "modelscope"}.get(place)
    name = repository.split("/")[1]
    here = {"hf": f'"{repository}"', "modelscope": f'snapshot_download("{repository}")'}.get(place, f'"{name}"')
    loaded = here
    if adapter is not None:
        loaded = f'snapshot_download("{base}")' if place == "modelscope" else f'"{base}"'
    named = adapter is not None and template != "auto"
    lines = ["from pathlib import Path", ""] if named else []
    if fetched and (named or place == "modelscope"):
        lines.append(f"from {fetched} import snapshot_download")
    lines += ["from peft import PeftModel"] if adapter is not None else []
    lines += [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({loaded})",
        f'model = AutoModelForCausalLM.from_pretrained({loaded}, dtype="auto", device_map="auto")',
    ]
    if named:  # the template that it was trained with, in place of the tokenizer's own
        lines += [
            f'folder = snapshot_download("{repository}")' if fetched else f'folder = "{name}"',
            'tokenizer.chat_template = Path(folder, "chat_template.jinja").read_text(encoding="utf-8")',
        ]
        here = "folder"
    if adapter is not None:
        lines.append(f"model = PeftModel.from_pretrained(model, {here})")
    lines += [
        'messages = [{"role": "user", "content": "Who are you?"}]',
        'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        "answer = model.generate(**inputs.to(model.device), max_new_tokens=200)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    clone = f"```\ngit clone https://code.openxlab.org.cn/{repository}.git\n```\n\n" if place == "openxlab" else ""
    return clone + "```python\n" + "\n".join(lines) + "\n```"


def _training_facts(run: Run, adapter: dict[str, Any] | None) -> dict[str, str]:
    data, training, started = run.recipe.data, run.recipe.training, run.of("RunStarted")
    facts = {}
    if data.identity:
        facts["data"] = f"generated rows that make it the assistant of {data.identity.name}"
    elif data.path:
        facts["data"] = f"`{_shown(data.path)}`"
    if started:
        facts["rows"] = f"{started[0]['train_examples']:,} trained, {started[0]['held_out_examples']:,} held out"
    if adapter:
        facts["adapter"] = f"{_method(adapter)}, rank {adapter['r']}, alpha {adapter['lora_alpha']:g}"
    if started:
        share = started[0]["trainable_parameters"] / started[0]["parameters"]
        facts["trained"] = f"{started[0]['trainable_parameters']:,} parameters ({share:.2%})"
    facts["base held in"] = run.recipe.model.dtype
    if run.recipe.model.template != "auto":
        facts["chat template"] = run.recipe.model.template
    facts["optimizer"] = f"{training.optimizer}, learning rate {training.lr:g}, {training.schedule} schedule"
    facts["row length"] = f"at most {data.max_length:,} tokens, packing: {data.packing}"
    return facts


def _results(run: Run) -> dict[str, str]:
    facts, steps, held_out, ended = {}, run.of("StepDone"), run.of("HeldOutLoss"), run.of("RunEnded")
    if steps:
        facts["steps"] = f"{steps[-1]['step']:,}"
        if len(steps) == steps[-1]["step"]:  # else some were not logged
            facts["steps"] += f", {sum(step['tokens'] for step in steps):,} tokens"
        facts["training loss, first and last step"] = f"{steps[0]['loss']:.4f}, {steps[-1]['loss']:.4f}"
    if held_out:
        facts["loss of the held-out rows, before and after"] = f"{held_out[0]['loss']:.4f}, {held_out[-1]['loss']:.4f}"
    if ended:
        facts["time"] = f"{ended[-1]['seconds']:,.0f} s"
    return facts


def _answers(run: Run) -> list[str]:
    samples = run.of("SampleAnswers")
    if len(samples) < 2:
        return []
    before, after = (dict(map(tuple, sample["answers"])) for sample in (samples[0], samples[-1]))
    rows = ["| question | before | after |", "|---|---|---|"]
    rows += [
        f"| {_cell(question)} | {_cell(before.get(question, ''))} | {_cell(text)} |" for question, text in after.items()
    ]
    return ["Answers before and after training, greedily chosen:", "\n".join(rows)]


def _table(facts: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(fact)} |" for name, fact in facts.items())])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _licence(base: str, info: ModelInfo | None, *, page: str) -> str:
    known = f": {info.licence}" if info else ""
    return f"The licence of [{base}]({page}) applies{known}."
