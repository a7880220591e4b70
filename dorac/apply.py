"""Model surgery: wrap a model's layers with DoRA, freeze the rest, merge."""

import bisect
import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dorac import lora_config, notices, offload, pretrained
from dorac.names import ModuleNames, Names, parents, plain_name
from dorac.nn import DoraLayer, blocks, layer_class, loading, loftq, merging, starts
from dorac.nn.kinds import CONVOLUTIONS
from dorac.nn.shelf import SHELF_ATTRIBUTE
from dorac.ops import sharded
from dorac.targets import Target, find_targets, named_places, peft_layers, with_eva_ranks
from dorac.undo import Undo

if TYPE_CHECKING:
    import peft

# Where a wrapped model remembers which modules are trained and saved whole.
SAVED_ATTRIBUTE = "dora_modules_to_save"
_LEFT_BY_WRAPPING = (SAVED_ATTRIBUTE, lora_config.RECORD_ATTRIBUTE, SHELF_ATTRIBUTE)


@lora_config.takes_lora_config
def apply_dora(
    model: nn.Module,
    target_modules: "str | Sequence[str] | peft.LoraConfig | None" = None,
    r: int = 8,
    lora_alpha: float = 8,
    *,
    lora_dropout: float = 0.0,
    dropout_on: str = "adapter",
    use_rslora: bool = False,
    init_lora_weights: bool | str = True,
    adapter_dtype: torch.dtype | None = None,
    norm_grad: bool = False,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Sequence[str] | None = None,
    bias: str = "none",
    grouped_lora_A: bool = False,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    original_weights: Mapping[str, Tensor] | None = None,
    config: "peft.LoraConfig | None" = None,
) -> list[str]:
    """Replaces the named layers of ``model`` by their adapted forms from ``dorac.nn``, in place, and freezes the rest.

    The arguments mean what they mean in PEFT's ``LoraConfig``, and one of those may stand in their place.

    Args:
        model: any module that contains layers of the kinds that ``dorac.nn`` adapts, quantised linear layers of
            bitsandbytes, torchao and HQQ among them (:class:`dorac.nn.DoraQuantLinear`). Quantise it first, let
            accelerate dispatch it and ``peft.prepare_model_for_kbit_training`` come before.
        target_modules: a list of names or dotted name endings, a regex for the whole name, or "all-linear" (every
            linear layer but the language-model head). None takes what PEFT has for the model's architecture, where
            PEFT is installed.
        r, lora_alpha, lora_dropout, dropout_on, use_rslora, init_lora_weights, adapter_dtype, norm_grad: see
            :class:`dorac.nn.DoraLayer`; of these ``LoraConfig`` has no dropout_on and no norm_grad. For linear layers
            init_lora_weights may also be a start of PEFT's, by PEFT's own code: "pissa", "pissa_niter_[number]",
            "olora", "orthogonal"; "corda" and "lora_ga" after PEFT's ``preprocess_corda`` or ``preprocess_loraga`` with
            the same config; "eva" with the ``eva_state_dict`` that ``peft.get_eva_state_dict(model, data, config)``
            returns, which gives the layers ranks, and none to some. The output at the start is the frozen model's, to a
            rounding. All but "orthogonal" and "eva" take a part out of the base weight: see :mod:`dorac.nn.residual`
            and :func:`dorac.save_adapter`. "loftq" is for quantised linear layers, with ``original_weights``: the
            output at the start is nearer to that of the model before it was quantised (:mod:`dorac.nn.loftq`).
        exclude_modules: a list of names or endings, or a regex; never adapted.
        layers_to_transform: layer numbers; only layers inside these are adapted. layers_pattern: the name before the
            number.
        rank_pattern, alpha_pattern: from a regex for the end of a name (anchored by a leading ``^``) to another r or
            lora_alpha. A key that matches nothing is warned about.
        modules_to_save: endings of names of modules that are trained whole and saved with the adapter; never adapted.
        bias: only "none"; training biases is refused.
        grouped_lora_A: for the convolutions among the targets, see :class:`dorac.nn.DoraConv2d`.
        eva_state_dict: for the start "eva".
        original_weights: for the start "loftq", the state dict of the model before it was quantised, or as much of it
            as is adapted: ``{"<module>.weight": [out, in]}``.
        config: PEFT's ``LoraConfig`` in the place of all that it has fields for; it may come second as well,
            ``apply_dora(model, LoraConfig(use_dora=True, r=16))``. Beside it go the arguments that it has no field for.
            Its ``task_type`` has the task's head trained whole, as in PEFT, and is in the saved config.

    Returns:
        The names of the wrapped modules, in the model's order. A ``RuntimeWarning`` names those whose weight the code
        of the model can read past their forward, as Mamba does: see :func:`dorac.find_idle`. Another one names
        quantised layers of a format whose norm takes a dense copy of the weight.

    Raises:
        TypeError, ValueError: nothing matched; a matched module cannot be adapted (listed by name with the reason);
            PEFT has adapted a module of the model; arguments out of range; a config that asks for what dorac does not
            have (each field by name), or one beside arguments that it has fields for. The model is then unchanged.
    """
    if bias != "none":
        raise ValueError(
            f"bias must be 'none', got {bias!r}: dorac trains no biases; set requires_grad on them yourself"
        )
    refuse_ddp(model)
    model = bare(model)
    if target_modules is None:
        target_modules = lora_config.default_targets(model)
    saved = find_saved(model, modules_to_save or [])
    targets = find_targets(
        model,
        target_modules,
        r=r,
        lora_alpha=lora_alpha,
        exclude_modules=exclude_modules,
        layers_to_transform=layers_to_transform,
        layers_pattern=layers_pattern,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        saved=[*saved, *saved_modules(model)],
        stacklevel=4,
    )
    if grouped_lora_A:
        targets = [
            dataclasses.replace(target, layout={"grouped_lora_A": True})
            if layer_class(target.module) in CONVOLUTIONS
            else target
            for target in targets
        ]
    inits, by_loftq = None, init_lora_weights == "loftq"
    if original_weights is not None and not by_loftq:
        raise ValueError(f"original_weights is for init_lora_weights='loftq', got {init_lora_weights!r}")
    if by_loftq:
        loftq.check({t.name: t.module for t in targets}, original_weights, config)
    elif isinstance(init_lora_weights, str) and init_lora_weights != "gaussian":
        from dorac.peft import inits  # imported only for a start of PEFT's

        inits.check(init_lora_weights, {t.name: t.module for t in targets}, config, eva_state_dict)
    if eva_state_dict is not None:
        if init_lora_weights != "eva":
            raise ValueError(f"eva_state_dict is for init_lora_weights='eva', got {init_lora_weights!r}")
        eva_state_dict = {key.removeprefix("base_model.model."): t for key, t in eva_state_dict.items()}
        adjust_alpha = getattr(getattr(config, "eva_config", None), "adjust_scaling_factors", True)
        targets = with_eva_ranks(targets, eva_state_dict, adjust_alpha=adjust_alpha)
    with Undo() as log:
        wrap(
            model,
            targets,
            saved,
            log,
            lora_dropout=lora_dropout,
            dropout_on=dropout_on,
            use_rslora=use_rslora,
            init_lora_weights=True if by_loftq or inits is not None else init_lora_weights,
            adapter_dtype=adapter_dtype,
            norm_grad=norm_grad,
            stacklevel=4,
        )
        layers = {plain_name(target.name): model.get_submodule(target.name) for target in targets}
        if by_loftq:
            loftq.begin(layers, original_weights)
        if inits is not None:
            if inits.takes_out(init_lora_weights):
                refuse_tied(model, layers.values(), f"init_lora_weights={init_lora_weights!r}")
            inits.begin(init_lora_weights, layers, config, eva_state_dict, log, stacklevel=4)
        if config is not None:
            setattr(model, lora_config.RECORD_ATTRIBUTE, config_record(model) | lora_config.recorded(config))
    return ModuleNames(target.name for target in targets)


