"""Objectives: what a projector is trained for. One small interface, one file each.

An objective is made once per training and called once per step:

    objective = make(options, table, scale)
    loss = objective(outputs, lengths, examples, step)

`outputs` is what the projector gave for a batch, (B, T, D) pooled or (B, N', D + 1) framed, `lengths` (B,) how
many rows of each count, `examples` the utterances, `step` the number of steps done. It returns a scalar with a
gradient, and holds as `table` the embeddings it is bound to. All but `end-to-end` need nothing else of the LLM. Where
the loss is no good judge of weights, `held_out(...)` takes the same and returns what is: smaller is better.
"""

from typing import TYPE_CHECKING, Protocol

from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:
    from torch import Tensor

    from tiny_align.align.data.examples import Example

FRAMED, POOLED = (
    ("ctc",),
    ("paper", "aligned", "paper-padded", "end-to-end"),
)  # what each reads, default first
LLM_FREE = ("ctc", "aligned", "paper", "paper-padded")  # those a device trains with


class Objective(Protocol):
    """What a projector is trained for; see above."""

    table: "Tensor"

    def __call__(
        self, outputs: "Tensor", lengths: "Tensor", examples: "list[Example]", step: int
    ) -> "Tensor": ...


def default_for(soft_tokens: int | None) -> str:
    """The objective a projector is trained with unless another is asked for."""
    return (POOLED if soft_tokens else FRAMED)[0]


def check(name: str, soft_tokens: int | None) -> None:
    """Raises TinyAlignError where a projector's form is not the objective's."""
    fitting = POOLED if soft_tokens else FRAMED
    if name not in fitting:
        form = f"pools to {soft_tokens} soft tokens" if soft_tokens else "follows the speech"
        raise TinyAlignError(
            f"the objective {name!r} is not for this bundle, whose projector {form}: choose {' or '.join(fitting)}, "
            f"or export the bundle {'without' if soft_tokens else 'with'} --soft-tokens"
        )


def make(options, table, scale: float | None = None, llm=None):
    """The objective that `options`, align.train.TrainOptions, names.

    Args:
        table: (K, D) float32 tensor, the speech vocabulary's embeddings; the examples' tokens are its rows.
        scale: of the logits, for "ctc" (the manifest's readout.scale).
        llm: the frozen LLM and its prompt (end_to_end.FrozenLlm), for "end-to-end".
    """
    name = options.objective
    if name == "ctc":
        from tiny_align.align.model.objectives.ctc import Ctc

        return Ctc(table, scale, options.flat_start)
    if name == "aligned":
        from tiny_align.align.model.objectives.aligned import Aligned

        return Aligned(table, options.flat_start)
    if name == "end-to-end":
        from tiny_align.align.model.objectives.end_to_end import EndToEnd

        return EndToEnd(llm)
    from tiny_align.align.model.objectives.paper import Paper

    return Paper(table, padded=name == "paper-padded")
