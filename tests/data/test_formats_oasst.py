from __future__ import annotations

from typing import Any

import pytest

from course_lib.data.conversation import RowError
from course_lib.data.formats import assemble_rows, to_conversation


def oasst(text: str, role: str, *replies: dict, **more: Any) -> dict:
    return {"message_id": f"id-{text}", "text": text, "role": role, "replies": list(replies), **more}


TREE = oasst(
    "q",
    "prompter",
    oasst("no rank", "assistant"),
    oasst("deleted", "assistant", deleted=True, rank=0),
    oasst("refused", "assistant", review_result=False, rank=0),
    oasst("second", "assistant", oasst("x", "prompter"), rank=1.0),
    oasst("first", "assistant", oasst("r", "prompter", oasst("end", "assistant", oasst("open", "prompter"))), rank=0.0),
    oasst("first too", "assistant", rank=0),
)
OTHER = {"instruction": "Say hi", "output": "hi"}
BEST = ["q", "first", "r", "end"]


def test_oasst_takes_the_best_path() -> None:
    notes: list[str] = []
    messages = to_conversation({"message_tree_id": "1", "prompt": TREE}, notes=notes)["messages"]
    assert [message["content"] for message in messages] == BEST
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert len(notes) == 2


def flat(node: dict, parent: str | None = None) -> list[dict]:
    row = {key: value for key, value in node.items() if key != "replies"} | {"parent_id": parent}
    return [row, *(below for reply in node["replies"] for below in flat(reply, node["message_id"]))]


def test_flat_oasst_messages_become_trees_and_none_is_lost() -> None:
    rows = flat(TREE)
    rows = rows[4:] + rows[:4]  # the prompt comes late
    strays = [
        {"message_id": "s1", "parent_id": "absent", "text": "t", "role": "assistant"},
        {"message_id": "s2", "parent_id": "s3", "text": "t", "role": "assistant"},
        {"message_id": "s3", "parent_id": "s2", "text": "t", "role": "prompter"},
        {"message_id": "id-q", "parent_id": None, "text": "again", "role": "prompter"},
        {"message_id": ["x"], "parent_id": None, "text": "t", "role": "prompter"},
    ]
    numbered = enumerate([OTHER, *strays[:2], *rows, *strays[2:]], start=1)
    (other, tree, *outside) = assemble_rows(numbered)
    assert other == (1, OTHER)
    assert tree[0] == 4 + rows.index(flat(TREE)[0])
    texts = {message["content"] for message in to_conversation(tree[1])["messages"]}
    assert texts == set(BEST)
    assert [row for _, row in outside] == strays
    for _, row in outside:
        with pytest.raises(RowError, match="leads to no prompt: its parent_id"):
            to_conversation(row)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ({**TREE, "deleted": True}, "prompt is deleted"),
        (oasst("q", "prompter"), "no output"),
        (oasst("q", "bot"), "unknown role 'bot'"),
        ({**TREE, "replies": {}}, "replies is not a list"),
        ("q", "prompt is text, not a message: 'q'"),
    ],
)
def test_trees_that_do_not_fit_say_why(prompt: Any, said: str) -> None:
    with pytest.raises(RowError, match=said):
        to_conversation({"message_tree_id": "1", "prompt": prompt})
