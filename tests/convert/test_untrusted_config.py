"""A config from anyone: numbers, nesting, patterns and fields that lorafast doesn't know."""

import json
import re
import sys

import pytest
import torch
from adapter_files import CONFIG, good_config, write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lorafast
from lorafast.convert.bounded_regex import BoundedRegex
from lorafast.convert.peft_format import parse_config

peft = pytest.importorskip("peft")

HUGE = "1" + "0" * 400
LONGER_THAN_PYTHON_READS = "1" * 5000
DEEP = "[" * 100_000 + "]" * 100_000
NESTED = "[" * 700 + "]" * 700


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, HUGE) for field in ("r", "lora_alpha", "lora_dropout")),
        *((f"{field}_pattern", f'{{"up": {HUGE}}}') for field in ("rank", "alpha")),
        *(
            (field, number)
            for field in ("r", "lora_alpha", "lora_dropout", "layers_to_transform")
            for number in ("NaN", "Infinity", "-Infinity")
        ),
        ("alpha_pattern", '{"up": NaN}'),
        ("lora_alpha", "1e999"),
        ("r", "4294967296000"),
        ("target_modules", NESTED),
        ("exclude_modules", NESTED),
        ("rank_pattern", NESTED),
        ("init_lora_weights", NESTED),
        ("use_rslora", NESTED),
        ("use_dora", NESTED),
        ("init_lora_weights", '"a_start_of_the_future"'),
    ],
    ids=lambda text: text[:20],
)
def test_refuses_a_value_by_file_and_field(net, unchanged, tmp_path, field, value):
    _write(tmp_path, field, value)
    with unchanged(net), pytest.raises(ValueError, match=rf"{field} in .*{CONFIG}") as caught:
        lorafast.load_adapter(net, tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("value", [DEEP, LONGER_THAN_PYTHON_READS], ids=["deep", "digits"])
@pytest.mark.parametrize("field", ["r", "lora_alpha", "target_modules", "anything"])
def test_refuses_what_python_does_not_read_by_file(net, unchanged, tmp_path, field, value):
    _write(tmp_path, field, value)
    with unchanged(net), pytest.raises(ValueError, match=f"{CONFIG} is not JSON"):
        lorafast.load_adapter(net, tmp_path)


def _write(folder, field, value):
    write_adapter(folder)
    other = {k: v for k, v in good_config().items() if k != field}
    (folder / CONFIG).write_text(json.dumps(other)[:-1] + f', "{field}": {value}}}')


# Each needs more than the age of the world, searched as re searches.
SLOW = [r"(\w+\w*)+!", r"(a|aa|\w)+!", r"(?:\w?){60}!", "(.*)*!", "(.*.*)+!", ".*.*.*.*.*.*.*.*.*!"]
LONG = "a" * 200


@pytest.fixture
def net_of_long_names():
    block = nn.ModuleDict({"up": nn.Linear(5, 7), "down": nn.Linear(7, 3)})
    return nn.ModuleDict({LONG: block, "block": block})


@pytest.mark.parametrize("regex", SLOW)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_a_regex_in_a_file_does_not_hang(net_of_long_names, tmp_path, field, regex):
    folder = write_adapter(tmp_path, config={field: regex})
    with pytest.raises(ValueError, match=r"doesn't target|doesn't have|has an adapter for"):
        lorafast.load_adapter(net_of_long_names, folder)


@pytest.mark.parametrize("regex", SLOW)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_key_in_a_file_does_not_hang(net, tmp_path, field, regex):
    config = {field: {regex: 9}, "target_modules": "block\\.(up|down)"}
    lorafast.load_adapter(net, write_adapter(tmp_path, config=config))
    assert (net.block.up.r, net.block.up.alpha) == (2, 5)


@pytest.mark.parametrize("regex", SLOW)
def test_a_layers_pattern_in_a_file_does_not_hang(net, unchanged, tmp_path, regex):
    config = {"layers_pattern": [regex], "layers_to_transform": [0]}
    sentence = rf"layers_pattern in .* is {re.escape(repr(regex))}, a regex with too many ways"
    with unchanged(net), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(net, write_adapter(tmp_path, config=config))


@pytest.mark.parametrize("regex", [r"((\w+)\w*)+\2!", r"(?>\w+\w*)+!"])
def test_names_a_regex_that_has_no_bound(net, unchanged, tmp_path, regex):
    try:
        re.compile(regex)
    except re.error:
        pytest.skip("Python 3.10 has no atomic groups")
    folder = write_adapter(tmp_path, config={"target_modules": regex})
    with unchanged(net), pytest.raises(ValueError, match=r"target_modules in .*too many ways"):
        lorafast.load_adapter(net, folder)


@pytest.mark.parametrize("key", ["(?i)up", "(", "a{99999999999}", "(" * 3000 + ")" * 3000])
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_names_a_key_that_is_no_regex_where_peft_puts_it(net, unchanged, tmp_path, field, key):
    if key == "(?i)up" and sys.version_info < (3, 11):
        pytest.skip("Python 3.10 takes flags anywhere")
    folder = write_adapter(tmp_path, config={field: {key: 2}})
    sentence = rf"a key of {field} in .* is '{re.escape(key[:50])}.*not a regex"
    with unchanged(net), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(net, folder)


@pytest.mark.parametrize(
    "regex",
    [
        r".*\.layers\.\d+\.self_attn\.(q|v)_proj",
        r"(?:.*\.)?(q_proj|k_proj)$",
        r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*$",
        r"(?i)MODEL\.LAYERS\.(?:[02468]|1[0-9])\..*proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q|k|v)_proj.*?)|(?:\bmodel\.layers\.\d+\..*)",
        r"(\w+\.)+q_proj",
        r"(.*)_\1\.q_proj",
    ],
)
def test_serves_the_regexes_of_users_as_re_does(regex):
    names = [
        f"{root}layers.{i}.{block}.{leaf}"
        for root in ("model.", "base.visual.", "a_a.", "language_model.model.", "")
        for i in (0, 7, 13)
        for block in ("self_attn", "mlp")
        for leaf in ("q_proj", "o_proj", "fc")
    ] + ["q_proj", "lm_head", "a_a.q_proj"]
    bounded = BoundedRegex("target_modules", regex)
    for name in names:
        assert bounded.fullmatch(name) == (re.fullmatch(regex, name) is not None), name
        assert bounded.match(name) == (re.match(regex, name) is not None), name


ATOMS = ["a", "b", ".", r"\w", "[ab]", "[^a]", "^", "$", r"\b", r"\B", "(?=a)", "(?!b)", "(?<=a)",
         "(?<!ab)", "(?i:A)", r"\.", r"\d", ""]  # fmt: skip
REGEXES = st.recursive(
    st.sampled_from(ATOMS),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(
            inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{0,3}", "{2,}"])
        ).map("({0[0]}){0[1]}".format),
    ),
    max_leaves=8,
)


