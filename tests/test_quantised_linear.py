"""``DoraQuantLinear``: DoRA over layers that hold packed weights, held to the textbook over the dequantised weight.

Stand-ins for the libraries' layers run everywhere, those of bitsandbytes, torchao, HQQ and transformers where they are
installed. Where such a layer's product needs a GPU, it runs here with the product of the dequantised weight.
"""

import copy
import importlib.util
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dorac
from dorac import packed, quantise, reference
from dorac.nn import DoraQuantLinear, norm_cache
from dorac.testing import layer_budgets, linear_inputs
from dorac.testing import quantised_layers as fake

S = 0.7
PLAIN = torch.Tensor.__torch_dispatch__


def fake_4bit(linear):
    layer = fake.Linear4bit(*linear.weight.shape[::-1], bias=linear.bias is not None, dtype=linear.weight.dtype)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def fake_8bit(linear):
    layer = fake.Linear8bitLt(*linear.weight.shape[::-1], bias=linear.bias is not None, dtype=linear.weight.dtype)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def fake_hqq(linear):
    return fake.HQQLinear(linear, {"bits": 12, "offload_meta": False}, linear.weight.dtype)


def bnb_4bit(linear, quant_type="nf4"):
    from bitsandbytes.nn import Linear4bit

    out_features, in_features = linear.weight.shape
    options = {"compute_dtype": linear.weight.dtype, "quant_type": quant_type}
    layer = Linear4bit(in_features, out_features, bias=linear.bias is not None, **options).to(linear.weight.dtype)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def bnb_fp4(linear):
    return bnb_4bit(linear, "fp4")


