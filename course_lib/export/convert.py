"""A checkpoint of XTuner, DeepSpeed, peft or this library as a PEFT adapter; one of all weights as a model.

A checkpoint names LoRA's matrices as the training's modules are named: `llm.` (XTuner) or `module.` before peft's own
`base_model.model.`, and the adapter's name (`default`) after `lora_A`. Ranks and targets are read off them. Alpha is in no weight.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.adapter_record import RECORD_FILE, base_fingerprint, check_shapes
from course_lib.errors import InputError
from course_lib.export.checkpoint_reader import TrainedWeights, read_checkpoint
from course_lib.export.model_files import check_room, copy_side_files, plan_shards, total_bytes, write_shards
from course_lib.export.restricted_load import LazyTensor
from course_lib.export.stored import DTYPES, stored_tensors
from course_lib.files import atomic_folder, file_to_write, read_json
from course_lib.internlm.layout import layout_of
from course_lib.models import catalogue, is_repository, model_folder

if TYPE_CHECKING:
    import torch

PEFT_PREFIX = "base_model.model."
WRAPPERS = re.compile(r"(?:(?:llm|module|_orig_mod)\.)+")  # what training programs put before a model's own names
LORA_NAME = re.compile(r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.([^.]+?))??(\.weight|\.bias)?")
SAVED_NAME = re.compile(r"(.+)\.modules_to_save\.([^.]+)\.(.+)")  # a module trained whole
NOT_LANGUAGE = ("visual_encoder.", "projector.")  # what a LLaVA of XTuner trains beside the language model
SHARD_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Conversion:
    """What was written."""

    out: Path
    tensors: int
    settings: dict[str, Any]  # of the adapter; empty for a model
    base: str
    checked: bool  # against the base's shapes
    left_out: int  # tensors of the checkpoint with no place in an adapter

    def summary(self) -> str:
        """One line."""
        if not self.settings:
            return f"a whole model of {self.tensors} tensors, with config and tokenizer of {self.base}"
        rank, alpha = self.settings["r"], self.settings["lora_alpha"]
        fits = "shapes checked" if self.checked else "not on this machine, so shapes were not checked"
        base = f"for {self.base} ({fits})" if self.base else "for a base it does not name"
        left = f"; {self.left_out} other tensors left out" if self.left_out else ""
        return f"an adapter of {self.tensors} tensors, r = {rank}, alpha = {alpha:g}, {base}{left}"


def convert(
    checkpoint: str | Path, out: str | Path, *, alpha: float | None = None, base: str | Path | None = None
) -> Conversion:
    """Write a PEFT adapter from a checkpoint with LoRA in it, or a model from one of all weights, to the folder `out`.

    The checkpoint is a file of torch.save, of which nothing is run (restricted_load.py), or a folder (checkpoint_reader.py). Weights
    keep their names and number format; of a model, the base's on disk.

    Args:
        alpha: of the LoRA, whose scaling is alpha / r; by default what stands in the checkpoint: peft's settings, or XTuner's config.
        base: the base model's name or folder, by default the one the checkpoint names. Where it is on this machine, the weights
            are checked against it and a record of it is written. A model takes its config and tokenizer from there.

    Raises:
        InputError: there is no checkpoint, it is damaged or unlike what it should be, it does not fit its base, `out` exists,
            or alpha, or for a model the base, is not known.
        CourseError: the disk is full.
    """
    target = file_to_write(Path(out).expanduser(), overwrite=False)
    path = Path(checkpoint).expanduser()
    weights = read_checkpoint(path)
    named = base or weights.record.get("base") or weights.settings.get("base_model_name_or_path") or weights.config.base
    folder = _base_folder(named, sure=base is not None) if named else None
    adapter, left_out = _adapter_tensors(weights, path)
    if not adapter:
        if folder is None:
            raise InputError(
                f"{path}: holds all weights of a model and no LoRA; name its base with --base, for config and tokenizer"
                + (f" ({named} is not on this machine)" if named else "")
            )
        count = _write_model(weights, path, folder, target)
        return Conversion(target, count, {}, str(named), True, 0)
    settings = _settings(weights, adapter, path, alpha=alpha, base=str(named or ""), folder=folder)
    if folder:
        shapes = {name: tensor.shape for name, tensor in adapter.items()}
        transposed, remedy = bool(settings.get("fan_in_fan_out")), "name its own base with --base"
        check_shapes(shapes, folder, transposed=transposed, adapter=path, remedy=remedy)
    _write_adapter(adapter, settings, _record(weights, path, named, folder), target)
    return Conversion(target, len(adapter), settings, str(named or ""), folder is not None, left_out)


def _base_folder(base: str | Path, *, sure: bool) -> Path | None:
    """The base's folder, if it is on this machine. One that somebody named just now must exist, or be a name of the Hub."""
    try:
        return model_folder(base, fetch_missing=False)
    except InputError:
        if sure and str(base).lower() not in catalogue() and not is_repository(str(base)):
            raise
        return None


