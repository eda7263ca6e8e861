"""CTC in the LLM's own vocabulary: the frozen embedding table is the output layer, plus a blank.

The projector says for every frame which token is spoken there, if any (Graves et al. 2006, "Connectionist Temporal
Classification"); the runtime collapses runs to one soft token each, so that the LLM sees speech as it sees text.
Only the transcript's tokens and the normaliser enter the loss. Over a large speech vocabulary the normaliser is
estimated: the batch's own tokens count in full, a random sample stands for all others (sampled softmax, arXiv
1412.2007), so that the tens of thousands of tokens in the texts of many people take little more time and memory than
one person's few hundred.

From nothing, CTC spends long on giving only blanks. A flat start spares that: for some steps every frame is simply told
the token that the paper's cast puts there, as speech recognisers were long begun with utterances cut evenly.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_align.align.model.objectives.paper import cast_places

EXACT = 2048  # tokens; a larger speech vocabulary is sampled
SAMPLE = 1024  # tokens that stand for those which no transcript of the batch holds


def log_normaliser(frames: Tensor, table: Tensor, scale: float) -> Tensor:
    """(B, N', D + 1) -> (B, N'): log of the summed exponentials over every token's logit and the blank's."""
    logits = frames[..., :-1] @ table.T * scale
    return torch.logaddexp(logits.logsumexp(dim=-1), frames[..., -1])


def sampled_log_normaliser(
    frames: Tensor, table: Tensor, scale: float, own: Tensor, seed: int
) -> Tensor:
    """An estimate of `log_normaliser`: the tokens `own` (K,) in full, SAMPLE others for all the rest."""
    generator = torch.Generator(table.device).manual_seed(seed)
    drawn = torch.randint(len(table), (SAMPLE,), generator=generator, device=table.device)
    others = drawn[~torch.isin(drawn, own)]
    weight = math.log((len(table) - len(own)) / len(others))
    rest = (frames[..., :-1] @ table[others].T * scale).logsumexp(dim=-1) + weight
    return torch.logaddexp(log_normaliser(frames, table[own], scale), rest)


def best_path(frames: Tensor, table: Tensor, scale: float) -> Tensor:
    """(B, N', D + 1) -> (B, N'): each frame's best token, -1 for the blank; a large table is read in pieces."""
    best, token = frames[..., -1], torch.full(frames.shape[:-1], -1)
    for start in range(0, len(table), EXACT):
        value, index = (frames[..., :-1] @ table[start : start + EXACT].T * scale).max(dim=-1)
        best, token = torch.maximum(best, value), torch.where(value > best, index + start, token)
    return token


def _library_surplus(log_probs: Tensor, lengths: Tensor, possible: Tensor) -> Tensor:
    """(B,) zeros with the gradient by which F.ctc_loss is off.

    It takes for granted that log_probs come from a log-softmax over all its classes, where adding the probabilities
    to the gradient changes nothing; ours are normalised over a vocabulary of which they show a part.
    """
    counted = (torch.arange(log_probs.shape[1]) < lengths[:, None]) & possible[:, None]  # (B, N')
    surplus = ((log_probs.detach().exp() * log_probs).sum(dim=-1) * counted).sum(dim=-1)
    return surplus - surplus.detach()


def _cast(example, n_frames: int) -> Tensor:
    """(N',): the token that the paper's cast puts at each frame, -1 where nothing is said."""
    if not example.tokens:
        return torch.full((n_frames,), -1)
    return torch.tensor(example.tokens)[cast_places(example.token_lengths, n_frames)]


def _line(tokens) -> str:
    return " ".join(map(str, tokens))


class Ctc:
    """Connectionist temporal classification over the speech vocabulary's table (K, D); per token of the transcripts.

    For the first `flat_start` steps it is the cross-entropy of every frame with the token cast there, per frame.
    """

    def __init__(self, table: Tensor, scale: float, flat_start: int = 0):
        self.table, self.scale, self.flat_start = table, scale, flat_start

    def __call__(self, frames: Tensor, lengths: Tensor, examples: list, step: int) -> Tensor:
        if step < self.flat_start:
            return self._flat(frames, lengths, examples, step)
        log_probs, labels = self.log_probs(frames, [e.tokens for e in examples], step)
        sizes = torch.tensor([len(e.tokens) for e in examples])
        loss = F.ctc_loss(
            log_probs.transpose(0, 1),
            torch.cat(labels),
            lengths,
            sizes,
            blank=0,
            reduction="none",
            zero_infinity=True,
        )  # a transcript with more tokens than frames teaches nothing
        loss = loss - _library_surplus(log_probs, lengths, possible=loss.detach() > 0)
        return loss.sum() / sizes.sum().clamp(min=1)

    def _flat(self, frames: Tensor, lengths: Tensor, examples: list, step: int) -> Tensor:
        cast = [_cast(e, int(n)) for e, n in zip(examples, lengths)]
        places = torch.nn.utils.rnn.pad_sequence(
            cast, batch_first=True, padding_value=-1
        )  # (B, N'), -1: the blank
        tokens = places.clamp(min=0)
        logits = (frames[..., :-1] * self.table[tokens]).sum(dim=-1) * self.scale
        logits = torch.where(places >= 0, logits, frames[..., -1])
        wrong = self._normaliser(frames, tokens.unique(), step) - logits
        counted = torch.arange(places.shape[1]) < lengths[:, None]
        return wrong[counted].mean()

    def held_out(self, frames: Tensor, lengths: Tensor, examples: list, step: int) -> float:
        """Share of the tokens that are heard wrongly. The loss grows with sure mistakes, long before there are more."""
        import jiwer

        pairs = [
            (e.tokens, path[:n].unique_consecutive().tolist())
            for e, path, n in zip(examples, best_path(frames, self.table, self.scale), lengths)
        ]
        said, heard = zip(
            *((_line(said), _line(t for t in heard if t >= 0)) for said, heard in pairs if said)
        )
        return jiwer.wer(list(said), list(heard))

    def log_probs(
        self, frames: Tensor, transcripts: list[list[int]], step: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities of the blank (0) and of each transcript's own tokens, and the transcripts in those numbers.

        Args:
            frames: (B, N', D + 1).
        Returns:
            (B, N', K + 1), where K is the most different tokens of a transcript, and (L,) labels from 1 for each.
        """
        own = [
            torch.tensor(tokens, dtype=torch.long).unique(return_inverse=True)
            for tokens in transcripts
        ]
        used = torch.nn.utils.rnn.pad_sequence(
            [tokens for tokens, _ in own], batch_first=True
        )  # (B, K)
        logits = torch.einsum("bnd,bkd->bnk", frames[..., :-1], self.table[used]) * self.scale
        logits = torch.cat([frames[..., -1:], logits], dim=-1)
        return logits - self._normaliser(frames, used.unique(), step)[..., None], [
            labels + 1 for _, labels in own
        ]

    def _normaliser(self, frames: Tensor, own: Tensor, step: int) -> Tensor:
        if len(self.table) <= EXACT:
            return log_normaliser(frames, self.table, self.scale)
        return sampled_log_normaliser(frames, self.table, self.scale, own, step)
