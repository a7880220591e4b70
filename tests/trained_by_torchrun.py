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
if options.get("fsdp"):
    tiny.shard_on_cpus()
trainer = tiny.trainer(model, Path(folder, "out"), gradient_accumulation_steps=2, **options)
trainer.train(resume_from_checkpoint=None if checkpoint == "-" else checkpoint)
trained = tiny.trained(trainer.model)
trained = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in trained.items()}
if kind == "dorac":  # on every rank, whatever the trainer's checkpoints hold
    dorac.save_adapter(trainer.model, Path(folder, "adapter"))
torch.save({"trained": trained, "losses": tiny.losses(trainer)}, Path(folder, f"{os.environ['RANK']}.pt"))
