"""Tiny random models of the families that people adapt, what each is trained on, and the ways to train and keep it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable

import peft
import torch
import transformers
from torch import Tensor, nn

import dorac
import dorac.peft
from dorac import reference
from dorac.apply import dora_layers
from dorac.testing import rounding

STEPS = 4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TEXT = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = TEXT | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """A model, ``draw(number, generator)`` for that many rows of its data, and what is adapted in it."""

    build: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], dict[str, Tensor]]
    targets: tuple[str, ...]
    options: dict[str, object] = dataclasses.field(default_factory=dict)  # of LoraConfig
    beyond_peft: tuple[str, ...] = ()  # targets that PEFT has no DoRA for
    peft_says: str = ""
    diffusers: bool = False

    def model(self, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Module.to(self.build(), dtype)  # diffusers' own warns
        if "experts" in self.targets and dtype == torch.float64:  # which torch's grouped product does not take
            model.config._experts_implementation = "eager"
        return model

    def config(self, targets: tuple[str, ...] | None = None) -> peft.LoraConfig:
        targets = list(targets or self.targets)
        return peft.LoraConfig(use_dora=True, r=4, lora_alpha=6, target_modules=targets, **self.options)

    def rows(self, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """Two for each step."""
        drawn = self.draw(2 * STEPS, torch.Generator().manual_seed(0))
        cast = {key: t.to(dtype) if t.is_floating_point() else t for key, t in drawn.items()}
        return [{key: t[number] for key, t in cast.items()} for number in range(2 * STEPS)]


def causal(config: Callable[[], object]) -> Callable[[], nn.Module]:
    return lambda: transformers.AutoModelForCausalLM.from_config(config())


def text(number: int, generator: torch.Generator, length: int = 9) -> dict[str, Tensor]:
    ids = torch.randint(3, 32, (number, length), generator=generator)
    return {"input_ids": ids, "labels": ids}


def speech(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    features = torch.randn(number, 8, 24, generator=generator)
    return {"input_features": features, "labels": torch.randint(3, 32, (number, 6), generator=generator)}


def images(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    pixels = torch.randn(number, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(0, 5, (number,), generator=generator)}


def noisy_images(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(number, 3, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (number,), generator=generator),
        "encoder_hidden_states": torch.randn(number, 5, 8, generator=generator),
        "target": torch.randn(number, 3, 8, 8, generator=generator),
    }


def noisy_patches(number: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.randn(number, 6, 4, generator=generator),
        "encoder_hidden_states": torch.randn(number, 5, 12, generator=generator),
        "pooled_projections": torch.randn(number, 10, generator=generator),
        "timestep": torch.rand(number, generator=generator),
        "target": torch.randn(number, 6, 4, generator=generator),
    }


def llama() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, **sizes))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TEXT, **sizes))


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**TEXT, **sizes))


def whisper() -> nn.Module:
    ends = {
        f"{end}_{name}": size
        for end in ("encoder", "decoder")
        for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16}
    special = {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**TEXT, **ends, **sizes, **special))


def vit() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=5)
    )


def mixtral() -> nn.Module:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**EXPERTS))


def gpt_oss() -> nn.Module:
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**EXPERTS, **layers))


def unet() -> nn.Module:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def flux() -> nn.Module:
    import diffusers

    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    )


FAMILIES = {
    "llama": Family(llama, text, (*ATTENTION, "gate_proj", "up_proj", "down_proj"), {"task_type": "CAUSAL_LM"}),
    "gpt2": Family(gpt2, text, ("c_attn", "c_proj", "c_fc"), {"fan_in_fan_out": True}),
    "t5": Family(t5, text, ("q", "k", "v", "o", "wi", "wo"), {"task_type": "SEQ_2_SEQ_LM"}),
    "whisper": Family(
        whisper,
        speech,
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "conv1", "conv2"),
        beyond_peft=("conv1", "conv2"),
        peft_says="'Conv1d' object has no attribute 'stride'",  # which Whisper's encoder asks for
    ),
    "vit": Family(vit, images, ("q_proj", "v_proj", "projection"), {"modules_to_save": ["classifier"]}),
    "mixtral": Family(
        mixtral,
        text,
        (*ATTENTION, "experts"),
        beyond_peft=("experts",),
        peft_says=r"Target module MixtralExperts\(.*\) is not supported",
    ),
    "gpt_oss": Family(
        gpt_oss,
        text,
        (*ATTENTION, "experts"),
        beyond_peft=("experts",),
        peft_says=r"Target module GptOssExperts\(.*\) is not supported",
    ),
    "unet": Family(
        unet, noisy_images, ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in"), diffusers=True
    ),
    "flux": Family(flux, noisy_patches, ("to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out"), diffusers=True),
}


class Stock:
    """PEFT's own models, or, of diffusers', the adapter methods that those have of PEFT's."""

    enabled = staticmethod(contextlib.nullcontext)

    def begin(self, family: Family, model: nn.Module, targets: tuple[str, ...] | None = None) -> nn.Module:
        """A new adapter."""
        config = family.config(targets)
        if family.diffusers:
            model.add_adapter(config)
            return model
        return peft.get_peft_model(model, config)

    def read(self, family: Family, model: nn.Module, directory) -> nn.Module:
        """An adapter from files, to be trained."""
        if family.diffusers:
            model.load_lora_adapter(str(directory), prefix=None, use_safetensors=True, adapter_name="default")
            return model
        return peft.PeftModel.from_pretrained(model, str(directory), is_trainable=True)

    def save(self, family: Family, model: nn.Module, directory) -> None:
        save = model.save_lora_adapter if family.diffusers else model.save_pretrained
        save(str(directory))

    def merge(self, family: Family, model: nn.Module) -> nn.Module:
        if family.diffusers:
            model.fuse_lora()
            return model
        return model.merge_and_unload()


