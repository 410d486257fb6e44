"""Nothing in a file runs when it is read: what it would do leaves no trace, and it ends in tensors or in one line."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import random
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import XTUNER_CONFIG, foreign_class, write_xtuner
from course_runner import Course

from course_lib.errors import InputError
from course_lib.export.restricted_load import Inert, PickledTensor, load_restricted
from course_lib.export.xtuner_config import parse_config

LORA = "llm.base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight"


class Calls:
    """Calls a function with arguments when it is unpickled."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.made_by = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made_by


def attacks(trace: Path) -> dict[str, Calls]:
    """What would make the file `trace`, each in another way."""
    code = f"open({str(trace)!r}, 'w').close()"
    opens = Calls(builtins.open, str(trace), "w")
    return {
        "os.system": Calls(os.system, f"touch {trace}"),
        "eval": Calls(builtins.eval, f"__import__('os').system('touch {trace}')"),
        "exec": Calls(builtins.exec, code),
        "open": opens,
        "Popen": Calls(subprocess.Popen, ["touch", str(trace)]),
        "in another's arguments": Calls(OrderedDict, [("a", opens)]),
        "an attribute of a module": Calls(getattr, Calls(__import__, "os"), "getcwd"),
        "another pickle": Calls(pickle.loads, pickle.dumps(opens)),
        "another file": Calls(torch.load, io.BytesIO(b"x")),
    }


def tensors() -> dict[str, torch.Tensor]:
    return {LORA.format("A"): torch.ones(2, 6), LORA.format("B"): torch.full((4, 2), 2.0)}


@pytest.mark.parametrize("attack", attacks(Path("x")))
@pytest.mark.parametrize("place", ["beside", "in the state", "as a key", "as the whole", "in the meta"])
def test_an_attack_leaves_no_trace(attack: str, place: str, tmp_path: Path, course: Course) -> None:
    trace, file = tmp_path / "trace", tmp_path / "epoch_1.pth"
    hostile = attacks(trace)[attack]
    content: Any = {"meta": {"cfg": XTUNER_CONFIG.replace("r=4", "r=2")}, "state_dict": tensors()}
    if place == "beside":
        content["optimizer"] = [hostile]
    elif place == "in the state":
        content["state_dict"]["llm.more"] = hostile
    elif place == "as a key":
        content["state_dict"][(hostile,)] = torch.ones(1)
    elif place == "in the meta":
        content["meta"] = hostile
    else:
        content = hostile
    torch.save(content, file)
    result = course("convert", str(file), "out")
    assert not trace.exists()
    assert result.returncode in (0, 2)
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() == (result.returncode == 0)
    dict_as_key = place == "as a key" and attack == "in another's arguments"
    assert result.returncode == (2 if place in ("as the whole", "in the meta") or dict_as_key else 0)


def test_these_attacks_do_work_elsewhere(tmp_path: Path) -> None:
    """Else the test above would prove nothing."""
    done = []
    for number, name in enumerate(attacks(tmp_path)):
        trace, file = tmp_path / f"trace{number}", tmp_path / f"{number}.pth"
        torch.save(attacks(trace)[name], file)
        try:
            found = torch.load(file, weights_only=False)
        except (EOFError, RuntimeError, pickle.UnpicklingError):
            continue
        if isinstance(found, subprocess.Popen):
            found.wait()
        done += [name] if trace.exists() else []
    assert len(done) >= 6, done


def test_an_attack_in_a_tensors_persistent_id(tmp_path: Path) -> None:
    trace = tmp_path / "trace"

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", attacks(trace)["os.system"], "0", "cpu", 1) if value is Pickler else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"state_dict": {"a": Pickler}})
    refused(archive(tmp_path / "a.pth", {"x/data.pkl": buffer.getvalue()}), "a storage of an unknown kind")
    assert not trace.exists()


