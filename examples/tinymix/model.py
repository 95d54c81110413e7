"""The networks of our own models: a Llama or a Mixtral of any shape, in torch, for training.

Parameters are named as in a Hugging Face checkpoint, but the experts of a layer lie in one tensor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """A model's shape; without another word, that of tinymix.

    Every matrix of tinymix has a multiple of 256 columns, so that K- and I-quants take all of them.

    Attributes:
        experts: 0 for a dense model.
        tied: the embeddings are the output matrix, too.
    """

    vocabulary: int = 2048
    hidden: int = 256
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    feed_forward: int = 256
    experts: int = 8
    experts_used: int = 2
    context: int = 1024
    rope_theta: float = 10_000.0
    epsilon: float = 1e-5
    tied: bool = False


class Norm(nn.Module):
    """Root-mean-square norm with a gain."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


def rotary_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Returns cosine and sine, each [length, head_size], in the halves layout of the Hugging Face checkpoints."""
    exponents = torch.arange(0, shape.head_size, 2).float() / shape.head_size
    angles = torch.outer(torch.arange(length).float(), shape.rope_theta**-exponents)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Applies rotary positions to [batch, heads, length, head_size]."""
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        query_size, kv_size = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        self.q_proj = nn.Linear(shape.hidden, query_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, shape.hidden, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor | None) -> Tensor:
        shape = self.shape
        batch, length, _ = x.shape
        query = self.q_proj(x).view(batch, length, shape.heads, shape.head_size).transpose(1, 2)
        key = self.k_proj(x).view(batch, length, shape.kv_heads, shape.head_size).transpose(1, 2)
        value = self.v_proj(x).view(batch, length, shape.kv_heads, shape.head_size).transpose(1, 2)
        query, key = rotate(query, cosine, sine).to(value.dtype), rotate(key, cosine, sine).to(value.dtype)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1))
        return output


class FeedForward(nn.Module):
    """The gated feed-forward block of a dense model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.feed_forward, bias=False)
        self.down_proj = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output, and what `Experts` does: no loss of balance, and no counts."""
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return output, torch.zeros(()), torch.zeros(0, dtype=torch.long)


class Experts(nn.Module):
    """The sparse feed-forward block: a router picks a few of the gated networks for every token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = nn.Linear(shape.hidden, shape.experts, bias=False)
        # [expert, out, in], the layout of the checkpoint.
        self.w1 = nn.Parameter(torch.empty(shape.experts, shape.feed_forward, shape.hidden))
        self.w2 = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.feed_forward))
        self.w3 = nn.Parameter(torch.empty(shape.experts, shape.feed_forward, shape.hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the output, the balance loss (1 when all experts are used alike) and the use of each expert."""
        shape = self.shape
        tokens = x.reshape(-1, shape.hidden)
        probabilities = torch.softmax(self.gate(tokens).float(), dim=-1)
        weights, chosen = torch.topk(probabilities, shape.experts_used, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        # Sorting the (token, expert) pairs by expert makes one dense product per expert out of scattered rows.
        order = torch.argsort(chosen.flatten(), stable=True)
        rows = order // shape.experts_used
        counts = torch.bincount(chosen.flatten(), minlength=shape.experts)
        gathered = torch.split(tokens.index_select(0, rows), counts.tolist())
        outputs = [
            functional.linear(
                functional.silu(functional.linear(part, self.w1[expert])) * functional.linear(part, self.w3[expert]),
                self.w2[expert],
            )
            for expert, part in enumerate(gathered)
        ]
        weighted = torch.cat(outputs).float() * weights.flatten().index_select(0, order).unsqueeze(1)
        mixed = torch.zeros_like(tokens, dtype=torch.float32).index_add(0, rows, weighted)
        share = counts.float() / rows.numel()
        balance = shape.experts * (share * probabilities.mean(dim=0)).sum()
        return mixed.view_as(x), balance, counts


class Layer(nn.Module):
    """One decoder layer; the names of its parts are those of the checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.epsilon)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.epsilon)
        if shape.experts:
            self.block_sparse_moe = Experts(shape)
        else:
            self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cosine, sine, mask)
        block = self.mlp if hasattr(self, "mlp") else self.block_sparse_moe
        mixed, balance, counts = block(self.post_attention_layernorm(x))
        return x + mixed, balance, counts


class LanguageModel(nn.Module):
    """The language model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.epsilon)
        if not shape.tied:
            self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                # The matrices that write into the residual stream start smaller, as in GPT-2.
                writes = name.endswith(("o_proj.weight", "down_proj.weight", "w2"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * shape.layers) if writes else 0.02)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits [batch, length, vocabulary], the mean balance loss and expert counts [layer, expert].

        `mask` [batch, 1, length, length] says which tokens see which; without it all earlier ones are seen.
        """
        x = self.embed_tokens(tokens)
        cosine, sine = rotary_tables(self.shape, tokens.shape[1])
        balances, counts = [], []
        for layer in self.layers:
            x, balance, used = layer(x, cosine, sine, mask)
            balances.append(balance)
            counts.append(used)
        output = self.embed_tokens.weight if self.shape.tied else self.lm_head.weight
        logits = functional.linear(self.norm(x), output)
        return logits, torch.stack(balances).mean(), torch.stack(counts)
