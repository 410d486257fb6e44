from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from course_lib.agent import search as searching
from course_lib.agent.search import BM25, SearchError, search, search_corpus, terms
from course_lib.agent.tools import run_tool, shipped_tools
from course_lib.data.readers import read_rows

KEY = "sk-0123456789abcdef"


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERPER_API_KEY", raising=False)


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("How tall is the Eiffel Tower?", "Eiffel Tower"),
        ("capital of Iceland", "Iceland"),
        ("who discovered penicillin", "Penicillin"),
        ("highest mountain of Africa", "Mount Kilimanjaro"),
        ("speed of light", "Speed of light"),
        ("when was the Berlin wall opened", "Berlin Wall"),
        ("长江有多长？", "长江"),
        ("谁获得了诺贝尔生理学或医学奖", "屠呦呦"),
        ("上海中心大厦有多高", "上海"),
        ("书生浦语什么时候发布", "书生·浦语"),
    ],
)
def test_the_encyclopedia_is_found_by_questions(query: str, title: str) -> None:
    assert search(query)[0].startswith(f"{title}: ")


def test_every_document_is_found_by_its_title_and_holds_one_fact_sheet() -> None:
    rows = read_rows(searching.CORPUS)
    assert len(rows) == len({row["title"] for row in rows}) == 98
    assert sum(re.search(r"[\u4e00-\u9fff]", row["text"]) is not None for row in rows) == 31
    for row in rows:
        assert search_corpus(row["title"])[0].startswith(f"{row['title']}: "), row["title"]
        assert len(row["text"]) < 260


@pytest.mark.parametrize("query", ["", "?!", "the of and", "qwzxv", "\x00\ud83d" * 1000, "a" * 100_000])
def test_a_query_that_fits_nothing_finds_nothing(query: str) -> None:
    assert search(query) == []
    assert "nothing was found" in run_tool(shipped_tools(["search"])[0], {"query": query}).text


def test_bm25_by_hand() -> None:
    """Two texts of mean length 2: idf of a term in one of two is ln 2, and tf / (tf + norm) is worked out by hand."""
    scores = BM25(["red apple", "green apple"]).scores("red")
    assert scores == {0: pytest.approx(0.6931471805599453 * 2.2 / 2.2)}
    ordered = BM25(["apple", "apple pear plum fig", "apple apple"]).scores("apple")
    assert ordered[2] > ordered[0] > ordered[1]


def test_terms() -> None:
    assert terms("The rivers of Glass, 42 classes!") == ["river", "glass", "42", "classe"]
    assert terms("长江大桥有多长") == ["长江", "江大", "大桥"]


@pytest.fixture
def serper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, bytes], list[Any]]]:
    """A server in place of serper.dev: returns what it has seen."""
    servers = []

    def start(status: int, body: bytes) -> list[Any]:
        seen: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = self.rfile.read(int(self.headers["Content-Length"]))
                seen.append((self.headers["X-API-KEY"], json.loads(asked)))
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *_: None
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(searching, "SERPER", f"http://127.0.0.1:{server.server_port}/search")
        monkeypatch.setenv("SERPER_API_KEY", KEY)
        return seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_the_web_is_searched_where_there_is_a_key(serper: Callable[[int, bytes], list[Any]]) -> None:
    organic = [{"title": f"T{n}", "snippet": f"text\n{n}", "link": "https://example.org"} for n in range(5)]
    seen = serper(
        200, json.dumps({"answerBox": {"answer": "5 °C"}, "organic": [{"title": "no snippet"}, *organic]}).encode()
    )
    assert search("weather", 3) == ["5 °C", "T0: text 0", "T1: text 1"]
    assert seen == [(KEY, {"q": "weather", "num": 3})]


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (403, b'{"message": "Unauthorized. key sk-0123456789abcdef"}', "status 403; check SERPER_API_KEY"),
        (500, b"", "status 500"),
        (200, b"<html>", "a form that is not known"),
        (200, b'{"organic": "no"}', "a form that is not known"),
        (200, b"[]", "a form that is not known"),
        (200, b" " * 2_100_000, "more than 2000000 bytes"),
    ],
)
def test_a_web_search_that_fails_is_told_without_the_key(
    serper: Callable[[int, bytes], list[Any]], status: int, body: bytes, says: str
) -> None:
    serper(status, body)
    with pytest.raises(SearchError, match=says):
        search("weather")
    outcome = run_tool(shipped_tools(["search"])[0], {"query": "weather"})
    assert outcome.failed
    assert says in outcome.text
    assert KEY not in outcome.text


def test_without_a_network_the_web_search_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERPER_API_KEY", KEY)
    monkeypatch.setattr(searching, "SERPER", "http://127.0.0.1:9/search")
    with pytest.raises(SearchError, match="cannot be reached"):
        search("weather")
