"""The projectors: encoder features -> vectors in the LLM's embedding space.

BridgeFormer follows Tiny-Align (arXiv 2411.13766): input MLP, transformer-encoder layers without
positional encoding (the features already carry time), adaptive pooling to a fixed number of soft
tokens, output MLP. The paper's sizes are not public; these are ours. A transformer with positions,
an MLP and a linear map are there for comparison.

With `soft_tokens`, a projector pools to that many. Without, it gives one vector per pair of frames
and the logit of a blank, which the runtime collapses (runtime/readout.py). It then also has a
shortcut: a linear map of REACH frames of the lowest exported encoder layer, added just before the
last linear map. It is trained for users whom the encoder misunderstands: a few hundred words are
enough to learn their sound patterns there. The shortcut is ours, not the paper's.

A projector knows nothing of objectives or training.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STACK = 2  # encoder frames per vector where nothing is pooled
REACH = 12  # encoder frames that the shortcut reads at once: a pair and five on each side


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
    # The shortcut reads the first so many features, where nothing is pooled; 0: there is none.
    shortcut_size: int = 0

    @property
    def output_size(self) -> int:
        """D, and the blank's logit where nothing is pooled."""
        return self.embedding_size if self.soft_tokens else self.embedding_size + 1


def pooling_weights(n_frames: Tensor, max_frames: int, soft_tokens: int) -> Tensor:
    """(B,) frame counts -> (B, T, N): row t averages the frames of the t-th of T equal spans.

    Adaptive average pooling with fractional borders, written as weights from the length because the
    library operator does not export with a dynamic length; with fewer frames than spans it
    interpolates.
    """
    device = n_frames.device
    frames = torch.arange(max_frames, dtype=torch.float32, device=device)  # (N,)
    spans = torch.arange(soft_tokens, dtype=torch.float32, device=device)[:, None]  # (T, 1)
    width = n_frames.to(torch.float32)[:, None, None] / soft_tokens  # (B, 1, 1)
    overlap = torch.minimum(frames + 1, (spans + 1) * width) - torch.maximum(frames, spans * width)
    return overlap.clamp(min=0) / width  # (B, T, N)


