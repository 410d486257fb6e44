"""Chat over pipes and in a pseudo-terminal: what goes where, commands, Ctrl-C, and what never reaches the terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from course_lib.chat.session import ChatSession, SamplingSettings
from course_lib.chat.terminal import answer_once, chat_terminal, printable, printable_pieces
from course_lib.errors import CourseError, InputError

# A chat with the tiny model, slow enough to be interrupted. It says "word word …", or "Hi 你好" to a question with a question mark.
SCRIPT = """
import sys, time, torch
from course_lib.chat.session import ChatSession, SamplingSettings
from course_lib.chat.terminal import chat_terminal
from course_lib.errors import CourseError
from course_lib.models import load_model

model, tokenizer = load_model("tiny")
session = ChatSession(model, tokenizer, sampling=SamplingSettings(max_new_tokens=1000), system="be brief")
encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
state = {}

def force(module, args, kwargs, output):
    if kwargs["input_ids"].shape[1] > 1:
        question = tokenizer.decode(kwargs["input_ids"][0]).split("user")[-1]
        state.update(at=0, ids=[*encode("Hi 你好"), tokenizer.eos_token_id] if "?" in question else encode("word " * 1000))
    time.sleep(0.002)
    output.logits = torch.full_like(output.logits, -1e4)
    output.logits[:, -1, state["ids"][state["at"]]] = 0
    state["at"] += 1
    return output

model.register_forward_hook(force, with_kwargs=True)
try:
    chat_terminal(session)
