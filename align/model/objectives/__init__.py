"""Objectives: what a projector is trained for. One interface (base.py), one file each.

| name         | projector  | loss                                                                |
|--------------|------------|---------------------------------------------------------------------|
| ctc          | not pooled | connectionist temporal classification over the speech vocabulary    |
| paper        | pooled     | EmbedLink; every token takes places in proportion to its letters    |
| paper-padded | pooled     | EmbedLink; one place per token, the rest is padding                 |
| aligned      | pooled     | EmbedLink; every token takes the places that fit it best            |
| end-to-end   | pooled     | cross-entropy of the LLM's answers, through the frozen LLM          |

    objective = make(options, table, scale)
    loss = objective(outputs, lengths, examples, step)

`--objective` takes those in LLM_FREE, which need nothing of the LLM but `table`, its embeddings of
the speech vocabulary. "end-to-end" needs the whole LLM in PyTorch: it is the baseline of the
benchmarks, and no command offers it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tiny_align.runtime.errors import TinyAlignError

if TYPE_CHECKING:  # a command's --help must not load torch
    from torch import Tensor

    from tiny_align.align.model.objectives.base import Objective, ObjectiveOptions
    from tiny_align.align.model.objectives.end_to_end import FrozenLlm

FRAMED = ("ctc",)  # for projectors whose length follows the speech; the default first
POOLED = ("paper", "aligned", "paper-padded", "end-to-end")  # for pooled ones; the default first
LLM_FREE = ("ctc", "aligned", "paper", "paper-padded")  # those that a device trains with


def default_for(soft_tokens: int | None) -> str:
    """The objective of a projector for which no other is asked."""
    return POOLED[0] if soft_tokens else FRAMED[0]


def check(name: str, soft_tokens: int | None) -> None:
    """Raise a TinyAlignError if an objective does not fit the form of a projector."""
    fitting = POOLED if soft_tokens else FRAMED
    if name in fitting:
        return
    form = f"pools to {soft_tokens} soft tokens" if soft_tokens else "follows the speech"
    choices = " or ".join(choice for choice in fitting if choice in LLM_FREE)
    option = "without" if soft_tokens else "with"
    raise TinyAlignError(
        f"the objective {name!r} is not for this bundle, whose projector {form}: "
        f"choose {choices}, or export the bundle {option} --soft-tokens"
    )


def make(
    options: ObjectiveOptions,
    table: Tensor | None,
    scale: float | None = None,
    llm: FrozenLlm | None = None,
) -> Objective:
    """The objective that `options` names.

    Args:
        table: (K, D) float32, the speech vocabulary's embeddings; the examples' tokens are its
            rows. "end-to-end" has the LLM's own and takes None.
        scale: of the logits, for "ctc" (the manifest's readout.scale).
        llm: the frozen LLM and its prompts, for "end-to-end".

    Raises:
        ValueError: what the objective needs is missing, or its name is unknown.
    """
    name = options.objective
    if name == "end-to-end":
        from tiny_align.align.model.objectives.end_to_end import EndToEnd

        if llm is None:
            raise ValueError("end-to-end needs the LLM: give `llm`")
        return EndToEnd(llm)
    if table is None:
        raise ValueError(f"{name} needs the embeddings of the speech vocabulary: give `table`")
    if name == "ctc":
        from tiny_align.align.model.objectives.ctc import Ctc

        if scale is None:
            raise ValueError("ctc needs the scale of the logits: give `scale`")
        return Ctc(table, scale, options.flat_start)
    if name == "aligned":
        from tiny_align.align.model.objectives.aligned import Aligned

        return Aligned(table, options.flat_start)
    if name in ("paper", "paper-padded"):
        from tiny_align.align.model.objectives.paper import Paper

        return Paper(table, padded=name == "paper-padded")
    raise ValueError(f"unknown objective {name!r}: expected one of {', '.join(FRAMED + POOLED)}")
