"""The projectors: encoder features -> soft tokens in the LLM's embedding space.

BridgeFormer after Tiny-Align (arXiv 2411.13766): input MLP, transformer-encoder layers without positional encoding
(the features already carry time), adaptive pooling to a fixed number of soft tokens, output MLP. The paper's
sizes are not public; these are ours. A transformer with positions, an MLP and a linear map are there to compare with.

With `soft_tokens` a projector pools to so many; without, it gives one vector per pair of frames and a blank's logit,
which the runtime collapses (runtime/readout.py). Such a one has a shortcut beside all that: a linear map of REACH
frames of the first layer that is exported, added just before the last linear map. A voice that the encoder
misunderstands is learnt there from a few hundred words, as patterns of sound. The shortcut is ours, not the paper's. A
projector knows nothing of objectives or training.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STACK = 2  # encoder frames per vector where nothing is pooled
REACH = 12  # encoder frames that the shortcut sees at once, as many to the left of a pair as to its right


@dataclass(frozen=True)
class ProjectorConfig:
    """Class and sizes, stored in the bundle's manifest under `projector`."""

    feature_size: int  # Da
    embedding_size: int  # D
    soft_tokens: int | None = None  # T; None: length follows the speech
    hidden_size: int = 256  # C
    n_layers: int = 2
    n_heads: int = 4
    kind: str = "bridgeformer"
    near_size: int = 0  # the shortcut reads the first so many features, where nothing is pooled; 0: there is none

    @property
    def output_size(self) -> int:
        """D, and the blank's logit where nothing is pooled."""
        return self.embedding_size if self.soft_tokens else self.embedding_size + 1


def pooling_weights(n_frames: Tensor, longest: int, soft_tokens: int) -> Tensor:
    """(B,) frame counts -> (B, T, N): row t averages the frames of the t-th of T equal spans.

    Adaptive average pooling with fractional borders, written as weights from the length because the library
    operator does not export with a dynamic length; with fewer frames than spans it interpolates.
    """
    frames = torch.arange(longest, dtype=torch.float32, device=n_frames.device)  # (N,)
    spans = torch.arange(soft_tokens, dtype=torch.float32, device=n_frames.device)[
        :, None
    ]  # (T, 1)
    width = n_frames.to(torch.float32)[:, None, None] / soft_tokens  # (B, 1, 1)
    overlap = torch.minimum(frames + 1, (spans + 1) * width) - torch.maximum(frames, spans * width)
    return overlap.clamp(min=0) / width  # (B, T, N)