def bnb_8bit(linear):
    from bitsandbytes.nn import Linear8bitLt

    layer = Linear8bitLt(*linear.weight.shape[::-1], bias=linear.bias is not None, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def torchao_layer(linear, config):
    from torchao.quantization import quantize_

    layer = copy.deepcopy(linear)
    quantize_(layer, config)
    return layer


def torchao_int8(linear):
    from torchao.quantization import Int8WeightOnlyConfig

    return torchao_layer(linear, Int8WeightOnlyConfig())


def torchao_int8_group(linear):
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return torchao_layer(linear, Int8WeightOnlyConfig(granularity=PerGroup(32)))


def torchao_float8(linear):
    from torchao.quantization import Float8WeightOnlyConfig

    return torchao_layer(linear, Float8WeightOnlyConfig())


def torchao_nvfp4(linear):
    from torchao.prototype.mx_formats.inference_workflow import NVFP4WeightOnlyConfig

    return torchao_layer(linear, NVFP4WeightOnlyConfig())


def torchao_int4(linear):
    return quantise.quantise(copy.deepcopy(linear), "int4")


def torchao_intx(linear):
    """A format that no value stands for."""
    from torchao.quantization import IntxWeightOnlyConfig

    return torchao_layer(linear, IntxWeightOnlyConfig(torch.int4))


def fp8_linear(linear, block_size=(32, 32)):
    from transformers.integrations import finegrained_fp8

    if not hasattr(finegrained_fp8, "FP8LinearFunction"):
        pytest.skip("of an earlier transformers, whose FP8Linear runs on a GPU alone")
    out_features, in_features = linear.weight.shape
    layer = finegrained_fp8.FP8Linear(in_features, out_features, block_size, has_bias=linear.bias is not None)
    blocks = linear.weight.float().view(out_features // 32, 32, in_features // 32, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    layer.weight.data = (blocks / scale[:, None, :, None]).view(linear.weight.shape).to(layer.weight.dtype)
    layer.weight_scale_inv.data = scale
    layer.bias = linear.bias
    return layer.requires_grad_(False)


@pytest.fixture(autouse=True, scope="module")
def products():
    """Of int4 and of FP8Linear, for the CPU; as on a GPU that of int4 has no derivative (MSLK registers none)."""
    library = torch.library.Library("mslk", "FRAGMENT")
    schema = "bf16i4bf16_rowwise(Tensor X, Tensor W, Tensor w_scale_group, Tensor w_zero_group) -> Tensor"

    @torch.no_grad()
    def int4(x, codes, scale, zero):
        shape = codes.shape[0], 2 * codes.shape[1]
        value = packed.TorchaoInt4(codes, scale, zero, shape, scale.dtype, shape[1] // scale.shape[0])
        return F.linear(x, value.rows(0, shape[0]))

    def float8(x, weight, scale, block_size, bias, *_):
        rows, columns = weight.shape
        scale = scale.repeat_interleave(block_size[0], 0)[:rows].repeat_interleave(block_size[1], 1)[:, :columns]
        return F.linear(x, (weight.float() * scale).to(x.dtype), bias)

    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("mslk") is None:
            library.define(schema)
            library.impl("bf16i4bf16_rowwise", int4, "CPU")
            torch.library.register_fake("mslk::bf16i4bf16_rowwise", lib=library)(
                lambda x, codes, *_: x.new_empty(x.shape[0], codes.shape[0])
            )
        if importlib.util.find_spec("transformers") is not None:
            patch.setattr("transformers.integrations.finegrained_fp8.fp8_linear", float8, raising=False)
        yield
    library._destroy()


def hqq_4bit(linear):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    frozen = copy.deepcopy(linear).requires_grad_(False)
    config = BaseQuantizeConfig(nbits=4, group_size=32)
    return HQQLinear(frozen, config, compute_dtype=linear.weight.dtype, device="cpu", initialize=True)


LIBRARIES = {
    bnb_4bit: "bitsandbytes",
    bnb_fp4: "bitsandbytes",
    bnb_8bit: "bitsandbytes",
    torchao_int8: "torchao",
    torchao_int8_group: "torchao",
    torchao_float8: "torchao",
    torchao_nvfp4: "torchao",
    torchao_int4: "torchao",
    torchao_intx: "torchao",
    fp8_linear: "transformers",
    hqq_4bit: "hqq",
}


def parameters(*schemes):
    return [
        pytest.param(
            scheme,
            id=scheme.__name__,
            marks=pytest.mark.skipif(
                scheme in LIBRARIES and importlib.util.find_spec(LIBRARIES[scheme]) is None,
                reason=f"needs {LIBRARIES.get(scheme)}",
            ),
        )
        for scheme in schemes
    ]


FAKES = (fake_4bit, fake_8bit, fake_hqq)
SCHEMES = parameters(*FAKES, *LIBRARIES)
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
REFUSED = {  # where they are merged, and why
    torchao_int4: r"torchao cannot quantise to int4 here: Requires mslk",
    torchao_intx: r"a torchao weight .Linear. cannot be quantised again here",
    fp8_linear: r"a float8 weight of transformers .FP8Linear. cannot be quantised again here",
}
each_that_merges = pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.values[0] not in REFUSED])


# In-features are a multiple of 64: of other weights bitsandbytes misreads the blocks on the CPU (0.50).
def linear(out_features=128, in_features=64, dtype=torch.float32, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)


def off_init(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, dorac.nn.DoraLayer):
                layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
                layer.lora_magnitude_vector.mul_(0.8 + 0.4 * torch.rand(layer.out_features, generator=generator))
    return model


def quiet(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def model_of(scheme, **options):
    model = nn.Sequential(scheme(linear()), nn.Tanh(), scheme(linear(64, 128, seed=2)))
    quiet(dorac.apply_dora, model, ["0", "2"], r=4, lora_alpha=4 * S, **options)
    return off_init(model)


def dense_of(layer):
    """The weight that a base layer multiplies with."""
    weight = packed.weight_of(layer)
    return weight if isinstance(weight, torch.Tensor) else weight.rows(0, weight.shape[0])


def layer_of(scheme, dtype=torch.float32, bias=True, leading=(5,), **options):
    """The layer with an adapter off its start, an x for it, and what the textbook computes with."""
    rows = torch.Size(leading).numel()
    inputs = linear_inputs((rows, 128, 64, 4), dtype=dtype, factor_dtype=torch.float32, bias=bias)
    plain = nn.Linear(64, 128, bias=bias, dtype=dtype)
    plain.load_state_dict({"weight": inputs.weight} | ({"bias": inputs.bias} if bias else {}))
    layer = DoraQuantLinear(scheme(plain.requires_grad_(False)), r=4, lora_alpha=4 * S, **options)
    with torch.no_grad():
        for name, value in (("lora_A", inputs.lora_A), ("lora_B", inputs.lora_B)):
            getattr(layer, name).copy_(value)
        layer.lora_magnitude_vector.copy_(inputs.magnitude)
    x = inputs.x.reshape(*leading, 64).requires_grad_()
    dense = dense_of(layer.base_layer)
    return layer, x, (inputs.x, dense, inputs.lora_A, inputs.lora_B, inputs.magnitude, inputs.bias), inputs.sums()


def run(layer, x, compiled):
    return torch.compile(layer, fullgraph=True, backend="aot_eager")(x) if compiled else layer(x)


def check(layer, x, tensors, sums, y, *, casts=0, dtype=None, **options):
    """y, and every gradient, against float64; the base layer has its product, its bias and the sum rounded."""
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], 128)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    y.backward(dy)
    budgets = layer_budgets(
        reference.dora_linear,
        reference.row_norm,
        tensors,
        sums,
        scaling=S,
        dy=dy.view(-1, 128),
        casts=casts + 3,
        dtype=dtype or x.dtype,
        **options,
    )
    actual = {
        "y": y.view(-1, 128),
        "x": x.grad.view(-1, 64),
        "lora_A": layer.lora_A.grad,
        "lora_B": layer.lora_B.grad,
        "magnitude": layer.lora_magnitude_vector.grad,
    }
    for name, value in actual.items():
        budgets[name].check(value.to(budgets[name].truth.device), name)
    assert all(p.grad is None for p in layer.base_layer.parameters())


