"""The magnitude of a linear layer, as PEFT's (``peft.tuners.lora.dora``), on dorac's functions: what others share."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from dorac import functional, magnitudes, offload, packed, stock_peft
from dorac.nn import norm_cache
from dorac.nn.compiled_norm import DICTIONARIES_TELL, CompiledNorm
from dorac.numerics import FLOAT_DTYPES, accumulate_dtype
from dorac.ops.norm import DEFAULT_BUDGET, lengths
from dorac.ops.packed_product import Held
from dorac.peft.direct import parameter
from dorac.peft.kept import Origin
from dorac.peft.norms import AdapterNorm
from dorac.peft.weights import (
    call_unit,
    dense_weight,
    gathered,
    is_fsdp_unit,
    linear_from_copy,
    whole,
)

_settings, _CACHING = stock_peft.place("dora_caching")
_SETTINGS = vars(_settings)  # where every forward looks
_OF_KEEPER = "keeper", "compiled_norm"  # which no copy has


class DoraLinearLayer(stock_peft.DoraLinearLayer):
    """The magnitude of a linear layer, ``weight [out]``, and what DoRA adds to the layer's output.

    Args:
        fan_in_fan_out: whether the base layer stores its weight as ``[in, out]`` (GPT-2's ``Conv1D``).

    Under PEFT's ``DoraCaching`` the norm, and nothing else, is kept in eval mode, and used while what it was taken of
    stays as it was (:class:`dorac.peft.kept.Origin`). Compiled code takes the norm in every call.

    The magnitude is float32 while it is trained, whoever casts it: see :mod:`dorac.magnitudes`.
    """

    norm_budget = DEFAULT_BUDGET  # bytes for the buffers of the norm
    own_scaling: float | Tensor | None = None  # lora_alpha / r; a tensor where PEFT's scaling is one. See split()
    keeper: AdapterNorm | None = None  # of the norm under dorac.cache_norms
    compiled_norm: CompiledNorm | None = None  # what compiled code knows of that

    def train(self, mode: bool = True) -> Self:
        self._cache_clear()
        if mode != self.training:
            norm_cache.doubt(self._keepers())
        if mode:
            magnitudes.widen(self._parameters.get("weight"))
            for keeper in self._keepers():
                keeper.stack = None
        return super().train(mode)

    # A LoRA layer registers its magnitudes last: what follows reaches them after its base layer and its factors.

    def _apply(self, fn, recurse=True) -> Self:
        """Moves and casts as any module, but never casts the magnitude below float32: see :mod:`dorac.magnitudes`."""
        weight = self._parameters.get("weight")
        kept = () if weight is None else (weight, weight.grad)
        super()._apply(magnitudes.never_narrower(fn, *kept), recurse)
        norm_cache.refresh(self._keepers())
        return self

    def _load_from_state_dict(self, *args) -> None:
        if offload.is_offloaded(self):
            raise ValueError(f"{offload.name_of(self)}: {offload.LOAD_BEFORE}")
        magnitudes.widen(self._parameters.get("weight"))  # before what comes is rounded
        super()._load_from_state_dict(*args)
        norm_cache.refresh(self._keepers())

    def _keepers(self) -> list[AdapterNorm]:
        return [] if self.keeper is None else [self.keeper]

    def current(self) -> Tensor:
        """The magnitude for a forward; a trained one in half precision becomes float32 first."""
        weight = parameter(self, "weight")
        if weight is None:
            return self.weight  # parametrised
        if weight.dtype in magnitudes.HALF and self.training:
            magnitudes.widen(weight)
        return weight

    def __getstate__(self) -> dict:
        state = super().__getstate__()
        # What a copy's norms would be taken of are other tensors.
        return {name: value for name, value in state.items() if name not in _OF_KEEPER} | {"_dora_cache": {}}

    def known_norm(
        self, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor
    ) -> Tensor | None:
        """The norm that :func:`dorac.cache_norms` keeps, if it is that of these parameters now."""
        told = self.compiled_norm
        if told is None and self.keeper is None:
            return None
        inputs = parameter(base_layer, "weight"), lora_A, lora_B
        if not is_dynamo_compiling():
            return self.keeper.known(inputs, scaling)
        if not DICTIONARIES_TELL and self.keeper is None:
            return None
        if told is None or isinstance(scaling, Tensor) or scaling != told.scaling:
            return None
        return norm_cache.known_to_compiled(told, inputs, scaling)

    def split(self, scaling: float | Tensor) -> tuple[float | Tensor, float | Tensor | None]:
        """The adapter's own scaling s and the strength a, where PEFT's ``scaling`` is ``a s``; None for the strength 1.

        ``set_scale``, ``scale_layer`` and ``rescale_adapter_scale`` multiply the scaling by a strength: read like this,
        the weight is ``W + a (W' - W)``. A layer that no model of PEFT's holds has its scaling as it is given.
        """
        own = self.own_scaling
        if isinstance(own, Tensor):
            return own, torch.where(own == 0, 1.0, scaling / own)
        if own is None or isinstance(scaling, Tensor):
            return scaling, None
        if scaling == own or own == 0:
            return own, None
        strength = scaling / own
        return own, None if abs(strength - 1) < 1e-12 else strength  # a division took a multiplication back

    def keeps_norms(self) -> bool:
        """Whether norms are kept now; forgets those there are if not. Compiled code neither keeps nor forgets."""
        if torch.compiler.is_compiling():
            return False
        if _SETTINGS[_CACHING] and not self.training:
            return True
        if self._dora_cache:
            self._cache_clear()
        return False

    def _kept(
        self, adapter_name: str | None, origin: Callable[[], Origin | None], norm: Callable[[], Tensor]
    ) -> Tensor:
        """The norm, or the one that is kept of the same origin."""
        if not self.keeps_norms():
            return norm()
        if adapter_name is None:
            self._cache_clear()
            return norm()
        now, (then, kept) = origin(), self._dora_cache.get(f"weight-norm-{adapter_name}", (None, None))
        if now is None or now != then:
            kept = norm()
            self._dora_cache[f"weight-norm-{adapter_name}"] = now, kept
        return kept

    get_lora_weight = stock_peft.linear_lora_weight  # uncached: a dense product

    def get_weight_norm(
        self, weight: Tensor, lora_weight: Tensor, scaling: float, adapter_name: str | None = None
    ) -> Tensor:
        """``||weight + scaling * lora_weight||_row`` from a dense ``lora_weight``, which forward never makes.

        Args:
            weight: as the base layer stores it. lora_weight: ``[out, in]``, for a convolution the filters' shape.
            adapter_name: PEFT's; of a dense ``lora_weight`` no norm is kept.

        Returns:
            ``[out]``, ``[1, out, 1, ...]`` for a convolution; float32, or float64 if an argument is.

        Raises:
            RuntimeError: FSDP1 holds the weight in parts now.
        """
        whole(weight)
        acc = accumulate_dtype(weight, lora_weight)
        if weight.ndim >= 3:
            norm = lengths((weight.to(acc) + scaling * lora_weight.to(acc)).flatten(1))
            return norm.view(1, -1, *[1] * (weight.ndim - 2))
        return lengths(self._matrix(weight).to(acc) + scaling * lora_weight.to(acc))

    def factored_norm(
        self,
        weight: Tensor | packed.Packed | Held,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        *,
        groups: int = 1,
        adapter_name: str | None = None,
        base_layer: nn.Module | None = None,
    ) -> Tensor:
        """The same norm from the factors as PEFT stores them; a constant in backprop (paper, section 4.3).

        Of a packed weight (:mod:`dorac.packed`) it is read from there. ``base_layer``: whose weight it is, if known;
        under ``DoraCaching`` no norm of a quantised one is kept without it.

        Of an embedding ``||weight^T + s * lora_B lora_A||_row``, from ``lora_A [r, vocab]`` and ``lora_B [dim, r]``.

        Raises:
            RuntimeError: FSDP1 holds one of them in parts now.
        """
        factors = whole(lora_A), whole(lora_B)
        is_packed = packed.is_packed(weight) or type(weight) is Held
        if not is_packed:
            weight = whole(weight)

        def norm() -> Tensor:
            if not is_packed and weight.ndim >= 3:
                flat = functional.norm_factored_conv(weight, *factors, scaling, groups=groups)
                return flat.view(1, -1, *[1] * (weight.ndim - 2))
            matrix = weight if is_packed else self._matrix(weight)
            return functional.norm_factored(matrix, *factors, scaling, budget=self.norm_budget)

        return self._kept(adapter_name, lambda: Origin.of(base_layer, weight, factors, scaling, groups), norm)

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.t() if self.fan_in_fan_out else weight

    @torch.no_grad()
    def update_layer(
        self, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, place_on_cpu: bool = False
    ) -> None:
        """Sets the magnitude to the norm, float32 or float64, so that g = 1.

        Args:
            lora_A, lora_B: as PEFT stores them (for an embedding ``[r, vocab]`` and ``[dim, r]``). The norm is computed
                where lora_A is.
            place_on_cpu: keep the magnitude on the CPU (PEFT's ephemeral offload computes it on a GPU).
        """
        with gathered([*base_layer.parameters(), lora_A, lora_B]):
            if lora_A.dtype not in FLOAT_DTYPES:  # PEFT has them in FP8Linear's float8 until it widens them after this
                lora_A, lora_B = lora_A.float(), lora_B.float()
            weight = packed.of(base_layer)  # which forward takes the norm of, too
            if weight is None or weight.device != lora_A.device:
                weight = dense_weight(base_layer).to(lora_A.device)
            norm = self.factored_norm(weight, lora_A, lora_B, scaling, groups=getattr(base_layer, "groups", 1))
        self.weight = nn.Parameter(norm.cpu() if place_on_cpu else norm)

    def mag_scale(self, norm: Tensor) -> Tensor:
        """g in the shape of the magnitude, on the norm's device."""
        magnitude = whole(self.current(), norm.numel()).flatten().to(norm.device)
        return functional.magnitude_scale(magnitude, norm.flatten()).view(norm.shape)

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """``(g - 1) * base + g * s * lora``, to be added to the base layer's output.

        Args:
            x: ``[*, in]``, in training what dropout left of it.
            lora_A, lora_B: the modules.
            base_result: the base layer's output for this x; None computes it again, without the bias: a layer whose
                weight is packed is called once more, of others the weight is multiplied with, dense.

        Returns:
            ``[*, out]``, float32, or float64 if anything is: the sum with the base layer's output is rounded, once.
        """
        scaling, strength = self.split(scaling)
        with self._gathered(base_layer, lora_A, lora_B) as will_be_released:
            known = self.known_norm(base_layer, lora_A.weight, lora_B.weight, scaling)
            weight = None
            if known is None or base_result is None:
                weight = packed.of(base_layer)
                if weight is None or (base_result is None and will_be_released):
                    weight = dense_weight(base_layer)

            def norm_of(lora_A: Tensor, lora_B: Tensor) -> Tensor:
                if known is not None:
                    return known
                return self.factored_norm(
                    weight, lora_A, lora_B, scaling, adapter_name=adapter_name, base_layer=base_layer
                )

            lora, norm = self._lora_and_norm(x, lora_A, lora_B, norm_of)
            g = self.mag_scale(norm)
            if base_result is None and packed.is_packed(weight):
                base_result = _own_product(base_layer, x)
            if base_result is None:
                base = linear_from_copy(x, self._matrix(weight.clone() if will_be_released else weight))
            else:
                base = without_bias(base_result, base_layer.bias)
        return self._delta(base, lora, g, scaling, strength)

    @staticmethod
    def _lora_and_norm(
        x: Tensor, lora_A: nn.Module, lora_B: nn.Module, norm: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """``lora_B(lora_A(x))`` and ``norm`` of their weights."""
        if is_fsdp_unit(lora_A) or is_fsdp_unit(lora_B):
            lora, weight_A = call_unit(lora_A, x)
            lora, weight_B = call_unit(lora_B, lora)
            return lora, norm(weight_A, weight_B)
        adapted_norm = norm(lora_A.weight, lora_B.weight)  # first: DeepSpeed releases what a module was called with
        return lora_B(lora_A(x)), adapted_norm

    def _gathered(self, *modules: nn.Module):
        return gathered([*self.parameters(), *(p for m in modules for p in m.parameters())])

    @staticmethod
    def _delta(
        base: Tensor, lora: Tensor, g: Tensor, scaling: float | Tensor, strength: float | Tensor | None, dim: int = -1
    ) -> Tensor:
        g = g.flatten().to(base.device)
        wide = accumulate_dtype(base, lora, g)  # the caller rounds once, after its sum
        change = functional.compose(base.to(wide), lora, g, scaling, delta=True, dim=dim)
        return change if strength is None else strength * change

    def __repr__(self) -> str:
        return "lora.dora." + nn.Module.__repr__(self)  # stock PEFT's subclasses say it twice


def _own_product(base_layer: nn.Module, x: Tensor) -> Tensor:
    """The output of a layer with a packed weight for an x that PEFT may have converted to the adapter's dtype."""
    weight = base_layer.weight
    if hasattr(type(weight), "__tensor_flatten__"):  # torchao's take x in their own dtype alone
        x = x.to(weight.dtype)
    return base_layer(x)


def without_bias(base_result: Tensor, bias: Tensor | None, trailing: int = 0) -> Tensor:
    """The base layer's output before its bias, in float32 or float64; ``trailing`` dimensions follow the outputs'."""
    base_result = base_result.to(accumulate_dtype(base_result))
    return base_result if bias is None else base_result - bias.to(base_result).view(-1, *[1] * trailing)


def is_zero(strength: float | Tensor | None) -> bool:
    """Whether a layer at this strength is its base layer, bit for bit.

    Compiled code does not ask: a scaling that a graph only compares, Dynamo takes for a constant in all graphs after.
    """
    return not torch.compiler.is_compiling() and not isinstance(strength, Tensor) and strength == 0
