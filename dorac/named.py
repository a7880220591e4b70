"""Several named adapters of one model, one of them active: ``add_adapter``, ``set_adapter``, ``delete_adapter``."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from dorac import callers, checks, notices, offload
from dorac.names import Pattern, plain_name
from dorac.nn import DoraLayer, norm_cache, shelf, starts
from dorac.nn.hyperparameters import DEFAULT_ALPHA, DEFAULT_R, check_hyperparameters, scaling_factor
from dorac.nn.shelf import Shelved
from dorac.undo import Undo
from dorac.wrapped import bare, refuse_offloaded_as_parts, require_layers, reshard, saved_modules


def adapters(model: nn.Module) -> list[str]:
    """The names of the adapters of ``model``, in the order in which they were added; at first ``["default"]``.

    Raises:
        ValueError: no adapter in the model; parts of it that were adapted apart and hold other names.
    """
    return list(_first(_layers(model)).adapters)


def active_adapter(model: nn.Module) -> str:
    """The name of the adapter that ``model`` runs, trains and saves.

    Raises:
        ValueError: as :func:`adapters`.
    """
    return _first(_layers(model)).adapter_name


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Makes another adapter of ``model`` the active one: in all of its layers, or in none if anything is raised.

    The adapters' tensors, modules of ``modules_to_save``, scalings, strengths and dropouts are exchanged; nothing is
    computed but what :func:`dorac.cache_norms` does not have already: it keeps the norms of each adapter. A compiled
    model runs on: between adapters of one rank nothing is recompiled (a second scaling costs a graph, as ever, and in
    training another dropout), for another rank once.

    The parameters are other ``nn.Parameter`` objects then: an optimizer holds the adapter that it was made for. So
    train each with its own (``parameter_groups`` after the switch), and step the one of the active adapter;
    ``parameters()`` and the state dict are the active adapter's.

    Raises:
        TypeError: not one name. (A list is for PEFT, where several adapters can be active.)
        ValueError: a name that is not loaded; a merged adapter, one that is switched off, sharded, offloaded itself or
            on ``meta``; a model in DistributedDataParallel, which goes on synchronising the gradients of the adapter
            that it was given.
    """
    root, model = model, bare(model)
    layers = _layers(model)
    active = active_of(layers, adapter_name)
    if adapter_name == active:
        return
    if isinstance(getattr(root, "_orig_mod", root), nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model is in DistributedDataParallel, which synchronises the adapter that it was given: switch the model "
            "first, then put it there"
        )
    check_switchable(model, layers)
    with Undo() as log:
        norm_cache.refresh(exchange(model, layers, adapter_name, log))


