"""LoRA adapters of InternLM2 from Llama's module names to the checkpoint's own, and back.

W' = W + s B A. On `wqkv` of r rows, B's rows go by head as W's do, so q, k and v are B's rows taken apart, with the same A. The
other way, the three A of q, k and v lie one over the other, and B is made of blocks: rank 3r on `wqkv` computes the same. DoRA's
magnitudes, one a row, go with B's rows.
InternLM and InternLM3 have Llama's names: their adapters stay as they are.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.adapter_record import RECORD_FILE, check_adapter, read_record
from course_lib.errors import InputError
from course_lib.export.adapter_changes import LORA_KEY, scaling_of
from course_lib.export.stored import open_safetensors
from course_lib.files import atomic_folder, file_to_write, read_json
from course_lib.internlm import is_internlm
from course_lib.internlm.layout import InternLM2Layout, Layout, layout_of
from course_lib.models import model_folder

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass
class _Pair:
    """A LoRA on one module: A (r, in), B (out, r); of an embedding, A (r, vocabulary) and B (width, r). With DoRA, magnitudes (out,)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    embedding: bool
    magnitude: torch.Tensor | None = None


@dataclass
class _Adapter:
    config: dict[str, Any]
    pairs: dict[str, _Pair]  # by module
    saved: dict[str, torch.Tensor]  # tensors trained whole, by parameter


def export_original(
    adapter: str | Path, out: str | Path, *, base: str | Path | None = None, overwrite: bool = False
) -> Path:
    """Write an adapter for the module names of the InternLM code on the Hub, for programs that run that code; return `out`.

    `base` is a model's name or folder; by default the one that the adapter names. Of InternLM2, q, k and v become one LoRA of
    three times the rank on `wqkv`; of InternLM and InternLM3 nothing changes but the folder.

    Raises:
        InputError: the base is no InternLM, not on this machine, or another than the adapter's; the adapter is neither LoRA nor DoRA;
            `out` exists.
        CourseError: the disk is full.
    """
    adapter, target = Path(adapter).expanduser(), Path(out).expanduser()
    named = base or read_record(adapter).get("base") or read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not named:
        raise InputError(f"{adapter}: does not say which base it belongs to; name it with --base")
    folder = model_folder(named, fetch_missing=False)
    check_adapter(adapter, folder)
    settings = read_json(folder / "config.json")
    if not is_internlm(settings):
        raise InputError(
            f"{folder}: is no InternLM but of type {settings.get('model_type')}, whose module names stay as they are"
        )
    file_to_write(target, overwrite=overwrite)
    lora, tensors = original_names(adapter, folder)
    with atomic_folder(target) as new:
        _save(lora, tensors, new)
        if (adapter / RECORD_FILE).is_file():
            shutil.copyfile(adapter / RECORD_FILE, new / RECORD_FILE)
    return Path(out)