class TestValues:
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("bias", [True, False])
    @each_scheme
    def test_float32(self, scheme, bias, compiled):
        layer, x, *rest = layer_of(scheme, bias=bias)
        check(layer, x, *rest, run(layer, x, compiled))

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize(
        "scheme",
        parameters(fake_4bit, bnb_4bit, torchao_int8, torchao_float8, torchao_int4, torchao_nvfp4, fp8_linear),
    )
    def test_bfloat16(self, scheme, compiled):
        layer, x, *rest = layer_of(scheme, torch.bfloat16)
        rounded = scheme is fp8_linear  # its weight in the product here, and everywhere in backward
        check(layer, x, *rest, run(layer, x, compiled), casts=int(rounded))
        assert layer.lora_A.grad.dtype is torch.float32

    @pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 1, 3), (0,)])
    @pytest.mark.parametrize("scheme", parameters(fake_4bit, torchao_int8))
    def test_dimensions_of_x(self, scheme, leading):
        layer, x, *rest = layer_of(scheme, leading=leading)
        check(layer, x, *rest, layer(x))

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("dropout_on", ["adapter", "low_rank"])
    @each_scheme
    def test_dropout(self, scheme, dropout_on, compiled):
        layer, x, *rest = layer_of(scheme, lora_dropout=0.4, dropout_on=dropout_on)
        torch.manual_seed(5)
        dropped = F.dropout(torch.ones_like(x), 0.4)
        torch.manual_seed(5)
        y = run(layer, x, compiled)
        check(layer, x, *rest, y, casts=2, dropped=dropped, dropout_on=dropout_on)
        with torch.no_grad():
            assert torch.equal(layer.eval()(x), layer(x))

    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    @pytest.mark.parametrize("scheme", [s for s in SCHEMES if "hqq" not in s.id])
    def test_a_trained_bias(self, scheme, dropout):
        """It is added once, whatever g is; HQQ's is no parameter."""
        layer, x, *_ = layer_of(scheme, lora_dropout=dropout)
        layer.base_layer.bias = nn.Parameter(layer.base_layer.bias.detach().clone())
        dy = torch.randn(5, 128)
        layer(x.detach()).backward(dy)
        torch.testing.assert_close(layer.base_layer.bias.grad, dy.sum(0))

    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("scheme", parameters(fake_4bit, bnb_4bit))
    def test_autocast(self, scheme, compiled, dropout):
        """The base layer returns float32, its compute dtype; the low-rank branch runs in bfloat16."""
        layer, x, *rest = layer_of(scheme, lora_dropout=dropout)
        torch.manual_seed(5)
        options = {"dropped": F.dropout(torch.ones_like(x), dropout)} if dropout else {}
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            y = run(layer, x, compiled)
        check(layer, x, *rest, y, casts=5, dtype=torch.bfloat16, **options)

    @each_scheme
    def test_starts_as_the_base_layer(self, scheme):
        base = scheme(linear())
        layer = DoraQuantLinear(base, r=4)
        x = torch.randn(5, 64)
        assert torch.equal(layer(x), base(x))
        assert (layer.lora_A.dtype, layer.lora_B.dtype, layer.lora_magnitude_vector.dtype) == (torch.float32,) * 3
        torch.testing.assert_close(layer.lora_magnitude_vector.detach(), dense_of(base).float().norm(dim=1))

    def test_adapter_dtype(self):
        layer = DoraQuantLinear(fake_4bit(linear(dtype=torch.bfloat16)), adapter_dtype=torch.bfloat16)
        assert (layer.lora_A.dtype, layer.lora_magnitude_vector.dtype) == (torch.bfloat16, torch.float32)
        layer.to(torch.float16)
        assert (layer.lora_A.dtype, layer.lora_magnitude_vector.dtype) == (torch.float16, torch.float32)
        assert layer.weight.dtype is torch.uint8

    def test_the_base_layer_runs_its_hooks(self):
        layer, x, *_ = layer_of(fake_4bit)
        calls = []
        layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
        layer(x)
        assert calls == [1]

    @pytest.mark.parametrize("scheme", parameters(bnb_4bit))
    def test_inference_over_a_weight_packed_for_the_cpu(self, scheme):
        layer, x, tensors, _ = layer_of(scheme)
        if not layer.base_layer.support_avx512bf16_for_cpu:
            pytest.skip("needs a CPU with bf16 instructions")
        layer.eval()
        x = x.detach()
        with torch.no_grad():
            first, second = layer(x), layer(x)
        assert type(packed.of(layer.base_layer)) is packed.Bnb4bitCpu
        dense = dense_of(layer.base_layer)
        truth = reference.dora_linear(*(t.double() for t in (tensors[0], dense, *tensors[2:])), scaling=S)
        for y in (first, second):
            assert (y - truth).norm() / truth.norm() < 2**-7  # its product rounds x and the sums to bfloat16


