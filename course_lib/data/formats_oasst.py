"""OpenAssistant's message trees (OASST1, OASST2): several replies to a message, ranked by people.

A conversation is the best path from the prompt: at each step the reply of the best rank. That is how
openassistant-guanaco was made. The data come as trees (`….trees.jsonl.gz`) or as a flat list of messages
(`….messages.jsonl.gz`, and the tables on the Hub), which `assemble_trees` puts together first.
Source: https://huggingface.co/datasets/OpenAssistant/oasst1
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from course_lib.data.conversation import Conversation, Message, RowError, conversation, json_type, shown
from course_lib.data.formats_fields import Row, leave_off_unanswered, text_field

_ROLE_OF = {"prompter": "user", "assistant": "assistant"}
BESIDE_PATH = "replies beside the best path left out"


def from_oasst(row: Row, notes: list[str]) -> Conversation:
    """A message tree: {"message_tree_id", "prompt": {"text", "role", "replies": [...]}}.

    Rank 0 is the best; a reply without a rank comes last; of equals the first is taken. Replies that are deleted or
    did not pass review are never taken. The conversation ends at the last assistant message.

    Raises:
        RowError: no usable prompt, no answer, or a message row that belongs to no tree (see `assemble_trees`).
    """
    if is_message_row(row):
        raise RowError(
            f"message {shown(row['message_id'])} leads to no prompt: its parent_id {shown(row.get('parent_id'))} "
            "or one above it is missing in the file, repeated or in a loop"
        )
    node = row["prompt"]
    if not isinstance(node, Mapping):
        raise RowError(f"prompt is {json_type(node)}, not a message: {shown(node)}")
    if not _usable(node):
        raise RowError("the prompt is deleted or did not pass review")
    messages: list[Message] = []
    beside = False
    while node is not None:
        messages.append(_message(node, len(messages) + 1))
        replies = _replies(node, len(messages))
        node = min(filter(_usable, replies), key=_rank, default=None)
        beside = beside or len(replies) > (node is not None)
    if beside:
        notes.append(BESIDE_PATH)
    return conversation(leave_off_unanswered(messages, notes))


def _message(node: Row, number: int) -> Message:
    role = node.get("role")
    if not isinstance(role, str) or role not in _ROLE_OF:
        raise RowError(f"message {number} of the path: unknown role {shown(role)} (known: {', '.join(_ROLE_OF)})")
    return {"role": _ROLE_OF[role], "content": text_field(node, "text", f"message {number} of the path")}


def _replies(node: Row, number: int) -> list[Row]:
    replies = node.get("replies")
    if replies is None:
        return []
    if not isinstance(replies, list) or not all(isinstance(reply, Mapping) for reply in replies):
        raise RowError(f"message {number} of the path: replies is not a list of messages: {shown(replies)}")
    return replies


def _usable(node: Row) -> bool:
    return not node.get("deleted") and node.get("review_result") is not False


def _rank(node: Row) -> float:
    """Rank to sort by: 0 is the best, none is last. Tables write whole numbers as floats, and none as NaN."""
    rank = node.get("rank")
    known = isinstance(rank, int | float) and not isinstance(rank, bool) and rank == rank  # NaN is not itself
    return rank if known else math.inf


def is_message_row(row: Any) -> bool:
    """Whether a row is one message of a flat OASST file."""
    return (
        isinstance(row, Mapping) and "prompt" not in row and all(key in row for key in ("message_id", "text", "role"))
    )


def assemble_trees(rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Put the messages of a flat file together into trees, each under the row number of its prompt.

    Other rows pass through at once; the trees follow at the end, when every message is known, and last the messages that
    lead to no prompt, as they are: `from_oasst` refuses them, so none is lost in silence.
    """
    messages: dict[str, tuple[int, Any]] = {}
    outside: list[tuple[int, Any]] = []
    for number, row in rows:
        if not is_message_row(row):
            yield number, row
        elif not isinstance(row["message_id"], str) or row["message_id"] in messages:
            outside.append((number, row))
        else:
            messages[row["message_id"]] = (number, row)
    nodes = {message_id: {**row, "replies": []} for message_id, (_, row) in messages.items()}
    roots = []
    for node in nodes.values():
        parent = node.get("parent_id")
        if not parent:
            roots.append(node)
        elif isinstance(parent, str) and parent in nodes:
            nodes[parent]["replies"].append(node)
    for root in roots:
        yield messages[root["message_id"]][0], {"message_tree_id": root["message_id"], "prompt": root}
    reached = _ids_below(roots)
    outside += [entry for message_id, entry in messages.items() if message_id not in reached]
    yield from sorted(outside, key=lambda entry: entry[0])


def _ids_below(roots: list[dict[str, Any]]) -> set[str]:
    reached: set[str] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        reached.add(node["message_id"])
        waiting += node["replies"]
    return reached