def llama_names(adapter: Path, base: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return an adapter's settings and tensors as they are for transformers' Llama, whichever names it is saved under.

    Raises:
        InputError: the adapter is saved under the original names of InternLM2 and is neither LoRA nor DoRA.
    """
    settings, tensors, layout = read_json(adapter / CONFIG), _tensors(adapter), layout_of(base)
    if not _under_original_names(tensors, layout):
        return settings, tensors
    converted = _to_llama(_parse(adapter, settings, tensors), layout, layers=_layers(base))
    return converted.config, _keyed(converted)


def original_names(adapter: Path, base: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return an adapter's settings and tensors as they are for the modules of the checkpoint's own code.

    Raises:
        InputError: InternLM2's names differ and the adapter is neither LoRA nor DoRA.
    """
    settings, tensors, layout = read_json(adapter / CONFIG), _tensors(adapter), layout_of(base)
    if not isinstance(layout, InternLM2Layout) or _under_original_names(tensors, layout):
        return settings, tensors
    converted = _to_original(_parse(adapter, settings, tensors), layout, layers=_layers(base))
    return converted.config, _keyed(converted)


@contextmanager
def adapter_for_llama(adapter: Path, base: Path) -> Iterator[Path]:
    """Yield a folder with the adapter under Llama's names: its own, or one that is gone after the block."""
    if not _under_original_names(_tensors(adapter), layout_of(base)):
        yield adapter
        return
    with tempfile.TemporaryDirectory() as temporary:
        _save(*llama_names(adapter, base), Path(temporary))
        yield Path(temporary)


def _to_llama(adapter: _Adapter, layout: Layout, *, layers: int) -> _Adapter:
    pairs = {}
    for module, pair in adapter.pairs.items():
        modules = layout.names(module)
        magnitudes = [None] * len(modules) if pair.magnitude is None else layout.split(module, pair.magnitude)
        for name, rows, magnitude in zip(modules, layout.split(module, pair.b), magnitudes, strict=True):
            pairs[name] = _Pair(pair.a, rows, pair.scaling, pair.embedding, magnitude)
    saved = {}
    for parameter, tensor in adapter.saved.items():
        saved |= dict(zip(layout.names(parameter), layout.split(parameter, tensor), strict=True))
    names = {parameter: layout.names(parameter) for parameter in adapter.saved}
    return _Adapter(_settings(adapter, pairs, names, layers=layers), pairs, saved)


def _to_original(adapter: _Adapter, layout: Layout, *, layers: int) -> _Adapter:
    together: dict[str, dict[str, _Pair]] = defaultdict(dict)
    for module, pair in adapter.pairs.items():
        together[layout.stored_name(module)][module] = pair
    pairs = {stored: _joined(stored, parts, layout) for stored, parts in together.items()}
    saved = {}
    for parameter in adapter.saved:
        stored = layout.stored_name(parameter)
        if missing := set(layout.names(stored)) - set(adapter.saved):
            raise InputError(
                f"the adapter has {parameter} trained whole, but not {min(missing)}: {stored} is one tensor"
            )
        saved[stored] = layout.join(stored, tuple(adapter.saved[name] for name in layout.names(stored)))
    names = {parameter: (layout.stored_name(parameter),) for parameter in adapter.saved}
    return _Adapter(_settings(adapter, pairs, names, layers=layers), pairs, saved)


def _joined(stored: str, parts: dict[str, _Pair], layout: Layout) -> _Pair:
    """One LoRA for the parts of a stored matrix, of which some may have none. Where their scalings differ, B takes up the difference."""
    import torch

    names = layout.names(stored)
    if len(names) == 1:
        return parts[names[0]]
    assert isinstance(layout, InternLM2Layout)
    heads = dict(zip(names, layout.heads, strict=True))
    first = next(iter(parts))
    head_dim, scaling = len(parts[first].b) // heads[first], parts[first].scaling
    adapted = [name for name in names if name in parts]
    magnitude = None
    if parts[first].magnitude is not None:
        if missing := {*names} - {*parts}:
            raise InputError(
                f"the adapter is DoRA on {first} and has none on {min(missing)}: {stored} is one matrix, where every row has a "
                "magnitude; train with all three of q_proj, k_proj and v_proj in lora.targets"
            )
        magnitude = layout.join(stored, tuple(parts[name].magnitude for name in names))
    blocks = {
        name: parts[first].b.new_zeros(heads[name] * head_dim, sum(len(parts[one].a) for one in adapted))
        for name in names
    }
    column = 0
    for name in adapted:
        own = parts[name]
        blocks[name][:, column : column + len(own.a)] = own.b * (own.scaling / scaling)
        column += len(own.a)
    a, b = torch.cat([parts[name].a for name in adapted]), layout.join(stored, tuple(blocks.values()))
    return _Pair(a, b, scaling, embedding=False, magnitude=magnitude)


def _settings(
    adapter: _Adapter, pairs: dict[str, _Pair], saved: dict[str, tuple[str, ...]], *, layers: int
) -> dict[str, Any]:
    """peft's settings for other modules: ranks and alphas that differ from the default go into its patterns."""
    old = adapter.config
    ranks = {module: len(pair.a) for module, pair in pairs.items()}
    alphas = {
        module: pair.scaling * (sqrt(ranks[module]) if old.get("use_rslora") else ranks[module])
        for module, pair in pairs.items()
    }
    whole = {
        name.rsplit(".", 2)[-2]
        for parameter, names in saved.items()
        if parameter.rsplit(".", 2)[-2] in (old.get("modules_to_save") or [])
        for name in names
    }
    modules = _short_names(dict.fromkeys(pairs, 0), layers=layers)
    return {
        **old,
        "target_modules": sorted(modules),
        "modules_to_save": sorted(whole) or None,
        "rank_pattern": _pattern(ranks, old["r"], layers=layers),
        "alpha_pattern": _pattern(alphas, old["lora_alpha"], layers=layers),
        **dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules")),
    }


def _pattern(values: dict[str, float], default: float, *, layers: int) -> dict[str, float]:
    rounded = {module: round(value) if abs(value - round(value)) < 1e-9 else value for module, value in values.items()}
    return {name: value for name, value in _short_names(rounded, layers=layers).items() if value != default}


def _short_names(values: dict[str, float], *, layers: int) -> dict[str, float]:
    """Values by the last part of the modules' names, where every layer has it with the same value; else by the whole names."""
    alike: dict[str, list[str]] = defaultdict(list)
    for module in values:
        alike[module.rsplit(".", 1)[-1]].append(module)
    short: dict[str, float] = {}
    for last, modules in alike.items():
        everywhere = len(modules) == (layers if ".layers." in modules[0] else 1)
        if everywhere and len({values[module] for module in modules}) == 1:
            short[last] = values[modules[0]]
        else:
            short |= {module: values[module] for module in modules}
    return short


def _parse(adapter: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> _Adapter:
    halves: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    embeddings, saved = set(), {}
    for key, tensor in tensors.items():
        name, side = _parameter(key)
        if side:
            halves[name][side.removeprefix("embedding_")] = tensor
            embeddings |= {name} if "embedding" in side else set()
        else:
            saved[name] = tensor
    more = [name for name in saved if "lora_" in name]  # biases of B, and the like
    if config.get("peft_type") != "LORA" or more:
        kind = f"LoRA with {more[0]}" if more else f"of type {config.get('peft_type')}"
        raise InputError(f"{adapter}: is {kind}, and only LoRA and DoRA have a form under other module names")
    if alone := [module for module, sides in halves.items() if not {"A", "B"} <= {*sides}]:
        raise InputError(f"{adapter}: has only one of the two LoRA matrices for {alone[0]}; save the adapter again")
    pairs = {
        module: _Pair(
            sides["A"],
            sides["B"],
            scaling_of(config, module),
            embedding=module in embeddings,
            magnitude=sides.get("magnitude_vector"),
        )
        for module, sides in halves.items()
    }
    return _Adapter(config, pairs, saved)


def _save(config: dict[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    # a copy each: q, k and v may share one A, and safetensors keeps no tensor twice
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _keyed(adapter: _Adapter) -> dict[str, torch.Tensor]:
    """The tensors by the keys that peft saves them under."""
    keyed = {f"base_model.model.{parameter}": tensor for parameter, tensor in adapter.saved.items()}
    for module, pair in adapter.pairs.items():
        a, b = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
        keyed[f"base_model.model.{module}.{a}"] = pair.a.contiguous()
        keyed[f"base_model.model.{module}.{b}"] = pair.b.contiguous()
        if pair.magnitude is not None:
            keyed[f"base_model.model.{module}.lora_magnitude_vector"] = pair.magnitude.contiguous()
    return keyed


def _parameter(key: str) -> tuple[str, str]:
    """Of peft's key, the module and which part of a LoRA on it; or a parameter, and nothing."""
    found = re.fullmatch(LORA_KEY, key)
    if found and found[4] != ".bias":
        return found[1], f"{found[2] or ''}{found[3]}"
    return key.removeprefix("base_model.model."), ""


def _under_original_names(tensors: Iterable[str], layout: Layout) -> bool:
    names = (_parameter(key)[0] for key in tensors)
    return any(layout.names(name) != (name,) for name in names)


def _layers(base: Path) -> int:
    return read_json(base / "config.json")["num_hidden_layers"]


def _tensors(adapter: Path) -> dict[str, torch.Tensor]:
    with open_safetensors(adapter / WEIGHTS) as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (it is no mapping)
