"""Tools of MCP servers (Model Context Protocol, https://modelcontextprotocol.io), by the official client, over standard input
and output.

The client is asynchronous: it lives on a thread of its own. A server that is lost, late or wrong becomes an error text for the
model, never an exception in the runner. It gets none of the environment but PATH, HOME and the like.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import re
import shlex
import tempfile
import threading
from typing import TYPE_CHECKING, Any

from course_lib.agent.tools import AgentTool, plain
from course_lib.data.conversation import RowError, check_json
from course_lib.errors import InputError

if TYPE_CHECKING:
    from mcp import Client

START_SECONDS = 20.0
CALL_SECONDS = 30.0
MOST_TOOLS = 100


class McpServer:
    """A running server and its `tools`; use it as a context, or `close` it."""

    def __init__(
        self, command: str, *, start_seconds: float = START_SECONDS, call_seconds: float = CALL_SECONDS
    ) -> None:
        """Start a server, as in `python my_server.py`, and ask for its tools.

        Raises:
            InputError: the extra `mcp` is not installed; the command is not there, ends, or speaks no MCP in `start_seconds`; a
                tool's schema is no JSON a conversation can hold.
        """
        try:
            import mcp  # noqa: F401
        except ImportError:
            raise InputError("MCP servers need the package mcp: pip install -c constraints.txt -e '.[mcp]'") from None
        self.command, self._seconds = command, call_seconds
        self._client: Client | None = None
        self._loop = asyncio.new_event_loop()
        self._serving = self._loop.create_task(self._serve())
        self._listed: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (close() closes it)
        self._thread = threading.Thread(target=self._work, name="mcp", daemon=True)
        self._thread.start()
        try:
            self.tools = [self._tool(one) for one in self._listed.result(timeout=start_seconds)]
        except TimeoutError:
            self.close()
            raise InputError(
                f"--mcp {command!r}: no answer within {start_seconds:g} seconds; is it an MCP server?"
            ) from None
        except RowError as error:
            self.close()
            raise InputError(f"--mcp {command!r}: {error}") from None
        except Exception as error:
            said = self._last_line()
            self.close()
            raise InputError(f"--mcp {command!r}: cannot be used as an MCP server ({_reason(error)}){said}") from None

    def __enter__(self) -> McpServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the server; calls that wait end with an error."""
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join(timeout=5)
        self._log.close()

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._serving)
        except BaseException as error:
            if not self._listed.done():
                self._listed.set_exception(error)
        finally:
            self._client = None
            self._loop.close()

    async def _serve(self) -> None:
        from mcp import Client, StdioServerParameters, stdio_client

        program, *arguments = shlex.split(self.command) or [""]
        transport = stdio_client(StdioServerParameters(command=program, args=arguments), errlog=self._log)
        async with Client(transport, read_timeout_seconds=self._seconds) as client:
            found, cursor = [], None
            while True:
                page = await client.list_tools(cursor=cursor)
                found += page.tools
                cursor = page.next_cursor
                if not cursor or len(found) >= MOST_TOOLS:
                    break
            self._client = client
            self._listed.set_result(found[:MOST_TOOLS])
            await asyncio.Event().wait()  # until it is cancelled

    def _tool(self, one: Any) -> AgentTool:
        name = re.sub(r"[^A-Za-z0-9_.-]", "_", one.name)[:64] or "_"
        check_json(one.input_schema, f"tool {name}: its schema")
        about = plain(one.description or name, 1000)
        return AgentTool(
            name=name if name[0].isalpha() or name[0] == "_" else f"_{name}"[:64],
            description=" ".join(about.split()),
            parameters=one.input_schema,
            run=lambda **arguments: self._call(one.name, arguments),
            seconds=self._seconds + 2,
        )

    def _call(self, name: str, arguments: dict[str, Any]) -> str:
        gone = f"the MCP server {self.command!r} is no longer there"
        client = self._client
        if client is None or self._loop.is_closed():
            raise RuntimeError(gone)
        waiting = asyncio.run_coroutine_threadsafe(client.call_tool(name, arguments), self._loop)
        try:
            result = waiting.result(timeout=self._seconds)
        except TimeoutError:
            waiting.cancel()
            raise RuntimeError(f"the MCP server gave no answer within {self._seconds:g} seconds") from None
        except concurrent.futures.CancelledError:
            raise RuntimeError(gone) from None
        except Exception as error:
            raise RuntimeError(f"the MCP server failed: {_reason(error)}") from None
        texts = [getattr(part, "text", f"[{part.type}]") for part in result.content]
        if not texts and result.structured_content is not None:
            texts = [str(result.structured_content)]
        if result.is_error:
            raise RuntimeError("\n".join(texts) or "the tool failed")
        return "\n".join(texts)

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = self._log.read()[-2000:].strip().splitlines()
        return f"; it said: {plain(lines[-1], 300)}" if lines else ""


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):  # anyio wraps what went wrong in its task groups
        error = error.exceptions[0]
    return plain(" ".join(str(error).split()) or type(error).__name__, 300)
