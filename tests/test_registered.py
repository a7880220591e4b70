"""A packed format and a layer kind that dorac does not have: with their own file and their registration they work."""

import copy
from typing import ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dorac
from dorac import functional, packed, reference
from dorac.nn import DoraLayer, DoraLinear
from dorac.nn.stock import not_stock
from dorac.packed.pieces import check_piece, looked_up, scaled
from dorac.testing import Sums, layer_budgets, norm_budget

S, BLOCK = 0.7, 32


class Plain4(NamedTuple):
    """``w = q * scale``: q from -8 to 7, the first of two in the low half of a byte, a float32 scale for 32 of them."""

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    NAME = "plain 4-bit weight"
    PIECES = 2
    SCRATCH = 12

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def check(self) -> None:
        rows, columns = self.shape
        check_piece(self.NAME, "codes", self.codes, (torch.uint8,), (rows, columns // 2), self.codes)
        check_piece(self.NAME, "scale", self.scale, (torch.float32,), (rows, columns // BLOCK), self.codes)

    def rows(self, start: int, stop: int) -> Tensor:
        table = torch.tensor([*range(8), *range(-8, 0)], dtype=torch.float32, device=self.device)
        numbers = looked_up(self.codes[start:stop], table, high_first=False)
        return scaled(numbers, self.scale[start:stop], BLOCK).to(self.dtype)

    def form(self) -> tuple[packed.Form, tuple[Tensor | None, ...]]:
        """torchao's int4 without a zero, its scales row by row."""
        form = packed.Form("int4", "float32", 2, BLOCK // 2, strides=(0, *self.scale.stride(), 0))
        return form, (self.codes, None, self.scale, None, None, None, None)


class Plain4Parameter(nn.Parameter):
    """The codes, with their scales as an attribute."""


class Plain4Linear(nn.Linear):
    def __init__(self, value: Plain4) -> None:
        super().__init__(*reversed(value.shape), bias=False, device="meta")
        self.weight = Plain4Parameter(value.codes, requires_grad=False)
        self.weight.scale = value.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, packed.of(self).rows(0, self.out_features).to(x.dtype))


def read_plain4(weight: Tensor, _: nn.Module | Tensor) -> Plain4:
    rows, half = weight.shape
    return Plain4(weight.data, weight.scale, (rows, 2 * half), torch.float32)


@pytest.fixture
def plain4(device, monkeypatch):
    """A value of the format, which is registered, and the dense weight that it stands for."""
    monkeypatch.setitem(packed.FORMATS, "Plain4", Plain4)
    holder = packed.Holder(Plain4.NAME, read=read_plain4)
    monkeypatch.setitem(packed.HOLDERS, "Plain4Parameter", holder)
    numbers, scale = torch.randint(-8, 8, (33, 192)), torch.rand(33, 192 // BLOCK) + 0.5
    codes = ((numbers[:, ::2] & 15) | ((numbers[:, 1::2] & 15) << 4)).to(torch.uint8)
    dense = numbers * scale.repeat_interleave(BLOCK, 1)
    return Plain4(codes.to(device), scale.to(device), (33, 192), torch.float32), dense.to(device)


def draw_factors(dense, dtype):
    rows, columns = dense.shape
    lora_A, lora_B = torch.randn(4, columns) / 2, torch.randn(rows, 4)
    return lora_A.to(dense.device, dtype), lora_B.to(dense.device, dtype)


class TestPackedFormat:
    def test_norm(self, plain4):
        value, dense = plain4
        assert torch.equal(value.rows(0, 33), dense)
        lora_A, lora_B = draw_factors(dense, torch.bfloat16)
        sums = Sums(1, *dense.shape, 4, dense.shape[1])
        budget = norm_budget(reference.row_norm, (dense, lora_A, lora_B), sums, scaling=S)
        budget.check(functional.norm_factored(value, lora_A, lora_B, S))

    def test_norm_of_the_kernel(self, plain4):
        pytest.importorskip("triton")
        from dorac.kernels.packed_norm import packed_row_norm

        value, dense = plain4
        lora_A, lora_B = draw_factors(dense, torch.bfloat16)
        sums = Sums(1, *dense.shape, 4, dense.shape[1])
        budget = norm_budget(reference.row_norm, (dense, lora_A, lora_B), sums, scaling=S)
        budget.check(packed_row_norm(value, lora_A, lora_B, S))

    def test_layer(self, plain4, device):
        value, dense = plain4
        model = nn.Sequential(Plain4Linear(value))
        assert dorac.apply_dora(model, "all-linear", r=4, init_lora_weights=False) == ["0"]
        layer = model[0]
        assert type(layer) is dorac.nn.DoraQuantLinear
        with torch.no_grad():
            layer.lora_magnitude_vector.mul_(1.3)
        x = torch.randn(7, 192, device=device, requires_grad=True)
        y, dy = model(x), torch.randn(7, 33, device=device)
        tensors = x, dense, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector
        sums = Sums.of_linear(x, dense, layer.lora_A)
        options = {"scaling": layer.scaling, "dy": dy}
        budgets = layer_budgets(reference.dora_linear, reference.row_norm, tensors, sums, **options)
        names = "x", "lora_A", "lora_B", "magnitude"
        gradients = torch.autograd.grad(y, (x, *tensors[2:]), dy)
        for name, result in zip(("y", *names), (y, *gradients), strict=True):
            budgets[name].check(result, name)
        with pytest.raises(ValueError, match=r"a plain 4-bit weight \(Plain4Linear\) cannot be quantised again here"):
            dorac.merge(model)


class DoraBilinear(DoraLayer):
    """Adapts an ``nn.Bilinear``, a linear layer of the products ``x_i z_j``."""

    PEFT_KEYS: ClassVar = DoraLinear.PEFT_KEYS

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Bilinear)

    @classmethod
    def unwrappable(cls, module: nn.Module) -> str | None:
        return not_stock(module, nn.Bilinear)

    @classmethod
    def adapter_shapes(cls, base_layer: nn.Module, r: int) -> dict[str, torch.Size]:
        rows, columns = base_layer.weight.flatten(1).shape
        return dict(zip(cls.PEFT_KEYS, map(torch.Size, ((r, columns), (rows, r), (rows,))), strict=True))

    def _matrix(self) -> Tensor:
        return self.base_layer.weight.flatten(1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        base = self.base_layer
        if self.merged or self.runs_base:
            return base(x, z)
        norm = self._known_norm()
        if norm is None:
            norm = self._norm()
        lora_A, lora_B, magnitude = self._own_parameters()
        lora = F.linear(F.bilinear(x, z, lora_A.view(-1, *base.weight.shape[1:])), lora_B)
        g = functional.magnitude_scale(magnitude, norm)
        return functional.compose(F.bilinear(x, z, base.weight), lora, g, self.scaling, bias=base.bias)


@pytest.fixture
def bilinear(monkeypatch, device):
    """A model with an adapted layer of the kind, which is registered, its input, and what its output may err by."""
    monkeypatch.setattr(dorac.nn, "KINDS", (*dorac.nn.KINDS, DoraBilinear))
    model = nn.ModuleDict({"pair": nn.Bilinear(5, 7, 6)}).to(device, torch.float64)
    assert dorac.apply_dora(model, ["pair"], r=3, init_lora_weights=False) == ["pair"]
    layer = model["pair"]
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.3)
    x, z = (torch.randn(9, size, dtype=torch.float64, device=device) for size in (5, 7))
    products = (x[:, :, None] * z[:, None, :]).flatten(1)
    tensors = products, layer._matrix(), *layer._own_parameters(), layer.base_layer.bias
    sums, options = Sums.of_linear(*tensors[:3]), {"scaling": layer.scaling, "casts": 1}  # of a product
    return model, (x, z), layer_budgets(reference.dora_linear, reference.row_norm, tensors, sums, **options)["y"]


class TestLayerKind:
    def test_forward_and_merge(self, bilinear):
        model, inputs, budget = bilinear
        layer = model["pair"]
        assert type(layer) is DoraBilinear
        budget.check(layer(*inputs), "adapted")
        dorac.cache_norms(model)
        budget.check(layer(*inputs), "with a cached norm")
        dorac.merge(model)
        budget.check(layer(*inputs), "merged")
        dorac.unmerge(model)
        budget.check(layer(*inputs), "unmerged")
        assert type(dorac.merge(model, unload=True)["pair"]) is nn.Bilinear
        budget.check(model["pair"](*inputs), "unloaded")

    def test_only_the_adapter_is_trained(self, bilinear):
        model, inputs, _ = bilinear
        model["pair"](*inputs).sum().backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert trained == {f"pair.{name}" for name in DoraBilinear.PEFT_KEYS}

    def test_adapter_file(self, bilinear, tmp_path):
        model, inputs, _ = bilinear
        y = model["pair"](*inputs)
        dorac.save_adapter(model, tmp_path)
        plain = nn.ModuleDict({"pair": copy.deepcopy(model["pair"].base_layer)})
        dorac.load_adapter(plain, tmp_path)
        assert torch.equal(plain["pair"](*inputs), y)
