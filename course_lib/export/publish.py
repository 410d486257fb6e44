"""Publishing an adapter or a merged model: to the Hugging Face Hub, to ModelScope, or to OpenXLab.

Each goes through its own client, OpenXLab through git: the openxlab package (0.1.3, the last) pins a requests, rich and tqdm that
are too old to stand beside transformers, and takes metafiles that name one weight each.
"""

from __future__ import annotations

import io
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from course_lib.errors import CourseError, InputError, install_extra
from course_lib.export.secrets import check_no_secrets
from course_lib.export.upload import Upload
from course_lib.fetch import hub_bars

AGAIN = "run the same command again: what arrived whole is not sent twice"
MESSAGE = "Upload by course publish"
OPENXLAB_GIT = "https://code.openxlab.org.cn"
LARGE = 10_000_000  # bytes; OpenXLab wants larger files in git-lfs


def hub_token() -> str:
    """The token of HF_TOKEN, or of `hf auth login`.

    Raises:
        InputError: there is none.
    """
    from huggingface_hub import get_token

    if not (token := get_token()):
        raise InputError("no Hugging Face token: set HF_TOKEN to one with write access, or run: hf auth login")
    return token


def publish_hub(upload: Upload, repository: str, *, private: bool = False, sdk: str | None = None) -> str:
    """Make the repository where it is missing, send what changed in one commit, and return its address.

    With an `sdk`, gradio or docker, it is a Space, else a model. HF_ENDPOINT and HF_TOKEN are honoured.

    Raises:
        InputError: no token, or a file holds a secret.
        CourseError: the Hub refuses or cannot be reached; the repository's files are as they were.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    token, kind = hub_token(), "space" if sdk else "model"
    check_no_secrets(upload.files.items(), [token])
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in upload.files.items()
    ]
    with _hub_errors(repository, token), hub_bars(True):
        url = api.create_repo(repository, private=private, exist_ok=True, repo_type=kind, space_sdk=sdk)
        api.create_commit(repository, operations, commit_message=MESSAGE, repo_type=kind)
    return str(url)


@contextmanager
def _hub_errors(repository: str, token: str) -> Iterator[None]:
    """One line for what the Hub or the network answers."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ is not None:  # uploads wrap what went wrong
            chain.append(chain[-1].__cause__)
        refused = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
        status = refused.response.status_code if refused is not None else None
        raise CourseError(_said("the Hub", repository, status, chain[-1], token)) from error


def _said(place: str, repository: str, status: int | None, error: BaseException, token: str) -> str:
    if status == 401:
        return f"{repository}: {place} does not accept the token (HTTP 401); make a new one, with write access"
    if status in (403, 404):
        owner = repository.split("/")[0]
        return f"{repository}: the token may not write to {owner} (HTTP {status}); check the name, and that it has write access"
    if status is not None and status >= 500:
        return f"{repository}: {place} failed (HTTP {status}); {AGAIN}"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].replace(token, "***")
    return f"{repository}: was not published ({reason}); check the network, then {AGAIN}"


def publish_modelscope(upload: Upload, repository: str, *, private: bool = False) -> str:
    """Make the repository where it is missing, send its files, of the large ones those it lacks, and return its address.

    Where a large file fails, the client has sent the others: then the repository is whole only after a second run.
    MODELSCOPE_API_TOKEN is the token, MODELSCOPE_ENDPOINT another address.

    Raises:
        InputError: the modelscope package or a token is missing, or a file holds a secret.
        CourseError: ModelScope refuses or cannot be reached.
    """
    try:
        from modelscope import HubApi
    except ImportError as error:
        raise InputError(f"publishing to ModelScope needs its package; {install_extra('modelscope')}") from error
    token = _variable(
        "MODELSCOPE_API_TOKEN", "no ModelScope token: set MODELSCOPE_API_TOKEN to one from your account's page"
    )
    check_no_secrets(upload.files.items(), [token])
    api = HubApi(endpoint=os.environ.get("MODELSCOPE_ENDPOINT") or None, token=token)
    # without a licence it takes Apache-2.0
    licence = {"apache-2.0": "Apache-2.0"}.get(upload.licence or "", "other")
    visibility = "private" if private else "public"
    with _staged(upload) as folder, _quiet_modelscope():
        try:
            api.create_repo(repository, visibility=visibility, license=licence, exist_ok=True)
            api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=MESSAGE, disable_tqdm=not sys.stderr.isatty(),
                use_cache=False,
            )  # fmt: skip
        except Exception as error:  # its errors share no base with those of requests, which come through too
            response = getattr(error, "response", None)
            status = getattr(error, "status_code", None) or getattr(response, "status_code", None)
            raise CourseError(_said("ModelScope", repository, status, error, token)) from error
    return f"{api.endpoint}/models/{repository}"


