from __future__ import annotations

from pathlib import Path

import pytest

from course_lib.errors import InputError
from course_lib.models import catalogue
from course_lib.recipe import copy_recipe, load_recipe, make_recipe, recipe_for, recipe_names
from course_lib.scale import DEFAULT_MODEL

MINIMAL = "model: {name: tiny}\ndata: {path: rows.json}\n"


@pytest.fixture
def write(tmp_path: Path):
    def writer(text: str) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(text)
        return path

    return writer


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_loads_and_names_a_known_model(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.model.name in catalogue()
    assert recipe.description
    assert recipe.task in name
    assert str(recipe.data.max_length) in name


def test_yaml_round_trip(write) -> None:
    recipe = load_recipe(recipe_names()[0])
    assert load_recipe(write(recipe.to_yaml())) == recipe


def test_overrides_reach_every_depth(write) -> None:
    recipe = load_recipe(
        write(MINIMAL), ["training.lr=1e-4", "training.betas=[0.8, 0.95]", "model.dtype=nf4", "data.max_rows=7"]
    )
    assert (recipe.training.lr, recipe.training.betas, recipe.model.dtype, recipe.data.max_rows) == (
        1e-4,
        (0.8, 0.95),
        "nf4",
        7,
    )


def test_variants_of_adapters_may_be_combined(write) -> None:
    overrides = ["lora.dora=true", "lora.rslora=true", "lora.init=eva", "lora.lr_ratio=16", "model.dtype=nf4"]
    lora = load_recipe(write(MINIMAL), overrides).lora
    assert (lora.dora, lora.rslora, lora.init, lora.lr_ratio) == (True, True, "eva", 16)
    checkpoints = ["lora.init=eva", "training.offload=[checkpoints]", "training.gradient_checkpointing=true"]
    assert load_recipe(write(MINIMAL), checkpoints).lora.init == "eva"
    assert load_recipe(write(MINIMAL), ["lora.init=pissa", "training.offload=[layers]"]).lora.init == "pissa"


def test_lora_null_means_full_fine_tuning(write) -> None:
    assert load_recipe(write(MINIMAL), ["lora=null"]).lora is None


@pytest.mark.parametrize(
    ("extra", "overrides", "said"),
    [
        ("trainin: {lr: 1}\n", [], "unknown key 'trainin'; did you mean training"),
        ("training: {batchsize: 1}\n", [], r"unknown key 'training.batchsize'; did you mean batch_size"),
        ("lora: {rank: 4}\n", [], r"unknown key 'lora.rank'; known here: r, alpha"),
        ("", ["lora.r=0"], r"lora\.r = 0: input should be greater than or equal to 1"),
        ("", ["training.lr=-1"], r"training\.lr = -1: input should be greater than 0"),
        ("", ["training.lr=fast"], r"training\.lr = 'fast': input should be a valid number"),
        ("", ["model.dtype=fp8"], r"model\.dtype = 'fp8': input should be 'auto'"),
        ("", ["lora=null", "model.dtype=nf4"], "a base in nf4 cannot be trained itself"),
        ("", ["data.path=null"], "set one of path and identity"),
        ("", ["training"], r"write it as section\.key=value"),
        ("", ["model.name.x=1"], "name is not a section"),
        ("x: [", [], "broken YAML at line 3"),
        ("x: &a [*a]\n", [], "unknown key 'x'"),
        ("", ["model=3"], "model = 3: is a section; set one of its keys: name, dtype, "),
        ("", ["lora=16"], "lora = 16: is a section; set one of its keys: r, alpha, "),
        ("", ["lora.targets=[]"], "name at least one linear layer"),
        ("", ["lora.init=pisa"], r"lora\.init = 'pisa': input should be 'default', 'pissa', 'olora' or 'eva'"),
        (
            "",
            ["lora.init=pissa", "model.dtype=nf4"],
            r"lora\.init = pissa takes .* and nf4 weights cannot hold .* exactly",
        ),
        ("", ["lora.init=olora", "model.dtype=int8"], r"lora\.init = olora takes .*set lora\.init to eva or default"),
        (
            "",
            ["lora.init=eva", "training.offload=[layers]"],
            r"lora\.init = eva runs the whole base before .*\['layers'\]",
        ),
        ("", ["lora.dora=true", "training.offload=[head]"], r"training\.offload = \['head'\] needs the fused layers"),
        ("", ["lora.lr_ratio=0"], r"lora\.lr_ratio = 0: input should be greater than 0"),
        ("", ["lora.lr_ratio=1e9"], r"lora\.lr_ratio = 1000000000\.0: input should be less than or equal to 1000"),
        ("", ["lora.rslora=maybe"], r"lora\.rslora = 'maybe': input should be a"),
        ("", ["lora.r=10000000000"], r"lora\.r = 10000000000: input should be less than or equal to 1000000000"),
        ("", ["data.max_rows=1e12"], r"data\.max_rows = 1000000000000.0: input should be less"),
        ("", ["data.max_length=1e12"], r"data\.max_length = 1000000000000.0: input should be less"),
        ("", ["training.epochs=1e308"], r"training\.epochs = 1e\+308: input should be less than or equal to 1000000"),
        ("", ["training.epochs=.nan"], r"training\.epochs = nan: input should be a finite number"),
        ("", ["training.lr=.inf"], r"training\.lr = inf: input should be a finite number"),
        ("", ["training.lr=1e30"], r"training\.lr = 1e\+30: input should be less than or equal to 10"),
        ("", ["training.seed=-1"], r"training\.seed = -1: input should be greater than or equal to 0"),
        ("", ["training.seed=99999999999"], r"training\.seed = 99999999999: input should be less than 4294967296"),
        ("", ["data.seed=-1"], r"data\.seed = -1"),
    ],
)
def test_wrong_recipes_say_what_and_where_in_one_line(write, extra: str, overrides: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_recipe(write(MINIMAL + extra), overrides)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "name", ["No", "on", "1e5", "007", "1.5", "null", "~", "2024-01-01", "C: D", "#1", "[x]", "O'Brien", "李雷"]
)
def test_an_override_is_read_by_the_type_of_its_key(write, name: str) -> None:
    text = "model: {name: tiny}\ndata: {identity: {name: Ada, base: tiny}}\n"
    identity = load_recipe(
        write(text), [f"data.identity.name={name}", "data.identity.languages=[en, no]"]
    ).data.identity
    assert identity is not None
    assert identity.name == name
    assert identity.languages == ["en", "no"]


def test_text_of_an_override_may_stand_in_quotes_and_null_stays_null_where_it_means_something(write) -> None:
    quoted = load_recipe(write(MINIMAL), ["evaluation.system='Be kind: always'", 'data.path="a b.json"'])
    assert (quoted.evaluation.system, quoted.data.path) == ("Be kind: always", "a b.json")
    text = "model: {name: tiny}\ndata: {path: x, identity: {name: Ada, base: tiny}}\n"
    assert load_recipe(write(text), ["data.path=null"]).data.path is None
    assert load_recipe(write(MINIMAL), ["lora.targets=all-linear"]).lora.targets == "all-linear"
    assert load_recipe(write(MINIMAL), ["lora.targets=[q_proj, v_proj]"]).lora.targets == ["q_proj", "v_proj"]


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n"])
def test_an_empty_recipe_speaks_of_recipes_not_of_rows(write, text: str) -> None:
    with pytest.raises(InputError, match="is empty$|holds nothing but comments") as caught:
        load_recipe(write(text))
    assert "row" not in str(caught.value)


@pytest.mark.parametrize("text", ["just text", "- a list", "3"])
def test_a_file_that_is_no_mapping(write, text: str) -> None:
    with pytest.raises(InputError, match="not a recipe of keys and values"):
        load_recipe(write(text))


def test_unknown_names_bring_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean smollm2_135m_lora_alpaca_512_e1"):
        load_recipe("smollm2_135m_lora_alpaca")
    with pytest.raises(InputError, match="no such file"):
        load_recipe("absent.yaml")
    with pytest.raises(InputError, match="did you mean personal_assistant"):
        recipe_for("personal_asistant", "cpu")


def test_copy_keeps_comments_and_never_overwrites(tmp_path: Path) -> None:
    name = recipe_names("personal_assistant_256")[0]
    copy = copy_recipe(name, tmp_path)
    assert "#" in copy.read_text()
    copy.write_text("mine")
    with pytest.raises(InputError, match="already exists"):
        copy_recipe(name, tmp_path)
    assert copy.read_text() == "mine"


def test_pattern_ignores_case() -> None:
    assert recipe_names("ALPACA") == recipe_names("alpaca") != []


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_of_a_scale_is_for_the_model_of_that_scale(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.scale is None or recipe.model.name == DEFAULT_MODEL[recipe.scale]


@pytest.mark.parametrize("scale", DEFAULT_MODEL)
def test_the_dial_has_a_personal_assistant_at_every_scale(scale: str) -> None:
    assert recipe_for("personal_assistant", scale).model.name == DEFAULT_MODEL[scale]


def test_values_are_checked_when_set_later() -> None:
    recipe = make_recipe({"model": {"name": "tiny"}, "data": {"path": "x"}})
    with pytest.raises(ValueError, match="greater than 0"):
        recipe.training.lr = -1
