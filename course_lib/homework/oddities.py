"""Lines of a submission that somebody should read, because honest answers have no use for them.

A test and the answer it tests run in one process. `kernel_child.py` undoes the easy ways for one to change the other; the hard
ones need words that stand out.
"""

from __future__ import annotations

import re

from nbformat import NotebookNode

_WORDS = (
    r"get_ipython|InteractiveShell|input_transformer|ast_transformer|events\.register|sys\.modules|importlib|builtins|"
    r"_getframe|gc\.get_|inspect\.|ctypes|os\._exit|__code__|__builtins__|settrace|setprofile|"
    r"(?:checks\w*|CheckFailed)(?:\.\w+)*\s*=[^=]|setattr\(\s*checks"
)


def oddities(notebook: NotebookNode) -> list[str]:
    """Such lines of the cells that are not locked, as they stand, at most ten."""
    found = []
    for cell in notebook.cells:
        locked = cell.metadata.get("nbgrader", {}).get("locked", False)
        if cell.cell_type == "code" and not locked:
            found += [line.strip()[:100] for line in cell.source.splitlines() if re.search(_WORDS, line)]
    return found[:10]
