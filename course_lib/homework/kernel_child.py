"""Run by `contained.ContainedKernel` in a process of its own: locks itself down, then is the Jupyter kernel of one submission.

Arguments: the connection file, and as JSON {"library": the folder course_lib, "readable": paths, "memory": bytes, "seconds": s,
"file_size": bytes}; the working folder is the one it may write.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Lock down, then serve until the client says shutdown."""
    connection, request = sys.argv[1], json.loads(sys.argv[2])
    sys.path.insert(0, str(Path(__file__).parents[1] / "agent"))
    from lock_down import lock_down  # type: ignore[import-not-found]

    del sys.path[0]
    limits = {key: request[key] for key in ("memory", "seconds", "file_size")}
    lock_down(str(Path.cwd()), request["readable"], kernel=True, **limits)
    _import_course_lib(Path(request["library"]))
    from ipykernel.iostream import IOPubThread
    from ipykernel.ipkernel import IPythonKernel
    from ipykernel.kernelapp import IPKernelApp

    def no_pipe(thread: Any) -> None:  # from forked processes, over TCP: there are none, and libzmq aborts without TCP
        thread._pipe_flag = False

    IOPubThread._setup_pipe_in = no_pipe  # type: ignore[method-assign]

    class Kernel(IPythonKernel):
        shell_class = _shell_class()

        def _process_children(self) -> list[Any]:
            return []  # it would look through the processes of the whole machine

    IPKernelApp.launch_instance(
        ["-f", connection, "--HistoryManager.enabled=False"],
        kernel_class=Kernel,
    )


def _import_course_lib(folder: Path) -> None:
    """From its own folder, which may be read; the one around it, with the source of the homework, may not."""
    spec = importlib.util.spec_from_file_location(
        "course_lib", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None  # noqa: PT018
    sys.modules["course_lib"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _shell_class() -> type:
    """A shell that undoes, before each cell, what an earlier cell did to the next ones.

    A cell may hook into IPython, or put a module of its own in place of the checks, so that every test after it passes. That
    is put back here. It cannot be made safe: tests and submission share a process, and who takes Python itself apart
    finds a way. `oddities.py` names such cells, so that somebody reads them.
    """
    import builtins

    from ipykernel.zmqshell import ZMQInteractiveShell
    from IPython.core.inputtransformer2 import TransformerManager

    builtin = dict(vars(builtins))
    checks: dict[str, tuple[Any, dict[str, Any]]] = {}

    class Shell(ZMQInteractiveShell):
        def run_cell_async(self, *arguments: Any, **options: Any) -> Any:
            self._put_back()
            return super().run_cell_async(*arguments, **options)

        def transform_cell(self, raw_cell: str) -> str:
            return TransformerManager().transform_cell(raw_cell)

        def _put_back(self) -> None:
            self.ast_transformers = []
            for event in ("pre_run_cell", "pre_execute"):
                self.events.callbacks[event] = []
            vars(builtins).update(
                {name: value for name, value in builtin.items() if name not in ("_", "display", "get_ipython")}
            )
            for name, module in list(sys.modules.items()):
                if name.startswith("course_lib.homework.check") and name not in checks and _is_ours(module):
                    importlib.reload(module)  # the cell that imported it may have changed it as well
                    checks[name] = (module, dict(vars(module)))
            for name, (module, content) in checks.items():
                sys.modules[name] = module
                vars(module).clear()
                vars(module).update(content)

    return Shell


def _is_ours(module: Any) -> bool:
    spec = getattr(module, "__spec__", None)
    return spec is not None and spec.origin is not None and Path(spec.origin).parent == Path(__file__).parent


if __name__ == "__main__":
    main()
