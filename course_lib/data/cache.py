"""Tables on disk, memory-mapped, kept by what they were made from: same content, same settings, same code, no second making.

`datasets` writes and maps them; the cache key is ours, because it must follow the content of files, which theirs does not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.files import save_errors
from course_lib.models import cache_folder

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

ROWS_A_BATCH = 250  # at 2,000 tokens a row some 20 MB of Python numbers
ROWS_A_PROCESS = 5_000  # fewer are done before a second process has started
ROWS_OF_A_BAR = 20_000  # fewer are done before a progress bar is read


def content_key(*parts: str | Path) -> str:
    """Digest of texts, the contents of files, and this package's data code with the libraries it calls.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256(_code_key().encode())
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                inner = hashlib.file_digest(file, "sha256").digest()
        else:
            inner = hashlib.sha256(part.encode("utf-8", "surrogatepass")).digest()
        digest.update(inner)
    return digest.hexdigest()[:32]


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """Text that differs where tokenizers differ: the whole of a fast one, vocabulary and special tokens of any other."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return f"{tokenizer!r} {inner}"


def rows_from(
    generate: Callable[[], Iterator[dict[str, Any]]], columns: dict[str, Any], key: str, *, show_progress: bool = False
) -> datasets.Dataset:
    """The rows a generator yields as a memory-mapped table, made once for a key.

    Args:
        columns: name -> `datasets` type name, or a list of one for a column of lists.

    Raises:
        whatever the generator raises; nothing is kept then.
    """
    import datasets

    with _progress(show_progress), save_errors(cache_folder()):
        try:
            return datasets.Dataset.from_generator(
                generate, features=_features(columns), cache_dir=str(cache_folder() / "data"), fingerprint=key
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise (error.__cause__ or error) from None


def map_rows(
    table: datasets.Dataset,
    function: Callable[..., dict[str, list[Any]]],
    columns: dict[str, Any],
    key: str,
    **arguments: Any,
) -> datasets.Dataset:
    """`function(batch, **arguments)` over all rows, on all processors where rows are many, as a table of these columns."""
    processes = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 32)
    processes = min(processes, len(table) // ROWS_A_PROCESS)
    with _progress(len(table) >= ROWS_OF_A_BAR), _tokenizer_threads(processes), save_errors(cache_folder()):
        return table.map(
            function,
            batched=True,
            batch_size=ROWS_A_BATCH,
            remove_columns=table.column_names,
            features=_features(columns),
            fn_kwargs=arguments,
            num_proc=processes if processes > 1 else None,
            new_fingerprint=key,
            load_from_cache_file=True,
            desc="tokenise",
        )


def _features(columns: dict[str, Any]) -> datasets.Features:
    import datasets

    return datasets.Features(
        {
            name: datasets.List(datasets.Value(kind[0])) if isinstance(kind, list) else datasets.Value(kind)
            for name, kind in columns.items()
        }
    )


@contextmanager
def _progress(wanted: bool) -> Iterator[None]:
    """Bars where someone watches and there is time to; as before afterwards."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    if not (wanted and sys.stderr.isatty()):
        disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


@contextmanager
def _tokenizer_threads(processes: int) -> Iterator[None]:
    """No threads of the tokenizer inside many processes: together they would be more than the processors."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    if processes > 1:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if processes > 1:
            if before is None:
                os.environ.pop("TOKENIZERS_PARALLELISM")
            else:
                os.environ["TOKENIZERS_PARALLELISM"] = before


@cache
def _code_key() -> str:
    """What the same input may come out differently with: the code and templates of this folder and of the agent's, which writes
    tool calls, and the libraries beneath."""
    folders = (Path(__file__).parent, Path(__file__).parents[1] / "agent")
    kinds = (".py", ".jinja", ".yaml", ".json")
    sources = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in kinds)
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    versions = [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2", "datasets")]
    return digest.hexdigest() + " ".join(versions)