class DropIn(Stock):
    enabled = staticmethod(dorac.peft.enable)


class Applied:
    """``apply_dora`` and what belongs to it."""

    enabled = staticmethod(contextlib.nullcontext)

    def begin(self, family: Family, model: nn.Module, targets: tuple[str, ...] | None = None) -> nn.Module:
        dorac.apply_dora(model, family.config(targets))
        return model

    def read(self, family: Family, model: nn.Module, directory) -> nn.Module:
        dorac.load_adapter(model, directory)
        return model

    def save(self, family: Family, model: nn.Module, directory) -> None:
        model.save_pretrained(directory)

    def merge(self, family: Family, model: nn.Module) -> nn.Module:
        return dorac.merge(model, unload=True)


def adapter(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the adapters, by dorac's or PEFT's names."""
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


@torch.no_grad()
def off_start(model: nn.Module) -> nn.Module:
    """Factors that are not zero, magnitudes up to 20 % off the norm."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapter(model).items():
        drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
        if "magnitude" in name:
            parameter.mul_((0.8 + 0.4 * drawn).to(parameter.dtype))
        else:
            parameter.copy_(0.2 * (drawn - 0.5))
    return model


def dense(layer: dorac.nn.DoraLayer, *args: Tensor) -> Tensor:
    """The textbook in the place of a layer's forward."""
    base = layer.base_layer
    if isinstance(layer, dorac.nn.DoraExperts):
        weights = {}
        for name in ("gate_up_proj", "down_proj"):
            weight, tensors = layer._matrices(name), layer._adapter(name)
            norm = reference.row_norm(weight, *tensors[:2], layer.scaling).detach()
            merged = reference.merge_weight(weight, *tensors, scaling=layer.scaling, weight_norm=norm)
            weights[name] = merged.mT if layer.transposed else merged
        return torch.func.functional_call(base, weights, args)
    tensors = layer.lora_A, layer.lora_B, layer.lora_magnitude_vector.flatten(), base.bias
    if isinstance(layer, dorac.nn.DoraLinear):
        weight = base.weight.T if layer.fan_in_fan_out else base.weight
        return reference.dora_linear(args[0], weight, *tensors, scaling=layer.scaling)
    geometry = {"stride": base.stride, "padding": base.padding, "dilation": base.dilation, "groups": base.groups}
    return reference.dora_conv(args[0], base.weight, *tensors, scaling=layer.scaling, **geometry)


def textbook(model: nn.Module) -> nn.Module:
    """The same adapters of ``apply_dora``, computed as ``dorac.reference`` does."""
    for layer in dora_layers(model).values():
        layer.forward = functools.partial(dense, layer)
    return model


def train(family: Family, model: nn.Module, dtype: torch.dtype, folder) -> list[float]:
    """The loss of each step: through transformers' Trainer, or in a loop for diffusers' models, which it is not for."""
    if family.diffusers:
        return _train_in_a_loop(model.train(), family.rows(dtype))
    losses = []

    class Trainer(transformers.Trainer):
        def compute_loss(self, *args, **options):  # what it logs is float32
            loss = super().compute_loss(*args, **options)
            losses.append(loss.item())
            return loss

    Trainer(model=model, args=_arguments(folder), train_dataset=family.rows(dtype)).train()
    return losses


def _arguments(folder) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )


def _train_in_a_loop(model: nn.Module, rows: list[dict[str, Tensor]]) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(STEPS):
        loss = run(model, rows[2 * step : 2 * step + 2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def run(model: nn.Module, rows: list[dict[str, Tensor]]) -> Tensor:
    """The loss of the rows, of a model of diffusers'."""
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    target = batch.pop("target")
    return (output(model, batch) - target).square().mean()


def output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    batch = {key: t for key, t in batch.items() if key != "target"}
    if "pooled_projections" in batch:  # Flux: where each row of the two inputs lies
        lengths = batch["encoder_hidden_states"].shape[1], batch["hidden_states"].shape[1]
        batch["txt_ids"], batch["img_ids"] = (torch.arange(3.0 * length).reshape(length, 3) for length in lengths)
    result = model(**batch)
    return result.sample if hasattr(result, "sample") else result.logits


@torch.no_grad()
def outputs(family: Family, model: nn.Module, dtype: torch.dtype) -> Tensor:
    rows = family.rows(dtype)[:2]
    return output(model.eval(), {key: torch.stack([row[key] for row in rows]) for key in rows[0]})


def tolerance(layers: int, dtype: torch.dtype, steps: int = 1) -> float:
    """What the roundings of two right computations make of a loss or an output, relative and in RMS.

    They differ in the adapted layers alone. Each is off by the roundings on the longest way to its output, passes on
    what came in, and does the same in backward; what a step has made of that is there in the next.
    """
    each = rounding.ROUNDINGS["y"] + rounding.ELEMENTWISE
    return 2 * steps * layers * each * rounding.unit_roundoff(dtype)
