"""course_lib.export.publish through the real clients: whole files arrive, faults are one line, secrets and states stay here."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from course_runner import Course
from hub_server import TOKEN, Hub, running_hub
from modelscope_server import TOKEN as MODELSCOPE_TOKEN
from modelscope_server import ModelScope, running_modelscope
from packaging.requirements import Requirement

from course_lib.errors import InputError
from course_lib.export.publish import publish_hub
from course_lib.export.secrets import check_no_secrets
from course_lib.export.upload import plan_upload

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory, course_home: Path) -> Path:
    """The work dir of a tiny quickstart: adapter, merged model, recipe, metrics."""
    from course_lib.quickstart import quickstart

    folder = tmp_path_factory.mktemp("run") / "quickstart"
    quickstart(name="Ada", scale="tiny", work_dir=folder)
    return folder


@pytest.fixture
def run(made_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_run, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, a token for it, and no waiting between attempts."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with running_hub() as started:
        monkeypatch.setenv("HF_ENDPOINT", started.url)
        yield started


def publish(course: Course, folder: Path, *more: str, place: str = "hf", env: dict[str, str] | None = None):
    return course("publish", place, str(folder), "ada/mine", "--base", BASE, *more, env=env)


def test_an_adapter_arrives_whole(run: Path, hub: Hub, course: Course) -> None:
    ended = publish(course, run / "adapter", "--private")
    assert (ended.returncode, ended.stdout) == (0, f"{hub.url}/ada/mine\n")
    repository = hub.repositories["models/ada/mine"]
    assert repository.private
    assert sorted(repository.files) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "course.json",
        "loss.png",
    ]
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert repository.files["adapter_model.safetensors"] == weights
    oid = hashlib.sha256(weights).hexdigest()
    assert oid in hub.verified
    assert len(hub.parts[oid]) == -(-len(weights) // 50_000) > 1  # it came in parts
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert json.loads(repository.files["course.json"])["base"] == BASE
    assert repository.files["loss.png"].startswith(b"\x89PNG")
    assert len(repository.commits) == 1
    assert TOKEN not in ended.stdout + ended.stderr


def test_a_merged_model_arrives_and_loads(run: Path, hub: Hub, course: Course, tmp_path: Path) -> None:
    from course_lib.models import load_model

    assert publish(course, run / "merged").returncode == 0
    for name, content in hub.repositories["models/ada/mine"].files.items():
        (tmp_path / "fetched").mkdir(exist_ok=True)
        (tmp_path / "fetched" / name).write_bytes(content)
    sent, own = load_model(tmp_path / "fetched")[0], load_model(run / "merged")[0]
    assert all(bool((a == b).all()) for a, b in zip(sent.parameters(), own.parameters(), strict=True))


def test_a_second_time_only_what_changed_is_sent(run: Path, hub: Hub, course: Course) -> None:
    assert publish(course, run / "adapter").returncode == 0
    first = len(hub.sent())
    ended = publish(course, run / "adapter")
    assert ended.returncode == 0
    repository = hub.repositories["models/ada/mine"]
    assert (len(hub.sent()), len(repository.commits)) == (first, 1)
    (run / "adapter" / "README.md").write_text("# My own words\n")
    assert publish(course, run / "adapter").returncode == 0
    assert repository.commits[1:] == [["README.md"]]
    assert repository.files["README.md"] == b"# My own words\n"
    assert len(hub.sent()) == first


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"POST /api/repos/create": 401}, "the Hub does not accept the token (HTTP 401)"),
        ({"POST /api/repos/create": 403}, "the token may not write to ada (HTTP 403)"),
        ({"POST .*preupload": 500}, "the Hub failed (HTTP 500)"),
        ({"POST .*lfs/objects/batch": 503}, "the Hub failed (HTTP 503)"),
        ({"PUT /lfs/part": 500}, "the Hub failed (HTTP 500)"),
        ({"PUT /lfs/": "cut"}, "was not published ("),
        ({"POST .*commit": 500}, "the Hub failed (HTTP 500)"),
        ({"POST .*commit": 403}, "the token may not write to ada (HTTP 403)"),
        ({"POST .*commit": "cut"}, "was not published ("),
    ],
)
def test_faults_are_one_line_and_leave_the_repository_as_it_was(
    fault: dict[str, int | str], said: str, run: Path, hub: Hub, course: Course
) -> None:
    hub.faults = fault
    ended = publish(course, run / "adapter")
    assert ended.returncode == 1
    assert ended.stderr.startswith("course: ada/mine: ")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert TOKEN not in ended.stderr
    assert all(not repository.files for repository in hub.repositories.values())
    hub.faults = {}
    assert publish(course, run / "adapter").returncode == 0
    assert len(hub.repositories["models/ada/mine"].files) == 5


def test_a_hub_that_is_not_there(run: Path, hub: Hub, course: Course) -> None:
    ended = publish(course, run / "adapter", env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1


def test_no_token(run: Path, hub: Hub, course: Course, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    ended = publish(course, run / "adapter")
    assert ended.returncode == 2
    assert "no Hugging Face token: set HF_TOKEN" in ended.stderr
    assert hub.requests == []


# --- what is sent and what is not


def test_a_dry_run_lists_names_and_bytes_and_asks_nobody(run: Path, hub: Hub, course: Course) -> None:
    (run / "adapter" / ".env").write_text("A=b")
    (run / "adapter" / "optimizer.pt").write_bytes(b"state")
    ended = publish(course, run / "adapter", "--dry-run")
    assert ended.returncode == 0
    assert hub.requests == []
    listed = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in ended.stdout.splitlines()[1:]}
    assert listed["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert ended.stdout.startswith(f"model ada/mine on hf, {sum(listed.values()):,} bytes\n")
    assert ended.stderr == "left out: .env, optimizer.pt\n"


def test_states_and_hidden_files_are_never_sent(run: Path) -> None:
    for name in (".env", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "source.json", "notes.txt",
                 "credentials.json", "checkpoint-000002/adapter_model.safetensors", "global_step2/zero.pt", "rng.json",
                 "optimizer.safetensors", "trainer_state.json", ".git/config", "state.safetensors"):  # fmt: skip
        for folder in ("adapter", "merged"):
            (run / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (run / folder / name).write_text("{}")
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "course.json", "loss.png"}
    adapter = plan_upload(run / "adapter", "ada/mine", base=BASE)
    assert set(adapter.files) == expected
    assert {".env", "optimizer.pt", "rng.json"} <= set(adapter.left_out)
    merged = plan_upload(run / "merged", "ada/mine", base=BASE)
    assert set(merged.files) == {
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "loss.png"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }


SECRETS = {
    "a Hugging Face token": "hf_" + "Zz9" * 11,
    "a ModelScope token": "ms-01234567-89ab-cdef-0123-456789abcdef",
    "an API key": "sk-" + "a1B2" * 10,
    "a GitHub token": "ghp_" + "a1B2" * 9,
    "a private key": "-----BEGIN OPENSSH PRIVATE KEY-----",
}


@pytest.mark.parametrize("kind", SECRETS)
def test_what_looks_like_a_secret_is_found(kind: str) -> None:
    content = f"# Mine\n\nlogin with {SECRETS[kind]}\n".encode()
    with pytest.raises(InputError, match=f"README.md: holds {kind}; take it out") as refused:
        check_no_secrets([("LICENSE", b"hf_transfer and sk-learn, ms-office"), ("README.md", content)])
    assert SECRETS[kind] not in str(refused.value)


@pytest.mark.parametrize("dry", [True, False])
def test_a_secret_stops_the_publication(dry: bool, run: Path, hub: Hub, course: Course) -> None:
    (run / "adapter" / "README.md").write_text(f"login with {TOKEN[:-5]}12345")
    ended = publish(course, run / "adapter", *(["--dry-run"] if dry else []))
    assert ended.returncode == 2
    assert "README.md: holds a Hugging Face token" in ended.stderr
    assert TOKEN[:-5] not in ended.stdout + ended.stderr
    assert hub.requests == []


def test_the_value_of_a_variable_named_as_a_secret_is_refused(run: Path, hub: Hub, course: Course) -> None:
    (run / "adapter" / "README.md").write_text("the words are open sesame 42\n")
    ended = publish(course, run / "adapter", env={"SERPER_API_KEY": "open sesame 42"})
    assert ended.returncode == 2
    assert "README.md: holds the value of SERPER_API_KEY" in ended.stderr
    assert hub.requests == []


def test_a_token_in_the_metadata_of_weights_is_found(run: Path, hub: Hub) -> None:
    from safetensors.torch import load_file, save_file

    file = run / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "note": TOKEN})
    with pytest.raises(InputError, match=r"adapter_model.safetensors: holds the value of HF_TOKEN"):
        publish_hub(plan_upload(run / "adapter", "ada/mine", base=BASE), "ada/mine")


def test_a_token_across_the_pieces_a_file_is_read_in_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from course_lib.export import secrets

    monkeypatch.setattr(secrets, "CHUNK", 64)
    (tmp_path / "tokenizer.json").write_text("x " * 25 + "hf_" + "q" * 40)
    with pytest.raises(InputError, match="a Hugging Face token"):
        secrets.check_no_secrets([("tokenizer.json", tmp_path / "tokenizer.json")])


# --- the card


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_card_tells_the_run(run: Path) -> None:
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in metrics if event["event"] == "StepDone"]
    card = plan_upload(run / "adapter", "ada/mine", base="smollm2-135m-instruct").files["README.md"].decode()
    assert front_matter(card) == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": ["en"],
    }
    for said in (
        "assistant of Ada",
        "LoRA, rank 16, alpha 32",
        f"{steps[0]['loss']:.4f}, {steps[-1]['loss']:.4f}",
        'PeftModel.from_pretrained(model, "ada/mine")',
        "![Loss by step](loss.png)",
        "applies: Apache-2.0",
    ):
        assert said in card
    assert str(run) not in card


def test_the_code_of_the_card_runs(run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = plan_upload(run / "adapter", "ada/mine", base=BASE).files["README.md"].decode()
    code = (
        card.split("```python\n")[1].split("```")[0].replace("ada/mine", str(run / "adapter")).replace(BASE, str(tiny))
    )
    said: list[str] = []
    exec(code, {"print": said.append})
    assert len(said) == 1


def test_held_out_losses_and_answers_are_in_the_card(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step, loss, answer in ((0, 3.25, "I am a | bot"), (2, 1.5, "I am Ada's\nassistant")):
            file.write(json.dumps({"event": "HeldOutLoss", "step": step, "loss": loss}) + "\n")
            file.write(
                json.dumps({"event": "SampleAnswers", "step": step, "answers": [["Who are you?", answer]]}) + "\n"
            )
    card = plan_upload(run / "merged", "ada/mine", base=BASE).files["README.md"].decode()
    assert "| loss of the held-out rows, before and after | 3.2500, 1.5000 |" in card
    assert "| Who are you? | I am a \\| bot | I am Ada's assistant |" in card
    assert front_matter(card)["base_model_relation"] == "finetune"


def test_a_model_merged_elsewhere_is_told_its_run(run: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(run / "merged", tmp_path / "elsewhere" / "merged")
    with pytest.raises(InputError, match="nothing here tells its base"):
        plan_upload(elsewhere, "ada/mine")
    assert b"assistant of Ada" not in plan_upload(elsewhere, "ada/mine", base=BASE).files["README.md"]
    upload = plan_upload(elsewhere, "ada/mine", base=BASE, run=run)
    assert b"assistant of Ada" in upload.files["README.md"]
    assert "loss.png" in upload.files
    with pytest.raises(InputError, match="is no folder of a run"):
        plan_upload(elsewhere, "ada/mine", base=BASE, run=tmp_path)
    (elsewhere / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="holds no tokenizer"):
        plan_upload(elsewhere, "ada/mine", base=BASE)


def test_folders_of_this_machine_are_not_told(run: Path) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["data"] |= {"identity": None, "path": "/home/ada/private/rows.jsonl"}
    recipe["model"]["name"] = "/home/ada/models/base"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    record = json.loads((run / "adapter" / "course.json").read_text())
    (run / "adapter" / "course.json").write_text(json.dumps({**record, "base": "/home/ada/models/base"}))
    config = json.loads((run / "merged" / "config.json").read_text())
    (run / "merged" / "config.json").write_text(json.dumps({**config, "_name_or_path": "/home/ada/models/base"}))
    for folder in ("adapter", "merged"):
        for name, content in plan_upload(run / folder, "ada/mine", base=BASE).files.items():
            assert b"/home/ada" not in (content if isinstance(content, bytes) else content.read_bytes()), name


def test_a_named_template_comes_with_the_adapter(run: Path) -> None:
    record = json.loads((run / "adapter" / "course.json").read_text())
    (run / "adapter" / "course.json").write_text(json.dumps({**record, "template": "internlm2_chat"}))
    files = plan_upload(run / "adapter", "ada/mine", base=BASE).files
    assert b"<|im_start|>" in files["chat_template.jinja"]
    assert b"generation %" not in files["chat_template.jinja"]
    assert 'tokenizer.chat_template = Path(folder, "chat_template.jinja")' in files["README.md"].decode()


def test_modelscope_names_are_taken_there(run: Path) -> None:
    upload = plan_upload(run / "adapter", "ada/mine", base="internlm2-chat-7b", place="modelscope")
    card = upload.files["README.md"].decode()
    assert 'snapshot_download("Shanghai_AI_Laboratory/internlm2-chat-7b")' in card
    assert front_matter(card)["license"] == "other"


# --- bad input


@pytest.mark.parametrize(
    ("folder", "repository", "more", "said"),
    [
        ("adapter", "mine", [], "mine: is no repository; name it OWNER/NAME"),
        ("nowhere", "ada/mine", [], "nowhere: no such folder"),
        (".", "ada/mine", [], "holds neither adapter_config.json nor config.json; name"),
        ("adapter", "ada/mine", ["--base", "tiny"], "its base, tiny, is in no repository"),
        ("adapter", "ada/mine", ["--base", BASE, "--app", "gradoi"], "choose gradio or streamlit; did you mean gradio"),
    ],
)
def test_wrong_arguments_are_one_line(
    folder: str, repository: str, more: list[str], said: str, run: Path, course: Course
) -> None:
    ended = course("publish", "hf", str(run / folder), repository, *more)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_wrong_place_is_named(run: Path, course: Course) -> None:
    ended = publish(course, run / "adapter", place="modelscop")
    assert ended.returncode == 2
    assert "choose hf, modelscope, openxlab; did you mean modelscope?" in ended.stderr


def test_damaged_weights_are_not_sent(run: Path, hub: Hub, course: Course) -> None:
    file = run / "merged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    ended = publish(course, run / "merged")
    assert ended.returncode == 2
    assert "cannot be read as safetensors" in ended.stderr
    assert hub.requests == []


# --- apps


@pytest.mark.parametrize(("kind", "sdk"), [("gradio", "gradio"), ("streamlit", "docker")])
def test_an_app_becomes_a_space(kind: str, sdk: str, run: Path, hub: Hub, course: Course) -> None:
    ended = publish(course, run / "adapter", "--app", kind)
    assert ended.returncode == 0
    assert ended.stdout == f"{hub.url}/ada/mine\n{hub.url}/spaces/ada/mine\n"
    space = hub.repositories["spaces/ada/mine"]
    assert space.sdk == sdk
    assert ("Dockerfile" in space.files) == (sdk == "docker")
    facts = front_matter(space.files["README.md"].decode())
    assert (facts["sdk"], facts["models"]) == (sdk, ["ada/mine"])
    settings = json.loads(space.files["app.json"])
    assert settings == {"title": "mine", "model": "ada/mine", "base": BASE, "chat_template": None, "stop": []}
    needed = space.files["requirements.txt"].decode().splitlines()
    assert needed[-1] == kind
    assert {Requirement(line).name for line in needed[:-1]} == {"torch", "transformers", "peft", "accelerate"}
    for name in ("app.py", "model.py"):
        compile(space.files[name], name, "exec")


@pytest.mark.slow
def test_the_app_answers(run: Path, tiny: Path, tmp_path: Path) -> None:
    """model.py in a process of its own, as a Space runs it, without this library."""
    from course_lib.export.app_files import app_files

    settings = {"title": "mine", "model": str(run / "adapter"), "base": str(tiny), "chat_template": None}
    for name, content in app_files("gradio", **settings, stop=("<|im_end|>", "<absent>")).items():
        (tmp_path / name).write_bytes(content)
    program = (
        "import sys; sys.path.insert(0, '.'); from model import answer, load; model, tokenizer = load()\n"
        "pieces = list(answer(model, tokenizer, [{'role': 'user', 'content': 'Hi'}], temperature=0, max_new_tokens=8))\n"
        "assert 'course_lib' not in sys.modules; print(len(pieces))"
    )
    import sys

    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


# --- OpenXLab, by git


@pytest.fixture
def git_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bare repository ada/mine, as made on the web page."""
    if shutil.which("git") is None:
        pytest.skip("no git here")
    root = tmp_path / "server"
    subprocess.run(
        ["git", "init", "--bare", "--quiet", "--initial-branch=main", str(root / "ada" / "mine.git")], check=True
    )
    monkeypatch.setenv("OPENXLAB_GIT", f"file://{root}")
    return root / "ada" / "mine.git"


