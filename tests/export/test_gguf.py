"""course_lib.export.gguf: what is read back computes and cuts text as the folder does; what llama.cpp would get wrong is refused."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from course_runner import Course
from gguf_models import (
    BYTE_LEVEL,
    LLAMA3_ROPE,
    ROPE,
    SHAPES,
    TOKENS,
    save_model,
    split_by,
    texts,
    with_byte_level,
    with_sentencepiece,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from course_lib.data.templates import STOP_TEXTS, choose_template, named_template, render_prompt, without_marks
from course_lib.errors import CourseError, InputError
from course_lib.export import gguf as exporting
from course_lib.export.gguf import export_gguf
from course_lib.export.gguf_tokenizer import LLAMA3, QWEN2, TEKKEN
from course_lib.export.ollama import go_template, modelfile, texts_between_turns
from course_lib.models import load_model, load_tokenizer


@pytest.fixture
def make(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save a random model as `model`."""
    return lambda *arguments, **settings: save_model(tiny, tmp_path / "model", *arguments, **settings)


def read_back(file: Path, folder: Path) -> torch.Tensor:
    """Logits of the file, by transformers. It takes no biases and no scaled rotation from a file, so the settings are the folder's."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "mistral":  # a Llama in llama.cpp
        config = LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    with redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, config=config, dtype=torch.float32
        )
    return model(TOKENS).logits.detach()


def logits(folder: Path) -> torch.Tensor:
    return load_model(folder, dtype="float32", device="cpu")[0](TOKENS).logits.detach()


def fields(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


def relative_error(computed: torch.Tensor, expected: torch.Tensor) -> float:
    return ((computed - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize("name", SHAPES)
def test_float32_is_read_back_exactly(name: str, make: Callable[..., Path], tmp_path: Path) -> None:
    kind, settings = SHAPES[name]
    folder = make(kind, **settings)
    file = export_gguf(folder, tmp_path / "m.gguf", type="f32")
    assert torch.equal(read_back(file, folder), logits(folder))
    told = fields(file)
    architecture = told["general.architecture"]
    assert architecture == {"mistral": "llama"}.get(kind, kind)
    assert told[f"{architecture}.context_length"] == 2048


# measured on these models: f16 1e-3, bf16 0.006, q8_0 0.012, q4_0 0.2; a matrix in the wrong order gives more than 1
BOUNDS = {"f16": 0.003, "bf16": 0.02, "q8_0": 0.03, "q4_0": 0.4}


@pytest.mark.parametrize("type", BOUNDS)
@pytest.mark.parametrize("name", ["llama, untied", "llama, odd rows", "qwen3"])
def test_smaller_types_are_read_back_within_their_bound(
    type: str, name: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    kind, settings = SHAPES[name]
    folder = make(kind, **settings)
    file = export_gguf(folder, tmp_path / "m.gguf", type=type)
    error = relative_error(read_back(file, folder), logits(folder))
    assert 0 < error < BOUNDS[type]


def test_bfloat16_weights_are_exact_as_bf16(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make(dtype=torch.bfloat16)
    assert torch.equal(read_back(export_gguf(folder, tmp_path / "m.gguf", type="bf16"), folder), logits(folder))


def test_types_of_the_tensors(make: Callable[..., Path], tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = make(intermediate_size=120)
    tensors = {
        t.name: t.tensor_type.name for t in GGUFReader(export_gguf(folder, tmp_path / "m.gguf", type="q4_0")).tensors
    }
    assert tensors["token_embd.weight"] == tensors["output.weight"] == "Q8_0"
    assert tensors["blk.0.attn_q.weight"] == tensors["blk.1.ffn_up.weight"] == "Q4_0"
    assert tensors["blk.0.ffn_down.weight"] == "F16"  # 120 is no multiple of 32
    assert tensors["blk.0.attn_norm.weight"] == tensors["output_norm.weight"] == "F32"


def test_large_tensors_are_quantised_some_rows_at_a_time(
    make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make()
    whole = export_gguf(folder, tmp_path / "a" / "m.gguf").read_bytes()
    monkeypatch.setattr(exporting, "CHUNK", 300)
    assert export_gguf(folder, tmp_path / "b" / "m.gguf").read_bytes() == whole


def test_llama3_rotation_is_written_as_its_factors(make: Callable[..., Path], tmp_path: Path) -> None:
    from gguf import GGUFReader
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = make(rope_parameters=LLAMA3_ROPE)
    (written,) = [
        tensor.data
        for tensor in GGUFReader(export_gguf(folder, tmp_path / "m.gguf")).tensors
        if "rope_freqs" in tensor.name
    ]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), "cpu")
    plain = 1 / LLAMA3_ROPE["rope_theta"] ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / written, scaled.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("rope_type", "extra"), [("linear", {}), ("yarn", {"original_max_position_embeddings": 512})])
def test_scaled_rotations_are_named(
    rope_type: str, extra: dict[str, int], make: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make(rope_parameters={**ROPE, "rope_type": rope_type, "factor": 4.0, **extra})
    told = fields(export_gguf(folder, tmp_path / "m.gguf"))
    assert told["llama.rope.scaling.type"] == rope_type
    assert told["llama.rope.scaling.factor"] == 4
    assert told.get("llama.rope.scaling.original_context_length") == extra.get("original_max_position_embeddings")


def test_a_window_bounds_the_context(make: Callable[..., Path], tmp_path: Path) -> None:
    assert fields(export_gguf(make("mistral", sliding_window=512), tmp_path / "m.gguf"))["llama.context_length"] == 512


# --- tokenizers


def ids_by_transformers(file: Path) -> Callable[[str], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("pre", [pre for pre in BYTE_LEVEL if pre != "smollm"])  # transformers reads that one as gpt-2
def test_byte_level_ids_are_read_back(pre: str, make: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_byte_level(make(vocab_size=500), pre)
    file = export_gguf(folder, tmp_path / "m.gguf")
    own, read = load_tokenizer(folder), ids_by_transformers(file)
    told = fields(file)
    assert told["tokenizer.ggml.pre"] == pre
    assert len(own) < 500 == len(told["tokenizer.ggml.tokens"])  # rows of the embedding without a token are named too
    for text in texts():
        assert read(text) == own(text, add_special_tokens=False)["input_ids"], text


def test_sentencepiece_ids_are_read_back(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_sentencepiece(make(vocab_size=900))
    file = export_gguf(folder, tmp_path / "m.gguf")
    own, read, told = load_tokenizer(folder), ids_by_transformers(file), fields(file)
    assert told["tokenizer.ggml.model"] == "llama"
    assert told["tokenizer.ggml.add_bos_token"]
    assert told["tokenizer.ggml.add_space_prefix"]
    kinds = dict(zip(told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<unk>"], kinds["</s>"], kinds["<0x41>"], kinds["▁"]) == (2, 3, 6, 1)
    for text in texts():
        assert read(text) == own(text, add_special_tokens=False)["input_ids"], text


def test_smollm_digits_are_cut_first(make: Callable[..., Path], tmp_path: Path) -> None:
    file = export_gguf(with_byte_level(make(vocab_size=500), "smollm"), tmp_path / "m.gguf")
    assert fields(file)["tokenizer.ggml.pre"] == "smollm"


def test_the_regular_expressions_are_those_transformers_reads_the_names_as() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS

    assert (SPLITS["qwen2"], SPLITS["llama-bpe"], SPLITS["tekken"]) == (QWEN2, LLAMA3, TEKKEN)


def test_special_tokens_and_template_come_along(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_byte_level(make(vocab_size=500), "qwen2")
    file = export_gguf(folder, tmp_path / "m.gguf")
    own, read = load_tokenizer(folder), AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert (read.bos_token, read.eos_token, read.pad_token) == (own.bos_token, own.eos_token, own.pad_token)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert "generation" in own.chat_template
    assert "generation %" not in read.chat_template
    assert read.apply_chat_template(turns, tokenize=False) == own.apply_chat_template(turns, tokenize=False)
    told = fields(file)
    assert not told["tokenizer.ggml.add_bos_token"]
    assert not told["tokenizer.ggml.add_eos_token"]
    kinds = dict(zip(told["tokenizer.ggml.tokens"], told["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<|im_end|>"], kinds["<think>"], kinds["a"], kinds["[PAD499]"]) == (3, 4, 1, 5)


def test_the_end_of_a_turn_is_told_where_it_is_not_eos(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_byte_level(make(vocab_size=500), "gpt-2")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|endoftext|>"}))
    told = fields(export_gguf(folder, tmp_path / "m.gguf"))
    tokens = told["tokenizer.ggml.tokens"]
    assert tokens[told["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"
    assert tokens[told["tokenizer.ggml.eot_token_id"]] == "<|im_end|>"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cut": lambda: split_by(r"\p{L}+|\P{L}+")}, "cuts text in a way that is not known"),
        ({"ignore_merges": True}, "cuts text in a way that is not known"),
        ({"cut": lambda: pre_tokenizers.Whitespace()}, "neither byte-level BPE nor SentencePiece's"),
    ],
)
def test_other_tokenizers_are_refused(
    changes: dict[str, Any], said: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    folder = with_byte_level(make(vocab_size=4000), "qwen2", **changes)
    with pytest.raises(InputError, match=said):
        export_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_unigram_tokenizer_is_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make()
    backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0)], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<unk>").save_pretrained(folder)
    with pytest.raises(InputError, match="of type Unigram; only BPE"):
        export_gguf(folder, tmp_path / "m.gguf")


def test_a_tokenizer_of_another_model_is_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has ids up to 258, and the embedding 200 rows"):
        export_gguf(make(vocab_size=200), tmp_path / "m.gguf")


# --- bad input, and writes that fail


def test_an_adapter_is_to_be_merged_first(tmp_path: Path, course: Course) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    ended = course("export", "gguf", "adapter", "m.gguf")
    assert ended.returncode == 2
    assert ended.stderr == "course: adapter: is an adapter; merge it first: course merge BASE adapter OUT\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "m.bin"], "m.bin: is no name of a GGUF file; name one such as m.gguf"),
        (["tiny", "folder"], "folder: is no name of a GGUF file; name one such as folder/model.gguf"),
        (["tiny", "old.gguf"], "old.gguf: already exists"),
        (["tiny", "beside.gguf"], "beside.Modelfile: already exists"),
        (
            ["tiny", "m.gguf", "--type", "q8"],
            "type 'q8' is unknown: choose f32, f16, bf16, q8_0, q4_0; did you mean q8_0",
        ),
        (["nowhere", "m.gguf"], "'nowhere' is unknown"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], said: str, course: Course, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "old.gguf").write_text("old")
    (tmp_path / "beside.Modelfile").write_text("old")
    ended = course("export", "gguf", *arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("gemma", {"head_dim": 16}, "is a gemma; only llama, mistral"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not in llama.cpp's llama"),
        ("qwen3", {"attention_bias": True}, "attention_bias is not in llama.cpp's qwen3"),
        (
            "llama",
            {"rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 2.0, "beta_fast": 16.0}},
            "beta_fast 16.0 of the rotary embedding",
        ),
    ],
)
def test_other_models_are_refused_by_name(
    kind: str, settings: dict[str, Any], said: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        export_gguf(make(kind, **settings), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_incomplete_and_quantised_folders_are_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make()
    weights = load_file(folder / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != gone}, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor {gone} is missing"):
        export_gguf(folder, tmp_path / "m.gguf")
    save_file({**weights, gone: weights[gone][:-1].contiguous()}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"up_proj.weight is \[127, 64\], and by config.json \[128, 64\]"):
        export_gguf(folder, tmp_path / "m.gguf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(InputError, match="is stored quantised"):
        export_gguf(folder, tmp_path / "m.gguf")


def test_weights_beyond_float16_are_not_made_infinite(make: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make()
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        CourseError, match=r"blk.0.ffn_up.weight: holds 100000, beyond float16's 65504.0; export it as bf16"
    ):
        export_gguf(folder, tmp_path / "m.gguf", type="f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_full_disk_leaves_nothing(make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFWriter

    folder, written = make(), []

    def full(self: Any, tensor: Any) -> None:
        written.append(tensor)
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(CourseError, match="the disk is full"):
        export_gguf(folder, tmp_path / "m.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_command_writes_both_files(course: Course, tmp_path: Path) -> None:
    ended = course("export", "gguf", "tiny", "made/tiny.gguf", "--type", "bf16")
    assert (ended.returncode, ended.stdout) == (0, "made/tiny.gguf\n")
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["tiny.Modelfile", "tiny.gguf"]


# --- Ollama


CONVERSATIONS = [
    [("user", 'say "{{ hi }}"')],
    [("system", "Be brief."), ("user", "1\n2")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
]


def known_conversations(between: dict[tuple[str, str], str]) -> list[list[dict[str, str]]]:
    """Those of CONVERSATIONS whose roles a template knows, as messages."""
    made = [[{"role": role, "content": content} for role, content in turns] for turns in CONVERSATIONS]
    return [turns for turns in made if turns[0]["role"] == "user" or ("start", "system") in between]


@pytest.mark.parametrize("name", STOP_TEXTS)
def test_a_chat_template_is_its_texts_between_turns(name: str, tiny: Path) -> None:
    tokenizer, template = load_tokenizer(tiny), named_template(name)
    between = texts_between_turns(template, tokenizer)
    assert between is not None
    for messages in known_conversations(between):
        written, last = "", "start"
        for message in messages:
            written, last = written + between[last, message["role"]] + message["content"], message["role"]
        assert written + between[last, "answer"] == render_prompt(messages, template, tokenizer).text


def test_the_loop_of_a_go_template(tiny: Path) -> None:
    between = texts_between_turns(named_template("internlm2_chat"), load_tokenizer(tiny))
    assert between is not None
    assert go_template(between) == (
        '{{- $last := "start" }}\n'
        "{{- range .Messages }}\n"
        '{{- if eq .Role "system" }}{{ "<|im_start|><|im_start|>system\\n" }}{{ .Content }}\n'
        '{{- else if eq .Role "user" }}\n'
        '{{- if eq $last "system" }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}'
        '{{ else if eq $last "assistant" }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}'
        '{{ else }}{{ "<|im_start|><|im_start|>user\\n" }}{{ end }}{{ .Content }}\n'
        '{{- else if eq .Role "assistant" }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}{{ .Content }}\n'
        "{{- end }}\n"
        "{{- $last = .Role }}\n"
        '{{- end }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}'
    )


GO_PROGRAM = """package main
import ("encoding/json"; "os"; "text/template")
type message struct { Role, Content string }
func main() {
    var cases []struct { Source string; Messages []message }
    if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
    out := json.NewEncoder(os.Stdout)
    for _, c := range cases {
        var text writer
        if err := template.Must(template.New("").Parse(c.Source)).Execute(&text, c); err != nil { panic(err) }
        out.Encode(string(text))
    }
}
type writer []byte
func (w *writer) Write(more []byte) (int, error) { *w = append(*w, more...); return len(more), nil }
"""


@pytest.mark.skipif(shutil.which("go") is None, reason="no Go here")
def test_go_writes_what_the_chat_template_writes(tiny: Path, tmp_path: Path) -> None:
    tokenizer, cases, expected = load_tokenizer(tiny), [], []
    for template in map(named_template, STOP_TEXTS):
        between = texts_between_turns(template, tokenizer)
        assert between is not None
        assert '"""' not in go_template(between)  # it stands between those in a Modelfile
        for messages in known_conversations(between):
            cases.append({"source": go_template(between), "messages": messages})
            expected.append(render_prompt(messages, template, tokenizer).text)
    tokenizer.chat_template = NO_SYSTEM
    own = choose_template(tokenizer)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    cases.append({"source": go_template(texts_between_turns(own, tokenizer)), "messages": messages})
    expected.append(render_prompt(messages[1:], own, tokenizer).text)
    (tmp_path / "main.go").write_text(GO_PROGRAM)
    environment = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
    run = subprocess.run(
        ["go", "run", "main.go"], cwd=tmp_path, input=json.dumps(cases), capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert [json.loads(line) for line in run.stdout.splitlines()] == expected


def test_a_bos_that_the_tokenizer_writes_is_not_written_twice(tiny: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer, template = load_tokenizer(tiny), named_template("internlm2_chat")
    assert texts_between_turns(template, tokenizer)["start", "user"].startswith(tokenizer.bos_token)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    assert texts_between_turns(template, tokenizer)["start", "user"] == "<|im_start|>user\n"


def test_a_template_that_counts_turns_gives_no_ollama_template(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    text = modelfile("m.gguf", tokenizer, choose_template(tokenizer))
    assert 'TEMPLATE """' not in text
    assert "# no TEMPLATE" in text
    assert 'PARAMETER stop "<|im_end|>"' in text


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_without_system_turns_gives_an_ollama_template_that_passes_over_them(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = NO_SYSTEM
    between = texts_between_turns(choose_template(tokenizer), tokenizer)
    assert between is not None
    source = go_template(between)
    assert "system" not in source
    assert (
        '{{- if eq .Role "user" }}\n{{- if eq $last "assistant" }}{{ "</><user>" }}{{ else }}{{ "<user>" }}{{ end }}'
        in source
    )


def test_a_modelfile_names_file_template_and_stops(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    lines = modelfile("my.gguf", tokenizer, named_template("chatml")).splitlines()
    assert lines[:2] == ["# ollama create NAME -f my.Modelfile", "FROM ./my.gguf"]
    assert lines[-2:] == ['PARAMETER stop "<|im_end|>"', 'PARAMETER stop "<|endoftext|>"']


@pytest.mark.parametrize("name", STOP_TEXTS)
def test_a_template_without_marks_writes_the_same(name: str, tiny: Path) -> None:
    template = named_template(name)
    plain = without_marks(template.source)
    assert not re.search(r"generation\s*-?%", plain)
    tokenizer = load_tokenizer(tiny)
    turns = [
        {"role": "user", "content": " a\n"},
        {"role": "assistant", "content": "\n b "},
        {"role": "user", "content": "c"},
    ]
    for prompt in (False, True):
        written = [
            tokenizer.apply_chat_template(turns, chat_template=source, tokenize=False, add_generation_prompt=prompt)
            for source in (template.source, plain)
        ]
        assert written[0] == written[1]


# --- the embedded model


@pytest.mark.embedded
@pytest.mark.slow
def test_the_embedded_model_is_read_back(embedded: Path, tmp_path: Path) -> None:
    model, own = load_model(embedded, dtype="float32", device="cpu")
    sample = Path(__file__).parents[2] / "data" / "fine_tuning_notes.jsonl"
    rows = [json.loads(line)["text"] for line in sample.read_text(encoding="utf-8").splitlines()]
    tokens = torch.tensor([own(" ".join(rows))["input_ids"][:256]])
    expected = model(tokens).logits.detach()
    errors = {}
    for type in ("f32", "q8_0"):
        file = export_gguf(embedded, tmp_path / f"{type}.gguf", type=type)
        with redirect_stderr(io.StringIO()):
            read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
        errors[type] = relative_error(read(tokens).logits.detach(), expected)
    assert errors["f32"] == 0
    assert 0 < errors["q8_0"] < 0.06, errors
    ids = ids_by_transformers(tmp_path / "q8_0.gguf")
    for text in [*rows, *texts(1000)]:
        assert ids(text) == own(text, add_special_tokens=False)["input_ids"], text
