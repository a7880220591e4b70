"""Models with convolutions: apply, merge, and adapters that go to stock PEFT and back."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dorac
from dorac.apply import dora_layers
from dorac.nn import DoraConv1d, DoraConv2d, DoraConv3d, DoraLinear

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")


class Model(nn.Module):
    """Convolutions of every dimension, with strides and paddings, a grouped one and a depthwise one."""

    def __init__(self):
        super().__init__()
        self.volume = nn.Conv3d(1, 3, (2, 3, 3), stride=(1, 2, 1), padding=(0, 1, 1))
        self.plane = nn.Conv2d(9, 8, 3, padding="same", bias=False)
        self.mix = nn.Conv2d(8, 8, (3, 1), groups=4, padding=(1, 0))
        self.line = nn.Conv1d(8, 6, 4, stride=2)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.volume(x).tanh().flatten(1, 2)
        x = self.mix(self.plane(x).tanh()).tanh().flatten(2)
        return self.head(self.depthwise(self.line(x).tanh()).mean(-1))


PLAIN = ["volume", "plane", "line", "head"]
GROUPED = ["mix", "depthwise"]
X = torch.linspace(-1, 1, 2 * 4 * 6 * 5).sin().reshape(2, 1, 4, 6, 5)


def build():
    return Model().eval()


def adapted(model, targets, **options):
    """Wrapped and away from the initial state."""
    names = dorac.apply_dora(model, targets, **{"r": 12, "lora_alpha": 10, **options})
    assert set(names) == set(targets)
    with torch.no_grad():
        for layer in dora_layers(model).values():
            layer.lora_B.normal_(std=0.2)
            layer.lora_magnitude_vector.mul_(0.8 + 0.4 * torch.rand_like(layer.lora_magnitude_vector))
    return model


def stock_adapted(model, targets, **options):
    peft = pytest.importorskip("peft")
    options = {"r": 12, "lora_alpha": 10, **options}
    stock = peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, use_dora=True, **options)).eval()
    with torch.no_grad():
        for name, p in stock.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
            elif "magnitude" in name:
                p.mul_(0.8 + 0.4 * torch.rand_like(p))
    return stock


def stock_loaded(model, directory):
    return pytest.importorskip("peft").PeftModel.from_pretrained(model, directory).eval()


def file_of(directory):
    return load_file(directory / "adapter_model.safetensors")


def assert_same_file(directory, other):
    mine, theirs = file_of(directory), file_of(other)
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        assert (tensor.shape, tensor.dtype) == (theirs[key].shape, theirs[key].dtype)
        assert torch.equal(tensor, theirs[key])


def assert_same_output(actual, expected, plain):
    """To 1e-5 of the largest output, float32 through two ways of adding up six layers, of which the adapter is some."""
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (expected - plain).abs().max() > 1e-3 * expected.abs().max()


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True, "rank_pattern": {"plane": 2}, "alpha_pattern": {"line": 3}}]
)
@torch.no_grad()
def test_dorac_to_peft_to_dorac(options, tmp_path):
    plain = build()
    model = adapted(copy.deepcopy(plain), PLAIN, **options)
    dorac.save_adapter(model, tmp_path / "dorac")
    stock = stock_loaded(copy.deepcopy(plain), tmp_path / "dorac")
    assert_same_output(stock(X), model(X), plain(X))
    stock.save_pretrained(tmp_path / "peft")
    assert_same_file(tmp_path / "dorac", tmp_path / "peft")
    again = copy.deepcopy(plain)
    assert dorac.load_adapter(again, tmp_path / "peft") == list(dora_layers(model))
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("wrapped", [False, True])
@torch.no_grad()
def test_peft_to_dorac(wrapped, tmp_path):
    plain = build()
    stock = stock_adapted(copy.deepcopy(plain), PLAIN)
    stock.save_pretrained(tmp_path)
    model = adapted(copy.deepcopy(plain), PLAIN) if wrapped else copy.deepcopy(plain)
    dorac.load_adapter(model, tmp_path)
    assert_same_output(model(X), stock(X), plain(X))
    assert [type(m) for m in dora_layers(model).values()] == [DoraConv3d, DoraConv2d, DoraConv1d, DoraLinear]


@torch.no_grad()
def test_grouped_adapters_go_through_peft_unchanged(tmp_path):
    """Their tensors do; what PEFT computes with them is another norm (test_conv_module)."""
    plain = build()
    model = adapted(copy.deepcopy(plain), [*PLAIN, *GROUPED])
    dorac.save_adapter(model, tmp_path / "dorac")
    stock_loaded(copy.deepcopy(plain), tmp_path / "dorac").save_pretrained(tmp_path / "peft")
    assert_same_file(tmp_path / "dorac", tmp_path / "peft")
    again = copy.deepcopy(plain)
    dorac.load_adapter(again, tmp_path / "peft")
    assert torch.equal(again(X), model(X))


@pytest.mark.parametrize("wrapped", [False, True])
@torch.no_grad()
def test_grouped_lora_A(wrapped, tmp_path):
    """dorac's own layout: found in the file, applied with groups, and mergeable."""
    plain, targets = build(), [*PLAIN, *GROUPED]
    model = adapted(copy.deepcopy(plain), targets, grouped_lora_A=True)
    assert model.mix.lora_A.shape == (12, 2, 3, 1)
    assert model.depthwise.lora_A.shape == (12, 1, 3)
    dorac.save_adapter(model, tmp_path)
    other = copy.deepcopy(plain)
    if wrapped:
        adapted(other, targets, grouped_lora_A=True)
    dorac.load_adapter(other, tmp_path)
    assert torch.equal(other(X), model(X))
    before = model(X)
    dorac.merge(model)
    torch.testing.assert_close(model(X), before)
    dorac.unmerge(model)
    torch.testing.assert_close(model(X), before)
    merged = dorac.merge(model, unload=True)
    assert {type(m) for m in merged.children()} == {nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear}
    torch.testing.assert_close(merged(X), before)


