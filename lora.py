"""Low-rank updates (LoRA, Hu et al. 2021): train W + scale B A instead of W, with B (out, r) and A (r, in).

The paper finetunes Llama-2 so: rank 8, alpha 16 on the projections of q, k, v and the output, all else frozen.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

SCALE = 2.0  # alpha / rank, the paper's 16 / 8, kept at every rank


class LowRankLinear(nn.Linear):
    """A linear layer whose weight stays, plus scale B A. B starts at zero: the update does too."""

    def __init__(self, linear, rank):
        nn.Module.__init__(self)  # not nn.Linear's, which would draw weights that are replaced here
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_A = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        return super().forward(x) + SCALE * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(model, rank):
    """Freeze the GPT `model` and give the attention's projections, c_attn (q, k, v) and c_proj, low-rank updates."""
    smallest = model.config.n_embd
    if rank > smallest:
        raise ValueError(f"--lora-rank {rank} is no low rank for matrices of width {smallest}: take at most that")
    model.requires_grad_(False)
    for block in model.transformer.h:
        block.attn.c_attn = LowRankLinear(block.attn.c_attn, rank)
        block.attn.c_proj = LowRankLinear(block.attn.c_proj, rank)


def merge_lora(state):
    """A state_dict with its low-rank updates added to the weights. One without any is returned as it is."""
    merged = {name: p for name, p in state.items() if ".lora_" not in name}
    for name in state:
        if name.endswith(".lora_A"):
            layer = name.removesuffix("lora_A")
            update = state[layer + "lora_B"].float() @ state[name].float()
            merged[layer + "weight"] = merged[layer + "weight"] + SCALE * update
    return merged
