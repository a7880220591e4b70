"""``dorac.cache_norms`` in models of PEFT's: the norm of each adapter of each layer, as :mod:`dorac.nn` keeps its own.

What a norm rests on, how it is compared and when it is taken anew is in :mod:`dorac.nn.norm_cache`. This is what that
asks of an adapter. PEFT's scalings are numbers in a dictionary that anybody writes to, so they are compared, too.
"""

import weakref
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from dorac import offload, packed
from dorac.nn import compiled_norm, norm_cache
from dorac.nn.keeper import KeptNorm
from dorac.ops import sharded
from dorac.peft.direct import parameter
from dorac.peft.weights import is_partitioned, is_plain, whole
from dorac.stock_peft import BaseTunerLayer, LoraLayer
from dorac.undo import Undo

if TYPE_CHECKING:
    from dorac.peft import stacked


class AdapterNorm:
    """The norm of one adapter of a layer: a :class:`dorac.nn.keeper.Keeper`, held by the magnitude's module.

    It holds neither that nor the layer, so that a model that is dropped is freed at once.
    """

    norm_grad = False
    stack: "stacked.Kept | None" = None  # that holds the adapter beside others of the layer, for adapter_names

    def __init__(self, layer: LoraLayer, adapter: str) -> None:
        magnitude = layer.lora_magnitude_vector[adapter]
        self._layer, self._magnitude, self.adapter = weakref.ref(layer), weakref.ref(magnitude), adapter
        self.norm_budget = magnitude.norm_budget
        self.kept: KeptNorm | None = None

    def __repr__(self) -> str:
        return f"{type(self.layer).__name__} (adapter {self.adapter})"

    @property
    def layer(self) -> LoraLayer | None:
        """None once it is gone, whoever has kept the magnitude."""
        return self._layer()

    @property
    def magnitude(self) -> nn.Module:
        return self._magnitude()

    def is_current(self) -> bool:
        """Whether the adapter is still the layer's."""
        layer = self.layer
        return layer is not None and layer.lora_magnitude_vector._modules.get(self.adapter) is self.magnitude

    def known(self, inputs: tuple[Tensor, ...], scaling: float | Tensor) -> Tensor | None:
        """The norm if an eager forward with these ``norm_inputs`` may use it, None where it has to take its own."""
        kept = self.kept
        if kept is None or isinstance(scaling, Tensor):
            return None
        if scaling != kept.scaling:
            kept.at = None  # it is taken anew, once
        return norm_cache.known_in_eager(self, inputs, scaling)

    @property
    def scaling(self) -> float | Tensor:
        return self.magnitude.split(self.layer.scaling[self.adapter])[0]

    _scaling = scaling

    @property
    def _base_layer(self) -> nn.Module:
        base = self.layer._modules["base_layer"]
        return base.get_base_layer() if isinstance(base, BaseTunerLayer) else base

    def base_weights(self) -> list[Tensor]:
        return [parameter(self._base_layer, "weight")]

    def norm_inputs(self) -> tuple[Tensor, ...]:
        """The base layer's parameter and the factors; nothing once the adapter is deleted, or the layer gone."""
        layer, adapter = self.layer, self.adapter
        if layer is None:
            return ()
        modules = layer._modules  # whose attributes take ten times as long
        lora_A, lora_B = (modules[name]._modules.get(adapter) for name in ("lora_A", "lora_B"))
        if lora_A is not None:
            lora_A, lora_B = parameter(lora_A, "weight"), parameter(lora_B, "weight")
        elif adapter in modules["lora_embedding_A"]._parameters:
            lora_A, lora_B = (modules[f"lora_embedding_{which}"]._parameters[adapter] for which in "AB")
        else:
            return ()
        return parameter(self._base_layer, "weight"), lora_A, lora_B

    @property
    def merged(self) -> bool:
        """Whether no norm can be taken now: of a merged layer, a deleted adapter, and what is not whole here."""
        layer = self.layer
        return layer is None or bool(layer.merged_adapters) or self._untakeable() is not None

    @property
    def cannot_cache(self) -> str | None:
        offloaded = [module for module in self.layer.modules() if offload.is_offloaded(module)]
        if any(map(offload.is_on_disk, offloaded)):
            return offload.UNKEPT
        if self.layer.merged_adapters or offloaded:
            return None  # the norm is taken when it is unmerged, or in the next forward
        return self._untakeable()

    def _untakeable(self) -> str | None:
        inputs = self.norm_inputs()
        if not inputs:
            return "its adapter is deleted"
        if all(is_plain(t) and t.ndim > 1 and t._base is None and not t.is_meta for t in inputs):
            return None
        weight, lora_A, lora_B = inputs
        if weight is None:
            return self._unknown()
        if lora_A is None or lora_B is None:
            return "its factors are no parameters of their own (parametrised, or in an FSDP unit)"
        if is_partitioned(weight) or is_partitioned(lora_A):
            return "its parameters are partitioned (DeepSpeed ZeRO-3)"
        if sharded.any_sharded(*inputs):
            return norm_cache.SHARDED
        if weight.is_meta or lora_A.is_meta:
            return "its parameters are on the meta device (offloaded, or not loaded yet)"
        dense = is_plain(weight)
        if not dense and self.packed_base() is None:
            return self._unknown()
        if not (is_plain(lora_A) and is_plain(lora_B)):
            return "its factors are not plain tensors"
        try:
            for tensor in inputs if dense else (lora_A, lora_B):
                whole(tensor)
        except RuntimeError:
            return "its parameters are in parts (FSDP)"
        return None

    def _unknown(self) -> str:
        return f"the weight of its base layer ({type(self._base_layer).__name__}) is in a format that is not known"

    def norm_holder(self) -> nn.Module | None:
        return self.magnitude

    def packed_base(self) -> nn.Module | None:
        base = self._base_layer
        return None if is_plain(parameter(base, "weight")) or packed.of(base) is None else base

    def norm_operands(self) -> tuple[Tensor, Tensor, Tensor] | None:
        weight, lora_A, lora_B = self.norm_inputs()
        if not is_plain(weight) or weight.ndim >= 3:
            return None
        return self.magnitude._matrix(weight), lora_A.to(weight.device), lora_B.to(weight.device)

    def _norm(self) -> Tensor:
        base = self._base_layer
        weight, lora_A, lora_B = self.norm_inputs()
        if not is_plain(weight):
            weight = packed.of(base)
        factors = lora_A.to(weight.device), lora_B.to(weight.device)
        return self.magnitude.factored_norm(weight, *factors, self.scaling, groups=getattr(base, "groups", 1))


