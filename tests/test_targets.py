"""Which modules are adapted: PEFT's rules, checked against PEFT itself, and what is refused."""

import json
import re
import time
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import dorac
from dorac import apply_dora
from dorac.apply import dora_layers
from dorac.bounded import Bounded
from dorac.names import Names, Pattern
from dorac.nn import DoraLinear
from dorac.targets import find_targets


def llama(bare=False):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    return (transformers.LlamaModel if bare else transformers.LlamaForCausalLM)(config)


def llama_model():
    return llama(bare=True)


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def experts():
    """Two levels of numbered modules, as in a mixture of experts, one of them at the top."""
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList(
        nn.ModuleDict(
            {"experts": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2)), "fc": nn.Linear(4, 4)}
        )
        for _ in range(2)
    )
    model.h = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(2))
    model.fc = nn.Linear(4, 4)
    return model


# name: (model, arguments of both LoraConfig and apply_dora)
SAME_AS_PEFT = {
    "endings": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "dotted endings": (llama, {"target_modules": ["self_attn.v_proj", "1.mlp.up_proj"]}),
    "full names": (llama, {"target_modules": ["model.layers.1.self_attn.q_proj", "lm_head"]}),
    "an ending that is no whole part": (llama, {"target_modules": ["proj", "k_proj"]}),
    "unknown names beside known ones": (llama, {"target_modules": ["query", "v_proj"]}),
    "regex": (llama, {"target_modules": r".*layers\.[02]\.self_attn\.(q|v)_proj"}),
    "all-linear": (llama, {"target_modules": "all-linear"}),
    "ALL-LINEAR": (llama, {"target_modules": "ALL-LINEAR"}),
    "all-linear without a head": (llama_model, {"target_modules": "all-linear"}),
    "exclude endings": (llama, {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "k_proj"]}),
    "exclude a full name": (
        llama,
        {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    ),
    "exclude a container": (llama, {"target_modules": ["q_proj"], "exclude_modules": ["self_attn", "mlp"]}),
    "exclude regex": (llama, {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.1\..*_proj"}),
    "one layer": (llama, {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1}),
    "layer zero": (llama, {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    "layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "no layers named": (llama, {"target_modules": ["q_proj"], "layers_to_transform": []}),
    "a pattern": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "patterns": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    "an empty pattern": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []}),
    "a top-level pattern": (
        llama_model,
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "a full name ignores the layers": (
        llama,
        {"target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": [1]},
    ),
    "the first number counts": (experts, {"target_modules": ["up", "fc"], "layers_to_transform": [1]}),
    "the number after a pattern counts": (
        experts,
        {"target_modules": ["up", "fc"], "layers_to_transform": [1], "layers_pattern": ["experts", "h"]},
    ),
    "rank and alpha by ending": (
        llama,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ),
    "rank by anchored name": (
        llama,
        {"target_modules": ["q_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}},
    ),
    "rank by longer ending": (llama, {"target_modules": ["q_proj"], "rank_pattern": {"layers.1.self_attn.q_proj": 2}}),
    "rank by regex": (
        llama,
        {
            "target_modules": "all-linear",
            "rank_pattern": {r"layers\.[01]\.mlp\..*": 2, "q_proj|k_proj": 3},
            "alpha_pattern": {".*up_proj": 1.5},
            "use_rslora": True,
        },
    ),
    "the first rank counts": (
        llama,
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {r"0\.self_attn\.q_proj": 2, "q_proj": 3, "self_attn.q_proj": 5},
        },
    ),
    "rank keys that match no whole ending": (
        llama,
        {"target_modules": ["q_proj"], "rank_pattern": {"proj": 2, "q_pro": 3, "layers.0": 5, "^layers.*": 7}},
    ),
    "rsLoRA": (llama, {"target_modules": ["q_proj"], "use_rslora": True, "rank_pattern": {"1.self_attn.q_proj": 5}}),
    "saved modules are not adapted": (
        llama,
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ),
    "inside saved modules neither": (
        llama,
        {"target_modules": "all-linear", "modules_to_save": ["layers.1.mlp", "2.self_attn"]},
    ),
    "saved norm": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "Conv1D endings": (gpt2, {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "Conv1D all-linear": (gpt2, {"target_modules": "all-linear"}),
    "Conv1D layer": (gpt2, {"target_modules": ["c_fc"], "layers_to_transform": 1, "layers_pattern": "h"}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "k_proj"], "rank_pattern": {"embed_tokens": 5}}),
    "embeddings by regex": (gpt2, {"target_modules": r".*\.w[tp]e", "alpha_pattern": {"wpe": 3}, "use_rslora": True}),
    "Conv1D regex": (gpt2, {"target_modules": r"transformer\.h\.\d\.attn\.c_.*", "modules_to_save": ["ln_f"]}),
}


@pytest.mark.parametrize("case", SAME_AS_PEFT)
def test_same_modules_ranks_and_scalings_as_peft(case):
    peft = pytest.importorskip("peft")
    build, arguments = SAME_AS_PEFT[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, **arguments)
        stock = peft.get_peft_model(build(), config).base_model.model
    expected = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in stock.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = apply_dora(model, r=4, lora_alpha=6, **arguments)
    layers = dora_layers(model)
    assert {name: (layer.r, layer.scaling) for name, layer in layers.items()} == expected
    assert names == list(layers)
    trained = {name.replace(".default", "") for name, p in stock.named_parameters() if p.requires_grad}
    trained = {re.sub(r"(lora_[AB]|lora_magnitude_vector)\.weight$", r"\1", name) for name in trained}
    trained = {name.replace(".modules_to_save", "") for name in trained}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


REFUSED_BY_PEFT_TOO = {
    "no such name": (llama, {"target_modules": ["query"]}),
    "a bare string is a whole regex": (llama, {"target_modules": "q_proj"}),
    "a regex for the beginning of names": (llama, {"target_modules": r"model\.layers\.\d\.self_attn\.q_pro"}),
    "no names": (llama, {"target_modules": []}),
    "all excluded": (llama, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}),
    "only saved": (llama, {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}),
    "no such layer": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [7]}),
    "no such pattern": (
        llama,
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    ),
    "the list of layers is at the top": (llama_model, {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "layers with a regex": (llama, {"target_modules": ".*q_proj", "layers_to_transform": [1]}),
    "pattern with a regex": (llama, {"target_modules": ".*q_proj", "layers_pattern": "layers"}),
    "pattern without layers": (llama, {"target_modules": ["q_proj"], "layers_pattern": "layers"}),
    "a container": (llama, {"target_modules": ["mlp"]}),
    "a regex that matches containers": (llama, {"target_modules": "model.*"}),
}


@pytest.mark.parametrize("case", REFUSED_BY_PEFT_TOO)
def test_refused_as_by_peft(case):
    peft = pytest.importorskip("peft")
    build, arguments = REFUSED_BY_PEFT_TOO[case]
    with pytest.raises(ValueError):  # noqa: PT011 (whatever PEFT says)
        peft.get_peft_model(build(), peft.LoraConfig(r=4, use_dora=True, **arguments))
    with pytest.raises(ValueError, match=r"matched no module|cannot be adapted|layers"):
        apply_dora(build(), **arguments)


def test_all_linear_may_be_limited_to_layers():
    """PEFT refuses the combination."""
    model = llama()
    names = apply_dora(model, "all-linear", layers_to_transform=[1], exclude_modules=["k_proj"])
    children = ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert [name.rpartition(".")[2] for name in names] == list(children)
    assert all(name.startswith("model.layers.1.") for name in names)


def small():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("names", [["0"], ("0",), {"0"}, frozenset({"0"}), r"(.*\.)?0"])
def test_names_may_be_any_collection(names):
    assert [t.name for t in find_targets(small(), names, r=2, lora_alpha=2)] == ["0", "2.0"]


def test_a_model_that_is_adapted_already_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    apply_dora(model, "all-linear", r=2)
    with pytest.raises(ValueError, match=r"adapted already \(0, 2\): dorac.add_adapter adds another"):
        apply_dora(model, "all-linear", r=2)


@pytest.mark.parametrize("leaves_out", [{"exclude_modules": ["0"]}, {"modules_to_save": ["0"]}])
def test_all_that_matched_is_left_out(leaves_out):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    expected = r"matched no module; exclude_modules, modules_to_save or layers_to_transform leave out 0$"
    with pytest.raises(ValueError, match=expected):
        apply_dora(model, ["0"], **leaves_out)


def test_nothing_matched_says_what_could_be():
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "act": nn.ReLU(), "attention": nn.MultiheadAttention(4, 2)})
    expected = r"target_modules \['fist'\] matched no module; modules of this model that could be: first$"
    with pytest.raises(ValueError, match=expected):
        apply_dora(model, ["fist"])
    with pytest.raises(
        ValueError, match=r"a string is a regex for the whole name, name endings go in a list; .* first$"
    ):
        apply_dora(nn.ModuleList([model]), "first")
    with pytest.raises(ValueError, match=r"this model holds none that could be adapted"):
        apply_dora(nn.Sequential(nn.ReLU()), ["first"])
    with pytest.raises(ValueError, match=r"the model is itself a Linear: wrap it with dorac.nn.DoraLinear"):
        apply_dora(nn.Linear(4, 4), "all-linear")


def test_nothing_matched_names_no_part_of_an_adapter():
    model = small()
    apply_dora(model, ["2.0"])
    with pytest.raises(ValueError, match=r"could be: 0$"):
        apply_dora(model, ["base_layer", "lora_A"])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.fc = nn.Linear(4, 4)
        self.up = nn.ConvTranspose2d(4, 4, 1)
        self.embedding = nn.Embedding(4, 4, max_norm=1)
        self.bag = nn.EmbeddingBag(4, 4)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def encoder_layer():
    return nn.ModuleDict({"encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1)})


UNADAPTABLE = {
    "attention": (Attention, ["attention"], "attention: MultiheadAttention is not supported"),
    "its projection": (Attention, ["out_proj"], "attention.out_proj: MultiheadAttention reads the weight of out_proj"),
    "all-linear meets attention": (
        Attention,
        "all-linear",
        r"attention: MultiheadAttention .*\n  attention.out_proj: MultiheadAttention",
    ),
    "feed-forward": (
        encoder_layer,
        ["linear1", "linear2"],
        r"0.linear1: TransformerEncoderLayer reads .*\n  encoder.layers.0.linear2: TransformerEncoderLayer reads",
    ),
    "the layer itself": (lambda: nn.TransformerEncoderLayer(4, 2, 8), ["linear1"], "linear1: TransformerEncoderLayer"),
    "transposed convolution": (Attention, ["up"], "up: ConvTranspose2d is not supported: transposed"),
    "embedding": (Attention, ["embedding"], "embedding: Embedding has max_norm=1"),
    "embedding bag": (Attention, ["bag"], "bag: EmbeddingBag is not supported, only nn.Linear"),
    "container": (lambda: nn.Sequential(small()), ["0"], r"0: Sequential is not supported"),
    "activation": (small, r".*1", "1: ReLU is not supported"),
    "own forward": (lambda: nn.ModuleList([ScaledLinear(4, 4)]), ["0"], "0: ScaledLinear has a forward of its own"),
    "compiled by itself": (lambda: nn.ModuleList([torch.compile(nn.Linear(4, 4))]), ["0"], r"0._orig_mod: is compiled"),
}


@pytest.mark.parametrize("case", UNADAPTABLE)
def test_unadaptable_modules_are_named(case):
    build, names, message = UNADAPTABLE[case]
    with pytest.raises(
        ValueError, match=r"these modules cannot be adapted \(name them in exclude_modules.*\n.*" + message
    ):
        apply_dora(build(), names)


def test_attention_under_two_names_is_refused_under_both():
    model = nn.ModuleDict({"a": Attention(), "b": nn.Module()})
    model["b"].attention = model["a"].attention
    with pytest.raises(ValueError, match=r"(?s)a.attention: .*b.attention: "):
        apply_dora(model, ["attention"])
    with pytest.raises(ValueError, match=r"b.attention: "):
        apply_dora(model, ["b.attention"])


def test_excluded_modules_are_left_alone():
    model = Attention()
    assert apply_dora(model, "all-linear", exclude_modules=["attention", "out_proj"]) == ["fc"]
    assert type(model.attention.out_proj) is not DoraLinear
    encoder = encoder_layer()
    encoder["fc"] = nn.Linear(4, 4)
    assert apply_dora(encoder, "all-linear", exclude_modules=r"encoder\..*") == ["fc"]


def test_adapted_modules_are_refused_by_name_and_skipped_by_all_linear():
    model = small()
    apply_dora(model, ["2.0"])
    with pytest.raises(ValueError, match=r"2.0: is adapted already"):
        apply_dora(model, ["0"])
    assert apply_dora(model, "all-linear") == ["0"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target_modules": "(q_proj"}, ValueError, r"target_modules is not a valid regex: '\(q_proj'"),
        ({"target_modules": 3}, TypeError, "target_modules must be a string or a list of strings, got 3"),
        ({"target_modules": [1]}, TypeError, r"target_modules must be .* got \[1\]"),
        ({"exclude_modules": "*"}, ValueError, r"exclude_modules is not a valid regex: '\*'"),
        ({"exclude_modules": [nn.Linear]}, TypeError, "exclude_modules must be a string or a list of strings"),
        ({"layers_to_transform": "1"}, TypeError, "layers_to_transform must be an integer or a list of integers"),
        ({"layers_to_transform": ["1"]}, TypeError, r"layers_to_transform must be .* got \['1'\]"),
        ({"rank_pattern": {"(": 2}}, ValueError, r"rank_pattern has a key that is not a valid regex: '\('"),
        ({"alpha_pattern": {"(": 2}}, ValueError, r"alpha_pattern has a key that is not a valid regex: '\('"),
        ({"rank_pattern": ["0"]}, TypeError, r"rank_pattern must map names to numbers, got \['0'\]"),
        ({"modules_to_save": "0"}, TypeError, "modules_to_save must be a list of names, got the string '0'"),
        ({"modules_to_save": [0]}, TypeError, "modules_to_save must be a string or a list of strings"),
        ({"modules_to_save": ["head"]}, ValueError, "modules_to_save: 'head' matches no module"),
    ],
)
def test_arguments_of_the_wrong_kind(arguments, error, message):
    with pytest.raises(error, match=message):
        apply_dora(small(), **{"target_modules": ["0"], **arguments})


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_pattern_keys_that_match_nothing_are_warned_about(pattern):
    """PEFT warns too; the rest of the call is honoured."""
    with pytest.warns(RuntimeWarning, match=rf"{pattern} has keys that match no adapted module: \['q_prj'\]"):
        assert apply_dora(small(), ["0"], **{pattern: {"q_prj": 2, "2.0": 3}}) == ["0", "2.0"]


@pytest.mark.parametrize(
    "names",
    [
        {"target_modules": ["0", "q_prj", "2.0", "no"]},
        {"target_modules": ["0", "2.0"], "exclude_modules": ["lm_head"]},
        {"target_modules": "all-linear", "exclude_modules": ["2.0", "lm_head"]},
        {"target_modules": ["0"], "exclude_modules": "lm_.*"},
    ],
    ids=lambda names: "-".join(map(str, names.values())),
)
def test_names_that_match_nothing_are_warned_about(names):
    """PEFT warns where nothing is excluded, and is silent where other targets are found."""
    argument = list(names)[-1]
    given = [names[argument]] if isinstance(names[argument], str) else names[argument]
    unmatched = sorted({"q_prj", "no", "lm_head", "lm_.*"}.intersection(given))
    with pytest.warns(RuntimeWarning) as caught:
        apply_dora(small(), **names)
    assert [str(warning.message) for warning in caught] == [f"{argument} has names that match no module: {unmatched}"]


def test_names_that_match_what_is_not_adapted_are_no_mistake():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert apply_dora(small(), ["0", "2.0"], exclude_modules=["2.0"]) == ["0"]
        assert apply_dora(small(), "0|3", exclude_modules="2.*") == ["0"]


def test_a_files_names_that_match_nothing_are_no_ones_mistake(tmp_path):
    model = small()
    apply_dora(model, ["0"], r=2, init_lora_weights=False)
    dorac.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    nothing = {"target_modules": ["0", "no"], "exclude_modules": ["no"], "rank_pattern": {"no": 3}}
    path.write_text(json.dumps(config | nothing | {"alpha_pattern": {"no": 3}}))
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # as PEFT writes it, without a digest of the config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dorac.load_adapter(small(), tmp_path) == ["0", "2.0"]


# --- names and patterns ----------------------------------------------------------------------------------------------

PARTS = st.sampled_from(["a", "b", "ab", "a_b", "axb", "0", "1"])
MODULES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
# Keys of every kind: escaped, anchored, with dots for any letter, and regexes.
KEYS = st.one_of(
    MODULES,
    MODULES.map(re.escape),
    MODULES.map(lambda name: f"^{re.escape(name)}"),
    MODULES.map(lambda name: f"^{name}$"),
    st.sampled_from(["a|b", "(a|b).a", ".*a", "b$", "^.b", ".", ".a", "a.*", "[ab]", r"^a\.(0|1)", "", "^", "a|^b.a"]),
)


def by_peft(pattern, name, default):
    """``peft.utils.get_pattern_key`` and the look-up with what it gives."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


@pytest.mark.parametrize("compile", [re.compile, "bounded"])
@settings(max_examples=200, deadline=None)
@given(keys=st.lists(KEYS, unique=True, max_size=6), names=st.lists(MODULES, min_size=1, max_size=8))
def test_patterns_mean_what_they_mean_to_peft(compile, keys, names):
    compile = Bounded().compile if compile == "bounded" else compile
    given = {key: number for number, key in enumerate(keys)}
    pattern = Pattern("rank_pattern", given, compile)
    assert [pattern.value(name, -1) for name in names] == [by_peft(given, name, -1) for name in names]
    unused = [key for key in keys if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)]
    assert pattern.unused() == unused


@settings(max_examples=200, deadline=None)
@given(
    named=st.one_of(st.lists(MODULES, max_size=5), st.lists(KEYS, min_size=1, max_size=3).map("|".join)), name=MODULES
)
def test_names_mean_what_they_mean_to_peft(named, name):
    if isinstance(named, str):
        expected = re.fullmatch(named, name) is not None
    else:
        expected = any(name == other or name.endswith(f".{other}") for other in named)
    assert Names("target_modules", named).match(name) == expected


PIECES = st.sampled_from(
    ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", "^", "$", r"\b", "(?=a)", "(?!b)", "a(?!.*b)", "]", "{"]
)
REPEATS = st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "*?", "+?", "??", "{2,}", "{0}"])
REGEXES = st.recursive(
    PIECES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, REPEATS).map(lambda pair: f"(?:{pair[0]}){pair[1]}"),
        st.tuples(PIECES, REPEATS).map("".join),
        inner.map(lambda regex: f"(?P<x{abs(hash(regex))}>{regex})"),
    ),
    max_leaves=8,
)


@settings(max_examples=500, deadline=None)
@given(regex=REGEXES, texts=st.lists(st.text("ab.]{", max_size=7), min_size=1, max_size=8))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_bounded_regex_answers_as_re_does(regex, texts):
    try:
        expected = re.compile(regex)
    except re.error:
        with pytest.raises(re.error):
            Bounded().compile(regex)
        return
    try:
        bounded = Bounded().compile(regex)
    except re.error as error:  # a repeat of "^" or of a look-ahead, which means nothing
        assert "plain regexes" in str(error)  # noqa: PT017
        assert re.search(r"[*+?}]\+", regex)
        return
    for text in texts:
        assert bounded.fullmatch(text) == (expected.fullmatch(text) is not None)


@pytest.mark.parametrize(
    "regex",
    [
        r".*layers\.[02]\.self_attn\.(q|v)_proj",
        r"^(?!.*vision).*(?:q_proj|k_proj|v_proj)$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn)"
        r"\.(?:(?:q_proj|v_proj)))",
        r"model\.layers\.(?P<number>\d+)\.mlp\.(up|down)_proj",
    ],
)
def test_regexes_that_people_write_are_taken_from_a_file(regex):
    """As those of vision models and of Unsloth."""
    names = [name for name, _ in llama().named_modules()] + ["vision.layers.0.q_proj", "language.1.self_attn.q_proj"]
    bounded = Bounded().compile(regex)
    found = [name for name in names if bounded.fullmatch(name)]
    assert found
    assert found == [name for name in names if re.fullmatch(regex, name)]


@pytest.mark.parametrize(
    "regex",
    [r"(a)\1", "(?P<x>a)(?P=x)", "(?<=a)b", "(?<!a)b", "(?i)a", "(?i:a)", "(?>a)b", "a*+", "(a)?(?(1)b|c)", "(?#c)a"],
)
def test_what_no_bounded_regex_is(regex):
    re.compile(regex)
    with pytest.raises(re.error, match="dorac takes only plain regexes from a file"):
        Bounded().compile(regex)


@pytest.mark.parametrize(
    "regex", ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(.*)*(.*)*(.*)*b", "((a{1,30}){1,30}){1,30}b", "(a?){40}a{40}b"]
)
def test_steps_are_few_where_re_takes_forever(regex):
    bounded = Bounded(steps=10**6).compile(regex)
    assert not bounded.fullmatch("a" * 200)
    assert bounded.fullmatch("a" * 60 + "b")


def test_steps_are_counted_over_all_regexes_and_names():
    bounded = Bounded(steps=2000)
    first, second = bounded.compile("(a*)*b"), bounded.compile(".*a")
    first.fullmatch("a" * 200)
    second.fullmatch("a" * 40)
    with pytest.raises(ValueError, match=r"takes too many steps to match, .*: '\.\*a'"):
        second.fullmatch("a" * 2000)


def test_a_thousand_keys_are_each_compiled_once(monkeypatch):
    """re keeps 512; the time is that of the look-ups."""
    model = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(2, 2)}) for _ in range(1000))
    compiled = []
    monkeypatch.setattr(
        re._compiler, "compile", lambda *args, real=re._compiler.compile: (compiled.append(args), real(*args))[1]
    )
    kinds = (lambda i: rf"^{i}\.up", lambda i: f"{i}.up", lambda i: rf"{i}\.(up|down)")
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the dot of "1.up" stands for a letter of "11up" too, which is none here
        targets = find_targets(
            model, "all-linear", r=1, lora_alpha=1, rank_pattern={kinds[i % 2](i): i + 1 for i in range(1000)}
        )
        assert [t.r for t in targets] == [i + 1 for i in range(1000)]
        assert len(compiled) < 10
        few = {kinds[2](i): i + 1 for i in range(600)}
        targets = find_targets(nn.ModuleList(list(model)[:600]), "all-linear", r=1, lora_alpha=1, rank_pattern=few)
    assert [t.r for t in targets] == [i + 1 for i in range(600)]
    assert len(compiled) < 620
    assert time.process_time() - start < 20
