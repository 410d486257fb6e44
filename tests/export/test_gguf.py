"""course_lib.export.gguf: what is read back computes and cuts text as the folder does; what llama.cpp would get wrong is refused."""

from __future__ import annotations

import errno
import io
import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from course_runner import Course
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from course_lib.data.templates import STOP_TEXTS, choose_template, named_template, render_prompt, without_marks
from course_lib.errors import CourseError, InputError
from course_lib.export import gguf as exporting
from course_lib.export.gguf import export_gguf
from course_lib.export.gguf_tokenizer import LLAMA3, QWEN2, TEKKEN
from course_lib.export.ollama import go_template, modelfile, texts_between_turns
from course_lib.models import load_model, load_tokenizer

TOKENS = torch.arange(3, 43).reshape(2, 20)
SHAPE = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
ROPE = {"rope_theta": 10000.0}
LLAMA3_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama, odd rows": ("llama", {"intermediate_size": 120}),
    "llama, dynamic rope": ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}


@pytest.fixture
def make(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save a random model, float32 unless said otherwise, whose every layer counts, with the tiny model's tokenizer."""

    def save(kind: str = "llama", name: str = "model", dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
        torch.manual_seed(1)
        config = AutoConfig.for_model(kind, **{**SHAPE, **HEADS, **settings})
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 2 else torch.nn.init.uniform_(
                parameter, 0.5, 1
            )
        folder = tmp_path / name
        shutil.copytree(tiny, folder)
        model.to(dtype).save_pretrained(folder)
        return folder

    return save


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
    tensors = {t.name: t.tensor_type.name for t in GGUFReader(export_gguf(folder, tmp_path / "m.gguf", type="q4_0")).tensors}
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
        tensor.data for tensor in GGUFReader(export_gguf(folder, tmp_path / "m.gguf")).tensors if "rope_freqs" in tensor.name
    ]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), "cpu")
    plain = 1 / LLAMA3_ROPE["rope_theta"] ** (np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / written, scaled.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("rope_type", "extra"), [("linear", {}), ("yarn", {"original_max_position_embeddings": 512})])
def test_scaled_rotations_are_named(rope_type: str, extra: dict[str, int], make: Callable[..., Path], tmp_path: Path) -> None:
    folder = make(rope_parameters={**ROPE, "rope_type": rope_type, "factor": 4.0, **extra})
    told = fields(export_gguf(folder, tmp_path / "m.gguf"))
    assert told["llama.rope.scaling.type"] == rope_type
    assert told["llama.rope.scaling.factor"] == 4
    assert told.get("llama.rope.scaling.original_context_length") == extra.get("original_max_position_embeddings")


def test_a_window_bounds_the_context(make: Callable[..., Path], tmp_path: Path) -> None:
    assert fields(export_gguf(make("mistral", sliding_window=512), tmp_path / "m.gguf"))["llama.context_length"] == 512


# --- tokenizers

ODD = ["🙂", "👩‍🚀", "é", "ß", "\n", "\t", "\r\n", " ", "  ", "   ", "don't", "I'LL", "123", "4567890", "한국어", "世界", "\u3000", "ﬁ", "①", "…!?", "/*", "x_1", "<think>", "<|im_end|>"]  # fmt: skip
WORDS = ["hello", "world", "Model", "the", "fine-tune", "你好", "мир", "don't", "2024", "x=1;"]


def texts(count: int = 300) -> list[str]:
    """Words, odd characters and random ones of many scripts, glued with and without spaces."""
    generator, made = random.Random(0), ["", " ", "\n", " a", "a ", "1 2  3   4"]
    scripts = [(32, 126), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF), (0xA0, 0x24F), (0x400, 0x4FF)]
    for _ in range(count):
        parts = []
        for kind in generator.choices(("word", "odd", "random"), (5, 4, 1), k=generator.randint(1, 8)):
            if kind == "random":
                parts.append("".join(chr(generator.randint(*generator.choice(scripts))) for _ in range(6)))
            else:
                parts.append(generator.choice(WORDS if kind == "word" else ODD))
        made.append(generator.choice(["", " "]).join(parts))
    return made


