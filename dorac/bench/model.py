"""``model``: a Llama-shaped stack with every linear layer adapted, relative to compiled plain LoRA."""

import argparse
import copy
import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import dorac
from dorac import packed, quantise
from dorac.bench import against_lora, bases, measure, options, peers
from dorac.cli import BadInput

# The whole stack, the same for everyone; where transformers or PEFT break the graph, the record counts it.
COMPILE = {"fullgraph": False, "dynamic": False}
# The others run on one layer too; a cache is a model's.
CACHED = {"dorac-cached": "dorac-every", "dorac-peft-cached": "dorac-peft"}
VARIANTS = peers.VARIANTS | {
    f"{name}-{mode}": peers.VARIANTS[f"{each}-{mode}"]
    for mode in ("compiled", "eager")
    for name, each in CACHED.items()
}
# Blocks by dorac.fuse, of DoRA's layers and of plain LoRA's: compiled code is that of the layers.
FUSED = {
    f"{name}-eager": peers.Variant(build, None)
    for name, build in (
        (against_lora.LORA_FUSED, peers.LoraProjection),
        ("dorac-fused", peers.dorac_every),
        ("dorac-fused-cached", peers.dorac_every),
        ("dorac-peft-fused", peers.dorac_peft),
        ("dorac-peft-fused-cached", peers.dorac_peft),
    )
} | {"dorac-fused-cached-compiled": peers.VARIANTS["dorac-every-compiled"]}
VARIANTS |= FUSED
# Those that take somebody else's layer; of the formats, blocks take bitsandbytes' with 4 bits.
OVER_4BIT = tuple(
    name
    for name in VARIANTS
    if name.startswith(("peft-lora", "peft-dora-eager", "dorac-", against_lora.LORA_FUSED))
    and not name.startswith("dorac-once")
)
OVER_QUANTISED = tuple(name for name in OVER_4BIT if name not in FUSED)
FOUR_BIT = ("nf4", "fp4")
_CPU_STACK = {"layers": 1, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2}
CUDA_STACK = {"layers": 4, "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 32}
DEFAULTS = {
    "cuda": CUDA_STACK
    | {
        "ranks": [16, 384],
        "tokens": 4096,
        "batch": 1,
        "phases": list(options.PHASES),
        "micro_batches": 1,
        "dropout": 0.0,
        "turns": 10,
        "variants": [name for name in VARIANTS if not (name.startswith("dense") or "low-rank" in name)],
    },
    "cpu": _CPU_STACK
    | {
        "ranks": [4],
        "tokens": 32,
        "batch": 1,
        "phases": list(options.PHASES),
        "micro_batches": 1,
        "dropout": 0.0,
        "turns": 10,
        "variants": [
            *("lora-addmm-compiled", "lora-addmm-eager", "peft-dora-eager"),
            *("dorac-every-compiled", "dorac-cached-compiled", "dorac-every-eager", "dorac-cached-eager"),
        ],
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    bases.add_base(parser)
    add_stack_arguments(parser)
    add_size_arguments(parser)
    parser.add_argument("--phases", nargs="+", choices=options.PHASES, help="what to measure (default: both)")
    parser.add_argument(
        "--micro-batches",
        type=options.natural,
        metavar="N",
        help="forward and backward passes per training step; 0: one, without the optimizer's step",
    )
    parser.add_argument("--turns", type=options.positive, metavar="N", help="in which every variant is timed once")
    parser.add_argument(
        "--autocast", action="store_true", help="PEFT's defaults: float32 adapters, forward under bfloat16 autocast"
    )
    parser.add_argument(
        "--checkpointing", action="store_true", help="train with activation checkpointing of each decoder layer, eager"
    )
    add_save_outputs(parser)
    options.add_dropout(parser)
    options.add_variants(parser, VARIANTS)


def add_save_outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save-outputs", action="store_true", help="dorac.save_outputs on dorac's variants")


def check_save_outputs(args: argparse.Namespace) -> None:
    if args.save_outputs and not any(name.startswith("dorac-") for name in args.variants):
        raise BadInput("--save-outputs is for dorac's layers, of which --variants names none")


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """The adapters' and the activations' sizes."""
    parser.add_argument("--ranks", nargs="+", type=options.positive, metavar="R", help="of the adapters")
    parser.add_argument("--tokens", type=options.positive, metavar="T", help="per sequence")
    parser.add_argument("--batch", type=options.positive, metavar="N", help="sequences")


def add_stack_arguments(parser: argparse.ArgumentParser) -> None:
    """The sizes of the stack, each with a default per device in ``DEFAULTS``."""
    for name, what in (
        ("layers", "decoder layers"),
        ("hidden", "features of the residual stream"),
        ("intermediate", "features of the MLP"),
        ("heads", "of attention"),
        ("kv-heads", "of keys and values"),
    ):
        parser.add_argument(f"--{name}", type=options.positive, metavar="N", help=what)


def check(args: argparse.Namespace) -> None:
    """Refuses what cannot be measured, and sets the adapters' dtype under autocast."""
    bases.check_base(args, VARIANTS, OVER_4BIT if args.base in FOUR_BIT else OVER_QUANTISED)
    if not quantise.has_product(args.base):
        raise BadInput(f"--base {args.base}: torchao multiplies with it by mslk, which is not installed")
    if args.autocast:
        if args.dtype is not torch.bfloat16:
            raise BadInput("--autocast is bfloat16's, so --dtype must be bfloat16")
        args.adapter_dtype = torch.float32
    if args.checkpointing and any(compile_args(name) is not None for name in args.variants):
        raise BadInput("--checkpointing measures eager steps, so --variants must name eager ones only")
    check_save_outputs(args)


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per rank, phase and variant. The base layers are shared; ``total_mib`` includes
    them and what the variants before keep.

    A training step is so many micro-batches and then a step of SGD, after which cached norms are taken anew; with 0
    micro-batches one pass alone, for which cached norms stay. Wall time is of synchronised steps in fair turns; see
    :func:`against_lora.measure_steps`.
    """
    how = {name: getattr(args, name) for name in ("checkpointing", "save_outputs")}
    setting = "".join(f", {name.replace('_', '-')}" for name in ("autocast", *how) if getattr(args, name))
    stack = build_stack(args)
    quantised = args.base != bases.DENSE
    if quantised:
        quantise.quantise_model(stack, args.base)
    weights = linear_weights(stack)
    x = torch.randn(args.batch, args.tokens, args.hidden, dtype=args.dtype, device=args.device)
    for rank, phase in itertools.product(args.ranks, args.phases):
        layers = draw_layers(weights, rank, args)
        dy = torch.randn_like(x) if phase == "train" else None
        size = {"layers": args.layers, "hidden": args.hidden, "rank": rank, "tokens": args.tokens, "batch": args.batch}
        size |= {"micro_batches": args.micro_batches} if phase == "train" else {}
        steps = {
            name: (
                functools.partial(build_variant, stack, layers, name, training=phase == "train", **how),
                compile_args(name),
            )
            for name in args.variants
        }
        compiled = [name for name in args.variants if compile_args(name) is not None]
        records = against_lora.measure_steps(
            f"r{rank} {phase}{bases.setting(args)}{setting}",
            steps,
            x,
            dy,
            micro_batches=args.micro_batches or None,
            turns=args.turns,
            autocast=args.autocast,
            kernels=compiled if args.profile else (),
            # Nobody has PEFT's second products over a quantised base for themselves; its library may refuse anything.
            beside=None if quantised else beside([*weights.values()], x, args, phase),
            failures=(Exception,) if quantised else measure.CANNOT_RUN,
        )
        yield from against_lora.related_to_lora([record | size | {"phase": phase} for record in records])


def beside(
    weights: list[Tensor], x: Tensor, args: argparse.Namespace, phase: str
) -> dict[str, Callable[[], measure.Callback]]:
    """:func:`against_lora.beside`, and the products with the base weights alone beside fused plain LoRA."""
    steps = against_lora.beside(weights, x, args, phase)
    if f"{against_lora.LORA_FUSED}-eager" in args.variants:
        products = 1 + args.checkpointing if phase == "train" else 1
        make = functools.partial(against_lora.products, weights, x, products, int(phase == "train"))
        steps[against_lora.BASE_PRODUCTS] = make
    return steps


class Stack(nn.Module):
    """The decoder layers and the last norm of a Llama, from embeddings ``[N, T, hidden]`` to hidden states."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, x: Tensor) -> Tensor:
        return self.llama(inputs_embeds=x, use_cache=False).last_hidden_state


def build_stack(args: argparse.Namespace) -> Stack:
    """Random frozen weights, causal attention by ``scaled_dot_product_attention``, no cache."""
    from transformers import AutoModel, LlamaConfig

    if args.hidden % args.heads or args.hidden // args.heads % 2:
        raise BadInput(f"--hidden {args.hidden} must be an even multiple of --heads {args.heads}")
    if args.heads % args.kv_heads:
        raise BadInput(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}")
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=max(getattr(args, "tokens", 1), 2048),
        pad_token_id=None,
        use_cache=False,
    )
    with args.device:
        llama = AutoModel.from_config(config, dtype=args.dtype, attn_implementation="sdpa")
    return Stack(llama.requires_grad_(False))


def linear_weights(stack: Stack) -> dict[str, Tensor | nn.Module]:
    """The weights of all linear layers, by the name of the layer; of a quantised one the layer itself."""
    linears = {name: m for name, m in stack.named_modules() if isinstance(m, nn.Linear)}
    return {name: m.weight.detach() if packed.of(m) is None else m for name, m in linears.items()}


def draw_layers(weights: dict[str, Tensor | nn.Module], rank: int, args: argparse.Namespace) -> dict[str, peers.Layer]:
    """An adapter for every weight."""
    return {name: peers.draw_layer(weight, rank, args) for name, weight in weights.items()}


def adapt(stack: Stack, layers: dict[str, peers.Layer], build: Callable[[peers.Layer], nn.Module]) -> Stack:
    """A copy of the stack, which shares its tensors, with ``build(layer)`` in the place of each linear layer.

    Its adapters are its own.
    """
    shared = itertools.chain(stack.parameters(), stack.buffers(), map(stack.get_submodule, layers))
    stack = copy.deepcopy(stack, {id(one): one for one in shared})
    for name, layer in layers.items():
        stack.set_submodule(name, build(layer.with_own_adapter()))
    return stack


def build_variant(
    stack: Stack,
    layers: dict[str, peers.Layer],
    name: str,
    *,
    training: bool = True,
    checkpointing: bool = False,
    save_outputs: bool = False,
) -> Stack:
    """The stack adapted in one of ``VARIANTS``, in training or in eval mode.

    That comes first: after a change of mode compiled code takes its own norm, see :func:`dorac.cache_norms`.
    """
    stack = adapt(stack, layers, VARIANTS[name].build).train(training)
    if name in FUSED and (left := dorac.fuse(stack).left):
        raise RuntimeError(f"{name}: dorac.fuse has left {left}")
    if name.rpartition("-")[0].endswith("-cached"):
        dorac.cache_norms(stack)
    if checkpointing:
        stack.llama.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if save_outputs and name.startswith("dorac-"):
        dorac.save_outputs(stack)
    return stack


def compile_args(name: str) -> dict[str, object] | None:
    """What ``torch.compile`` gets for one of ``VARIANTS``; None for eager."""
    return None if VARIANTS[name].compile_args is None else COMPILE