def _adapter_tensors(weights: TrainedWeights, path: Path) -> tuple[dict[str, LazyTensor], int]:
    """LoRA's matrices and modules trained whole, by the keys that peft saves them under, and how many tensors are left out."""
    adapter: dict[str, LazyTensor] = {}
    names: set[str] = set()
    left = []
    for name, tensor in weights.tensors.items():
        if name.startswith(NOT_LANGUAGE):
            raise InputError(f"{path}: holds {name}, of a model that sees; only language models are converted")
        bare = PEFT_PREFIX + _bare(name).removeprefix(PEFT_PREFIX)
        if found := LORA_NAME.fullmatch(bare):
            names.add(found[3] or "default")
            end = "" if found[2] == "lora_magnitude_vector" else found[4] or ""
            adapter[f"{found[1]}.{found[2]}{end}"] = tensor
        elif found := SAVED_NAME.fullmatch(bare):
            names.add(found[2])
            adapter[f"{found[1]}.{found[3]}"] = tensor
        else:
            left.append((name, bare, tensor))
    if len(names) > 1:
        raise InputError(
            f"{path}: holds {len(names)} adapters ({', '.join(sorted(names))}); save the one you want alone"
        )
    if not any(".lora_" in name for name in adapter):
        if weights.settings:
            raise InputError(
                f"{path}: is an adapter of type {weights.settings.get('peft_type')}; only LoRA is converted"
            )
        return {}, 0
    if weights.settings:  # peft's own files: what it saved belongs to the adapter
        adapter |= {bare: tensor for _, bare, tensor in left}
        left = []
    if left and (weights.all_trained or weights.config.lora.get("bias", "none") != "none"):
        raise InputError(
            f"{path}: {left[0][0]} was trained beside LoRA, and has no place in an adapter made from its weights"
        )
    return adapter, len(left)


def _settings(
    weights: TrainedWeights,
    adapter: dict[str, LazyTensor],
    path: Path,
    *,
    alpha: float | None,
    base: str,
    folder: Path | None,
) -> dict[str, Any]:
    """peft's adapter_config.json: the one that is there, or one made from names, shapes and what XTuner's config says."""
    ranks = _ranks(adapter, path)
    if weights.settings:
        said = weights.settings
        known = {said.get("r"), *(said.get("rank_pattern") or {}).values()}
        if wrong := next((module for module, rank in ranks.items() if rank not in known), None):
            raise InputError(
                f"{path}: {wrong} has rank {ranks[wrong]}, and adapter_config.json says r = {said.get('r')}"
            )
        if alpha is not None and alpha != said.get("lora_alpha"):
            raise InputError(
                f"--alpha {alpha}: adapter_config.json in {path} says {said.get('lora_alpha')}; leave --alpha out"
            )
        return {**said, "base_model_name_or_path": _public_name(base) or None}
    lora = weights.config.lora
    (r, _), *_ = Counter(ranks.values()).most_common(1)
    if alpha is None:
        alpha = lora.get("lora_alpha")
        if not isinstance(alpha, int | float) or isinstance(alpha, bool):
            raise InputError(f"{path}: does not say LoRA's alpha, and no weight does (r is {r}); give it with --alpha")
        if lora.get("r", r) != r:
            raise InputError(f"{path}: its config says r = {lora['r']}, its matrices have {r}; give alpha with --alpha")
    if not 0 < alpha < float("inf"):
        raise InputError(f"--alpha {alpha}: must be above 0; LoRA's scaling is alpha / r")
    from peft import LoraConfig

    dropout = lora.get("lora_dropout")
    config = LoraConfig(
        r=r,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        lora_dropout=dropout if isinstance(dropout, float) else 0.0,
        target_modules=_targets(ranks, folder),
        rank_pattern={module: rank for module, rank in ranks.items() if rank != r},
        use_rslora=lora.get("use_rslora") is True,
        use_dora=any(name.endswith(".lora_magnitude_vector") for name in adapter),
        modules_to_save=sorted({name.split(".")[-2] for name in adapter if ".lora_" not in name}) or None,
        base_model_name_or_path=_public_name(base) or None,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def _ranks(adapter: dict[str, LazyTensor], path: Path) -> dict[str, int]:
    """The rank of each module: rows of its A, shape (r, in), and columns of its B, shape (out, r)."""
    halves: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, tensor in adapter.items():
        if found := re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name):
            halves[found[1].removeprefix(PEFT_PREFIX)][found[2]] = tensor.shape
    ranks = {}
    for module, shapes in halves.items():
        if len(shapes) != 2:
            raise InputError(f"{path}: has only LoRA's {min(shapes)} of {module}; the checkpoint is not whole")
        a, b = shapes["A"], shapes["B"]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
            raise InputError(f"{path}: LoRA's matrices of {module} do not go together: A is {list(a)}, B {list(b)}")
        ranks[module] = a[0]
    return ranks