def _split(regex: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


BYTE_LEVEL: dict[str, tuple[Callable[[], Any], bool]] = {
    "gpt-2": (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (
        lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        False,
    ),
    "qwen2": (lambda: _split(QWEN2), False),
    "llama-bpe": (lambda: _split(LLAMA3), True),
    "tekken": (lambda: _split(TEKKEN), True),
}


def with_byte_level(folder: Path, pre: str, **changes: Any) -> Path:
    """Train a byte-level tokenizer of that kind and put it into a model's folder."""
    cut, ignore_merges = BYTE_LEVEL[pre]
    backend = Tokenizer(models.BPE(ignore_merges=changes.pop("ignore_merges", ignore_merges)))
    backend.pre_tokenizer, backend.decoder = changes.pop("cut", cut)(), decoders.ByteLevel()
    backend.normalizer = changes.pop("normalizer", None)
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"] + 236 - 8,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(2000), trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False, **changes,
    )  # fmt: skip
    tokenizer.chat_template = named_template("smollm2").source
    tokenizer.save_pretrained(folder)
    return folder


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


def test_smollm_digits_are_cut_first(make: Callable[..., Path], tmp_path: Path) -> None:
    file = export_gguf(with_byte_level(make(vocab_size=500), "smollm"), tmp_path / "m.gguf")
    assert fields(file)["tokenizer.ggml.pre"] == "smollm"


def test_the_regular_expressions_are_those_transformers_reads_the_names_as() -> None:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as SPLITS

    assert (QWEN2, LLAMA3, TEKKEN) == (SPLITS["qwen2"], SPLITS["llama-bpe"], SPLITS["tekken"])


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
        ({"cut": lambda: _split(r"\p{L}+|\P{L}+")}, "cuts text in a way that is not known"),
        ({"ignore_merges": True}, "cuts text in a way that is not known"),
        ({"cut": lambda: pre_tokenizers.Whitespace()}, "neither byte-level BPE nor SentencePiece's"),
    ],
)
def test_other_tokenizers_are_refused(
    changes: dict[str, Any], said: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    folder = with_byte_level(make(vocab_size=500), "qwen2", **changes)
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
        (["tiny", "m.gguf", "--type", "q8"], "type 'q8' is unknown: choose f32, f16, bf16, q8_0, q4_0; did you mean q8_0"),
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
    with pytest.raises(CourseError, match=r"blk.0.ffn_up.weight: holds 100000, beyond float16's 65504.0; export it as bf16"):
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


def run_loop(source: str, messages: Sequence[dict[str, str]]) -> str:
    """What Go's text/template makes of our loop: a reading of the few actions that it uses, with Go's white-space rule."""
    tokens = re.split(r"(\{\{.*?\}\})", re.sub(r"\s*\{\{- ", "{{ ", source))
    opened = source.index("{{- range")
    assert tokens[1] == '{{ $last := "start" }}'
    assert opened > 0
    written: list[str] = []

    def block(at: int, run: bool, dot: dict[str, str], state: dict[str, str]) -> int:
        """Run until this block's end; return where it is."""
        taken, active = run, run
        while True:
            action = tokens[at]
            if not action.startswith("{{"):
                if active and action.strip():
                    written.append(action)
                at += 1
                continue
            words = action[2:-2].strip()
            if words == "end":
                return at
            if words.startswith("if "):
                inner = active and holds(words.removeprefix("if "), dot, state)
                at = branches(at + 1, inner, active, dot, state)
            elif active:
                act(words, dot, state)
            at += 1
        assert taken

    def branches(at: int, matched: bool, allowed: bool, dot: dict[str, str], state: dict[str, str]) -> int:
        active = matched
        while True:
            action = tokens[at]
            words = action[2:-2].strip() if action.startswith("{{") else None
            if words is None:
                if active and action.strip():
                    written.append(action)
            elif words == "end":
                return at
            elif words.startswith("else if "):
                active = allowed and not matched and holds(words.removeprefix("else if "), dot, state)
                matched = matched or active
            elif words == "else":
                active = allowed and not matched
            elif words.startswith("if "):
                inner = active and holds(words.removeprefix("if "), dot, state)
                at = branches(at + 1, inner, active, dot, state)
            elif active:
                act(words, dot, state)
            at += 1

    def holds(words: str, dot: dict[str, str], state: dict[str, str]) -> bool:
        match = re.fullmatch(r'eq (\.Role|\$last) "(\w+)"', words)
        assert match, words
        return (dot["role"] if match[1] == ".Role" else state["last"]) == match[2]

    def act(words: str, dot: dict[str, str], state: dict[str, str]) -> None:
        if words == ".Content":
            written.append(dot["content"])
        elif words == "$last = .Role":
            state["last"] = dot["role"]
        else:
            written.append(json.loads(words))

    start = tokens.index("{{ range .Messages }}") + 1
    state, end = {"last": "start"}, start
    for message in messages:
        end = block(start, True, message, state)
    for action in tokens[end + 1 :]:
        if action.startswith("{{"):
            act(action[2:-2].strip(), {}, state)
        else:
            written.append(action)
    return "".join(written)


CONVERSATIONS = [
    [("user", 'say "{{ hi }}"')],
    [("system", "Be brief."), ("user", "1\n2")],
    [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")],
    [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c")],
]


@pytest.mark.parametrize("name", STOP_TEXTS)
def test_ollama_is_fed_what_the_chat_template_writes(name: str, tiny: Path) -> None:
    tokenizer, template = load_tokenizer(tiny), named_template(name)
    between = texts_between_turns(template, tokenizer)
    assert between is not None
    source = go_template(between)
    assert '"""' not in source
    compared = 0
    for turns in CONVERSATIONS:
        if turns[0][0] == "system" and ("start", "system") not in between:
            continue
        messages: list[Any] = [{"role": role, "content": content} for role, content in turns]
        assert run_loop(source, messages) == render_prompt(messages, template, tokenizer).text
        compared += 1
    assert compared >= 2


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
    assert "TEMPLATE \"\"\"" not in text
    assert "# no TEMPLATE" in text
    assert 'PARAMETER stop "<|im_end|>"' in text


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
    turns = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "\n b "}, {"role": "user", "content": "c"}]
    for prompt in (False, True):
        written = [
            tokenizer.apply_chat_template(turns, chat_template=source, tokenize=False, add_generation_prompt=prompt)
            for source in (template.source, plain)
        ]
        assert written[0] == written[1]