def in_git(repository: Path, *arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(repository), *arguments], check=True, capture_output=True).stdout


def test_openxlab_gets_model_and_app_in_one_repository(run: Path, git_server: Path, course: Course) -> None:
    ended = publish(course, run / "adapter", "--app", "streamlit", place="openxlab")
    assert (ended.returncode, ended.stderr) == (0, "")
    names = in_git(git_server, "ls-tree", "-r", "--name-only", "main").decode().split()
    assert {"app.py", "model.py", "requirements.txt", "README.md", "adapter_model.safetensors"} <= set(names)
    weights = in_git(git_server, "show", "main:adapter_model.safetensors")
    assert weights == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert json.loads(in_git(git_server, "show", "main:app.json"))["model"] == "."
    (run / "adapter" / "README.md").write_text("# My own words\n")
    assert publish(course, run / "adapter", "--app", "streamlit", place="openxlab").returncode == 0
    assert publish(course, run / "adapter", "--app", "streamlit", place="openxlab").returncode == 0
    assert in_git(git_server, "rev-list", "--count", "main") == b"2\n"
    assert in_git(git_server, "show", "--name-only", "--format=", "main") == b"README.md\n"


def test_openxlab_faults_are_one_line(run: Path, git_server: Path, course: Course) -> None:
    shutil.rmtree(git_server)
    ended = publish(course, run / "adapter", place="openxlab", env={"OPENXLAB_TOKEN": "a-secret-of-mine"})
    assert ended.returncode == 1
    assert ended.stderr.startswith("course: ada/mine: git clone failed (")
    assert ended.stderr.count("\n") == 1
    assert "a-secret-of-mine" not in ended.stderr
    private = publish(course, run / "adapter", "--private", place="openxlab")
    assert private.returncode == 2