def add_adapter(
    model: nn.Module,
    adapter_name: str,
    r: int = DEFAULT_R,
    lora_alpha: float = DEFAULT_ALPHA,
    *,
    lora_dropout: float = 0.0,
    dropout_on: str = "adapter",
    use_rslora: bool = False,
    init_lora_weights: bool | str = True,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> None:
    """Adds a new adapter to every adapted layer of ``model``; :func:`set_adapter` makes it the active one.

    It has the dtypes, the ``norm_grad`` and the ``requires_grad`` of the adapter that is active. Its magnitude is the
    norm of the base weight that is there when it first becomes active, so that it starts as the base model. Modules of
    ``modules_to_save`` it has as copies of the present ones.

    Args:
        model: wrapped by :func:`dorac.apply_dora`.
        adapter_name: of no other adapter. The one that ``apply_dora`` makes is "default".
        r, lora_alpha, lora_dropout, dropout_on, use_rslora, init_lora_weights: see :class:`dorac.nn.DoraLayer`.
        rank_pattern, alpha_pattern: see :func:`dorac.apply_dora`.

    Raises:
        TypeError, ValueError: a name that is there; arguments out of range; a layer that cannot take it, by name: see
            :func:`set_adapter`, and one that began as a part of its base weight. Nothing is added then.
    """
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}")
    checks.check_dropout_on(dropout_on)
    options = {
        "lora_dropout": lora_dropout,
        "dropout_on": dropout_on,
        "use_rslora": use_rslora,
        "init_lora_weights": init_lora_weights,
    }
    model = bare(model)
    layers = _layers(model)
    active = check_new(model, layers, adapter_name)
    ranks, alphas = Pattern("rank_pattern", rank_pattern), Pattern("alpha_pattern", alpha_pattern)

    def build(name: str, layer: DoraLayer) -> Shelved:
        with offload.onloaded(layer.base_layer):
            if any(weight.is_meta for weight in layer.base_weights()):
                raise ValueError(f"{name or type(layer).__name__}: its base weight is on meta: load it first")
        rank, alpha = ranks.value(plain_name(name), r), alphas.value(plain_name(name), lora_alpha)
        return empty_adapter(name, layer, rank, alpha, {}, options | {"magnitude_loaded": False})

    with Undo() as log:
        put_on_shelves(model, layers, adapter_name, build, log)
        exchange(model, layers, adapter_name, log, norms=False)
        with torch.no_grad():
            for layer in dict.fromkeys(layers.values()):
                layer._draw_factors()
                with offload.onloaded(layer.base_layer):
                    layer._reset_magnitudes()
        exchange(model, layers, active, log, norms=False)
        for layer in layers.values():
            layer.adapters[adapter_name].fresh = True
        for argument, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
            if unused := pattern.unused():
                callers.warn(f"{argument} has keys that match no adapted module: {unused}")
        notices.warn_zero_scaling(
            {n: layer.adapters[adapter_name].settings["lora_alpha"] for n, layer in layers.items()}
        )


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Takes an adapter that is not active off ``model``, with its memory.

    Raises:
        TypeError: not a name.
        ValueError: a name that is not loaded, or that of the active adapter.
    """
    model = bare(model)
    layers = _layers(model)
    if adapter_name == active_of(layers, adapter_name):
        others = [name for name in adapters(model) if name != adapter_name]
        hint = f"make another one active first (dorac.set_adapter(model, {others[0]!r}))" if others else "it is alone"
        raise ValueError(
            f"adapter {adapter_name!r} is active: {hint}, or go back to the plain model with "
            "dorac.merge(model, unload=True)"
        )
    with Undo() as log:
        for module in _saved(model):
            log.keep_module(module)
            shelf.shelf_of(module, adapter_name).pop(adapter_name, None)
        for layer in layers.values():
            log.keep_module(layer)
            layer.adapters.pop(adapter_name, None)
            shelf.forget_norm(layer, adapter_name)


def _first(layers: Mapping[str, DoraLayer]) -> DoraLayer:
    return next(iter(layers.values()))


def _layers(model: nn.Module) -> dict[str, DoraLayer]:
    """The adapted layers of a model, which agree on their adapters."""
    layers = require_layers(bare(model))
    _one_of(layers)
    return layers


def _one_of(layers: Mapping[str, DoraLayer]) -> DoraLayer:
    """A layer that speaks for all."""
    one = _first(layers)
    for name, layer in layers.items():
        if layer.adapters.keys() != one.adapters.keys() or layer.adapter_name != one.adapter_name:
            raise ValueError(
                f"{name or type(layer).__name__} holds the adapters {_listed(layer)}, {next(iter(layers))} "
                f"{_listed(one)}: give each part that was adapted by itself to this function"
            )
    return one


def _listed(layer: DoraLayer) -> str:
    return ", ".join(f"{name!r} (active)" if name == layer.adapter_name else repr(name) for name in layer.adapters)


def active_of(layers: Mapping[str, DoraLayer], adapter_name: str) -> str:
    """The active adapter, if ``adapter_name`` is one of the model's."""
    one = _one_of(layers)
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name must be the name of one adapter, got {adapter_name!r}")
    if adapter_name not in one.adapters:
        raise ValueError(f"no adapter {adapter_name!r} is loaded, only {_listed(one)}")
    return one.adapter_name


def check_name(adapter_name: object) -> None:
    """Refuses what is no name of an adapter."""
    if not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name must be a string, got {type(adapter_name).__name__}")
    if not adapter_name:
        raise ValueError("adapter_name must not be empty")