def _targets(modules: Iterable[str], folder: Path | None) -> list[str]:
    """Last parts of the modules' names where every layer has them, whole names else."""
    by_name: dict[str, list[str]] = defaultdict(list)
    for module in modules:
        by_name[module.rpartition(".")[2]].append(module)
    layers = [int(found[1]) for module in modules if (found := re.search(r"\.(\d+)\.", module))]
    count = max(layers, default=-1) + 1
    if folder:
        count = read_json(folder / "config.json").get("num_hidden_layers", count)
    targets = []
    for name, found in by_name.items():
        in_layers = re.search(r"\.\d+\.", found[0]) is not None
        targets += [name] if len(found) == (count if in_layers else 1) else found
    return sorted(targets)


def _record(weights: TrainedWeights, path: Path, base: str | Path | None, folder: Path | None) -> dict[str, Any]:
    """The adapter's course.json; empty where the base is not on this machine."""
    if folder is None:
        return weights.record
    fingerprint = base_fingerprint(folder)
    if weights.record.get("base_fingerprint", fingerprint) != fingerprint:
        was = f"{weights.record.get('base')} ({weights.record['base_fingerprint']})"
        raise InputError(f"{path}: was trained on {was}, and {folder} is {fingerprint}; name its own base with --base")
    known = {"base": str(base), "base_fingerprint": fingerprint, **weights.config.base_format}
    return weights.record or {**known, "template": weights.config.template}


def _write_adapter(
    adapter: dict[str, LazyTensor], settings: dict[str, Any], record: dict[str, Any], target: Path
) -> None:
    from safetensors.torch import save_file

    with atomic_folder(target) as new:
        # a copy each: what is read may be a view of the checkpoint's file
        tensors = {name: tensor.read().clone().contiguous() for name, tensor in adapter.items()}
        save_file(tensors, new / "adapter_model.safetensors", metadata={"format": "pt"})
        (new / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if record:
            (new / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _write_model(weights: TrainedWeights, path: Path, base: Path, target: Path) -> int:
    """Write all weights under the names of the base's files, with what stands beside those."""
    import torch

    config, layout = read_json(base / "config.json"), layout_of(base)
    stored = stored_tensors(base, quantised="quantization_config" in config)
    found = {_bare(name): tensor for name, tensor in {**weights.others, **weights.tensors}.items()}
    parts = {name: (name,) if name in found else layout.names(name) for name in stored}
    wanted = {part for names in parts.values() for part in names}
    if missing := [part for part in sorted(wanted) if part not in found]:
        raise InputError(
            f"{path}: has no {missing[0]}, which {base} has ({len(missing)} of {len(wanted)} missing); it is of another model, or not whole"
        )
    tied = ("lm_head.weight", "output.weight") if config.get("tie_word_embeddings") else ()
    if more := [name for name in found if name not in wanted and name not in tied and not name.endswith(".inv_freq")]:
        raise InputError(f"{path}: holds {more[0]}, which {base} does not have; name its own base with --base")
    for name, names in parts.items():
        shapes = [list(found[part].shape) for part in names]
        if shapes != (
            expected := [stored[name].shape] if names == (name,) else layout.shapes(name, stored[name].shape)
        ):
            raise InputError(
                f"{path}: {names[0]} is {shapes[0]}, and {expected[0]} in {base}; name its own base with --base"
            )
    kinds = {stored_name: getattr(torch, name) for name, stored_name in DTYPES.items()}

    def tensor(name: str) -> torch.Tensor:
        own = [found[part].read() for part in parts[name]]
        whole = own[0] if parts[name] == (name,) else layout.join(name, tuple(own))
        return whole.to(kinds[stored[name].dtype], copy=True).contiguous()

    shards = plan_shards(stored, "auto", SHARD_BYTES)
    with atomic_folder(target) as new:
        check_room(new, total_bytes(shards))
        copy_side_files(base, new, config, template=weights.record.get("template", weights.config.template))
        write_shards(new, shards, lambda shard: {name: tensor(name) for name in shard})
    return len(stored)


def _bare(name: str) -> str:
    found = WRAPPERS.match(name)
    return name[found.end() :] if found else name


def _public_name(base: str) -> str:
    """The repository's name of a model in the catalogue: others have no such catalogue."""
    known = catalogue().get(base.lower())
    return (known and known.hub) or base
