"""Other weights for the same function, so that no grid that the weights came from fits them.

A checkpoint that was once quantised lies on its file's grid, which then costs it nothing. Here each
input of every matrix gets a scale of its own between 1/BOUND and BOUND, at random, and what comes
before undoes it: the norm's gain, the rows of the value or of the up projection. Every matrix of
the layers changes, and stays about as hard to quantise as it was. Stronger changes do not: the
norms' whole gains in the matrices make blocks uneven and cost half as much again, a rotated
residual stream makes weights more Gaussian than trained ones. The embedding table, which often is
the output layer too, stays as it is.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

BOUND = 1.25
# by model_type: the norm before the MLP
MLP_NORMS = {"llama": "post_attention_layernorm", "gemma3_text": "pre_feedforward_layernorm"}


def off_the_grid(llm: "PreTrainedModel") -> None:
    """Change a Llama's or a Gemma 3's weights in place; what it computes stays.

    Raises:
        ValueError: another family.
    """
    import torch

    config = llm.config
    if config.model_type not in MLP_NORMS:
        raise ValueError(f"expected a model of {', '.join(MLP_NORMS)}, got {config.model_type}")
    mlp_norm = MLP_NORMS[config.model_type]
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> torch.Tensor:
        exponents = 2 * torch.rand(n, generator=generator) - 1
        return torch.exp(exponents * math.log(BOUND))

    with torch.no_grad():
        for layer in llm.model.layers:
            attention = layer.self_attn
            mlp = layer.mlp
            products = (attention.q_proj, attention.k_proj, attention.v_proj)
            _scale_inputs(layer.input_layernorm, products, draw(config.hidden_size))
            products = (mlp.gate_proj, mlp.up_proj)
            _scale_inputs(getattr(layer, mlp_norm), products, draw(config.hidden_size))
            scales = draw(len(attention.v_proj.weight))
            attention.v_proj.weight.div_(scales[:, None])
            attention.o_proj.weight.mul_(_for_every_query(scales, config))
            scales = draw(config.intermediate_size)
            mlp.up_proj.weight.div_(scales[:, None])
            mlp.down_proj.weight.mul_(scales)


def _scale_inputs(
    norm: "torch.nn.Module", products: "tuple[torch.nn.Linear, ...]", scales: "torch.Tensor"
) -> None:
    """Scale the columns of products, and divide the gain of the norm before them."""
    offset = 1 if type(norm).__name__.startswith("Gemma") else 0  # it multiplies by 1 + w
    norm.weight.add_(offset).div_(scales).sub_(offset)
    for product in products:
        product.weight.mul_(scales)


def _for_every_query(scales: "torch.Tensor", config: "PreTrainedConfig") -> "torch.Tensor":
    """Scales of all value heads -> of all query heads, several of which share a value head."""
    shared = config.num_attention_heads // config.num_key_value_heads
    heads = scales.view(-1, config.head_dim)
    return heads.repeat_interleave(shared, dim=0).flatten()
