"""Run by torchrun: BASE, "dorac" or the directory of a start for stock PEFT, a checkpoint or "-", FOLDER."""

import os
import sys
from pathlib import Path

import peft
import tiny_trainers as tiny
import torch

base, kind, checkpoint, folder = sys.argv[1:]
if kind == "dorac":
    model = tiny.wrapped(base, seed=1 if checkpoint == "-" else 2)
else:
    model = peft.PeftModel.from_pretrained(tiny.load(base), kind, is_trainable=True)
trainer = tiny.trainer(model, Path(folder, "out"), gradient_accumulation_steps=2)
trainer.train(resume_from_checkpoint=None if checkpoint == "-" else checkpoint)
state = {"trained": tiny.trained(model), "losses": tiny.losses(trainer)}
torch.save(state, Path(folder, f"{os.environ['RANK']}.pt"))
