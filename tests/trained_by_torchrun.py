"""Run by torchrun: BASE; "dorac", or "dropin:START" or "stock:START" with an adapter's directory; a checkpoint or "-";
FOLDER; the trainer's options as JSON.
"""

import json
import os
import sys
from pathlib import Path

import peft
import tiny_trainers as tiny
import torch
import transformers

import dorac.peft

base, kind, checkpoint, folder, options = sys.argv[1:]
kind, _, start = kind.partition(":")
if kind == "dorac":
    model = tiny.wrapped(base, seed=1 if checkpoint == "-" else 2)
else:
    if kind == "dropin":
        dorac.peft.enable()
    model = peft.PeftModel.from_pretrained(tiny.load(base), start, is_trainable=True)
options = json.loads(options)


class KeepNorms(transformers.TrainerCallback):
    """As dorac/docs/sharding.md has it: once the trainer has sharded the model."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        dorac.cache_norms(model)


def whole(parameter):
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()


if options.get("fsdp"):
    tiny.shard_on_cpus()
keeps = options.pop("keep_norms", False)
trainer = tiny.trainer(model, Path(folder, "out"), gradient_accumulation_steps=2, **options)
if keeps:
    trainer.add_callback(KeepNorms())
trainer.train(resume_from_checkpoint=None if checkpoint == "-" else checkpoint)
trained = {name: whole(p) for name, p in trainer.model.named_parameters() if p.requires_grad}
if kind == "dorac":  # on every rank, whatever the trainer's checkpoints hold
    dorac.save_adapter(trainer.model, Path(folder, "adapter"))
torch.save({"trained": trained, "losses": tiny.losses(trainer)}, Path(folder, f"{os.environ['RANK']}.pt"))
