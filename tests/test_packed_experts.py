"""Experts over mxfp4: the grouped product over packed weights, and ``DoraExperts`` over GPT-OSS' blocks and scales."""

import copy
import pickle

import pytest
import torch
from packed_weights import FORMATS
from torch import nn
from torch.library import opcheck

import dorac
from dorac import functional, packed, reference
from dorac.nn import DoraExperts
from dorac.ops.packed_grouped import ALIGNED
from dorac.testing import assert_rms_beside, max_error

E, K, HIDDEN, INNER, R = 4, 2, 64, 96, 3
ROWS = [0, 5, 1, 6]  # of each expert
PROJECTIONS = ("gate_up_proj", "down_proj")
BUDGETS = [2**28, 1]  # all rows at once, or the smallest chunks
each_budget = pytest.mark.parametrize("budget", BUDGETS)


def mxfp4(out_features=2 * ALIGNED + 16, in_features=HIDDEN, device="cpu", experts=E):
    generator = torch.Generator().manual_seed(out_features)
    codes = torch.randint(0, 256, (experts, out_features, in_features // 2), dtype=torch.uint8, generator=generator)
    scale = torch.randint(121, 126, (experts, out_features, in_features // 32), dtype=torch.uint8, generator=generator)
    shape = (experts, out_features, in_features)
    return packed.Mxfp4(codes.to(device), scale.to(device), shape, torch.bfloat16)


def rows(dtype, features=HIDDEN, device="cpu", requires_grad=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(ROWS), features, generator=generator, dtype=torch.float64)
    return x.to(device, dtype).requires_grad_(requires_grad)


def offsets(device="cpu"):
    return torch.tensor(ROWS, device=device).cumsum(0).to(torch.int32)


def index(device="cpu"):
    return torch.repeat_interleave(torch.arange(E), torch.tensor(ROWS)).to(device)


def dense(value):
    return value.rows(0, value.shape[1])


class TestOp:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    @each_budget
    def test_opcheck(self, dtype, budget, device):
        weight = packed.flatten(mxfp4(device=device))
        for grad in (False, True):
            x = rows(dtype, device=device, requires_grad=grad)
            args = (x, offsets(device), *weight, budget)
            opcheck(torch.ops.dorac.packed_grouped_linear.default, args)
        for transposed in (False, True):
            x = rows(dtype, weight[2][1] if transposed else HIDDEN, device)
            opcheck(torch.ops.dorac.packed_grouped_product.default, (x, offsets(device), *weight, budget, transposed))

    @each_budget
    @pytest.mark.parametrize("name", ["mxfp4", "torchao_int4"])
    def test_values_and_gradients(self, name, budget, device):
        """Of the second order too; a linear map has none but through dy."""
        if name == "mxfp4":
            weight = mxfp4(device=device)
        else:
            value, _ = FORMATS[name]((2 * ALIGNED + 16, HIDDEN))
            stacked = [torch.stack([t] * E).to(device) for t in value[: value.PIECES]]
            weight = value._replace(**dict(zip(value._fields, stacked, strict=False)), shape=(E, *value.shape))
        x = rows(torch.float64, device=device, requires_grad=True)
        y = torch.ops.dorac.packed_grouped_linear(x, offsets(device), *packed.flatten(weight), budget)
        expected = torch.einsum("soi,si->so", dense(weight).double()[index(device)], x)
        torch.testing.assert_close(y, expected)
        ones = torch.ones_like(y, requires_grad=True)
        (dx,) = torch.autograd.grad(y, x, ones, create_graph=True)
        (exact,) = torch.autograd.grad(expected, x, ones, create_graph=True)
        torch.testing.assert_close(dx, exact)
        second, exact = (torch.autograd.grad(t.sin().sum(), ones)[0] for t in (dx, exact))
        torch.testing.assert_close(second, exact)

    def test_rows_past_the_last_offset_are_zero(self):
        x, ends = rows(torch.float32), offsets() - torch.tensor([0, 0, 0, 2], dtype=torch.int32)
        weight = packed.flatten(mxfp4())
        y = torch.ops.dorac.packed_grouped_product(x, ends, *weight, 1, False)
        assert (y[-2:] == 0).all()
        assert (y[:-2] != 0).any(1).all()

    def test_nothing_dense_is_kept_for_backward(self):
        kept = []
        x = rows(torch.float32, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            value = mxfp4()
            torch.ops.dorac.packed_grouped_linear(x, offsets(), *packed.flatten(value), 1)
        assert max(t.numel() for t in kept) == value.codes.numel()

    def test_transforms(self):
        """``torch.func`` sees a dense copy."""
        value, x = mxfp4(), rows(torch.float64)

        def f(x):
            return torch.ops.dorac.packed_grouped_linear(x, offsets(), *packed.flatten(value), 1).sin().sum()

        leaf = x.clone().requires_grad_()
        f(leaf).backward()
        torch.testing.assert_close(torch.func.grad(f)(x), leaf.grad)
        _, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, leaf.grad.sum())

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_the_functional_layer(self, dtype):
        value, x = mxfp4(), rows(dtype, requires_grad=True)
        out_features = value.shape[1]
        generator = torch.Generator().manual_seed(3)
        A, B, m, b = (
            torch.randn(E, *shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
            for shape in ((R, HIDDEN), (out_features, R), (out_features,), (out_features,))
        )
        y = functional.dora_linear_grouped(x, value, A, B, m, b, offsets=offsets(), scaling=0.7)
        wide = [t.detach().double().requires_grad_() for t in (x, A, B, m, b)]
        parts = []
        for e, part in enumerate(wide[0].split(ROWS)):
            factors = [t[e] for t in wide[1:4]]
            parts.append(reference.dora_linear(part, dense(value)[e].double(), *factors, wide[4][e], scaling=0.7))
        expected = torch.cat(parts)
        rtol = 1e-12 if dtype is torch.float64 else 1e-5
        assert max_error(y, expected) <= rtol * expected.abs().max()
        dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        y.backward(dy.to(dtype))
        expected.backward(dy.to(dtype).double())
        for ours, exact in zip((x, A, B, m, b), wide, strict=True):
            assert max_error(ours.grad, exact.grad) <= rtol * exact.grad.abs().max()

    def test_bad_input(self):
        value, x = mxfp4(), rows(torch.float32)
        A, B = torch.ones(E, R, HIDDEN), torch.ones(E, value.shape[1], R)
        m = torch.ones(E, value.shape[1])
        with pytest.raises(ValueError, match=r"x must be \[S, in\] with in = 64"):
            functional.dora_linear_grouped(x[:, 1:], value, A, B, m, offsets=offsets(), scaling=1.0)
        broken = value._replace(scale=value.scale[:, 1:])
        with pytest.raises(ValueError, match="mxfp4 weight: scale must have the shape"):
            functional.dora_linear_grouped(x, broken, A, B, m, offsets=offsets(), scaling=1.0)
        with pytest.raises(ValueError, match="norm_grad needs a dense weight"):
            functional.dora_linear_grouped(x, value, A, B, m, offsets=offsets(), scaling=1.0, norm_grad=True)


transformers = pytest.importorskip("transformers")


def config():
    return transformers.GptOssConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=32,
        num_experts_per_tok=K,
        num_local_experts=E,
        pad_token_id=0,
        layer_types=["full_attention", "full_attention"],
        attn_implementation="eager",
    )


def packed_model(dtype=torch.float32, only=PROJECTIONS):
    """GPT-OSS whose experts hold blocks and scales, and the same model with the dequantised weights."""
    convert = transformers.integrations.mxfp4.convert_moe_packed_tensors
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(), dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "experts" in name or "router" in name:
            nn.init.normal_(parameter, std=0.3)
    twin = copy.deepcopy(model)
    for layer, other in zip(model.model.layers, twin.model.layers, strict=True):
        experts, dense_experts = layer.mlp.experts, other.mlp.experts
        dense_experts.config._experts_implementation = "eager"
        for projection in only:
            value = mxfp4(*getattr(experts, projection).shape[:0:-1])
            blocks = value.codes.unflatten(-1, (-1, 16))
            delattr(experts, projection)
            for suffix, piece in (("blocks", blocks), ("scales", value.scale)):
                experts.register_parameter(f"{projection}_{suffix}", nn.Parameter(piece, requires_grad=False))
            getattr(dense_experts, projection).data = convert(blocks, value.scale, dtype=dtype)
    return model, twin


def adapt(model, **options):
    names = dorac.apply_dora(model, ["experts", "q_proj"], r=R, init_lora_weights=False, **options)
    assert sum(name.endswith("experts") for name in names) == 2
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in dorac.apply.dora_layers(model).values():
            for magnitude in layer._magnitudes():
                magnitude.mul_(0.8 + 0.4 * torch.rand(magnitude.shape, generator=generator))
    return model


def logits(model):
    return model(input_ids=torch.arange(1, 13).view(3, 4), use_cache=False).logits


def adapted_pair(**options):
    model, twin = packed_model()
    torch.manual_seed(2)
    adapt(model, **options)
    adapt(twin, **options)
    twin.load_state_dict({n: p for n, p in model.named_parameters() if p.requires_grad}, strict=False)
    return model, twin


@pytest.mark.parametrize("only", [PROJECTIONS, PROJECTIONS[:1], PROJECTIONS[1:]], ids=lambda names: "+".join(names))
def test_starts_as_the_dequantised_model(only):
    model, twin = packed_model(only=only)
    dorac.apply_dora(model, ["experts"], r=R)
    for layer in dorac.apply.dora_layers(model).values():
        assert layer.gate_up_proj_lora_A.dtype is torch.float32
        for magnitude, projection in zip(layer._magnitudes(), PROJECTIONS, strict=True):
            weight = layer._matrices(projection)
            weight = dense(weight) if packed.is_packed(weight) else weight
            torch.testing.assert_close(magnitude.detach(), torch.linalg.vector_norm(weight.float(), dim=-1))
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}, {"lora_dropout": 0.3, "dropout_on": "low_rank"}])
def test_values_and_gradients_of_the_dequantised_model(options):
    """That of the dequantised weights is held to the textbook in test_experts_module.py."""
    results = []
    for model in adapted_pair(**options):
        model.train()
        torch.manual_seed(7)
        y = logits(model)
        y.sin().sum().backward()
        results.append({"y": y.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    ours, expected = results
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert max_error(ours[name], value) <= 2e-4 * value.abs().max(), name
        assert value.abs().max() > 0, name


def test_bfloat16():
    model, twin = packed_model(torch.bfloat16)
    for net in (model, twin):
        torch.manual_seed(2)
        adapt(net)
    truth = copy.deepcopy(twin).double()
    y = logits(model)
    assert y.dtype is torch.bfloat16
    assert_rms_beside(y, logits(twin), logits(truth))


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiles_to_one_graph(backend):
    model, _ = adapted_pair()
    layer = model.model.layers[0].mlp.experts
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for tokens in (6, 9, 14):
        generator = torch.Generator().manual_seed(tokens)
        hidden = torch.randn(tokens, HIDDEN, generator=generator)
        choice = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(tokens)])
        args = hidden, choice, torch.rand(tokens, K, generator=generator)
        with torch.compiler.set_stance("fail_on_recompile" if tokens == 14 else "default"):
            y = compiled(*args)
        torch.testing.assert_close(y, layer(*args))
        (ours,), (expected,) = (torch.autograd.grad(out.sum(), layer.down_proj_lora_A) for out in (y, layer(*args)))
        torch.testing.assert_close(ours, expected)


def test_save_load_and_copies(tmp_path):
    model, _ = adapted_pair()
    y = logits(model)
    dorac.save_adapter(model, tmp_path)
    again, _ = packed_model()
    dorac.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), y)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), y)
    other, _ = adapted_pair()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), y)