def wrap(
    model: nn.Module,
    targets: list[Target],
    saved: list[str],
    log: Undo,
    *,
    adapter_name: str = "default",
    stacklevel: int = 3,
    **options,
) -> None:
    """Builds all wrappers; then freezes the rest and puts them in place. The log can take all of it back.

    ``adapter_name``: of the adapter of a model that has none yet.
    """
    for name, layer in dora_layers(model).items():
        if len(layer.adapters) > 1:
            raise ValueError(
                f"{name} holds the adapters {', '.join(layer.adapters)}, and layers that are adapted later would have "
                "one of them: adapt all layers before further adapters are added"
            )
        adapter_name = layer.adapter_name
    modules = {target.name: target.module for target in targets}
    notices.warn_read_past_forward(model, modules, merging=False, stacklevel=stacklevel)
    notices.warn_dense_copies(modules, stacklevel=stacklevel)
    log.keep_requires_grad(model.parameters())
    wrappers: dict[nn.Module, DoraLayer] = {}  # one wrapper for a module that the model holds under several names
    for target in targets:
        if target.module not in wrappers:
            layer = layer_class(target.module)(target.module, target.r, target.lora_alpha, **options, **target.layout)
            layer.training = target.module.training
            layer.adapter_name, layer.adapters = adapter_name, {adapter_name: None}
            wrappers[target.module] = layer
    adapters = {id(p) for layer in dora_layers(model).values() for p in layer.parameters(recurse=False)}
    for parameter in model.parameters():
        if id(parameter) not in adapters:
            parameter.requires_grad_(False)
    saved = list(dict.fromkeys([*saved_modules(model), *saved]))
    for name in saved:
        for parameter in model.get_submodule(name).parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    replace(model, {target.name: wrappers[target.module] for target in targets}, log)
    log.keep_module(model)
    setattr(model, SAVED_ATTRIBUTE, saved)
    loading.guard(model)
    pretrained.install(model, saved, SAVED_ATTRIBUTE, log)