except CourseError as error:
    print(f"course: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
print("left", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def loaded(tiny: Path) -> tuple[Any, Any]:
    from course_lib.models import load_model

    return load_model(tiny)


@pytest.fixture
def session(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> ChatSession:
    """A session whose model repeats the question, in pieces of two characters, and fails when told to."""

    class Echo:
        new_tokens, seconds, ending = 3, 0.5, "end"

        def __init__(self, model: Any, tokenizer: Any, prompt: list[int], **options: Any) -> None:
            text = tokenizer.decode(prompt).rsplit("<|im_start|>user\n", 1)[1].split("<|im_end|>")[0]
            self.text = f"[{text}]"
            if text == "long":
                self.ending, self.new_tokens = "length", 8

        def __iter__(self) -> Iterator[str]:
            for start in range(0, len(self.text), 2):
                if "fail" in self.text and start == 4:
                    raise RuntimeError("no\nmore\x1b memory")
                yield self.text[start : start + 2]

        def stop(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr("course_lib.chat.session.Generation", Echo)
    return ChatSession(*loaded, sampling=SamplingSettings(max_new_tokens=8), context=300)


@pytest.fixture
def piped(session: ChatSession) -> Callable[[str], tuple[str, str]]:
    """Pipe text in; return what came out, and the notices."""

    def run(text: str) -> tuple[str, str]:
        output, notices = io.StringIO(), io.StringIO()
        try:
            chat_terminal(session, input_stream=io.StringIO(text), output_stream=output, notice_stream=notices)
        except CourseError as error:
            notices.write(f"raised {type(error).__name__}: {error}\n")
        return output.getvalue(), notices.getvalue()

    return run


def test_each_piped_line_is_a_question_of_one_conversation(
    piped: Callable[[str], tuple[str, str]], session: ChatSession
) -> None:
    output, notices = piped("\ufeffone\r\n\n你好 👋\nlast\\")
    assert output == "[one]\n[你好 👋]\n[last\\]\n"
    assert notices == "you> one\nyou> 你好 👋\nyou> last\\\n"
    assert len(session.messages) == 6


def test_a_space_makes_a_question_of_a_command(piped: Callable[[str], tuple[str, str]]) -> None:
    assert piped(" /exit\n/etc/passwd is what?\n")[0] == "[ /exit]\n[/etc/passwd is what?]\n"


def test_exit(piped: Callable[[str], tuple[str, str]]) -> None:
    assert piped("one\n/EXIT\ntwo\n")[0] == "[one]\n"


def test_help_names_every_command(piped: Callable[[str], tuple[str, str]]) -> None:
    output, notices = piped("/help\n")
    assert output == ""
    for usage in ("/help", "/reset", "/system TEXT", "/save FILE", "/stats", "/exit"):
        assert f"\n{usage} " in notices


def test_reset_and_system(piped: Callable[[str], tuple[str, str]], session: ChatSession) -> None:
    output, notices = piped("one\n/system be brief\ntwo\n/reset\n")
    assert output == "[one]\n[two]\n"
    assert session.messages == [{"role": "system", "content": "be brief"}]
    assert "anew with this system turn" in notices
    assert "now it is 'be brief'" in piped("/system\n")[1]


def test_save(piped: Callable[[str], tuple[str, str]], session: ChatSession, tmp_path: Path) -> None:
    path = tmp_path / "my chat.jsonl"
    notices = piped(f"one\n/save {path}\n/save {path}\n/save\ntwo\n")[1]
    assert f"[saved to {path}]" in notices
    assert f"line 3: {path}: already exists" in notices
    assert "/save needs a file name" in notices
    assert len(json.loads(path.read_text(encoding="utf-8"))["messages"]) == 2
    assert session.messages[-1]["content"] == "[two]"


def test_stats(piped: Callable[[str], tuple[str, str]]) -> None:
    notices = piped("/stats\none\n/stats\n")[1]
    assert "no answer yet" in notices
    assert "3 new tokens in 0.5 s (6.0 tokens/s); the model ended it" in notices
    assert " of 300 tokens, 0 turns trimmed" in notices


def test_errors_are_told_and_the_chat_goes_on(piped: Callable[[str], tuple[str, str]], session: ChatSession) -> None:
    output, notices = piped("/sav x\n" + "x" * 400 + "\none\n")
    assert output == "[one]\n"
    assert "line 1: command /sav is unknown; did you mean /save" in notices
    assert "line 2: the message is too long" in notices
    assert "raised InputError: standard input: 2 of its lines failed; the first: command /sav" in notices
    output, notices = piped("fail\ntwo\n/\n")
    assert output == "[fai\n[two]\n"
    assert "line 1: the model failed: RuntimeError: no more memory\n" in notices
    assert "raised CourseError: standard input: 2 of its lines failed" in notices
    assert [message["content"] for message in session.messages] == ["one", "[one]", "two", "[two]"]


def test_cut_off_and_trimmed_answers_are_told(piped: Callable[[str], tuple[str, str]]) -> None:
    notices = piped("long\n" + "a" * 175 + "\n")[1]
    assert "[cut off at max_new_tokens 8]" in notices
    assert "[the oldest 2 turns no longer fit into the context of 300 tokens]" in notices


def test_input_that_is_not_utf8(session: ChatSession) -> None:
    text = io.TextIOWrapper(io.BytesIO("caf\u00e9\n".encode("latin-1")), encoding="utf-8")
    with pytest.raises(InputError, match="not UTF-8"):
        chat_terminal(session, input_stream=text, output_stream=io.StringIO(), notice_stream=io.StringIO())


def test_output_that_is_not_utf8(session: ChatSession) -> None:
    raw = io.BytesIO()
    output = io.TextIOWrapper(raw, encoding="latin-1")
    answer_once(session, "h\u00e9 你", output_stream=output)
    assert raw.getvalue() == b"[h\xe9 ?]\n"


def test_answer_once_writes_the_answer_alone(session: ChatSession, capsys: pytest.CaptureFixture[str]) -> None:
    answer_once(session, "one\nmore\x1b[31m")
    assert tuple(capsys.readouterr()) == ("[one\nmore]\n", "")
    with pytest.raises(InputError, match="empty"):
        answer_once(session, " ")
    assert tuple(capsys.readouterr()) == ("", "")


def test_a_terminal_that_goes_away_ends_the_chat(session: ChatSession) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def readline(self, size: int = -1) -> str:
            return super().readline(size) or self.hang_up()

        def hang_up(self) -> str:
            raise OSError(5, "Input/output error")

    output = io.StringIO()
    chat_terminal(session, input_stream=Terminal("one\\\ntwo\n"), output_stream=output, notice_stream=io.StringIO())
    assert output.getvalue() == "[one\ntwo]\n"


CONTROL = [
    ("\x1b[31mred\x1b[0m\tand\nplain", "red\tand\nplain"),
    ("a\x1b]0;title\x07b", "a]0;titleb"),  # the text of a title does no harm; its frame is gone
    ("\x9b2Jx\x90\x85\x7f\x00\x08\ry", "xy"),
    ("\x1b[" + "9" * 200 + "z", ""),
    ("\x1b\x1b[1mz\x1b", "z"),
    ("你好 👋🏽 \u2028é", "你好 👋🏽 \u2028é"),
]


@pytest.mark.parametrize(("text", "shown"), CONTROL)
def test_control_characters_are_left_out(text: str, shown: str) -> None:
    assert printable(text) == shown
    for size in (1, 2, 3):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        streamed = "".join(printable_pieces(pieces))
        assert not any(character in streamed for character in "\x1b\x9b\x07\x00\x08\x7f\r")
        if len(text) < 100:
            assert streamed == shown


def test_pipes_end_to_end(tiny: Path, tmp_path: Path) -> None:
    script = tmp_path / "chat.py"
    script.write_text(SCRIPT, encoding="utf-8")
    run = subprocess.run([sys.executable, script], input=b"who?\n/save\nand?\n", capture_output=True, timeout=120)
    assert run.stdout.decode() == "Hi 你好\nHi 你好\n"
    assert run.returncode == 2
    told = [line for line in run.stderr.decode().splitlines() if not line.startswith("you> ")]
    assert told[0].startswith("line 2: /save needs a file name")
    assert told[1].startswith("course: standard input: 1 of its lines failed")
    assert len(told) == 2  # transformers has nothing to say


@pytest.mark.slow
def test_in_a_terminal(tiny: Path, tmp_path: Path) -> None:
    pexpect = pytest.importorskip("pexpect")
    script, saved = tmp_path / "chat.py", tmp_path / "chat.jsonl"
    script.write_text(SCRIPT, encoding="utf-8")
    child = pexpect.spawn(sys.executable, [str(script)], encoding="utf-8", timeout=60)
    try:
        child.expect("/help lists the commands")
        child.expect("you> ")
        child.sendline("who?")
        child.expect("Hi 你好\r\n")
        child.expect("you> ")
        child.sendline("tell me\\")
        child.expect(r"\.\.\.> ")
        child.sendline("a story")
        child.expect("word word")
        child.sendintr()
        child.expect(r"\[stopped\]", timeout=5)
        child.expect("you> ")
        child.sendline("/hlep")
        child.expect("did you mean /help")
        child.expect("you> ")
        child.sendline("/stats")
        child.expect("tokens/s\\); stopped")
        child.expect("you> ")
        child.send("\x1b[A\x1b[A\x1b[A\x1b[A\x1b[A")  # up, to the first line: readline keeps a history
        child.expect_exact("who?")
        child.sendline("")
        child.expect("Hi 你好\r\n")
        child.expect("you> ")
        child.sendline(f"/save {saved}")
        child.expect("saved to")
        child.expect("you> ")
        child.sendeof()
        child.expect("left")
        child.expect(pexpect.EOF)
    finally:
        child.close()
    assert child.exitstatus == 0
    roles = [message["content"] for message in json.loads(saved.read_text(encoding="utf-8"))["messages"]]
    assert roles[:4] == ["be brief", "who?", "Hi 你好", "tell me\na story"]
    assert roles[4].startswith("word word")


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_leaves(tiny: Path, tmp_path: Path) -> None:
    pexpect = pytest.importorskip("pexpect")
    script = tmp_path / "chat.py"
    script.write_text(SCRIPT, encoding="utf-8")
    child = pexpect.spawn(sys.executable, [str(script)], encoding="utf-8", timeout=60)
    try:
        child.expect("you> ")
        child.sendintr()
        child.expect("left")
        child.expect(pexpect.EOF)
    finally:
        child.close()
    assert child.exitstatus == 0