def test_cached_norms_follow():
    model, other = (adapted_pair()[0] for _ in range(2))
    cache = dorac.cache_norms(model)
    for net in (model, other):
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            logits(net).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(logits(model), logits(other))
    cache.check()
    for net in (model, other):
        with torch.no_grad():
            net.model.layers[1].mlp.experts.base_layer.gate_up_proj_scales.add_(1)
    assert torch.equal(logits(model), logits(other))
    cache.check()


def test_merging_is_refused():
    model, _ = adapted_pair()
    y, before = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    for unload in (False, True):
        with pytest.raises(ValueError, match=r"experts: gate_up_proj of GptOssExperts is mxfp4, which cannot be quant"):
            dorac.merge(model, unload=unload)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), y)


class TestRefusals:
    def refused(self, change, message, error=TypeError, **options):
        model, _ = packed_model()
        experts = model.model.layers[0].mlp.experts
        change(experts)
        with pytest.raises(error, match=message):
            DoraExperts(experts, R, **options)
        with pytest.raises(ValueError, match=message):
            dorac.apply_dora(model, ["experts"], r=R, **options)
        assert not [m for m in model.modules() if isinstance(m, dorac.nn.DoraLayer)]

    def test_norm_grad(self):
        message = "norm_grad needs a dense weight, gate_up_proj of GptOssExperts is mxfp4"
        self.refused(lambda experts: None, message, error=ValueError, norm_grad=True)

    def test_pieces_that_do_not_fit(self):
        def fewer_scales(experts):
            experts.down_proj_scales = nn.Parameter(experts.down_proj_scales[:, 1:], requires_grad=False)

        self.refused(fewer_scales, r"down_proj: mxfp4 weight: scale must have the shape \[4, 64, 3\]")

    def test_no_scales(self):
        def no_scales(experts):
            del experts.down_proj_scales

        self.refused(no_scales, "does not hold gate_up_proj or up_proj, and down_proj, as 3-D parameters")

    def test_a_weight_beside_its_blocks(self):
        def twice(experts):
            experts.down_proj = nn.Parameter(torch.ones(E, INNER, HIDDEN))

        self.refused(twice, "GptOssExperts holds down_proj twice, dense and as down_proj_blocks")

    def test_buffers(self):
        def buffers(experts):
            blocks = experts.down_proj_blocks.data
            del experts.down_proj_blocks
            experts.register_buffer("down_proj_blocks", blocks)

        self.refused(buffers, "holds down_proj_blocks and down_proj_scales as other than parameters")

    def test_on_meta(self):
        self.refused(
            lambda experts: experts.to("meta"), "the gate_up_proj of GptOssExperts is on the meta device and has"
        )

    def test_the_order_of_triton_kernels(self):
        experts = transformers.integrations.mxfp4.Mxfp4GptOssExperts(config())
        model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})
        message = (
            r"Mxfp4GptOssExperts holds mxfp4 weights in the order of triton_kernels.*Mxfp4Config\(dequantize=True\)"
        )
        with pytest.raises(TypeError, match=message):
            DoraExperts(experts, R)
        with pytest.raises(ValueError, match=r"\n  mlp.experts: " + message):
            dorac.apply_dora(model, ["experts"], r=R)
        assert model["mlp"]["experts"] is experts