def replace(model: nn.Module, modules: Mapping[str, nn.Module], log: Undo) -> None:
    """Puts modules in the places that they are named for."""
    log.keep_module(*{model.get_submodule(name.rpartition(".")[0]) for name in modules})
    for name, module in modules.items():
        model.set_submodule(name, module)


def saved_modules(model: nn.Module) -> list[str]:
    """The names of the modules of a wrapped model, or of parts that were wrapped, that are trained and saved whole."""
    names = [
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in vars(module).get(SAVED_ATTRIBUTE, [])
    ]
    return list(dict.fromkeys(names))


def config_record(model: nn.Module) -> dict[str, object]:
    """What the saved config of a wrapped model repeats of the config that it was wrapped with."""
    return vars(model).get(lora_config.RECORD_ATTRIBUTE, {})


def find_saved(model: nn.Module, modules_to_save: Sequence[str], *, all_needed: bool = True) -> list[str]:
    """The names of the modules that ``modules_to_save`` means.

    Raises:
        TypeError: not a list of names.
        ValueError: an entry that matches nothing (if ``all_needed``), a module that shares a parameter with the rest of
            the model, or one that is or holds a DoRA layer.
    """
    if isinstance(modules_to_save, str):
        raise TypeError(f"modules_to_save must be a list of names, got the string {modules_to_save!r}")
    Names("modules_to_save", modules_to_save)
    names = [name for name, _ in model.named_modules() if name]
    backwards = sorted((name[::-1], place) for place, name in enumerate(names))
    found = []
    for ending in modules_to_save:
        start = ending[::-1]
        first = place = bisect.bisect_left(backwards, (start,))
        while place < len(backwards) and backwards[place][0].startswith(start):
            place += 1
        if all_needed and place == first:
            raise ValueError(f"modules_to_save: {ending!r} matches no module")
        found += [names[index] for index in sorted(index for _, index in backwards[first:place])]
    _refuse_unsavable(model, found)
    return found