def sinusoids(n: int, size: int, device: torch.device | None = None) -> Tensor:
    """(N, C) sine and cosine positions (arXiv 1706.03762)."""
    rates = torch.exp(torch.arange(0, size, 2, device=device) * (-math.log(10_000.0) / size))
    angles = torch.arange(n, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    """A pre-norm transformer-encoder layer."""

    def __init__(self, size: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.norm_attention = nn.LayerNorm(size)
        self.norm_mlp = nn.LayerNorm(size)
        self.qkv = nn.Linear(size, 3 * size)
        self.out = nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(b, n, 3, self.n_heads, c // self.n_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x (B, H, N, C/H)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).reshape(b, n, c))
        return x + self.mlp(self.norm_mlp(x))


class Shortcut(nn.Module):
    """(B, N, Da) -> (B, N/2, size): a linear map of REACH frames; all zeros before training."""

    def __init__(self, config: ProjectorConfig, size: int):
        super().__init__()
        self.n_features = config.shortcut_size
        inner_size = min(self.n_features, config.hidden_size)
        self.narrow: nn.Module = nn.Identity()
        if inner_size < self.n_features:
            self.narrow = nn.Linear(self.n_features, inner_size, bias=False)
        self.patterns = nn.Conv1d(inner_size, size, REACH, stride=STACK, padding=REACH // 2 - 1)
        for parameter in self.patterns.parameters():
            nn.init.zeros_(parameter)

    def forward(self, features: Tensor, n_frames: Tensor | None) -> Tensor:
        x = features[..., : self.n_features]
        x = self.narrow(F.layer_norm(x, (self.n_features,)))
        if n_frames is not None:  # zeros after the end, as for an utterance without padding
            inside = torch.arange(x.shape[1], device=x.device) < n_frames[:, None]  # (B, N)
            x = x * inside[..., None]
        return self.patterns(x.transpose(1, 2)).transpose(1, 2)


class BridgeFormer(nn.Module):
    """The paper's projector, or with `soft_tokens` None ours.

    | stage       | pooled     | not pooled      |
    |-------------|------------|-----------------|
    | features    | (B, N, Da) | (B, N, Da)      |
    | input MLP   | (B, N, C)  | (B, N, C)       |
    | stacking    |            | (B, N/2, C)     |
    | layers      | (B, N, C)  | (B, N/2, C)     |
    | pooling     | (B, T, C)  |                 |
    | shortcut    |            | (B, N/2, 2 C)   |
    | output MLP  | (B, T, D)  | (B, N/2, D + 1) |
    """

    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.enter = self._input_map()
        self.stack = None if config.soft_tokens else nn.Conv1d(size, size, STACK, stride=STACK)
        self.layers = nn.ModuleList(Block(size, config.n_heads) for _ in range(self._n_layers()))
        self.leave = self._output_map()
        self.shortcut = None
        if config.shortcut_size and not config.soft_tokens:
            last = self.leave[-1]
            assert isinstance(last, nn.Linear)
            self.shortcut = Shortcut(config, last.in_features)

    def _input_map(self) -> nn.Module:
        feature_size = self.config.feature_size
        size = self.config.hidden_size
        return nn.Sequential(
            nn.LayerNorm(feature_size),
            nn.Linear(feature_size, size),
            nn.GELU(),
            nn.Linear(size, size),
        )

    def _n_layers(self) -> int:
        return self.config.n_layers

    def _output_map(self) -> nn.Sequential:
        size = self.config.hidden_size
        return nn.Sequential(
            nn.LayerNorm(size),
            nn.Linear(size, 2 * size),
            nn.GELU(),
            nn.Linear(2 * size, self.config.output_size),
        )

    def _add_positions(self, x: Tensor) -> Tensor:
        """Nothing to add: the features already carry time."""
        return x

    def output_lengths(self, n_frames: Tensor) -> Tensor:
        """(B,) frame counts -> (B,) vector counts."""
        if self.config.soft_tokens:
            return torch.full_like(n_frames, self.config.soft_tokens)
        return n_frames // STACK

    def forward(self, features: Tensor, n_frames: Tensor | None = None) -> Tensor:
        """(B, N, Da) -> (B, T, D) or (B, N/2, D + 1).

        Args:
            n_frames: (B,) frame counts, where the batch is padded.
        """
        x = self.enter(features)
        if self.stack is not None:
            x = self.stack(x.transpose(1, 2)).transpose(1, 2)
        mask = None
        if n_frames is not None:
            counts = n_frames // STACK if self.stack is not None else n_frames
            inside = torch.arange(x.shape[1], device=x.device) < counts[:, None]  # (B, N)
            mask = inside[:, None, None, :]  # (B, 1, 1, N)
        elif self.config.soft_tokens:
            n_frames = torch.full((features.shape[0],), features.shape[1], device=x.device)
        x = self._add_positions(x)
        for layer in self.layers:
            x = layer(x, mask)
        if self.config.soft_tokens:
            assert n_frames is not None
            x = pooling_weights(n_frames, x.shape[1], self.config.soft_tokens) @ x  # (B, T, C)
        if self.shortcut is None:
            return self.leave(x)
        return self.leave[-1](self.leave[:-1](x) + self.shortcut(features, n_frames))


class Transformer(BridgeFormer):
    """BridgeFormer with sinusoidal positions: what others use between encoder and LLM."""

    def _add_positions(self, x: Tensor) -> Tensor:
        return x + sinusoids(x.shape[1], x.shape[2], x.device)


class Mlp(BridgeFormer):
    """BridgeFormer without its layers: every vector depends on its own frames only."""

    def _n_layers(self) -> int:
        return 0


class Linear(Mlp):
    """Linear maps only."""

    def _input_map(self) -> nn.Module:
        return nn.Linear(self.config.feature_size, self.config.hidden_size)

    def _output_map(self) -> nn.Sequential:
        return nn.Sequential(nn.Linear(self.config.hidden_size, self.config.output_size))


PROJECTORS = {
    "bridgeformer": BridgeFormer,
    "transformer": Transformer,
    "mlp": Mlp,
    "linear": Linear,
}


def build_projector(config: dict) -> BridgeFormer:
    """The untrained projector of a manifest's `projector` entry.

    Raises:
        ValueError: its `kind` is unknown.
    """
    kind = config.get("kind")
    if kind not in PROJECTORS:
        raise ValueError(f"unknown projector {kind!r}: expected one of {', '.join(PROJECTORS)}")
    fields = dict(config)
    if "near_size" in fields:  # the name in older manifests
        fields["shortcut_size"] = fields.pop("near_size")
    return PROJECTORS[kind](ProjectorConfig(**fields))