class TestModel:
    @each_scheme
    def test_surgery(self, scheme):
        model = nn.Sequential(scheme(linear()), nn.Tanh(), nn.Embedding(3, 2), nn.Linear(128, 8))
        names = quiet(dorac.apply_dora, model, "all-linear", r=4)
        assert names == ["0", "3"]
        assert type(model[0]) is DoraQuantLinear
        assert type(model[3]) is dorac.nn.DoraLinear
        assert type(model[2]) is nn.Embedding
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {n.partition(".")[2] for n in trained} == {"lora_A", "lora_B", "lora_magnitude_vector"}

    @each_scheme
    def test_training(self, scheme):
        """Follows the model over the dequantised weights."""
        model = model_of(scheme)
        twin = nn.Sequential(*(nn.Tanh() if i == 1 else linear(*dense_of(model[i].base_layer).shape) for i in range(3)))
        for i in (0, 2):
            base = model[i].base_layer
            twin[i].load_state_dict({"weight": dense_of(base), "bias": base.bias})
        dorac.apply_dora(twin, ["0", "2"], r=4, lora_alpha=4 * S)
        twin.load_state_dict({n: p for n, p in model.named_parameters() if p.requires_grad}, strict=False)
        losses = []
        for net in (model, twin):
            optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
            losses.append([])
            for step in range(4):
                torch.manual_seed(step)
                x, target = torch.randn(2, 8, 64)
                loss = F.mse_loss(net(x.requires_grad_()), target)  # else bitsandbytes rounds as in inference
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)

    @each_scheme
    def test_save_and_load(self, scheme, tmp_path):
        model = model_of(scheme)
        dorac.save_adapter(model, tmp_path)
        again = nn.Sequential(scheme(linear()), nn.Tanh(), scheme(linear(64, 128, seed=2)))
        quiet(dorac.load_adapter, again, tmp_path)
        x = torch.randn(3, 64)
        assert torch.equal(again(x), model(x))
        off_init(again, seed=9)
        assert not torch.equal(again(x), model(x))
        dorac.load_adapter(again, tmp_path)
        assert torch.equal(again(x), model(x))

    def test_an_adapted_head_saves_no_packed_weight(self, tmp_path):
        from safetensors.torch import load_file

        model = nn.Sequential(nn.Linear(8, 64), fake_4bit(linear()))
        model.get_output_embeddings = lambda: model[1]
        dorac.apply_dora(model, ["1"], r=2)
        dorac.save_adapter(model, tmp_path)
        endings = {key.rpartition("1.")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
        assert endings == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}

    @each_scheme
    def test_state_dict(self, scheme):
        model = model_of(scheme)
        state = {key: value.clone() for key, value in model.state_dict().items() if ".base_layer." not in key}
        assert {key.partition(".")[2] for key in state} == {"lora_A", "lora_B", "lora_magnitude_vector"}
        x = torch.randn(3, 64)
        expected = model(x)
        off_init(model, seed=9)
        model.load_state_dict(state, strict=False)
        assert torch.equal(model(x), expected)

    @each_scheme
    def test_a_state_dict_that_is_refused(self, scheme):
        model, other = model_of(scheme), off_init(model_of(scheme), seed=9)
        x = torch.randn(3, 64)
        expected = model(x)
        state = other.state_dict() | {"2.lora_A": torch.ones(1)}
        with pytest.raises(RuntimeError):  # whatever else the library has against it
            model.load_state_dict(state, strict=False)
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("scheme", parameters(fake_4bit, fake_8bit, bnb_4bit, bnb_8bit))
    @pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    @pytest.mark.parametrize("merged", [False, True])
    def test_copies(self, scheme, make, merged):
        model = model_of(scheme)
        x = torch.randn(3, 64)
        plain = model(x).detach()  # an 8-bit layer takes its scales over in its first forward
        if merged:
            dorac.merge(model)
        expected = model(x)
        other = make(model)
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        if merged:
            dorac.unmerge(other)
            assert torch.equal(other(x), plain)
            assert model[0].merged
        else:
            dorac.merge(other)
            assert not model[0].merged
        assert torch.equal(model(x), expected)

    def test_move(self):
        model = model_of(fake_4bit)
        expected = model(torch.ones(64))
        dorac.merge(model)
        model.to("cpu").double().float()
        dorac.unmerge(model)
        assert torch.equal(model(torch.ones(64)), expected)

    def test_tied_packed_weights_are_no_obstacle_to_others(self):
        model = model_of(fake_4bit)
        model.tied = nn.Linear(1, 1)
        model.tied.weight = model[0].base_layer.weight
        with pytest.raises(ValueError, match=r"0.base_layer.weight is tied to tied.weight"):
            dorac.merge(model)


