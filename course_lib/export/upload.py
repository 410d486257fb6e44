"""What a publication consists of: the files of an adapter or a merged model that others need, and a model card.

Only files that are known to belong to a model are taken: a .env, optimizer states or data that lie beside them stay here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from course_lib.adapter_record import RECORD_FILE, read_record
from course_lib.data.templates import named_template, without_marks
from course_lib.errors import InputError
from course_lib.export.app_files import app_files, space_files
from course_lib.export.model_card import LICENCES, PICTURE, find_run, loss_picture, model_card
from course_lib.export.stored import open_safetensors, stored_tensors
from course_lib.files import read_json
from course_lib.models import ModelInfo, catalogue, is_repository

CARD = "README.md"
ADAPTER_FILES = ("adapter_model.safetensors", CARD, "LICENSE*", "LICENCE*", "NOTICE*")
MODEL_FILES = (
    *(
        "config.json",
        "generation_config.json",
        "model*.safetensors",
        "model.safetensors.index.json",
        "*.gguf",
        "*.Modelfile",
    ),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "*.tiktoken"),
    *("additional_chat_templates/*.jinja", "configuration_*.py", "modeling_*.py", "tokenization_*.py"),
    *(CARD, "LICENSE*", "LICENCE*", "NOTICE*"),
)


@dataclass(frozen=True)
class Upload:
    """Files by their name in the repository, each a path or its content; `left_out` names the folder's other files.

    `base` is an adapter's base, None for a whole model; `template` the named chat template it was trained with, or auto;
    `licence` the base's, by the Hub's name for it, where it is known.
    """

    files: dict[str, Path | bytes]
    left_out: list[str] = field(default_factory=list)
    base: str | None = None
    template: str = "auto"
    licence: str | None = None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def plan_upload(
    folder: str | Path, repository: str, *, base: str | None = None, run: str | Path | None = None, place: str = "hf"
) -> Upload:
    """Choose and make the files for a repository, `owner/name`. Nothing is written.

    `base` is the base's repository or catalogue name, where the folder does not tell it; `run` the work dir of the training,
    where the folder does not stand in it; `place` is hf, modelscope or openxlab: ModelScope has names of its own for the bases.
    A README.md that stands in the folder is kept.

    Raises:
        InputError: the folder is neither an adapter nor a whole model, a file is missing or damaged, or the base has no
            repository.
    """
    folder = Path(folder).expanduser()
    if not is_repository(repository):
        raise InputError(f"{repository}: is no repository; name it OWNER/NAME, with your user name as OWNER")
    adapter = _adapter_config(folder)
    trained = find_run(Path(run).expanduser() if run else folder.resolve().parent)
    if run and trained is None:
        raise InputError(f"{run}: is no folder of a run; it holds recipe.yaml and metrics.jsonl")
    record = read_record(folder)
    named = (
        base
        or record.get("base")
        or (adapter or {}).get("base_model_name_or_path")
        or (trained and trained.recipe.model.name)
    )
    base_repository, info = _base(str(named or ""), folder, place)
    template = record.get("template", "auto")
    wanted = ADAPTER_FILES if adapter is not None else MODEL_FILES
    files: dict[str, Path | bytes] = {}
    left_out = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in wanted):
            files[name] = path
        else:
            left_out.append(name)
    generated: dict[str, Any] = {}
    if adapter is not None:
        if record:
            generated[RECORD_FILE] = {**record, "base": base_repository}
        generated["adapter_config.json"] = {**adapter, "base_model_name_or_path": base_repository}
        if template != "auto":
            files["chat_template.jinja"] = without_marks(named_template(template).source).encode()
    else:
        config = read_json(folder / "config.json")
        config.pop("_name_or_path", None)  # a folder of this machine
        generated["config.json"] = config
    files |= {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode() for name, content in generated.items()
    }
    if trained is not None:
        files[PICTURE] = loss_picture(trained)
    if CARD not in files:
        card = model_card(
            repository, place=place, base=base_repository, info=info, adapter=adapter, template=template, run=trained
        )
        files[CARD] = card.encode()
    unused = [name for name in left_out if name not in files]
    return Upload(
        dict(sorted(files.items())),
        unused,
        base=base_repository if adapter is not None else None,
        template=template,
        licence=LICENCES.get(info.licence, "other") if info else None,
    )


def with_app(upload: Upload, kind: str, repository: str, place: str) -> list[tuple[Upload, str | None]]:
    """The model's upload and that of a web app, each with its sdk where it is a Space; on OpenXLab both are one.

    Raises:
        InputError: the kind is unknown, or the place takes no app this way.
    """
    if place == "modelscope":
        raise InputError("--app: ModelScope's studios are made on its page; publish the app to hf or openxlab")
    title = repository.split("/")[1]
    named = named_template(upload.template) if upload.template != "auto" else None
    files = app_files(
        kind,
        title=title,
        model=repository if place == "hf" else ".",
        base=upload.base,
        chat_template=without_marks(named.source) if named else None,
        stop=named.stop_texts if named else (),
    )
    if place == "openxlab":
        return [(replace(upload, files=dict(sorted({**files, **upload.files}.items()))), None)]
    space, sdk = space_files(kind, files, title=title, model=repository)
    return [(upload, None), (Upload({**space}), sdk)]


def _adapter_config(folder: Path) -> dict[str, Any] | None:
    """adapter_config.json of an adapter, None for a whole model; the weights are looked at."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; name the folder of an adapter or a merged model")
    if (folder / "adapter_config.json").is_file():
        if not (folder / "adapter_model.safetensors").is_file():
            raise InputError(
                f"{folder}: has no adapter_model.safetensors; name the adapter folder that a training wrote"
            )
        with open_safetensors(folder / "adapter_model.safetensors"):
            return read_json(folder / "adapter_config.json")
    if (folder / "config.json").is_file():
        stored_tensors(folder, quantised=False)
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            raise InputError(f"{folder}: holds no tokenizer, so nobody could use it; copy that of its base into it")
        return None
    inside = next((name for name in ("adapter", "merged", "model") if (folder / name).is_dir()), None)
    remedy = f"name {folder / inside}" if inside else "name the folder of an adapter or a merged model"
    raise InputError(f"{folder}: holds neither adapter_config.json nor config.json; {remedy}")


def _base(named: str, folder: Path, place: str) -> tuple[str, ModelInfo | None]:
    """The base's repository at the place, and its catalogue entry where it has one."""
    by_repository = {repository: info for info in catalogue().values() for repository in (info.hub, info.modelscope)}
    if (Path(named) / "source.json").is_file():  # the folder of a fetched model
        source = read_json(Path(named) / "source.json")
        named = source.get("name") or str(source.get("origin", "")).split("@")[0]
    info = catalogue().get(named.lower()) or by_repository.get(named)
    repository = (info.modelscope if place == "modelscope" else info.hub) if info else named
    if repository is None or not is_repository(repository) or Path(named).is_dir():
        told = f"its base, {named}, is in no repository" if named else "nothing here tells its base"
        raise InputError(f"{folder}: {told}, and others need to know it: name one with --base OWNER/NAME")
    return repository, info