@settings(max_examples=400)
@given(regex=REGEXES, text=st.text("aabA.b0", max_size=7))
def test_following_all_ways_at_once_finds_what_re_finds(regex, text):
    bounded = BoundedRegex("regex", regex)
    bounded._few = False
    assert bounded.fullmatch(text) == (re.fullmatch(regex, text) is not None)
    assert bounded.match(text) == (re.match(regex, text) is not None)


# Fields


@pytest.mark.parametrize("value", [True, 5, -1.5, "on", [1], {"a": 1}], ids=str)
def test_refuses_a_field_that_it_does_not_know(net, unchanged, tmp_path, value):
    folder = write_adapter(tmp_path, config={"a_field_of_the_future": value})
    sentence = f"a_field_of_the_future in .* is {re.escape(repr(value))}, a field that lorafast"
    with unchanged(net), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(net, folder)


@pytest.mark.parametrize("value", [False, [], {}, "", 0], ids=str)
def test_takes_a_field_that_it_does_not_know_without_a_value(net, tmp_path, value):
    lorafast.load_adapter(net, write_adapter(tmp_path, config={"a_field_of_the_future": value}))
    assert net.block.up.r == 2


# What PEFT's releases write with their default settings.
DEFAULTS = {
    "0.20": {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
        "auto_mapping": None, "base_model_name_or_path": None, "bias": "none", "corda_config": None,
        "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
        "loftq_config": {}, "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.0,
        "lora_ga_config": None, "megatron_config": None, "megatron_core": "megatron.core",
        "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA",
        "peft_version": "0.20.0", "qalora_group_size": 16, "r": 8, "rank_pattern": {},
        "revision": None, "target_modules": ["up"], "target_parameters": None, "task_type": None,
        "trainable_token_indices": None, "use_bdlora": None, "use_dora": False, "use_qalora": False,
        "use_rslora": False, "velora_config": None,
    },
}  # fmt: skip
DEFAULTS["0.21"] = DEFAULTS["0.20"] | {"kasa_config": None, "peft_version": "0.21.2"}


@pytest.mark.parametrize("release", DEFAULTS)
def test_takes_what_a_release_of_peft_writes_by_default(tmp_path, release):
    config = parse_config(DEFAULTS[release], tmp_path / CONFIG)
    assert (config.r, config.lora_alpha) == (8, 8.0)


def test_takes_what_this_peft_writes_by_default(tmp_path):
    peft.LoraConfig(target_modules=["up"]).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / CONFIG).read_text())
    assert len(raw) > 35
    assert parse_config(raw, tmp_path / CONFIG).r == 8


# Keys


@pytest.mark.parametrize(
    ("keys", "shown"),
    [
        (["lora_unet_up.lora_down.weight", "lora_unet_up.lora_up.weight"], "lora_unet_up.lora_do"),
        (["base_model.model.block.up.lora_A.default.weight"], "block.up.lora_A.default.weight"),
        (["block.up.weight", "norm.weight"], "'block.up.weight', 'norm.weight'"),
        ([], "its names are none"),
    ],
    ids=["kohya", "with-the-adapters-name", "a-model", "empty"],
)
def test_shows_names_of_another_layout(net, unchanged, tmp_path, keys, shown):
    none = dict.fromkeys(f"base_model.model.block.{n}.lora_{h}.weight" for n in ("up", "down")
                         for h in "AB")  # fmt: skip
    folder = write_adapter(tmp_path, none | {key: torch.ones(2, 2) for key in keys})
    sentence = rf"no LoRA tensors.*{re.escape(shown)}.*expected PEFT's"
    with unchanged(net), pytest.raises(ValueError, match=sentence):
        lorafast.load_adapter(net, folder)
