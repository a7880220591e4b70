"""The demo from the command line to the exit code."""

import sys

import torch

import dorac
from dorac.checkpoint import CONFIG_NAME, WEIGHTS_NAME
from dorac.cli import BadInput
from dorac.demo import data, model, train
from dorac.demo.compare import compare_with_peft
from dorac.demo.options import Options, parse
from dorac.demo.plot import save_curve

LOGIT_BOUND = 1e-5  # of the largest |logit|
EVALUATED_BLOCKS = 16
SAVE_EVERY = 50


def main(argv: list[str] | None = None) -> int:
    """Runs the demo: 0 if everything held, 1 if a check failed, 2 for bad input, 130 after Ctrl-C."""
    options = None
    try:
        options = parse(argv)
        return run(options)
    except BadInput as error:
        print(f"python -m dorac.demo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_last_adapter(options)}", file=sys.stderr)
        return 130


def run(options: Options) -> int:
    """Loads text and model, then fine-tunes or compares."""
    text = data.read_text(options.text)
    source = model.locate(options.model)
    tokenizer = model.load_tokenizer(source)
    train_blocks, held_out = data.token_blocks(text, lambda t: _encode(tokenizer, t), options.seq_len)
    print(f"text: {len(train_blocks)} blocks of {options.seq_len} tokens to train on, {len(held_out)} held out")
    print(f"loading {source['pretrained_model_name_or_path']} ...", flush=True)
    torch.manual_seed(options.seed)
    lm = model.load_model(source, dtype=options.dtype, device=options.device)
    if options.base is not None:
        model.quantise_base(lm, options.base)
    if options.checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    longest = getattr(lm.config, "max_position_embeddings", None)
    if longest is not None and options.seq_len > longest:
        raise BadInput(f"--seq-len {options.seq_len} is longer than the {longest} positions that the model has")
    batches = data.batches(train_blocks, options.batch_size, options.seed)
    if options.random_lengths:
        batches = data.random_lengths(batches, options.seq_len, options.seed)
    if options.compare:
        return _compare(options, lm, batches)
    return _fine_tune(options, lm, tokenizer, source, batches, data.spread(held_out, EVALUATED_BLOCKS))


def _fine_tune(options: Options, lm, tokenizer, source, batches, held_out) -> int:
    wrapped = dorac.apply_dora(lm, "all-linear", options.rank, 2 * options.rank)
    if options.fuse:
        print(dorac.fuse(lm))
    if options.compile:
        model.compile_blocks(lm)
    if options.cache_norms:
        dorac.cache_norms(lm)
    trainer = train.Trainer(lm, lr=options.lr, dtype=options.dtype, micro_batches=options.micro_batches)
    trained = sum(p.numel() for p in trainer.parameters)
    total = sum(p.numel() for p in lm.parameters())
    print(f"DoRA of rank {options.rank} on {len(wrapped)} linear layers trains {trained:,} of {total:,} parameters")

    before = train.held_out_loss(lm, held_out, options.batch_size)
    print(f"held-out loss before: {before:.4f}")
    if options.compile:
        print("the first step compiles the decoder block", flush=True)
    warm_after = train.WARMUP_STEPS if options.compile and options.random_lengths else None
    losses, seconds = train.train(
        trainer,
        batches,
        options.steps,
        save=lambda: dorac.save_adapter(lm, options.out),
        save_every=SAVE_EVERY,
        warm_after=warm_after,
    )
    if warm_after is not None:  # either would have ended the training
        print(f"no graph break, and nothing was compiled after step {warm_after}")
    after = train.held_out_loss(lm, held_out, options.batch_size)
    print(f"held-out loss after:  {after:.4f}")
    print(f"median warm step: {train.warm_median(seconds):.3f} s")
    curve = options.out / "loss.png"
    steps = range(1, options.steps + 1)
    curves = {"training": (steps, losses), "held out": ((0, options.steps), (before, after))}
    save_curve(curve, curves, "DoRA fine-tuning")
    print(f"loss curve: {curve}")

    adapted = model.logits(lm, held_out[:1])
    fresh = model.load_model(source, dtype=options.dtype, device=options.device)
    if options.base is not None:
        model.quantise_base(fresh, options.base)
    dorac.load_adapter(fresh, options.out)
    failures = _check_logits(f"adapter read back from {options.out}", model.logits(fresh, held_out[:1]), adapted)
    del fresh
    if options.merge is not None:
        model.write_merged(lm, tokenizer, options.merge)
        merged_source = {"pretrained_model_name_or_path": str(options.merge)}
        merged = model.load_model(merged_source, dtype=options.dtype, device=options.device)
        got = model.logits(merged, held_out[:1])
        what = f"merged model read back from {options.merge}"
        bounded = (
            options.dtype == torch.float32
        )  # half precision rounds the merged weight once more than the adapted layer
        failures += _check_logits(what, got, adapted, bounded=bounded)
        sample = tokenizer.decode(held_out[0])
        if _encode(model.load_tokenizer(merged_source), sample) != _encode(tokenizer, sample):
            failures.append(f"the tokenizer read back from {options.merge} splits text differently")
    if not after < before:
        failures.append(f"the held-out loss did not fall: {before:.4f} before, {after:.4f} after")
    return _report(failures)


def _compare(options: Options, lm, batches) -> int:
    comparison = compare_with_peft(lm, batches, options)
    print(comparison.summary())
    steps = range(1, options.steps + 1)
    curves = {name: (steps, losses) for name, losses in comparison.losses.items()}
    save_curve(options.out / "compare.png", curves, "dorac and PEFT")
    failures = []
    if options.dtype == torch.float32 and not comparison.agrees:
        failures.append("the losses differ by more than the bounds allow")
    if not comparison.caching_changes_nothing:
        failures.append("cached norms change the losses")
    return _report(failures)


def _check_logits(what: str, got: torch.Tensor, expected: torch.Tensor, *, bounded: bool = True) -> list[str]:
    """Prints the figure and returns what failed, if it did."""
    difference = model.relative_difference(got, expected)
    bound = f" (bound {LOGIT_BOUND:.0e})" if bounded else ""
    print(f"{what}: logits differ by {difference:.2e} of the largest |logit|{bound}")
    return [f"{what}: the logits differ"] if bounded and not difference <= LOGIT_BOUND else []


def _report(failures: list[str]) -> int:
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _last_adapter(options: Options | None) -> str:
    if options is not None and all((options.out / name).exists() for name in (CONFIG_NAME, WEIGHTS_NAME)):
        return f"the last saved adapter is whole in {options.out}"
    return "no adapter had been saved yet"


if __name__ == "__main__":
    sys.exit(main())