def test_large_files_want_git_lfs(run: Path, git_server: Path, monkeypatch: pytest.MonkeyPatch, course: Course) -> None:
    from course_lib.export import publish as publishing

    if subprocess.run(["git", "lfs", "version"], capture_output=True).returncode == 0:
        pytest.skip("git-lfs is here")
    monkeypatch.setattr(publishing, "LARGE", 1000)
    ended = publish(course, run / "adapter", place="openxlab")
    assert ended.returncode == 2
    assert "install git-lfs" in ended.stderr


# --- ModelScope


def test_modelscope_without_its_package(run: Path, course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "modelscope", None)
    ended = publish(course, run / "adapter", place="modelscope")
    assert ended.returncode == 2
    assert "pip install -c constraints.txt -e '.[modelscope]'" in ended.stderr
    ended = publish(course, run / "adapter", "--app", "gradio", place="modelscope")
    assert ended.returncode == 2


@pytest.fixture
def modelscope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModelScope]:
    """A ModelScope on this machine and a token for it; the client's own files go into a folder of the test."""
    pytest.importorskip("modelscope")
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", MODELSCOPE_TOKEN)
    monkeypatch.setenv("MODELSCOPE_CREDENTIALS_PATH", str(tmp_path / "credentials"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    with running_modelscope() as started:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", started.url)
        yield started


def test_an_adapter_arrives_whole_at_modelscope(run: Path, modelscope: ModelScope, course: Course) -> None:
    ended = publish(course, run / "adapter", "--private", place="modelscope")
    assert (ended.returncode, ended.stdout) == (0, f"{modelscope.url}/models/ada/mine\n")
    asked = modelscope.repositories["ada/mine"]
    assert (asked["Visibility"], asked["License"]) == (1, "Apache-2.0")
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert modelscope.files["adapter_model.safetensors"] == weights
    assert sorted(modelscope.files) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "course.json",
        "loss.png",
    ]
    assert publish(course, run / "adapter", place="modelscope").returncode == 0
    assert sum(request.startswith("PUT") for request in modelscope.requests) == 1  # the weights, once


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"POST /api/v1/models": 401}, "ModelScope does not accept the token (HTTP 401)"),
        ({"POST /api/v1/models": 403}, "the token may not write to ada (HTTP 403)"),
        ({"POST /api/v1/models": 500}, ""),
        ({"PUT /blob": 403}, ""),
        ({"POST .*commit": 403}, ""),
        ({"POST .*commit": "cut"}, ""),
    ],
)
def test_faults_of_modelscope_are_one_line(
    fault: dict[str, int | str], said: str, run: Path, modelscope: ModelScope, course: Course
) -> None:
    modelscope.faults = fault
    ended = publish(course, run / "adapter", place="modelscope")
    assert ended.returncode == 1, ended
    assert ended.stderr.startswith("course: ada/mine: ")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""
    assert MODELSCOPE_TOKEN not in ended.stderr
    assert "adapter_model.safetensors" not in modelscope.files
    modelscope.faults = {}
    assert publish(course, run / "adapter", place="modelscope").returncode == 0
    assert len(modelscope.files) == 5


def test_no_modelscope_token(run: Path, modelscope: ModelScope, course: Course) -> None:
    ended = publish(course, run / "adapter", place="modelscope", env={"MODELSCOPE_API_TOKEN": ""})
    assert ended.returncode == 2
    assert "set MODELSCOPE_API_TOKEN" in ended.stderr
    assert modelscope.requests == []