@contextmanager
def _quiet_modelscope() -> Iterator[None]:
    """Its client prints a report on stdout and logs each step: neither belongs between a command's results."""
    logger = logging.getLogger("modelscope_hub")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)


def publish_openxlab(upload: Upload, repository: str) -> str:
    """Commit what changed to the repository by git, push it, and return its address. It must have been made on the web page.

    Git asks as it is set up to for user name and access token, or takes OPENXLAB_USER and OPENXLAB_TOKEN; OPENXLAB_GIT is another
    address.

    Raises:
        InputError: git, or for large files git-lfs, is missing, or a file holds a secret.
        CourseError: the repository cannot be cloned or pushed to.
    """
    address = f"{os.environ.get('OPENXLAB_GIT') or OPENXLAB_GIT}/{repository}.git"
    token = os.environ.get("OPENXLAB_TOKEN", "")
    check_no_secrets(upload.files.items(), [token])
    if shutil.which("git") is None:
        raise InputError("publishing to OpenXLab needs git; install it")
    large = [name for name, size in upload.sizes().items() if size > LARGE]
    if large and subprocess.run(["git", "lfs", "version"], capture_output=True, check=False).returncode:
        raise InputError(
            f"{large[0]}: is over {LARGE // 10**6} MB, which OpenXLab takes by git-lfs alone; install git-lfs"
        )
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary) / "clone"
        git = _git(repository, token, Path(temporary))
        git("clone", "--depth", "1", "--quiet", address, str(clone))
        if large:
            git("-C", str(clone), "lfs", "track", "--filename", *large)
        for name, content in upload.files.items():
            target = clone / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, target)
        git("-C", str(clone), "add", "--all")
        if git("-C", str(clone), "status", "--porcelain"):
            author = ("-c", "user.name=course publish", "-c", "user.email=course-publish@localhost")
            git("-C", str(clone), *author, "commit", "--quiet", "--message", MESSAGE)
            git("-C", str(clone), "push", "--quiet", "origin", "HEAD")
    return address


def _git(repository: str, token: str, folder: Path) -> Callable[..., str]:
    """Run git without questions; the token is given by a program that reads it from the environment, so no command holds it."""
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    if token:
        ask = folder / "ask.sh"
        ask.write_text('#!/bin/sh\ncase "$1" in User*) echo "$OPENXLAB_USER" ;; *) echo "$OPENXLAB_TOKEN" ;; esac\n')
        ask.chmod(0o700)
        environment |= {
            "GIT_ASKPASS": str(ask),
            "OPENXLAB_USER": os.environ.get("OPENXLAB_USER") or repository.split("/")[0],
        }

    def run(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            what = next(word for word in arguments if word in ("clone", "track", "add", "status", "commit", "push"))
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
            reason = next((line for line in lines if line.startswith(("fatal:", "error:", "remote:"))), lines[-1])
            reason = reason.replace(token, "***") if token else reason
            raise CourseError(
                f"{repository}: git {what} failed ({reason}); make the repository on OpenXLab's page first, and set "
                "OPENXLAB_USER and OPENXLAB_TOKEN to your user name and an access token"
            )
        return done.stdout

    return run


@contextmanager
def _staged(upload: Upload) -> Iterator[Path]:
    """The files in a folder of their own, linked where the disk allows it."""
    with tempfile.TemporaryDirectory() as temporary:
        for name, content in upload.files.items():
            target = Path(temporary) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                target.symlink_to(content.resolve())
        yield Path(temporary)


def _variable(name: str, missing: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise InputError(missing)
    return value