def sinusoids(longest: int, size: int, device=None) -> Tensor:
    """(N, C) sine and cosine positions (arXiv 1706.03762)."""
    rates = torch.exp(torch.arange(0, size, 2, device=device) * (-math.log(10_000.0) / size))
    angles = torch.arange(longest, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


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


class Shortcut(nn.Module):
    """(B, N, Da) -> (B, N/2, size): what the first layer gives for REACH frames, linearly; nothing before training."""

    def __init__(self, config: ProjectorConfig, size: int):
        super().__init__()
        self.near_size, taken = config.near_size, min(config.near_size, config.hidden_size)
        self.narrow = (
            nn.Linear(config.near_size, taken, bias=False)
            if taken < config.near_size
            else nn.Identity()
        )
        self.patterns = nn.Conv1d(taken, size, REACH, stride=STACK, padding=REACH // 2 - 1)
        nn.init.zeros_(self.patterns.weight)
        nn.init.zeros_(self.patterns.bias)

    def forward(self, features: Tensor, n_frames: Tensor | None) -> Tensor:
        near = self.narrow(F.layer_norm(features[..., : self.near_size], (self.near_size,)))
        if n_frames is not None:  # as at the end of an utterance that stands alone
            near = (
                near
                * (torch.arange(near.shape[1], device=near.device) < n_frames[:, None])[..., None]
            )
        return self.patterns(near.transpose(1, 2)).transpose(1, 2)


class BridgeFormer(nn.Module):
    """
    | stage           | pooled    | not pooled     |
    |-----------------|-----------|----------------|
    | features        | (B, N, Da) | (B, N, Da)    |
    | input MLP       | (B, N, C) | (B, N, C)      |
    | stacking        |           | (B, N/2, C)    |
    | layers          | (B, N, C) | (B, N/2, C)    |
    | pooling         | (B, T, C) |                |
    | shortcut        |           | (B, N/2, 2 C)  |
    | output MLP      | (B, T, D) | (B, N/2, D + 1) |
    """

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.enter = self._enter()
        self.stack = None if config.soft_tokens else nn.Conv1d(size, size, STACK, stride=STACK)
        self.layers = nn.ModuleList(Block(size, config.n_heads) for _ in range(self._n_layers()))
        self.leave = self._leave()
        self.shortcut = (
            Shortcut(config, self.leave[-1].in_features)
            if config.near_size and self.stack
            else None
        )

    def _enter(self) -> nn.Module:
        da, size = self.config.feature_size, self.config.hidden_size
        return nn.Sequential(
            nn.LayerNorm(da), nn.Linear(da, size), nn.GELU(), nn.Linear(size, size)
        )

    def _n_layers(self) -> int:
        return self.config.n_layers

    def _leave(self) -> nn.Sequential:
        size = self.config.hidden_size
        return nn.Sequential(
            nn.LayerNorm(size),
            nn.Linear(size, 2 * size),
            nn.GELU(),
            nn.Linear(2 * size, self.config.output_size),
        )

    def _place(self, x: Tensor) -> Tensor:
        """What a vector knows of its place before the layers: nothing here."""
        return x

    def output_lengths(self, n_frames: Tensor) -> Tensor:
        """(B,) frame counts -> (B,) how many vectors come out."""
        return (
            torch.full_like(n_frames, self.config.soft_tokens)
            if self.config.soft_tokens
            else n_frames // STACK
        )

    def forward(self, features: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """(B, N, Da) and, where the batch is padded, (B,) frame counts -> (B, T, D) or (B, N/2, D + 1)."""
        x = self.enter(features)
        if self.stack is not None:
            x = self.stack(x.transpose(1, 2)).transpose(1, 2)
        mask, longest = None, x.shape[1]
        if n_frames is not None:
            counts = n_frames // STACK if self.stack is not None else n_frames
            mask = (torch.arange(longest, device=x.device) < counts[:, None])[
                :, None, None, :
            ]  # (B, 1, 1, N)
        elif self.config.soft_tokens:
            n_frames = torch.full((features.shape[0],), features.shape[1], device=x.device)
        x = self._place(x)
        for layer in self.layers:
            x = layer(x, mask)
        if self.config.soft_tokens:
            x = pooling_weights(n_frames, longest, self.config.soft_tokens) @ x  # (B, T, C)
        if self.shortcut is None:
            return self.leave(x)
        return self.leave[-1](self.leave[:-1](x) + self.shortcut(features, n_frames))


class Transformer(BridgeFormer):
    """BridgeFormer with sinusoidal positions: what others use between encoder and LLM."""

    def _place(self, x: Tensor) -> Tensor:
        return x + sinusoids(x.shape[1], x.shape[2], x.device)


class Mlp(BridgeFormer):
    """BridgeFormer without its layers: every vector is read alone."""

    def _n_layers(self) -> int:
        return 0


class Linear(Mlp):
    """Linear maps only."""

    def _enter(self) -> nn.Module:
        return nn.Linear(self.config.feature_size, self.config.hidden_size)

    def _leave(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(self.config.hidden_size, self.config.output_size))


PROJECTORS = {
    "bridgeformer": BridgeFormer,
    "transformer": Transformer,
    "mlp": Mlp,
    "linear": Linear,
}


def build_projector(config: dict) -> BridgeFormer:
    """The untrained projector of a manifest's `projector` entry."""
    if config.get("kind") not in PROJECTORS:
        raise ValueError(
            f"unknown projector {config.get('kind')!r}: choose one of {', '.join(PROJECTORS)}"
        )
    return PROJECTORS[config["kind"]](ProjectorConfig(**config))


def config_of(projector: nn.Module) -> dict:
    """The manifest entry that builds `projector` again."""
    return asdict(projector.config)
