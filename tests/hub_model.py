"""A model with huggingface_hub's ``save_pretrained``, one of its layers adapted."""

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

import dorac


class HubModel(nn.Module, PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)

    def forward(self, x):
        return self.down(self.norm(self.up(x)).relu())


def adapted(seed=0) -> HubModel:
    torch.manual_seed(seed)
    model = HubModel()
    dorac.apply_dora(model, ["up"], r=2, init_lora_weights=False)
    return model
