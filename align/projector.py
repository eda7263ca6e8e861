"""BridgeFormer, the projector: encoder features -> soft tokens in the LLM's embedding space.

After Tiny-Align (arXiv 2411.13766): input MLP, transformer-encoder layers without positional encoding (the
features already carry time), adaptive pooling to a fixed number of soft tokens, output MLP. The paper's sizes
are not public; these are ours. It knows nothing of objectives or training.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class BridgeFormerConfig:
    """Sizes, stored in the bundle's manifest under `projector`."""

    feature_size: int  # Da
    embedding_size: int  # D
    soft_tokens: int = 32  # T
    hidden_size: int = 256
    n_layers: int = 2
    n_heads: int = 4
    kind: str = "bridgeformer"


def pooling_weights(n_frames: Tensor, longest: int, soft_tokens: int) -> Tensor:
    """(B,) frame counts -> (B, T, N): row t averages the frames of the t-th of T equal spans.

    Adaptive average pooling with fractional borders, written as weights from the length because the library
    operator does not export with a dynamic length; with fewer frames than spans it interpolates.
    """
    frames = torch.arange(longest, dtype=torch.float32, device=n_frames.device)  # (N,)
    spans = torch.arange(soft_tokens, dtype=torch.float32, device=n_frames.device)[:, None]  # (T, 1)
    width = n_frames.to(torch.float32)[:, None, None] / soft_tokens  # (B, 1, 1)
    overlap = torch.minimum(frames + 1, (spans + 1) * width) - torch.maximum(frames, spans * width)
    return overlap.clamp(min=0) / width  # (B, T, N)


class Block(nn.Module):
    """A pre-norm transformer-encoder layer."""

    def __init__(self, size: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(b, n, 3, self.n_heads, c // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, C/H)
        heard = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(heard.transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm_mlp(x))


class BridgeFormer(nn.Module):
    """
    | stage      | shape               |
    |------------|---------------------|
    | features   | (B, N, Da)          |
    | input MLP  | (B, N, C)           |
    | layers     | (B, N, C)           |
    | pooling    | (B, T, C)           |
    | output MLP | (B, T, D)           |
    """

    def __init__(self, config: BridgeFormerConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.enter = nn.Sequential(
            nn.LayerNorm(config.feature_size), nn.Linear(config.feature_size, size), nn.GELU(), nn.Linear(size, size)
        )
        self.layers = nn.ModuleList(Block(size, config.n_heads) for _ in range(config.n_layers))
        self.leave = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, config.embedding_size)
        )

    def forward(self, features: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """(B, N, Da) and, where the batch is padded, (B,) frame counts -> (B, T, D)."""
        mask = None
        if n_frames is None:
            n_frames = torch.full((features.shape[0],), features.shape[1])
        else:
            mask = (torch.arange(features.shape[1]) < n_frames[:, None])[:, None, None, :]  # (B, 1, 1, N)
        x = self.enter(features)
        for layer in self.layers:
            x = layer(x, mask)
        pooled = pooling_weights(n_frames, features.shape[1], self.config.soft_tokens) @ x  # (B, T, C)
        return self.leave(pooled)


PROJECTORS = {"bridgeformer": (BridgeFormer, BridgeFormerConfig)}


def build_projector(config: dict) -> nn.Module:
    """The untrained projector of a manifest's `projector` entry."""
    if config.get("kind") not in PROJECTORS:
        raise ValueError(f"unknown projector {config.get('kind')!r}: choose one of {', '.join(PROJECTORS)}")
    network, configuration = PROJECTORS[config["kind"]]
    return network(configuration(**config))


def config_of(projector: nn.Module) -> dict:
    """The manifest entry that builds `projector` again."""
    return asdict(projector.config)
