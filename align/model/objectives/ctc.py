"""CTC in the LLM's own vocabulary: the frozen embedding table is the output layer, plus a blank.

For every frame, the projector predicts which token is spoken there, if any (Graves et al. 2006,
"Connectionist Temporal Classification"). The runtime collapses runs of a token to one soft token,
so that the LLM reads speech as it reads text. Only the transcript's tokens and the normaliser enter
the loss. Over a large speech vocabulary the normaliser is estimated: the batch's own tokens count
in full, a random sample stands for all others (sampled softmax, arXiv 1412.2007). The tens of
thousands of tokens in many speakers' texts then take little more time and memory than one user's
few hundred.

Trained from random weights, CTC first gives only blanks for a long time. A flat start avoids that:
for some steps, the target of every frame is the token that the paper's cast puts there, much as
speech recognisers were long begun with utterances cut into equal parts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tiny_align.align.data.examples import Example
from tiny_align.align.model.objectives.paper import cast_places

EXACT = 2048  # tokens; of a larger speech vocabulary the normaliser is estimated
N_SAMPLED = 1024  # tokens that stand for those which no transcript of the batch has
BLANK = -1  # in a path of tokens


def log_normaliser(frames: Tensor, table: Tensor, scale: float) -> Tensor:
    """(B, N', D + 1) -> (B, N'): log-sum-exp over every token's logit and the blank's."""
    logits = frames[..., :-1] @ table.T * scale
    return torch.logaddexp(logits.logsumexp(dim=-1), frames[..., -1])


def sampled_log_normaliser(
    frames: Tensor, table: Tensor, scale: float, own: Tensor, seed: int
) -> Tensor:
    """Estimate `log_normaliser`: the tokens `own` (K,) in full, a sample for all others."""
    generator = torch.Generator(table.device).manual_seed(seed)
    drawn = torch.randint(len(table), (N_SAMPLED,), generator=generator, device=table.device)
    others = drawn[~torch.isin(drawn, own)]
    weight = math.log((len(table) - len(own)) / len(others))
    rest = (frames[..., :-1] @ table[others].T * scale).logsumexp(dim=-1) + weight
    return torch.logaddexp(log_normaliser(frames, table[own], scale), rest)


def greedy_path(frames: Tensor, table: Tensor, scale: float) -> Tensor:
    """(B, N', D + 1) -> (B, N'): each frame's likeliest token or BLANK.

    A large table is multiplied in pieces.
    """
    highest = frames[..., -1]
    path = torch.full(frames.shape[:-1], BLANK)
    for start in range(0, len(table), EXACT):
        logits = frames[..., :-1] @ table[start : start + EXACT].T * scale
        value, index = logits.max(dim=-1)
        path = torch.where(value > highest, index + start, path)
        highest = torch.maximum(highest, value)
    return path


class Ctc:
    """Connectionist temporal classification over the speech vocabulary's table (K, D).

    The loss is per token of the transcripts. For the first `flat_start` steps it is the
    cross-entropy of every frame with the token cast there, per frame.
    """

    def __init__(self, table: Tensor, scale: float, flat_start: int = 0):
        self.table = table
        self.scale = scale
        self.flat_start = flat_start

    def __call__(
        self, outputs: Tensor, lengths: Tensor, examples: list[Example], step: int
    ) -> Tensor:
        if step < self.flat_start:
            return self._flat_loss(outputs, lengths, examples, step)
        log_probs, labels = self.log_probs(outputs, [e.tokens for e in examples], step)
        n_tokens = torch.tensor([len(e.tokens) for e in examples])
        loss = F.ctc_loss(
            log_probs.transpose(0, 1),
            torch.cat(labels),
            lengths,
            n_tokens,
            blank=0,
            reduction="none",
            zero_infinity=True,  # a transcript with more tokens than frames teaches nothing
        )
        loss = loss - _library_surplus(log_probs, lengths, possible=loss.detach() > 0)
        return loss.sum() / n_tokens.sum().clamp(min=1)

    def _flat_loss(
        self, frames: Tensor, lengths: Tensor, examples: list[Example], step: int
    ) -> Tensor:
        paths = [_cast_path(e, int(n)) for e, n in zip(examples, lengths)]
        path = pad_sequence(paths, batch_first=True, padding_value=BLANK)  # (B, N')
        tokens = path.clamp(min=0)
        logits = (frames[..., :-1] * self.table[tokens]).sum(dim=-1) * self.scale
        logits = torch.where(path >= 0, logits, frames[..., -1])
        loss = self._normaliser(frames, tokens.unique(), step) - logits
        counted = torch.arange(path.shape[1]) < lengths[:, None]
        return loss[counted].mean()

    def token_error_rate(
        self, outputs: Tensor, lengths: Tensor, examples: list[Example], step: int
    ) -> float:
        """Wrong, missing and extra tokens over the tokens of the transcripts, by the greedy path.

        A better measure of weights than the loss, which grows with the confidence of a few
        mistakes, long before there are more of them.
        """
        import jiwer

        transcripts = []
        recognised = []
        for example, path, length in zip(
            examples, greedy_path(outputs, self.table, self.scale), lengths
        ):
            if example.tokens:
                collapsed = path[:length].unique_consecutive()
                transcripts.append(_as_words(example.tokens))
                recognised.append(_as_words(collapsed[collapsed != BLANK].tolist()))
        return jiwer.wer(transcripts, recognised)

    def log_probs(
        self, frames: Tensor, transcripts: list[list[int]], step: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities of the blank (0) and of each transcript's own tokens (from 1).

        Args:
            frames: (B, N', D + 1).

        Returns:
            (B, N', K + 1), where K is the largest number of different tokens in a transcript, and
            (L,) labels of each transcript: its tokens in these numbers.
        """
        tokens = []  # of each transcript, each once
        labels = []
        for transcript in transcripts:
            own, places = torch.tensor(transcript, dtype=torch.long).unique(return_inverse=True)
            tokens.append(own)
            labels.append(places + 1)
        used = pad_sequence(tokens, batch_first=True)  # (B, K)
        logits = torch.einsum("bnd,bkd->bnk", frames[..., :-1], self.table[used]) * self.scale
        logits = torch.cat([frames[..., -1:], logits], dim=-1)
        normaliser = self._normaliser(frames, used.unique(), step)
        return logits - normaliser[..., None], labels

    def _normaliser(self, frames: Tensor, own: Tensor, step: int) -> Tensor:
        """(B, N'), exact or estimated; `own` (K,) are the tokens of the batch's transcripts."""
        if len(self.table) <= EXACT:
            return log_normaliser(frames, self.table, self.scale)
        return sampled_log_normaliser(frames, self.table, self.scale, own, step)


def _library_surplus(log_probs: Tensor, lengths: Tensor, possible: Tensor) -> Tensor:
    """(B,) zeros whose gradient is the error of F.ctc_loss's.

    It assumes that log_probs come from a log-softmax over all its classes, where adding the
    probabilities to the gradient changes nothing; ours are normalised over a vocabulary of which
    they show a part.
    """
    inside = torch.arange(log_probs.shape[1]) < lengths[:, None]  # (B, N')
    expected = (log_probs.detach().exp() * log_probs).sum(dim=-1)
    surplus = (expected * (inside & possible[:, None])).sum(dim=-1)
    return surplus - surplus.detach()


def _cast_path(example: Example, n_frames: int) -> Tensor:
    """(N',): the token that the paper's cast puts at each frame; BLANK without a transcript."""
    if not example.tokens:
        return torch.full((n_frames,), BLANK)
    return torch.tensor(example.tokens)[cast_places(example.token_lengths, n_frames)]


def _as_words(tokens: list[int]) -> str:
    """Tokens as words for jiwer."""
    return " ".join(map(str, tokens))
