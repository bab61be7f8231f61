"""Tiny transformers and their token sequences, shared by several test files."""

import torch
from torch import nn

from scenarios import generator

P = 11


def pairs(p=P):
    """All sequences [a, op, b] of arithmetic modulo p, as tokens (p^2, 3)."""
    a, b = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(p)] * 2, indexing="ij"))
    return torch.stack([a, torch.full_like(a, p), b], 1)


class TinyTransformer(nn.Module):
    """Embedding with positions, two blocks, mean over positions or the last token, a head."""

    def __init__(self, vocabulary=P + 1, length=3, width=8, outputs=P, pooled=False):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(width, 2, 16, 0.1, "gelu", batch_first=True)
                for _ in range(2)
            )
        )
        self.head = nn.Linear(width, outputs)
        self.pooled = pooled

    def forward(self, tokens):
        hidden = self.blocks(self.embedding(tokens) + self.position)
        return self.head(hidden.mean(1) if self.pooled else hidden[:, -1])


class MaskedTransformer(nn.Module):
    """A block that attends to what is no padding, called with a mapping."""

    def __init__(self, vocabulary=7, width=4, outputs=3):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 8, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, input_ids, attention_mask):
        real = attention_mask != 0
        hidden = self.block(self.embedding(input_ids), src_key_padding_mask=~real)
        weight = real.to(hidden.dtype)[..., None]
        return self.head((hidden * weight).sum(1) / weight.sum(1))


def randomised(net, seed):
    """Float64 weights away from their initial values, in evaluation mode."""
    noise = generator(seed)
    net = net.double().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            draw = torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * draw)
            else:
                parameter.copy_(0.5 * draw)
    return net


def moved(net, seed, scale=0.2):
    """Weights near those of `net`, by name, that want a gradient."""
    noise = generator(seed)
    return {
        name: (p + scale * torch.randn(p.shape, generator=noise, dtype=p.dtype))
        .detach()
        .requires_grad_()
        for name, p in net.named_parameters()
    }