def _refuse_unsavable(model: nn.Module, found: list[str]) -> None:
    """What is trained whole must hold no adapter, lie in none and share no parameter with the rest."""
    if not found:
        return
    layers = list(dora_layers(model))
    order = {name: place for place, name in enumerate(layers)}
    within: dict[str, int] = {}  # the first layer in each module
    for place, layer in enumerate(layers):
        for name in parents(layer):
            within.setdefault(name, place)
    keys: dict[int, list[str]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        keys.setdefault(id(parameter), []).append(key)
    for name in found:
        around = [order[parent] for parent in parents(name) if parent in order]
        if around or name in within:
            adapted = layers[min([*around, *([within[name]] if name in within else [])])]
            raise ValueError(f"modules_to_save: {name} cannot be trained whole, {adapted} is adapted already")
        own = model.get_submodule(name).parameters()
        outside = (key for p in own for key in keys[id(p)] if not key.startswith(f"{name}."))
        if shared := next(outside, None):
            raise ValueError(
                f"modules_to_save: {name} shares its weight with {shared}; untie them, or both would be trained"
            )


def merge(model: nn.Module, *, unload: bool = False) -> nn.Module | None:
    """Writes every adapter into its base weight: ``W' = g * (W + s * lora_B @ lora_A)``.

    A quantised weight is quantised anew, in its own format, with the error that this makes, and kept until the adapter
    is unmerged or dropped: see :class:`dorac.nn.DoraQuantLinear`.

    Args:
        model: a model with adapted layers (:class:`dorac.nn.DoraLayer`), or one such layer.
        unload: also put the plain layers back in place of the wrappers. What is left is the model's own classes, its
            parameters still frozen but for those in ``modules_to_save``. Adapters that are not active are gone.

    Returns:
        With ``unload`` the plain model: ``model``, or the plain layer if ``model`` itself is an adapted layer. Else
        None, since the change is made in place. A ``RuntimeWarning`` names layers whose weight the code of the model
        can read past their forward: that will see the merged one.

    Raises:
        ValueError: no adapter in the model; a base weight that another module also uses (tied weights): merging would
            change both; an adapter that is not finite: it would destroy the base weight; a grouped convolution whose
            lora_A sees all channels: it has no merged form; a format that cannot be quantised anew here (mxfp4,
            transformers' float8, int4 without torchao's kernels); a merged weight that overflows its dtype; a base
            weight that accelerate offloads to disk (on the host it is written). Refused by name.
            Then, and whatever else is raised, the model is what it was, bit for bit. (For that the base weights are
            kept until all are written: on their device while half of its free memory holds them, then on the host.)
    """
    root, model = model, bare(model)
    layers = require_layers(model)
    refuse_offloaded_as_parts(model, layers)
    reshard(model)
    for name, layer in layers.items():
        starts.settle(layer)
        if reason := layer.cannot_merge():
            raise ValueError(f"{name or type(layer).__name__}: {reason}")
    refuse_tied(model, layers.values(), "merging")
    for name, layer in layers.items():
        finite = all(p.is_meta or sharded.all_finite(p.detach()) for p in layer.parameters(recurse=False))
        if not layer.merged and not finite:
            raise ValueError(
                f"{name or type(layer).__name__}: the adapter is not finite, merging would destroy the weight"
            )
    notices.warn_read_past_forward(model, layers, merging=True, stacklevel=2)
    norms = {}
    for name, layer in layers.items():
        if not layer.merged:
            with _blaming(name, layer):
                norms[name] = merging.decide_merge(layer)
    with Undo() as log:
        for name, layer in layers.items():
            if not layer.merged:
                with _blaming(name, layer):
                    merging.write_merged(layer, norms.pop(name), log)
        if unload:
            _unload(model, layers, log)
            return layers[""].base_layer if "" in layers else root  # in the block: nothing raises once it has ended
        log.keep_module(model)
        loading.guard(model)
        return None


@contextlib.contextmanager
def _blaming(name: str, layer: DoraLayer) -> Iterator[None]:
    """Names the layer in what is said of its values."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name or type(layer).__name__}: {error}") from None


def _unload(model: nn.Module, layers: Mapping[str, DoraLayer], log: Undo) -> None:
    """Puts the base layers in the places of their wrappers, and takes what wrapping left on the modules."""
    if "" in layers:
        return
    replace(model, {name: layer.base_layer for name, layer in layers.items()}, log)
    blocks.restore(model.modules(), log)
    for module in model.modules():
        left = [name for name in _LEFT_BY_WRAPPING if name in vars(module)]
        if left or loading.is_guarded(module) or pretrained.is_installed(module):
            log.keep_module(module)
            for name in left:
                delattr(module, name)
            loading.unguard(module)
            pretrained.remove(module)


def unmerge(model: nn.Module) -> None:
    """Takes every merged adapter out of its base weight again, to ``2 eps * max(|V|, |W|)``; a quantised one exactly.

    Raises:
        ValueError: no adapter in the model; a layer with rows of g = 0, which cannot be restored (named). Then, and
            whatever else is raised, the model is what it was.
    """
    layers = {name: layer for name, layer in require_layers(bare(model)).items() if layer.merged}
    refuse_offloaded_as_parts(bare(model), layers)
    reshard(bare(model))
    for name, layer in layers.items():
        with _blaming(name, layer):
            merging.decide_unmerge(layer)
    with Undo() as log:
        for name, layer in layers.items():
            if layer.merged:  # not yet unmerged under another name
                with _blaming(name, layer):
                    merging.write_unmerged(layer, log)


def bare(model: nn.Module) -> nn.Module:
    """The module itself inside ``torch.compile``, ``DataParallel``, DDP: surgery and checkpoints go by its names."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def refuse_ddp(model: nn.Module) -> None:
    """An adapter cannot join a model that DDP holds already."""
    if isinstance(getattr(model, "_orig_mod", model), nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model is in DistributedDataParallel, which would not synchronise the new parameters: adapt the model "
            "first, then put it there"
        )


def reshard(model: nn.Module) -> None:
    """Frees what FSDP2 has gathered: after a forward some parameters are still copies, and writes to them get lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def dora_layers(model: nn.Module) -> dict[str, DoraLayer]:
    """The DoRA layers of a model by name; one that is held in several places has several names."""
    return {name: module for name, module in named_places(model) if isinstance(module, DoraLayer)}


def refuse_offloaded_as_parts(model: nn.Module, layers: Mapping[str, DoraLayer]) -> None:
    """The values of such layers are there only while an outer module runs."""
    reasons = offload.inside_others(model)
    for name in layers:
        if name in reasons:
            raise ValueError(f"{name} {reasons[name]}")


def require_layers(model: nn.Module) -> dict[str, DoraLayer]:
    """The DoRA layers of a model by name; a ``ValueError`` if there is none."""
    layers = dora_layers(model)
    if not layers:
        if found := peft_layers(model):
            raise ValueError(
                f"{found[0]} is adapted by PEFT: call save_pretrained, merge_adapter, unmerge_adapter, "
                "merge_and_unload or set_adapter of the PEFT model"
            )
        raise ValueError(f"{type(model).__name__} holds no DoRA layer; wrap it with dorac.apply_dora first")
    return layers


def _memory(parameter: Tensor) -> tuple[str, int]:
    """Where the parameter's memory begins (of a DTensor, this rank's shard), or which it is if it has none."""
    local = parameter.to_local() if sharded.any_sharded(parameter) else parameter
    if local.numel() and not local.is_meta and (address := local.data_ptr()):  # 0: it consists of other tensors
        return "address", address
    return "id", id(parameter)


def refuse_tied(model: nn.Module, layers: Iterable[DoraLayer], deed: str) -> None:
    """A base weight of ``layers`` that something outside its wrapper reads too must not be written to."""
    paths: dict[DoraLayer, list[str]] = {}
    layers = set(layers)
    for name, module in model.named_modules(remove_duplicate=False):
        if module in layers:
            paths.setdefault(module, []).append(f"{name}." if name else "")
    names: dict[tuple[str, int], list[str]] = {}  # of the parameters in one piece of memory
    memories: dict[int, tuple[str, int]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        originals = offload.originals(module)
        for key, parameter in module.named_parameters(recurse=False):
            kept = originals.get(key)
            memories[id(parameter)] = memory = _memory(parameter if kept is None else kept)
            names.setdefault(memory, []).append(f"{prefix}.{key}".lstrip("."))
    for layer, prefixes in paths.items():
        for weight in layer.base_weights():
            attribute = next(key for key, parameter in layer.base_layer.named_parameters() if parameter is weight)
            tied = next((n for n in names[memories[id(weight)]] if not n.startswith(tuple(prefixes))), None)
            if tied is not None:
                own = f"layer.base_layer.{attribute}"
                raise ValueError(
                    f"{prefixes[0]}base_layer.{attribute} is tied to {tied}: {deed} would change both. Give the "
                    f"layer a {attribute} of its own first ({own} = nn.Parameter({own}.clone()))"
                )