def adapter_norms(model: nn.Module) -> dict[str, AdapterNorm]:
    """Those of all adapters of the layers of ``model`` that run on dorac, by name; one that is there stays."""
    from dorac.peft.variants import adapters_on_dorac

    found = {}
    for name, layer, adapter in adapters_on_dorac(model):
        magnitude = layer.lora_magnitude_vector[adapter]
        magnitude.keeper = magnitude.keeper or AdapterNorm(layer, adapter)
        found[f"{name} (adapter {adapter})" if name else repr(magnitude.keeper)] = magnitude.keeper
    return found


def refresh(layer: nn.Module) -> None:
    """Takes the norms of all adapters of a layer of PEFT's anew, if it has any."""
    magnitudes = getattr(layer, "lora_magnitude_vector", {}).values()
    norm_cache.refresh([m.keeper for m in magnitudes if getattr(m, "keeper", None) is not None])


def forget(magnitude: nn.Module, log: Undo) -> None:
    """Ends the keeping of a norm whose magnitude is no longer dorac's."""
    keeper = vars(magnitude).pop("keeper", None)
    if keeper is not None:
        log.add(partial(setattr, magnitude, "keeper", keeper))
        if keeper.kept is not None:
            log.add(partial(compiled_norm.tell, keeper))  # last of these
            log.add(partial(vars(keeper).update, dict(vars(keeper))))
            log.add(partial(norm_cache.enlist, keeper))
        norm_cache.stop([keeper])
        vars(magnitude).pop("compiled_norm", None)