def test_layouts_are_not_confused(tmp_path):
    dorac.save_adapter(adapted(build(), GROUPED, grouped_lora_A=True), tmp_path)
    with pytest.raises(
        ValueError, match=r"shape of .*mix\.lora_A\.weight: the model has \[12, 8, 3, 1\], the file \[12"
    ):
        dorac.load_adapter(adapted(build(), GROUPED), tmp_path)


def test_merge_refuses_pefts_grouped_layout_by_name():
    model = adapted(build(), ["plane", "mix"])
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^mix: cannot merge into Conv2d with groups=4"):
        dorac.merge(model)
    assert not any(layer.merged for layer in dora_layers(model).values())
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_a_rank_that_groups_do_not_divide_is_refused_by_name():
    model = build()
    with pytest.raises(ValueError, match=r"mix: r must be divisible by the groups of Conv2d, 4, got 6"):
        dorac.apply_dora(model, ["plane", "mix", "depthwise"], r=6)
    assert not dora_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    assert dorac.apply_dora(model, ["plane", "mix"], r=6, rank_pattern={"mix": 8}) == ["plane", "mix"]


def test_transposed_convolutions_stay_refused():
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(4, 4, 2), "down": nn.Conv1d(4, 4, 2)})
    with pytest.raises(ValueError, match="up: ConvTranspose1d is not supported: transposed"):
        dorac.apply_dora(model, ["up", "down"])
    assert dorac.apply_dora(model, ["down"]) == ["down"]


@pytest.mark.parametrize("kind", ["Mamba", "Lfm2"])
def test_convolutions_that_kernels_read_are_refused(kind):
    """Causal convolution kernels are handed the weight itself: an adapter around it would be ignored on CUDA."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1}
    if kind == "Lfm2":
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["conv"], "pad_token_id": 0}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))
    (name,) = [name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)]
    with pytest.raises(ValueError, match=rf"{name}: {kind}\w+ reads the weight of conv\w* past its forward"):
        dorac.apply_dora(model, [name])


def test_all_linear_leaves_convolutions_alone():
    assert dorac.apply_dora(build(), "all-linear") == ["head"]


def test_training_learns():
    model = adapted(build(), [*PLAIN, *GROUPED])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    target = torch.randn(2, 5)
    losses = []
    for _ in range(10):
        loss = nn.functional.mse_loss(model(X), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.count_nonzero() for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
