"""`download` against a local server that misbehaves in the ways real ones do."""

from __future__ import annotations

from pathlib import Path

import pytest
from file_server import CONTENT, SHA256, broken, status, whole

from course_lib import download as module
from course_lib.download import download
from course_lib.errors import CourseError, InputError


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_plain_and_already_there(serve, tmp_path: Path) -> None:
    url, seen = serve(whole())
    path = tmp_path / "new" / "model.bin"
    assert download(url, path, sha256=SHA256) == path
    assert path.read_bytes() == CONTENT
    assert only(path.parent) == ["model.bin"]
    download(url, path, sha256=SHA256.upper())
    assert len(seen) == 1


def test_goes_on_after_a_broken_connection(serve, tmp_path: Path) -> None:
    url, seen = serve(broken(1000), whole())
    download(url, tmp_path / "m", sha256=SHA256)
    assert (tmp_path / "m").read_bytes() == CONTENT
    assert seen == [None, "bytes=1000-"]


def test_a_later_call_resumes(serve, tmp_path: Path) -> None:
    url, seen = serve(broken(5000), status(500), status(500), whole())
    with pytest.raises(CourseError, match=r"gave up after 2 attempts \(HTTP 500\).*kept and the next call goes on"):
        download(url, tmp_path / "m", attempts=2)
    assert (tmp_path / "m.part").stat().st_size == 5000
    assert not (tmp_path / "m").exists()
    download(url, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == CONTENT
    assert seen[-1] == "bytes=5000-"
    assert only(tmp_path) == ["m"]


def test_server_that_ignores_range_starts_anew(serve, tmp_path: Path) -> None:
    url, _ = serve(broken(1000), lambda handler: handler.reply(200, CONTENT, ETag='"one"'))
    assert download(url, tmp_path / "m").read_bytes() == CONTENT


def test_file_that_changed_between_calls_is_not_mixed(serve, tmp_path: Path) -> None:
    url, seen = serve(broken(1000), whole(CONTENT[::-1], etag='"two"'))
    assert download(url, tmp_path / "m").read_bytes() == CONTENT[::-1]
    assert seen == [None, "bytes=1000-"]


def test_without_a_version_or_hash_nothing_is_resumed(serve, tmp_path: Path) -> None:
    url, seen = serve(lambda handler: handler.reply(200, CONTENT[:10], length=len(CONTENT)), whole())
    assert download(url, tmp_path / "m").read_bytes() == CONTENT
    assert seen == [None, None]


def test_complete_part_is_recognised_by_416(serve, tmp_path: Path) -> None:
    url, _ = serve(whole())
    (tmp_path / "m.part").write_bytes(CONTENT)
    assert download(url, tmp_path / "m", sha256=SHA256).read_bytes() == CONTENT


def test_part_longer_than_the_file_is_thrown_away(serve, tmp_path: Path) -> None:
    url, seen = serve(whole())
    (tmp_path / "m.part").write_bytes(CONTENT + b"more")
    assert download(url, tmp_path / "m", sha256=SHA256).read_bytes() == CONTENT
    assert seen[-1] is None


def test_wrong_old_bytes_cost_one_more_download_not_a_failure(serve, tmp_path: Path) -> None:
    url, seen = serve(whole())
    (tmp_path / "m.part").write_bytes(b"x" * 1000)
    assert download(url, tmp_path / "m", sha256=SHA256).read_bytes() == CONTENT
    assert seen == ["bytes=1000-", None]


def test_wrong_range_is_not_appended(serve, tmp_path: Path) -> None:
    wrong = lambda handler: handler.reply(206, CONTENT, Content_Range=f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}")  # noqa: E731
    url, _ = serve(broken(1000), wrong, whole())
    assert download(url, tmp_path / "m").read_bytes() == CONTENT


def test_wrong_hash_removes_the_part_and_keeps_the_old_file(serve, tmp_path: Path) -> None:
    url, _ = serve(whole(CONTENT[:-1] + b"!"))
    (tmp_path / "m").write_bytes(b"old")
    with pytest.raises(CourseError, match=f"wrong sha256 [0-9a-f]{{64}}, expected {SHA256}"):
        download(url, tmp_path / "m", sha256=SHA256)
    assert (tmp_path / "m").read_bytes() == b"old"
    assert only(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("code", "words"), [(404, "not found"), (403, "access refused"), (401, "needs a login"), (418, "unexpected")]
)
def test_refusals_are_not_retried(serve, tmp_path: Path, code: int, words: str) -> None:
    url, seen = serve(status(code))
    with pytest.raises(CourseError, match=rf"{words}.*HTTP {code}"):
        download(url, tmp_path / "m")
    assert len(seen) == 1


def test_too_many_requests_then_well(serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    date = "Wed, 21 Oct 2015 07:28:00 GMT"
    url, seen = serve(
        status(429, Retry_After="7"), status(503, Retry_After="9999"), status(429, Retry_After=date), whole()
    )
    download(url, tmp_path / "m", sha256=SHA256)
    assert waits == [7.0, module.LONGEST_WAIT_SECONDS, 0.0]
    assert len(seen) == 4


def test_server_error_for_ever_gives_up(serve, tmp_path: Path) -> None:
    url, seen = serve(status(500))
    with pytest.raises(CourseError, match=r"gave up after 5 attempts \(HTTP 500\)") as caught:
        download(url, tmp_path / "m")
    assert len(seen) == module.ATTEMPTS
    assert "\n" not in str(caught.value)


def test_redirects(serve, tmp_path: Path) -> None:
    target, _ = serve(whole())
    url, _ = serve(status(302, Location=target))
    assert download(url, tmp_path / "m", sha256=SHA256).read_bytes() == CONTENT
    round_and_round, _ = serve(status(302, Location="/model.bin"))
    with pytest.raises(CourseError, match="redirect"):
        download(round_and_round, tmp_path / "n")


def test_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.001)
    with pytest.raises(CourseError, match="check the network or proxy"):
        download("http://127.0.0.1:9/x", tmp_path / "m")


def test_file_urls_and_wrong_addresses(tmp_path: Path) -> None:
    source = tmp_path / "a file.bin"
    source.write_bytes(CONTENT)
    assert download(source.as_uri(), tmp_path / "m", sha256=SHA256).read_bytes() == CONTENT
    with pytest.raises(InputError, match="no such file"):
        download((tmp_path / "none").as_uri(), tmp_path / "n")
    for url in ("ftp://host/x", "model.bin", ""):
        with pytest.raises(InputError, match="not an address"):
            download(url, tmp_path / "n")


def test_place_that_cannot_be_written(serve, tmp_path: Path) -> None:
    url, _ = serve(whole())
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be written"):
        download(url, tmp_path / "file" / "m")
