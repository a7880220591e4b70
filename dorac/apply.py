"""Model surgery: wrap a model's layers with DoRA, and freeze the rest."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dorac import lora_config, notices, pretrained
from dorac.names import ModuleNames, plain_name
from dorac.nn import DoraLayer, layer_class, loading, loftq
from dorac.nn.hyperparameters import DEFAULT_ALPHA, DEFAULT_R
from dorac.places import dora_layers
from dorac.targets import SELECTING, Target, find_targets, with_eva_ranks
from dorac.undo import Undo
from dorac.wrapped import (
    SAVED_ATTRIBUTE,
    bare,
    config_record,
    find_saved,
    refuse_ddp,
    refuse_tied,
    replace,
    saved_modules,
)

if TYPE_CHECKING:
    import peft


@lora_config.takes_lora_config
def apply_dora(
    model: nn.Module,
    target_modules: "str | Sequence[str] | peft.LoraConfig | None" = None,
    r: int = DEFAULT_R,
    lora_alpha: float = DEFAULT_ALPHA,
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
        exclude_modules: a list of names or endings, or a regex; never adapted. A name here or in target_modules that
            matches no module is warned about.
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
        of the model can read past their forward, as Mamba does: see :func:`dorac.find_idle`. Others name quantised
        layers of a format whose norm takes a dense copy of the weight, those whose lora_alpha is 0, and modules that
        the model also holds in places that were not named.

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
    warned_of = SELECTING
    if target_modules is None:  # PEFT's table is for all models of a type
        target_modules, warned_of = lora_config.default_targets(model), SELECTING[1:]
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
        warned_of=warned_of,
    )
    if grouped_lora_A:
        targets = [
            dataclasses.replace(target, layout={"grouped_lora_A": True})
            if layer_class(target.module).takes_option("grouped_lora_A")
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
    notices.warn_zero_scaling({target.name: target.lora_alpha for target in targets})
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
        )
        layers = {plain_name(target.name): model.get_submodule(target.name) for target in targets}
        if by_loftq:
            loftq.begin(layers, original_weights)
        if inits is not None:
            if inits.takes_out(init_lora_weights):
                refuse_tied(model, layers.values(), f"init_lora_weights={init_lora_weights!r}")
            inits.begin(init_lora_weights, layers, config, eva_state_dict, log)
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
    notices.warn_read_past_forward(model, modules, merging=False)
    notices.warn_unnamed_places(model, modules)
    notices.warn_dense_copies(modules)
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
