"""Merging and unmerging that leave a layer, or a whole model, bit for bit as it was if anything is raised.

The originals of the adapted layers' weights are kept until the call is done: on the host, or on a CUDA device while it
has room.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor, nn

from dorac import offload, packed, stock_peft
from dorac.nn import blocks
from dorac.ops import sharded
from dorac.peft import norms
from dorac.peft.state import state
from dorac.peft.uncovered import report_shared
from dorac.peft.weights import dense_weight, is_partitioned, is_plain, own_weight, whole, written_in_place
from dorac.stock_peft import BaseTunerLayer, LoraLayer
from dorac.undo import Undo

_merge_adapter_stock = stock_peft.LoraModel.merge_adapter
_unmerge_adapter_stock = stock_peft.LoraModel.unmerge_adapter
_unload_stock = stock_peft.unload_and_optionally_merge


def keep_layer(log: Undo, layer: BaseTunerLayer) -> None:
    """Tells the log all that merging or unmerging may change of a layer, whatever class of PEFT's it has.

    Raises:
        RuntimeError: FSDP1 holds the weight in parts now.
        ValueError: FSDP2 holds a quantised one in parts.
    """
    base = layer.base_layer
    weight = own_weight(layer.get_base_layer())
    if sharded.any_sharded(weight) and getattr(layer.get_base_layer(), "quant_state", None) is not None:
        raise ValueError(packed.IN_PARTS)
    log.add(partial(norms.refresh, layer))  # once all is restored, which is a write
    if is_plain(weight):
        whole(weight)
    for module in layer.modules():  # PEFT's onload_layer leaves there what it has brought in when a merge fails
        if offload.is_offloaded(module):
            log.keep_module(module)
    for module in base.modules():
        log.keep(*offload.originals(module).values())
        log.keep_module(module)
        for attribute in ("state", "_hf_hook"):  # bitsandbytes' and accelerate's, which merging writes to
            owned = getattr(module, attribute, None)
            if hasattr(owned, "__dict__") and not isinstance(owned, nn.Module):
                log.add(_attributes_of(owned))
    for parameter in base.parameters():
        if _is_written_in_place(parameter):
            memory = parameter.data
            log.keep(memory)
            log.keep_attribute(parameter, "data")
        else:
            log.add(_attributes_of(parameter))
    log.keep_module(layer)


def _attributes_of(owner: object):
    before = dict(vars(owner))

    def restore() -> None:
        vars(owner).clear()
        vars(owner).update(before)

    return restore


def _is_written_in_place(parameter: Tensor) -> bool:
    """Whether merging writes to the memory of this parameter: of a quantised weight PEFT makes another parameter."""
    if sharded.any_sharded(parameter):
        return True
    plain = type(parameter) in (nn.Parameter, Tensor) and not is_partitioned(parameter) and not parameter.is_meta
    return plain and parameter.untyped_storage().size() > 0


_ADAPTER = (
    "lora_A.{}.weight",
    "lora_B.{}.weight",
    "lora_embedding_A.{}",
    "lora_embedding_B.{}",
    "lora_magnitude_vector.{}.weight",
)


class UnmergedWeight:
    """What dorac's LoRA layers have instead of PEFT's replay of merged adapters."""

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args, **kwargs) -> None:
        """Refuses other values of a merged adapter, since unmerging would take these out of the weight.

        A state dict with the base weight is of a merged model.
        """
        for adapter in self.merged_adapters if f"{prefix}base_layer.weight" not in state_dict else ():
            if any(prefix + key.format(adapter) in state_dict for key in _ADAPTER):
                raise ValueError(
                    f"{prefix.rstrip('.')}: the adapter {adapter!r} is merged: call unmerge_adapter() before loading "
                    "another in its place"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @contextlib.contextmanager
    def _unmerged_base_weight(self, safe_merge: bool = False) -> Iterator[Tensor]:
        """The base weight with the adapters that are merged taken out of it, dense and detached.

        The merged weight comes back bit for bit, where PEFT merges again, which rounds again.
        """
        if not self.merged:
            with offload.onloaded(self.get_base_layer()):
                yield dense_weight(self.get_base_layer()).detach()
            return
        log = Undo()
        try:
            keep_layer(log, self)
            self.unmerge()
            weight = dense_weight(self.get_base_layer()).detach().clone()
        finally:
            log.roll_back()
        yield weight


class Merging(UnmergedWeight):
    """What dorac's LoRA layers over dense weights have instead of PEFT's merging; the weight keeps its memory, too."""

    def merge(self, *args, **kwargs) -> None:
        base = self.get_base_layer()
        if (holder := packed.holder(base)) is not None:  # PEFT would write the merged weight as if it was dense
            raise ValueError(holder.cannot_requantise(base))
        with Undo() as log:
            keep_layer(log, self)
            with written_in_place(base):
                super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        with Undo() as log:
            keep_layer(log, self)
            with written_in_place(self.get_base_layer()):
                super().unmerge()
            norms.refresh(self)


def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    """PEFT's, of all layers or none."""
    _refuse_unknown(self, adapter_names)
    report_shared(self.model, state.reported)
    with Undo() as log:
        _keep_layers(log, self.model)
        _merge_adapter_stock(self, adapter_names=adapter_names, safe_merge=safe_merge)
        _refresh_norms(self.model)


def unmerge_adapter(self) -> None:
    """PEFT's, of all layers or none."""
    with Undo() as log:
        _keep_layers(log, self.model)
        _unmerge_adapter_stock(self)
        _refresh_norms(self.model)


def unload_and_optionally_merge(
    self,
    merge: bool = True,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> nn.Module:
    """PEFT's, of all layers or none: a refused merge leaves the adapters in their places."""
    _refuse_unknown(self, adapter_names)
    if merge:
        report_shared(self.model, state.reported)
    with Undo() as log:
        if merge:
            _keep_layers(log, self.model)
        for module in self.model.modules():
            if isinstance(module, BaseTunerLayer) or any(isinstance(m, BaseTunerLayer) for m in module.children()):
                log.keep_module(module)
        log.keep_module(self.model)  # which has a peft_config
        if hasattr(getattr(self.model, "config", None), "tie_word_embeddings"):
            log.keep_attribute(self.model.config, "tie_word_embeddings")
        blocks.restore(self.model.modules(), log)
        return _unload_stock(self, merge, progressbar, safe_merge, adapter_names)


def _refuse_unknown(self, adapter_names: list[str] | None) -> None:
    """PEFT merges nothing of a name that it does not know, without a word, and unloads all the same."""
    unknown = [] if isinstance(adapter_names, (str, type(None))) else sorted({*adapter_names} - self.peft_config.keys())
    if unknown:
        raise ValueError(f"no adapter {unknown[0]!r} is loaded, only {', '.join(map(repr, self.peft_config))}")


def _refresh_norms(root: nn.Module) -> None:
    """Of merged layers they are forgotten, and with them what they were taken of: a quantised weight is another one."""
    for module in root.modules():
        if isinstance(module, LoraLayer):
            norms.refresh(module)


def _keep_layers(log: Undo, root: nn.Module) -> None:
    inside: set[nn.Module] = set()
    for module in root.modules():
        if isinstance(module, BaseTunerLayer) and module not in inside:
            inside.update(module.modules())
            keep_layer(log, module)
