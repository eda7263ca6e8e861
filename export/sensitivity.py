"""How much an error in every weight of an LLM would change its answers, on text it writes itself.

The measure is the divergence (Kullback-Leibler, nats per token) of the next token's probabilities.
For small errors it is half of their square in the Fisher information, which is taken apart as in
K-FAC (arXiv 1503.05671): mean squares of the gradient at a product's outputs, and of its inputs.
The gradients are those of tokens drawn from the LLM's own probabilities, so that the information is
the true one, not that of a data set.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tiny_align.export.llms import input_embedding
from tiny_align.runtime.backends.base import Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXTS = 10
VALIDATION_TEXTS = 2  # of them, on which the finished graph is measured
TOKENS = 64  # of each, after its beginning
TEMPERATURE = 0.7  # small LLMs write no sense at 1
SEED = 0


@dataclass(frozen=True)
class Sensitivity:
    """Of a product with weights (K, N)."""

    gradient: np.ndarray  # (N,) mean square at every output
    importance: np.ndarray  # (K,) mean square of every input, weighted by the gradients
    hessian: np.ndarray | None = None  # (K, K) mean products of the inputs, weighted alike

    def divergence(self, error: np.ndarray, inputs: slice) -> float:
        """Nats per token that an error of these inputs' weights costs, if it is small."""
        by_output = self.importance[inputs] @ np.square(error)
        return 0.5 * float(self.gradient @ by_output)


def join(parts: list[Sensitivity]) -> Sensitivity:
    """Of a product whose weights stand side by side: all have the same inputs."""
    shares = np.array([part.gradient.sum() for part in parts])
    shares = shares / max(shares.sum(), 1e-30)
    importance = sum(share * part.importance for share, part in zip(shares, parts))
    hessian = None
    if parts[0].hessian is not None:
        hessian = sum(share * part.hessian for share, part in zip(shares, parts))
    return Sensitivity(np.concatenate([part.gradient for part in parts]), importance, hessian)


def write_texts(llm: "PreTrainedModel", beginning: list[int]) -> list[torch.Tensor]:
    """Token ids of texts that the LLM writes: what it expects a user to say, and its answers.

    Args:
        beginning: the ids before a user's words in the prompt.
    """
    beginning = beginning or [0]
    room = llm.config.max_position_embeddings - len(beginning)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        ids = llm.generate(  # type: ignore[operator]  # transformers annotates it as a Tensor
            torch.tensor([beginning] * TEXTS),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            min_new_tokens=min(TOKENS, room),
            max_new_tokens=min(TOKENS, room),
            pad_token_id=0,
        )
    return list(ids)


def measure_sensitivities(
    llm: "PreTrainedModel", texts: Iterable[torch.Tensor], n_beginning: int, hessians: bool = False
) -> dict[str, Sensitivity]:
    """The sensitivity of every linear module but the output layer, by its name.

    Args:
        n_beginning: tokens at the start of every text, which nobody has to predict.
        hessians: whether to take the products of inputs too, which GPTQ needs: K * K floats each.
    """
    sums: dict[str, _Sums] = {}
    hooks = []
    for name, module in llm.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not llm.get_output_embeddings():
            sums[name] = _Sums(hessians)
            hooks.append(module.register_forward_pre_hook(sums[name].take_inputs))
            hooks.append(module.register_full_backward_hook(sums[name].take_gradients))
    trainable = [weight for weight in llm.parameters() if weight.requires_grad]
    n_tokens = 0
    try:
        for weight in trainable:
            weight.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            for ids in texts:
                n_tokens += _go_back(llm, ids, max(n_beginning, 1))
    finally:
        for weight in trainable:
            weight.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    return {name: each.means(n_tokens) for name, each in sums.items()}


def _go_back(llm: "PreTrainedModel", ids: torch.Tensor, n_beginning: int) -> int:
    """Send the gradients of drawn tokens through the LLM; returns their number."""
    embeddings = input_embedding(llm)(ids[None]).detach().requires_grad_()
    logits = llm(inputs_embeds=embeddings, use_cache=False).logits[0, n_beginning - 1 : -1]
    drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
    torch.nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return len(drawn)


class _Sums:
    """Collects a module's inputs and gradients."""

    def __init__(self, hessians: bool):
        self._hessians = hessians
        self._inputs = torch.empty(0)
        self._gradient: torch.Tensor | int = 0
        self._products: torch.Tensor | int = 0
        self._weight = 0.0

    def take_inputs(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self._inputs = inputs[0].detach().flatten(0, -2)

    def take_gradients(
        self,
        module: torch.nn.Module,
        inputs: tuple[torch.Tensor, ...],
        outputs: tuple[torch.Tensor, ...],
    ) -> None:
        rows = self._inputs
        squares = outputs[0].flatten(0, -2).square()
        weights = squares.sum(dim=1)
        self._gradient = self._gradient + squares.sum(dim=0)
        self._weight += float(weights.sum())
        if self._hessians:
            self._products = self._products + rows.T @ (rows * weights[:, None])
        else:
            self._products = self._products + weights @ rows.square()

    def means(self, n_tokens: int) -> Sensitivity:
        assert isinstance(self._gradient, torch.Tensor)
        assert isinstance(self._products, torch.Tensor)
        gradient = (self._gradient / n_tokens).numpy()
        products = (self._products / max(self._weight, 1e-30)).numpy()
        if self._hessians:
            return Sensitivity(gradient, products.diagonal().copy(), products)
        return Sensitivity(gradient, products)


# --- what a finished graph costs ---


@torch.no_grad()
def measure_divergence(
    decoder: Decoder, llm: "PreTrainedModel", texts: Iterable[torch.Tensor], n_beginning: int
) -> dict[str, float]:
    """How far a graph is from PyTorch in FP32, token by token, as the manifest records it.

    Returns:
        "kl_to_pytorch", nats per token, and "same_next_token", a share.
    """
    start = max(n_beginning, 1) - 1
    divergences = []
    equal = []
    for ids in texts:
        embeddings = input_embedding(llm)(ids[None])
        expected = llm(inputs_embeds=embeddings, use_cache=False).logits[0, start:-1]
        rows = embeddings[0, :-1].numpy()
        cache = decoder.open_cache(len(rows))
        for i, row in enumerate(expected.double().log_softmax(dim=-1)):
            first = 0 if i == 0 else start + i
            scores = decoder.run(rows[first : start + i + 1], cache, first)
            got = torch.from_numpy(scores.logits.astype(np.float64)).log_softmax(dim=-1)
            divergences.append(float((row.exp() * (row - got)).sum()))
            equal.append(bool(row.argmax() == got.argmax()))
    return {
        "kl_to_pytorch": float(np.mean(divergences)),
        "same_next_token": float(np.mean(equal)),
    }
