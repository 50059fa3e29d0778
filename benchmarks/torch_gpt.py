"""The model of `scaling_jax.tasks` and its training step in plain PyTorch: what `step.py` compares with."""

import torch
import torch.nn.functional as F
from torch import nn

from scaling_jax.tasks import ModelConfig


class Block(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.n_head = c.n_head
        self.attention_norm = nn.LayerNorm(c.d_model, eps=1e-6)
        self.qkv = nn.Linear(c.d_model, 3 * c.d_model)
        self.attention_out = nn.Linear(c.d_model, c.d_model)
        self.feed_forward_norm = nn.LayerNorm(c.d_model, eps=1e-6)
        self.feed_forward_in = nn.Linear(c.d_model, 4 * c.d_model)
        self.feed_forward_out = nn.Linear(4 * c.d_model, c.d_model)

    def forward(self, x_BxTxD):
        B, T, D = x_BxTxD.shape
        qkv = self.qkv(self.attention_norm(x_BxTxD)).view(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D)
        x_BxTxD = x_BxTxD + self.attention_out(h)
        h = F.gelu(self.feed_forward_in(self.feed_forward_norm(x_BxTxD)), approximate="tanh")
        return x_BxTxD + self.feed_forward_out(h)


class GPT(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        self.position = nn.Parameter(0.02 * torch.randn(c.context, c.d_model))
        self.layers = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = nn.LayerNorm(c.d_model, eps=1e-6)
        self.unembedding = nn.Linear(c.d_model, c.vocab_size)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens_BxT, targets_BxT):
        x_BxTxD = self.embedding(tokens_BxT) + self.position
        for layer in self.layers:
            x_BxTxD = layer(x_BxTxD)
        logits_BxTxV = self.unembedding(self.norm(x_BxTxD))
        return F.cross_entropy(logits_BxTxV.flatten(0, 1), targets_BxT.flatten())


def training_step(c: ModelConfig, compiled: bool):
    """`(tokens [B, T + 1]) -> loss`, with PyTorch's fused Adam."""
    torch.manual_seed(0)
    model = GPT(c)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98), fused=True)
    loss_of = torch.compile(model) if compiled else model

    def step(tokens_BxT1):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens_BxT1[:, :-1], tokens_BxT1[:, 1:])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
