"""Run by `isolation.run_child` in a process of its own: locks itself down, then runs the code it was given.

Standard input: {"code": text, "readable": paths, "memory": bytes, "seconds": s, "file_size": bytes}; the working folder is the
one it may write. Without code it prints the layers in force. What the code prints is the output; the value of a last line that
is an expression is printed as well, as Python's prompt does.
"""

from __future__ import annotations

import ast
import json
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from lock_down import lock_down  # type: ignore[import-not-found]

del sys.path[0]  # `import search` in the code must not find ours


def main() -> int:
    """Return the exit status: 1 where the code raised."""
    request = json.load(sys.stdin)
    limits = {key: request[key] for key in ("memory", "seconds", "file_size")}
    layers = lock_down(str(Path.cwd()), request["readable"], **limits)
    if "code" not in request:
        print(json.dumps(layers))
        return 0
    names = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        tree = ast.parse(request["code"], "code")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "code", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "code", "eval"), names)
            if value is not None:
                print(repr(value))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        sys.stdout.flush()
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "code"]
        where = f" (line {frames[-1].lineno})" if frames else ""
        print("".join(traceback.format_exception_only(error)).strip() + where)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