def raw(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


STATE = b"}X\x04\x00\x00\x00callK\x01s"  # {"call": 1}


@pytest.mark.parametrize(
    "content",
    [
        raw(b"ctorch._utils\n_rebuild_tensor_v2\n", STATE, b"b"),  # a function of ours is given a state
        raw(b"ctorch._utils\n_rebuild_tensor_v2\n(N", STATE, b"tb"),
        raw(b"ctorch\nFloatStorage\n}X\x04\x00\x00\x00nameX\x04\x00\x00\x00loads", b"sb"),  # and a type another name
        raw(b"ctorch\nFloatStorage\n)R"),  # a type is called
        raw(b"ccollections\nOrderedDict\n)\x81"),  # a function is instantiated
        raw(b"\x82\x01"),  # an object by an extension's number
        raw(b"h\x05"),  # from an empty memo
        raw(b"ctorch._tensor\n_rebuild_from_type_v2\n(NNK\x01Ntr"),
        b"\x80\x02]",
        b"",
    ],
)
def test_a_pickle_cannot_change_what_reads_it(content: bytes, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pth", {"x/data.pkl": content})
    with pytest.raises(InputError, match="is no checkpoint that can be read"):
        load_restricted(path)
    torch.save({"a": torch.ones(2)}, tmp_path / "sound.pth")
    assert load_restricted(tmp_path / "sound.pth")["a"].read().tolist() == [1, 1]


def archive(path: Path, files: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return path


def refused(path: Path, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_restricted(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_archives_that_torch_does_not_write(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    hostile, sound = pickle.dumps(attacks(trace)["os.system"], 2), pickle.dumps({"a": 1}, 2)
    path = tmp_path / "a.pth"
    refused(archive(path, {"x/data.pkl": sound, "y/data.pkl": hostile}), "is a zip archive with 2 data.pkl")
    refused(archive(path, {"x/data.pkl": sound, "x/constants.pkl": hostile}), "is a TorchScript program")
    refused(archive(path, {"x/data.pkl": sound}, zipfile.ZIP_DEFLATED), "is compressed")
    refused(archive(path, {"x/data.pkl": sound, "x/byteorder": b"big"}), "big-endian")
    refused(archive(path, {"x/other": sound}), "is a zip archive with 0 data.pkl")
    path.write_bytes(hostile)
    refused(path, "is no file that torch.save of PyTorch 1.6 or later writes")
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused(path, "is no file that torch.save of PyTorch 1.6 or later writes")
    path.write_bytes(b"")
    refused(path, "is no file that torch.save")
    refused(tmp_path / "absent.pth", "no such file")
    assert not trace.exists()
    assert load_restricted(archive(path, {"x/data.pkl": sound, "x/code/__torch__.py": b""})) == {"a": 1}


def test_a_file_cut_short_anywhere(tmp_path: Path) -> None:
    whole = write_xtuner(tmp_path / "whole.pth", tensors()).read_bytes()
    path = tmp_path / "cut.pth"
    for size in [*range(0, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(InputError):
            load_restricted(path)


def test_bytes_changed_anywhere_end_in_tensors_or_one_line(tmp_path: Path) -> None:
    """The archive's checksum is left out: a damaged pickle would seldom come as far as the unpickler."""
    torch.save({"state_dict": tensors(), "list": [1, (2, {"x": torch.zeros(3, 2).T})]}, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as opened:
        files = {name: opened.read(name) for name in opened.namelist()}
    name = next(name for name in files if name.endswith("data.pkl"))
    generator, read, wrong = random.Random(0), 0, 0
    for _ in range(400):
        changed = bytearray(files[name])
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        path = archive(tmp_path / "changed.pth", {**files, name: bytes(changed)})
        try:
            for tensor in leaves(load_restricted(path)):
                tensor.read()
            read += 1
        except InputError:
            wrong += 1
    assert read > 20
    assert wrong > 100


def leaves(value: Any) -> list[PickledTensor]:
    if isinstance(value, PickledTensor):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for one in inside for tensor in leaves(one)]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    base = torch.arange(24).view(4, 6).to(dtype)
    saved = {"whole": base, "view": base[1:, ::2], "turned": base.T, "scalar": base[0, 0], "none": base[:0]}
    saved["parameter"] = torch.nn.Parameter(base, requires_grad=False)
    saved["of a class"] = base.clone().as_subclass(Sub)
    torch.save(OrderedDict(saved), tmp_path / "a.pt")
    found = load_restricted(tmp_path / "a.pt")
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        assert found[name].shape == tuple(tensor.shape)
        assert torch.equal(found[name].read(), tensor.as_subclass(torch.Tensor)), name
        assert found[name].read().dtype == dtype


class Sub(torch.Tensor):
    """A tensor of a class that is not known to the reader."""


def test_objects_of_other_classes_are_inert(tmp_path: Path) -> None:
    with foreign_class("deepspeed.zero", "Stage", int) as stage:
        stage.__reduce_ex__ = lambda self, _: (stage, (int(self),))
        torch.save({"stage": stage(2), "function": os.system, "set": {1, 2}}, tmp_path / "a.pt")
    found = load_restricted(tmp_path / "a.pt")
    assert isinstance(found["stage"], Inert)
    assert found["stage"].arguments == (2,)
    assert found["function"] is Inert
    given_a_state = archive(tmp_path / "b.pt", {"x/data.pkl": raw(b"cos\nsystem\n", STATE, b"b")})
    assert load_restricted(given_a_state) is Inert


def test_a_tensor_larger_than_what_is_stored(tmp_path: Path) -> None:
    """By strides of zero it would be small here, and fill all memory once it is copied."""
    torch.save(torch.ones(1).expand(2**30, 2**10), tmp_path / "a.pt")
    with pytest.raises(InputError, match="does not fit into the 1 elements stored"):
        load_restricted(tmp_path / "a.pt").read()


@pytest.mark.parametrize(
    "text",
    [
        "model = dict(lora=dict(lora_alpha=__import__('os').system('touch trace')))",
        "import os; os.system('touch trace')\nmodel = dict(lora=dict(lora_alpha=open('trace', 'w')))",
        "model = dict(lora=dict(lora_alpha=",
        "model = dict(lora=" + "(" * 5000,
        "model = " + "-" * 100_000 + "1",
        "x" * 2_000_000,
        "model = dict(lora=5)",
        "",
        None,
        7,
    ],
)
def test_a_config_is_parsed_and_never_run(text: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_config(text).lora.get("lora_alpha") is None
    assert not (tmp_path / "trace").exists()