def check_new(model: nn.Module, layers: Mapping[str, DoraLayer], adapter_name: str) -> str:
    """The active adapter, if another one can be added under this name."""
    check_name(adapter_name)
    one = _one_of(layers)
    if adapter_name in one.adapters:
        raise ValueError(
            f"adapter {adapter_name!r} is loaded already ({_listed(one)}): choose another name, or call "
            f"dorac.delete_adapter(model, {adapter_name!r}) first"
        )
    check_switchable(model, layers)
    return one.adapter_name


def check_switchable(model: nn.Module, layers: Mapping[str, DoraLayer]) -> None:
    """Refuses, by name, layers in which no other adapter can take the place of the active one now."""
    refuse_offloaded_as_parts(model, layers)
    reshard(model)
    for name, layer in layers.items():
        starts.settle(layer)
        if reason := shelf.unswitchable(layer):
            raise ValueError(f"{name or type(layer).__name__}: {reason}")
    for module in _saved(model):
        if reason := shelf.unswitchable_whole(module):
            raise ValueError(f"modules_to_save: a module of the class {type(module).__name__} {reason}")


def _saved(model: nn.Module) -> list[nn.Module]:
    """The modules that are trained whole, and what is in them."""
    return list(dict.fromkeys(part for name in saved_modules(model) for part in model.get_submodule(name).modules()))


def empty_adapter(
    name: str,
    layer: DoraLayer,
    r: int,
    lora_alpha: float,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, object],
) -> Shelved:
    """An adapter without values for a layer, in the layout of ``tensors``, or of the active one's if there are none.

    Raises:
        TypeError, ValueError: a rank, alpha or dropout that the layer cannot have.
    """
    r, lora_alpha, dropout = check_hyperparameters(
        r, lora_alpha, settings["lora_dropout"], settings["init_lora_weights"], None, settings["use_rslora"]
    )
    with offload.onloaded(layer.base_layer):
        if reason := layer.unfit_rank(layer.base_layer, r):
            raise ValueError(f"{name or type(layer).__name__}: {reason}")
        layout = layer.layout_of(layer.base_layer, tensors or layer._parameters)
        shapes = layer.adapter_shapes(layer.base_layer, r, **layout)
    own = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": float(dropout), "_strength": None}
    own["_scaling"] = scaling_factor(r, lora_alpha, settings["use_rslora"])
    return shelf.new_adapter(layer, shapes, {**settings, **own})


def put_on_shelves(
    model: nn.Module,
    layers: Mapping[str, DoraLayer],
    adapter_name: str,
    build: Callable[[str, DoraLayer], Shelved],
    log: Undo,
) -> None:
    """Adds an adapter to all layers, as ``build`` makes it, and to the modules that are trained whole."""
    active = _first(layers).adapter_name
    built: set[DoraLayer] = set()
    for name, layer in layers.items():
        if layer not in built:
            built.add(layer)
            log.keep_module(layer)
            layer.adapters[adapter_name] = build(name, layer)
    memo: dict[int, Tensor] = {}
    for module in _saved(model):
        log.keep_module(module)
        shelf.shelf_of(module, active)[adapter_name] = shelf.copied(module, memo)


def exchange(
    model: nn.Module, layers: Mapping[str, DoraLayer], adapter_name: str, log: Undo, *, norms: bool = True
) -> list[DoraLayer]:
    """Makes an adapter that is known the active one; ``norms``: see :func:`dorac.nn.shelf.exchange`.

    Returns:
        The layers whose kept norms are to be taken.
    """
    active = _first(layers).adapter_name
    for module in _saved(model):
        shelf.exchange_whole(module, adapter_name, active, log)
    return [layer for layer in dict.fromkeys(layers.values()) if shelf.exchange(layer, adapter_name, log, norms=norms)]


@contextlib.contextmanager
def shown(model: nn.Module, layers: Mapping[str, DoraLayer], adapter_name: str) -> Iterator[None]:
    """The tensors and settings of an adapter that is not active as the layers' own, for a block that reads them.

    Raises:
        ValueError: sharded layers, by name.
    """
    reshard(model)
    for name, layer in layers.items():
        if reason := shelf.in_parts(layer):
            raise ValueError(f"{name or type(layer).__name__}: {reason}")
    with Undo() as log:  # which rolls back whatever is raised, at the next line too
        exchange(model, layers, adapter_name, log, norms=False)
        yield
        log.roll_back()
