"""Keys of a recipe by their path: overrides such as `training.lr=1e-4`, and what is said of a key that is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from course_lib.errors import InputError, did_you_mean


def set_key(content: dict[str, Any], override: str, *, root: type[BaseModel]) -> None:
    """Set `a.b=c` in a nested dict that is to become a `root`.

    Raises:
        InputError: it is not written so, or `a` is no section.
    """
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {override!r}: write it as section.key=value, such as training.lr=1e-4")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = content.setdefault(section, {})
        if inner is None:
            inner = content[section] = {}
        if not isinstance(inner, dict):
            raise InputError(f"--set {override!r}: {section} is not a section of the recipe")
        content = inner
    content[last] = _read_value(value.strip(), kinds=_kinds_at(key.strip().split("."), root))


def _read_value(text: str, *, kinds: Sequence[Any]) -> Any:
    """What the text of an override means for a key of these types.

    Where text is wanted, it is the text itself, quotes left off: YAML would read a name such as No, 1e5 or C: D otherwise.
    """
    if str in kinds and not text.startswith(("'", '"')):
        return None if type(None) in kinds and text in ("", "~", "null") else text
    loader = yaml.BaseLoader if str in kinds or list[str] in kinds else yaml.SafeLoader  # the first leaves all as text
    try:
        value = yaml.load(text, loader)
    except yaml.YAMLError:
        value = text
    if isinstance(value, str) and "e" in value.lower() and str not in kinds:  # YAML 1.1 reads 1e-4 as text
        with suppress(ValueError):
            return float(value)
    return value


def explain(error: ValidationError, *, root: type[BaseModel]) -> str:
    """The first complaint about a `root` in one line, with the nearest known key where a key is unknown."""
    first = error.errors()[0]
    location = [part for part in first["loc"] if not isinstance(part, int)]
    key = ".".join(map(str, first["loc"]))
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        known = _keys_at(location[:-1], root)
        return (
            f"unknown key {key!r}{did_you_mean(str(location[-1]), known) or '; known here: ' + ', '.join(known)}{more}"
        )
    if first["type"] == "missing":
        return f"key {key!r} is missing{more}"
    given = first["input"]
    if first["type"] == "model_type":
        return f"{key} = {given!r}: is a section; set one of its keys: {', '.join(_keys_at(location, root))}{more}"
    said = first["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, dict | BaseModel) else f" = {given!r}"
    return f"{key}{shown}: {said[0].lower() + said[1:]}{more}" if key else f"{said}{more}"


def _keys_at(location: Sequence[Any], root: type[BaseModel]) -> list[str]:
    """Keys of the section at a location; of the root itself where there is none."""
    sections = [kind for kind in _kinds_at(location, root) if isinstance(kind, type) and issubclass(kind, BaseModel)]
    return list((sections[0] if sections else root).model_fields)


def _kinds_at(location: Sequence[Any], root: type[BaseModel]) -> tuple[Any, ...]:
    """Types that the value at a location may have; none for an unknown key."""
    kinds: tuple[Any, ...] = (root,)
    for part in location:
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        annotations = [section.model_fields[part].annotation for section in sections if part in section.model_fields]
        kinds = tuple(kind for annotation in annotations for kind in _union_members(annotation))
    return kinds


def _union_members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
