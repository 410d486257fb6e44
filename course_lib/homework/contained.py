"""A submission runs in a kernel that may use little time, memory and disk, no network, and no files but Python's and the course's own.

`kernel_child.py` locks itself down; here it is started in an empty folder with a bare environment, watched, and killed when it
takes too long, prints too much or fills its folder. What ran until then keeps its points.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_output
from nbgrader.preprocessors import Execute
from traitlets import Integer

from course_lib.agent.isolation import python_files
from course_lib.models import cache_folder

LIBRARY = Path(__file__).parents[2]
SYSTEM_READ = (
    "/proc/self",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/stat",
    "/sys/devices/system/cpu",
    "/etc/localtime",
    "/etc/nsswitch.conf",
)
FILE_SIZE = 100_000_000
LOOK_EVERY = 0.1  # seconds


class ContainedKernelManager(AsyncKernelManager):
    """Starts `kernel_child.py`; client and kernel meet over sockets in the working folder, where the system has such."""

    limits: dict[str, Any] = {}  # noqa: RUF012 (set by Contained.setup_kernel)

    @property
    def kernel_spec(self) -> KernelSpec:
        """The spec that is none of the installed ones."""
        child = str(Path(__file__).with_name("kernel_child.py"))
        argv = [sys.executable, "-I", "-X", "utf8", child, "{connection_file}", json.dumps(self.limits)]
        return KernelSpec(argv=argv, display_name="contained", language="python")


class Contained(Execute):
    """nbgrader's Execute, held in. Its limits may be set in nbgrader_config.py."""

    total_timeout = Integer(600, help="seconds for all cells of a notebook").tag(config=True)
    memory = Integer(4 * 2**30, help="bytes of address space; torch alone maps 1.7 GB, with CUDA more").tag(config=True)
    folder_size = Integer(200_000_000, help="bytes in all files that a submission writes").tag(config=True)
    output_size = Integer(1_000_000, help="bytes that all cells may print and show").tag(config=True)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options["kernel_manager_class"] = ContainedKernelManager
        options["shutdown_kernel"] = "immediate"  # nothing is to be saved
        super().__init__(*arguments, **options)

    def preprocess(self, nb: NotebookNode, resources: Any = None, km: Any = None) -> tuple[NotebookNode, Any]:
        """Run all cells; those after the one that hit a limit get an error that says so."""
        self.ended = ""  # why nothing runs any more
        self._printed = 0
        self._ends = time.monotonic() + self.total_timeout
        resources = resources or {}
        with _folder_of((resources.get("metadata") or {}).get("path")) as folder:
            inside = {**resources, "metadata": {**resources.get("metadata", {}), "path": str(folder)}}
            self._folder = folder
            stop = threading.Event()
            watcher = threading.Thread(target=self._watch_folder, args=(stop,), daemon=True)
            watcher.start()
            try:
                super().preprocess(nb, inside, km)
            except DeadKernelError:
                pass  # died between two cells, or after the last
            finally:
                stop.set()
                watcher.join()
        notes = nb.metadata.setdefault("course_homework", {})
        notes["ended"] = self.ended
        return nb, resources

    @contextmanager
    def setup_kernel(self, **options: Any) -> Iterator[None]:
        """Start the kernel with a bare environment."""
        manager = self.create_kernel_manager()
        manager.limits = {
            "library": str(LIBRARY / "course_lib"),
            "readable": [
                *python_files(),
                *SYSTEM_READ,
                str(LIBRARY / "course_lib"),
                str(LIBRARY / "data"),
                str(cache_folder() / "models"),
            ],
            "memory": self.memory,
            "seconds": self.total_timeout + 5,
            "file_size": FILE_SIZE,
        }
        manager.connection_file = str(self._folder / ".kernel.json")
        if os.name == "posix":
            manager.transport, manager.ip = "ipc", str(self._folder / ".socket")
        with super().setup_kernel(env=_environment(self._folder), **options):
            yield

    def preprocess_cell(self, cell: NotebookNode, resources: Any, index: int) -> tuple[NotebookNode, Any]:
        """Run one cell, if the submission has not hit a limit."""
        if cell.cell_type != "code" or not cell.source.strip():
            return cell, resources
        if not self.ended and time.monotonic() > self._ends:
            self.ended = f"the limit of {self.total_timeout} s for the whole notebook"
        if self.ended:
            cell.outputs = [_error(f"not run: the submission was stopped by {self.ended}")]
            return cell, resources
        try:
            return super().preprocess_cell(cell, resources, index)
        except (DeadKernelError, CellTimeoutError) as error:
            deaf = isinstance(error, CellTimeoutError)  # the cell before it runs on
            died = "the end of its process: too much memory or processor time, or it ended itself"
            self.ended = self.ended or ("a cell that went on when its time was up" if deaf else died)
            cell.outputs = [*cell.outputs, _error(f"stopped by {self.ended}")]
            self._kill()
            return cell, resources

    def process_message(self, msg: Any, cell: NotebookNode, cell_index: int) -> NotebookNode | None:
        """Count what is printed; too much ends the run before it fills the grader's memory."""
        self._printed += len(json.dumps(msg["content"], default=str))
        if self._printed > self.output_size and not self.ended:
            self.ended = f"the limit of {self.output_size / 1e6:g} MB of output"
            self._kill()
        if self.ended and msg["msg_type"] != "status":
            return None
        return super().process_message(msg, cell, cell_index)

    def _get_timeout(self, cell: NotebookNode | None) -> int | None:
        left = max(1, int(self._ends - time.monotonic()))
        return min(self.timeout, left) if self.timeout else left

    def _watch_folder(self, stop: threading.Event) -> None:
        while not stop.wait(LOOK_EVERY):
            size = 0
            with contextlib.suppress(OSError):
                size = sum(path.lstat().st_size for path in self._folder.rglob("*"))
            if size > self.folder_size and not self.ended:
                self.ended = f"the limit of {self.folder_size / 1e6:g} MB of files"
                self._kill()

    def _kill(self) -> None:
        """At once, and from any thread."""
        provisioner = getattr(self.km, "provisioner", None)
        process = getattr(provisioner, "process", None)
        if process is not None and process.poll() is None:
            process.kill()


@contextmanager
def _folder_of(submission: str | None) -> Iterator[Path]:
    """A new folder with copies of what was handed in beside the notebooks: what a cell deletes there is no loss.

    Its path is short: the name of a socket holds some hundred characters.
    """
    base = "/tmp" if Path("/tmp").is_dir() and os.name == "posix" else None
    with tempfile.TemporaryDirectory(prefix="course-", dir=base, ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        for path in Path(submission).iterdir() if submission else []:
            if path.suffix != ".ipynb" and not path.is_symlink():
                (shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name)
        yield folder


def _environment(folder: Path) -> dict[str, str]:
    """Nothing of the grader's: no keys, no home."""
    kept = {name: os.environ[name] for name in ("SYSTEMROOT",) if name in os.environ}
    return {
        "COURSE_HOME": str(cache_folder()),
        **kept,
        **{name: str(folder) for name in ("HOME", "TMPDIR", "IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_RUNTIME_DIR")},
        "COURSE_SCALE": "tiny",
        "HF_HUB_OFFLINE": "1",
        "NBGRADER_EXECUTION": "autograde",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _error(text: str) -> NotebookNode:
    return new_output("error", ename="Stopped", evalue=text, traceback=[text])