def bits(model):
    """Everything that says what a model computes."""
    found = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_modules", "_buffers"):
                found[name, key] = value
        for key, value in module._parameters.items():
            plain = value is not None and not value.is_meta and type(value).__torch_dispatch__ is PLAIN
            found[name, key] = value, value.detach().clone() if plain else None
            if type(value) in (fake.Params4bit, fake.Int8Params):
                found |= {(name, key, attribute): state for attribute, state in vars(value).items()}
    return found


def assert_same(model, before):
    after = bits(model)
    assert after.keys() == before.keys()
    for key, old in before.items():
        new = after[key]
        if isinstance(old, tuple) and len(old) == 2 and isinstance(old[0], nn.Parameter):
            assert new[0] is old[0], key
            assert old[1] is None or torch.equal(new[1], old[1]), key
        elif isinstance(old, torch.Tensor):
            assert new is old, key
        elif key[-1] not in ("loading",):
            assert new is old or new == old, key


def textbook_merge(layer):
    tensors = dense_of(layer.base_layer), layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
    weight, lora_A, lora_B, magnitude = (t.detach().double() for t in tensors)
    norm = reference.row_norm(weight, lora_A, lora_B, S)
    return reference.merge_weight(weight, lora_A, lora_B, magnitude, scaling=S, weight_norm=norm)


class TestMerging:
    @each_that_merges
    def test_merged_weight(self, scheme):
        """It is quantised as if it had been there at first, and unmerging puts back what was there."""
        model = model_of(scheme)
        layer, base = model[0], model[0].base_layer
        x = torch.randn(7, 64)
        before, weight = model(x), layer.weight
        expected = textbook_merge(layer)
        dense = dense_of(base).clone()
        assert dorac.merge(model) is None
        assert layer.base_layer is base
        again = dense_of(scheme(_with_weight(linear(), expected.float())))
        same = torch.isclose(dense_of(base), again, rtol=1e-5, atol=1e-6)
        assert same.float().mean() > 0.99  # numbers halfway between two of the format go either way
        assert (dense_of(base) - again).abs().max() <= 0.3 * again.abs().max()
        assert torch.equal(layer(x), base(x))
        torch.testing.assert_close(layer(x), F.linear(x, dense_of(base).float(), base.bias), rtol=1e-4, atol=1e-5)
        dorac.unmerge(model)
        assert layer.weight is weight
        assert torch.equal(dense_of(base), dense)
        assert torch.equal(model(x), before)

    @pytest.mark.parametrize("scheme", parameters(fake_4bit, fake_8bit, bnb_4bit, bnb_8bit))
    def test_error(self, scheme):
        """As the docstring of DoraQuantLinear has it."""
        model = model_of(scheme)
        layer = model[0]
        expected = textbook_merge(layer)
        dorac.merge(model)
        error = (dense_of(layer.base_layer) - expected).abs()
        if "8bit" in scheme.__name__:
            bound = expected.abs().amax(1, keepdim=True) * (1 / 254 + 2**-11)  # it comes from float16
        else:  # its blocks are rows here; nested statistics round their largest, too
            bound = 0.152 * expected.abs().amax(1, keepdim=True)
        assert (error <= 1.02 * bound).all()
        assert error.max() > 0.2 * bound.max()  # it says something

    @each_that_merges
    def test_unload(self, scheme):
        model = model_of(scheme)
        base = model[0].base_layer
        x = torch.randn(3, 64)
        dorac.merge(model)
        merged = model(x)
        assert dorac.merge(model, unload=True) is model
        assert model[0] is base
        assert torch.equal(model(x), merged)

    def test_rows_of_zero_scale_come_back(self):
        model = model_of(fake_4bit)
        with torch.no_grad():
            model[0].lora_magnitude_vector[3] = 0
        x = torch.randn(3, 64)
        before = model(x)
        dorac.merge(model)
        dorac.unmerge(model)
        assert torch.equal(model(x), before)

    @pytest.mark.parametrize("scheme", parameters(torchao_nvfp4, torchao_int8, torchao_float8, hqq_4bit))
    def test_a_merged_weight_of_zeros(self, scheme):
        model = model_of(scheme)
        with torch.no_grad():
            model[2].lora_magnitude_vector.zero_()
        x = torch.randn(3, 64)
        dorac.merge(model)
        torch.testing.assert_close(model(x), model[2].base_layer.bias.expand(3, -1))

    @pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
    @pytest.mark.parametrize("scheme", parameters(*FAKES))
    @pytest.mark.parametrize("unload", [False, True])
    def test_whatever_is_raised_it_is_what_it_was(self, scheme, error, unload, monkeypatch):
        model = model_of(scheme)
        x = torch.randn(3, 64)
        expected, before = model(x), bits(model)
        requantised, calls = model[0].holder.requantised, []

        def fails_at_the_second(*args):
            calls.append(args)
            if len(calls) == 2:
                raise error("now")
            return requantised(*args)

        for layer in (model[0], model[2]):
            layer.holder = layer.holder._replace(requantised=fails_at_the_second)
        before = bits(model)
        with pytest.raises(error):
            dorac.merge(model, unload=unload)
        assert_same(model, before)
        assert torch.equal(model(x), expected)
        dorac.merge(model)  # the third call
        merged, before = model(x), bits(model)
        monkeypatch.setattr(norm_cache, "refresh", lambda layers: (_ for _ in ()).throw(error("now")))
        with pytest.raises(error):
            dorac.unmerge(model)
        assert_same(model, before)
        assert torch.equal(model(x), merged)

    def test_too_large_to_be_quantised(self):
        model = model_of(fake_8bit)
        with torch.no_grad():
            model[2].lora_magnitude_vector.fill_(1e6)
        with pytest.raises(ValueError, match=r"^2: the weight is not finite in torch.float16, which it would be"):
            dorac.merge(model)
        assert not model[0].merged

    @pytest.mark.parametrize("scheme", parameters(*REFUSED))
    def test_a_format_that_cannot_be_quantised_again(self, scheme):
        if scheme is torchao_int4 and importlib.util.find_spec("mslk") is not None:
            pytest.skip("torchao can, with mslk")
        model = nn.Sequential(fake_4bit(linear()), nn.Tanh(), scheme(linear(64, 128, seed=2)))
        quiet(dorac.apply_dora, model, ["0", "2"], r=4, lora_alpha=4 * S)
        off_init(model)
        x = torch.randn(3, 64)
        expected, before = model(x), bits(model)
        for unload in (False, True):
            with pytest.raises(ValueError, match=f"^2: {REFUSED[scheme]}"):
                dorac.merge(model, unload=unload)
            assert_same(model, before)
            assert torch.equal(model(x), expected)


