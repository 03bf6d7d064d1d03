"""A model to adapt, and the folders that PEFT saves its adapters in."""

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

transformers.utils.logging.set_verbosity_error()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.q, self.v = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        self.out = Conv1D(8, 6)

    def forward(self, x):
        return x + self.out(torch.tanh(self.v(self.norm(x + self.q(x)))))


class Model(nn.Module):
    """Two blocks between an embedding and a head that shares its weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.q = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11)
        self.head.weight = self.embedding.weight

    def forward(self, index):
        x = self.embedding(index)
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.relu(self.q(x)))


def model():
    """In float64, so that two ways to the same numbers differ by little."""
    torch.manual_seed(0)
    return Model().double()


def index():
    return torch.tensor([[1, 2, 10], [0, 3, 3]])


def shaken(made):
    """Everything that is trained has moved."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return made


def of_peft(**options):
    return shaken(get_peft_model(model(), LoraConfig(**{"r": 3, "target_modules": ["q", "v"], **options}))).eval()


def saved_by_peft(folder, **options):
    made = of_peft(**options)
    made.save_pretrained(folder)
    return made
