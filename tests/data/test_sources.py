"""Data sets by name, from a local server that misbehaves; no test reaches the network."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from file_server import CONTENT, SHA256, broken, status, whole

from course_lib.data import sources as module
from course_lib.data.sources import SAMPLE_FOLDER, download_source, find_source, open_source, sources
from course_lib.errors import CourseError, InputError

ROW = b'{"text": "### Human: hi### Assistant: hello"}\n'
PAGE = b"<!doctype html><title>Log in</title>"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on a machine that may ask a network."""
    monkeypatch.setenv("COURSE_HOME", str(tmp_path))
    for variable in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "COURSE_SOURCE"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


@pytest.fixture
def mirrored(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give the data set `openassistant-guanaco` other mirrors and another sha256."""

    def put(sha256: str | None = SHA256, **mirrors: str) -> None:
        source = replace(sources()["openassistant-guanaco"], sha256=sha256, mirrors=mirrors)
        monkeypatch.setattr(module, "sources", lambda: {source.name: source})

    return put


def test_unknown_names_are_answered_with_the_nearest(home: Path, mirrored: Callable) -> None:
    mirrored(hub="http://127.0.0.1:9/x", github="http://127.0.0.1:9/y")
    for call, said in (
        (lambda: find_source("openasistant-guanaco"), "did you mean openassistant-guanaco"),
        (lambda: open_source("nothing", offline_ok=True), "choose openassistant-guanaco"),
        (lambda: download_source("openassistant-guanaco", mirror="githab"), "did you mean github"),
    ):
        with pytest.raises(InputError, match=said):
            call()


def test_the_catalogue_is_sound() -> None:
    assert list(sources()) == ["openassistant-guanaco", "oasst1", "alpaca", "medication-qa", "msagent-bench"]
    for source in sources().values():
        assert source.licence
        assert source.origin.startswith("https://")
        assert source.mirrors
        assert all(url.startswith("https://") for url in source.mirrors.values())
        assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)
        assert (source.sha256 is None) == (source.size is None)
        assert source.sample is None or (SAMPLE_FOLDER / source.sample).is_file()
    assert find_source("OASST1").name == "oasst1"


@pytest.mark.realdata
def test_the_medication_sheet_has_the_size_and_sha256_of_the_catalogue(real_data: Path) -> None:
    source = find_source("medication-qa")
    content = (real_data / source.file).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (source.size, source.sha256)


def test_one_mirror_breaks_off_the_next_goes_on_where_it_stopped(serve, mirrored: Callable, home: Path) -> None:
    first, _ = serve(broken(5000), status(500))
    second, seen = serve(whole())
    mirrored(hub=first, github=second)
    said: list[str] = []
    path = download_source("openassistant-guanaco", say=said.append)
    assert path == home / "sources" / "openassistant-guanaco" / "openassistant_best_replies_train.jsonl"
    assert path.read_bytes() == CONTENT
    assert seen == ["bytes=5000-"]
    assert len(said) == 1
    assert re.match(r"hub: .*HTTP 500", said[0])
    download_source("openassistant-guanaco")
    assert len(seen) == 1, "a file with the right sha256 is not asked for again"


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([status(404)], "not found"),
        ([status(429, Retry_After="0")], "HTTP 429"),
        ([status(500)], "HTTP 500"),
        ([whole(CONTENT[:-1] + b"!")], "wrong sha256"),
        ([lambda handler: handler.reply(200, CONTENT, length=len(CONTENT) + 9)], "expected 1024009"),
        ([lambda handler: handler.reply(200, CONTENT, length=len(CONTENT) - 9)], "wrong sha256"),
        ([status(302, Location="/model.bin")], "redirect"),
    ],
)
def test_a_bad_mirror_costs_nothing_but_its_turn(serve, mirrored: Callable, answers: list, said: str) -> None:
    bad, _ = serve(*answers)
    good, _ = serve(status(302, Location=serve(whole())[0]))
    heard: list[str] = []
    mirrored(hub=bad, github=good)
    assert download_source("openassistant-guanaco", say=heard.append).read_bytes() == CONTENT
    assert said in heard[0]
    mirrored(hub=bad)
    find_source("openassistant-guanaco").path.unlink()
    with pytest.raises(CourseError, match=f"no mirror gave the file: hub: .*{said}"):
        download_source("openassistant-guanaco")
    opened = open_source("openassistant-guanaco", offline_ok=True)
    assert (opened.is_sample, opened.path) == (True, SAMPLE_FOLDER / "openassistant_sample.jsonl")
    assert said in opened.note
    assert "written for this course" in opened.note


def test_one_mirror_by_name_is_the_only_one_asked(serve, mirrored: Callable) -> None:
    (bad, _), (good, seen) = serve(status(404)), serve(whole())
    mirrored(hub=bad, github=good)
    with pytest.raises(CourseError, match="not found"):
        download_source("openassistant-guanaco", mirror="hub")
    assert not seen


def test_the_source_of_the_environment_comes_first(serve, mirrored: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub, hub_seen), (other, other_seen) = serve(whole()), serve(whole())
    mirrored(hub=hub, modelscope=other)
    monkeypatch.setenv("COURSE_SOURCE", "modelscope")
    download_source("openassistant-guanaco")
    assert (len(hub_seen), len(other_seen)) == (0, 1)


def test_hf_endpoint_stands_for_the_hub(serve, mirrored: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    url, seen = serve(whole())
    monkeypatch.setenv("HF_ENDPOINT", url.removesuffix("/model.bin") + "/")
    mirrored(hub="https://huggingface.co/datasets/a/b/resolve/main/c")
    download_source("openassistant-guanaco")
    assert len(seen) == 1


def test_a_login_page_is_not_taken_for_a_file_without_a_sha256(serve, mirrored: Callable) -> None:
    (page, _), (rows, seen) = serve(whole(PAGE)), serve(whole(ROW))
    mirrored(None, hub=page, github=rows)
    heard: list[str] = []
    path = download_source("openassistant-guanaco", say=heard.append)
    assert path.read_bytes() == ROW
    assert "what came is no data" in heard[0]
    download_source("openassistant-guanaco")
    assert len(seen) == 1, "what is there is not asked for again"


def test_offline_is_heeded_and_what_is_there_is_used(
    serve, mirrored: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, seen = serve(whole())
    mirrored(hub=url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CourseError, match="HF_HUB_OFFLINE is set"):
        download_source("openassistant-guanaco")
    assert open_source("openassistant-guanaco", offline_ok=True).is_sample
    assert not seen
    path = find_source("openassistant-guanaco").path
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    opened = open_source("openassistant-guanaco", offline_ok=True)
    assert (opened.path, opened.is_sample) == (path, False)
    assert "licence: Apache-2.0" in opened.note


def test_a_set_without_a_sample_fails_offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bare = replace(find_source("msagent-bench"), sample=None)
    monkeypatch.setattr(module, "find_source", lambda name: bare)
    with pytest.raises(CourseError, match="msagent-bench: not in the cache"):
        open_source("msagent-bench", offline_ok=True)


@pytest.mark.parametrize("name", sources())
def test_every_sample_stands_in_for_its_set(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    opened = open_source(name, offline_ok=True)
    assert opened.is_sample
    assert opened.path.is_file()


def test_a_cache_that_cannot_be_written_is_not_the_mirrors_fault(serve, mirrored: Callable, home: Path) -> None:
    url, _ = serve(whole())
    mirrored(hub=url)
    (home / "sources").write_text("a file in the way")
    with pytest.raises(InputError, match="cannot be written"):
        open_source("openassistant-guanaco", offline_ok=True)


def test_the_command_prints_the_path_and_says_the_licence(serve, mirrored: Callable, course: Callable) -> None:
    url, _ = serve(whole())
    mirrored(hub="http://127.0.0.1:9/x", github=url)
    done = course("data", "download", "openassistant-guanaco", env={"HF_HUB_OFFLINE": ""})
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == CONTENT
    assert "licence: Apache-2.0" in done.stderr
    assert "hub: " in done.stderr
    assert course("data", "download", "guanaco").returncode == 2
    listed = json.loads(course("data", "download", "--json").stdout)
    assert [entry["name"] for entry in listed] == ["openassistant-guanaco"]
    assert "Apache-2.0" in course("data", "download").stdout