def _with_weight(layer, weight):
    layer.weight.data = weight.to(layer.weight.dtype)
    return layer


def weight_data(weight, other):
    weight.data.copy_(other)


def piece_data(weight, other):
    weight.scale.data.copy_(other.scale)


def piece_numpy(weight, other):
    weight.qdata.view(torch.uint8).numpy()[:] = other.qdata.view(torch.uint8).numpy()


def whole_weight(weight, other):
    weight.copy_(other)


def detached_weight(weight, other):
    weight.detach().copy_(other)


def indexed_weight(weight, other):
    weight[...] = other


def piece(weight, other):
    weight.qdata.copy_(other.qdata)


def view_of_a_piece(weight, other):
    weight.qdata.view(torch.uint8)[:3].copy_(other.qdata.view(torch.uint8)[:3])


def replaced_piece(weight, other):
    weight.qdata = other.qdata


def swapped(weight, other):
    torch.utils.swap_tensors(weight, nn.Parameter(other, requires_grad=False))


def in_inference_mode(weight, other):
    with torch.inference_mode():
        weight.copy_(other)


# Writes inside a tensor of torchao's, and whether the next forward sees them (else after train() or eval()).
WRITES = dict.fromkeys((weight_data, piece_data, piece_numpy), False) | dict.fromkeys(
    (
        whole_weight,
        detached_weight,
        indexed_weight,
        piece,
        view_of_a_piece,
        replaced_piece,
        swapped,
        in_inference_mode,
    ),
    True,
)


class TestCachedNorms:
    @each_scheme
    def test_same_bits(self, scheme):
        model, other = model_of(scheme), model_of(scheme)
        cache = dorac.cache_norms(model)
        for net in (model, other):
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
            for step in range(3):
                torch.manual_seed(step)
                net(torch.randn(4, 64)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        x = torch.randn(4, 64)
        assert torch.equal(model(x), other(x))
        cache.check()

    def test_one_norm_in_a_step(self, monkeypatch):
        model = model_of(fake_4bit)
        taken = []
        of = DoraQuantLinear._matrix
        monkeypatch.setattr(DoraQuantLinear, "_matrix", lambda self: taken.append(self) or of(self))
        dorac.cache_norms(model)
        assert len(taken) == 2
        for _ in range(3):
            model(torch.randn(4, 64)).sum().backward()
        assert len(taken) == 2
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        assert len(taken) == 4

    def test_a_weight_that_is_packed_anew_is_noticed(self):
        """As bitsandbytes does in eval mode on a CPU, by ``weight.data = ...``."""
        model = model_of(fake_4bit)
        dorac.cache_norms(model)
        x = torch.randn(4, 64)
        model(x)
        base = model[0].base_layer
        other = fake_4bit(linear(seed=7)).weight
        base.weight.data = other.data
        base.weight.quant_state = base.quant_state = other.quant_state
        expected = copy.deepcopy(model)(x)
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
    @pytest.mark.parametrize("scheme", parameters(torchao_int8, torchao_float8, torchao_int4, torchao_nvfp4))
    def test_writes_inside_a_tensor_of_torchaos(self, scheme, write):
        model = model_of(scheme)
        weight, other = model[0].base_layer.weight, scheme(linear(seed=5)).weight
        x, seen = torch.randn(4, 64), WRITES[write]
        dorac.cache_norms(model)
        before = model(x)
        with torch.no_grad():
            write(weight, other)
        changed = copy.deepcopy(model)(x)  # which takes its own norm
        assert not torch.equal(changed, before)
        assert torch.equal(model(x), changed) == seen
        model.eval()
        assert torch.equal(model(x), changed)

    @pytest.mark.parametrize("scheme", parameters(fake_4bit, torchao_int8, bnb_4bit))
    def test_merge(self, scheme):
        model = model_of(scheme)
        x = torch.randn(4, 64)
        dorac.cache_norms(model)
        expected = model(x)
        dorac.merge(model)
        merged = model(x)
        assert not torch.equal(merged, expected)
        dorac.unmerge(model)
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("scheme", parameters(fake_4bit, torchao_int8, bnb_4bit))
    def test_compiled(self, scheme):
        model = model_of(scheme)
        x = torch.randn(4, 64)
        expected = model(x)
        dorac.cache_norms(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
        torch.optim.SGD([model[0].lora_B], lr=0.1).step()
        torch.testing.assert_close(compiled(x), expected)


class TestRefusals:
    def refused(self, layer, message, **options):
        model = nn.Sequential(nn.Linear(4, 4), layer)
        before = bits(model), [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            dorac.apply_dora(model, ["0", "1"], r=2, **options)
        assert_same(model, before[0])
        assert [p.requires_grad for p in model.parameters()] == before[1]

    def test_not_quantised_yet(self):
        for kind in (fake.Linear4bit, fake.Linear8bitLt):
            layer = kind(64, 128)
            message = rf"weight of this {kind.__name__} .bitsandbytes. is not quantised yet: move the layer"
            self.refused(layer, rf"\n  1: the .-bit {message}")
            with pytest.raises(TypeError, match=message):
                DoraQuantLinear(layer)

    @pytest.mark.parametrize("scheme", parameters(bnb_4bit))
    def test_not_quantised_yet_by_the_library(self, scheme):
        import bitsandbytes

        self.refused(
            bitsandbytes.nn.Linear4bit(64, 128), r"\n  1: the 4-bit weight of this Linear4bit .*not quantised yet"
        )

    def test_on_meta(self):
        layer = fake_4bit(linear())
        state = layer.quant_state
        layer.weight = fake.Params4bit(layer.weight.data.to("meta"), quant_state=state)
        self.refused(layer, r"\n  1: the weight of Linear4bit is on the meta device and has no values: load")

    def test_pieces_that_do_not_fit(self):
        layer = fake_4bit(linear())
        layer.quant_state.absmax = layer.quant_state.absmax[1:]
        self.refused(layer, r"\n  1: bitsandbytes 4-bit weight: absmax must have the shape \[128\], got \[127\]")
        layer = fake_8bit(linear())
        layer.weight.SCB = None
        self.refused(layer, r"\n  1: bitsandbytes int8 weight: its scales .SCB. are neither")

    def test_norm_grad(self):
        layer = fake_4bit(linear())
        layer.bias.requires_grad_()
        self.refused(layer, "norm_grad needs a dense weight, that of Linear4bit is quantised", norm_grad=True)

    def test_dora_linear_names_the_class(self):
        with pytest.raises(TypeError, match=r"Linear4bit is quantised: dorac.nn.DoraQuantLinear adapts it"):
            dorac.nn.DoraLinear(fake_4bit(linear()))
        with pytest.raises(TypeError, match=r"Linear is no quantised linear layer that is known here"):
            DoraQuantLinear(linear())

    @pytest.mark.parametrize("scheme", parameters(torchao_int8))
    def test_a_quantised_input(self, scheme):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        int4 = torchao_int4(linear())
        int4.weight.activation_dtype = torch.float8_e4m3fn
        for layer in (torchao_layer(linear(), Int8DynamicActivationInt8WeightConfig()), int4):
            self.refused(layer, r"\n  1: the weight of Linear quantises its input too, which then gets no gradient")

    @pytest.mark.parametrize("scheme", parameters(fp8_linear))
    def test_pairs_of_4_bit_numbers_in_fp8_linear(self, scheme):
        layer = scheme(linear())
        layer.weight = nn.Parameter(torch.zeros(128, 32, dtype=torch.int8), requires_grad=False)
        self.refused(layer, r"\n  1: FP8Linear has a weight of torch.int8, dequantise it first")

    def test_tensor_parallel(self):
        parallel = pytest.importorskip("dorac.parallel")
        with pytest.raises(ValueError, match=r"a quantised base weight .Linear4bit. cannot be sharded"):
            parallel._distribute(parallel.ColwiseParallel(), DoraQuantLinear(fake_4bit(linear())), None, None)

    def test_one_warning_for_dense_copies(self):
        model = nn.Sequential(fake_hqq(linear()), fake_4bit(linear(64, 128)), fake_hqq(linear()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dorac.apply_dora(model, ["0", "1", "2"], r=2)
            model(torch.randn(2, 64))
        (warning,) = caught
        assert str(warning.message).endswith(
            "each norm takes a dense copy of the weight (dorac.cache_norms: one in an optimizer's step): 0, 2"
        )
        assert warning.filename == __file__


def bnb_config(bits):
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def torchao_config():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def hqq_config():
    from transformers import HqqConfig

    return HqqConfig(nbits=4, group_size=32)


LOADS = [
    pytest.param(make, id=id, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=package))
    for id, package, make in (
        ("nf4", "bitsandbytes", lambda: bnb_config(4)),
        ("int8", "bitsandbytes", lambda: bnb_config(8)),
        ("torchao", "torchao", torchao_config),
        ("hqq", "hqq", hqq_config),
    )
]


class TestTransformers:
    """What ``from_pretrained`` quantises, prepared by PEFT for training with gradient checkpointing."""

    IDS = torch.arange(12)[None]

    @pytest.fixture(scope="class")
    def directory(self, tmp_path_factory):
        transformers = pytest.importorskip("transformers")
        directory = tmp_path_factory.mktemp("llama")
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)
        transformers.LlamaForCausalLM(config).save_pretrained(directory)
        return directory

    def load(self, directory, config):
        """In training, with an input that needs a gradient: else bitsandbytes computes in bfloat16 on some CPUs."""
        import transformers

        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, quantization_config=config(), dtype=torch.float32, device_map="cpu"
            )
        except NotImplementedError as error:  # HQQ's, in transformers 5 up to now
            pytest.skip(str(error))
        model.enable_input_require_grads()
        return model.train()

    @pytest.mark.parametrize("config", LOADS)
    def test_training(self, directory, config, tmp_path):
        peft = pytest.importorskip("peft")
        model = peft.prepare_model_for_kbit_training(
            self.load(directory, config), gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        names = dorac.apply_dora(model, "all-linear", r=4)
        assert len(names) == 14
        assert all(type(model.get_submodule(name)) is DoraQuantLinear for name in names)
        plain = model(self.IDS).logits
        dorac.cache_norms(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(4):
            loss = model(self.IDS, labels=self.IDS).loss
            loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
        dorac.save_adapter(model, tmp_path)
        logits = model(self.IDS).logits
        assert not torch.allclose(logits, plain)
        again = self.load(directory, config)
        dorac.load_adapter(again, tmp_path)
        torch.testing.assert_close(again(self.IDS).logits, logits)
        dorac.merge(model)
        merged = model(self.IDS).logits
        assert (merged - logits).norm() < 0.6 * (logits - plain).norm()
        dorac.unmerge(model)
        torch.testing.assert_close(model(self.IDS).logits, logits, rtol=0, atol=0)
        assert dorac.merge(again, unload=True) is again
        torch.testing.assert_close(again(self.IDS).logits, merged)
        assert not [m for m in again.modules() if isinstance(m, dorac.nn.DoraLayer)]

    @pytest.mark.parametrize("config", LOADS)
    def test_the_drop_in_agrees(self, directory, config, tmp_path):
        peft = pytest.importorskip("peft")
        import dorac.peft

        model = self.load(directory, config)
        dorac.apply_dora(model, ["q_proj", "down_proj"], r=4)
        off_init(model)
        dorac.save_adapter(model, tmp_path)
        other = peft.PeftModel.from_pretrained(self.load(directory, config), tmp_path)
        dorac.peft.enable(other)
        torch.testing.assert_close(other.train()(self.IDS).logits, model(self.IDS).logits)
