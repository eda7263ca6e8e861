"""Every family of encoders and LLMs that `tiny-align export` takes, beside transformers.

    python -m benchmarks.studies.families [--json]

Compares features and greedy answers. Each is a tiny random model (tests/support), exported in FP32
as the command does and run by the runtime on the shipped recordings and on prompts of several
lengths. Writes benchmarks/results/families.json; the last line of stdout is the same document.
"""

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tiny_align.benchmarks import finish, new_parser, stamp
from tiny_align.benchmarks.standard.markdown import grid
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.llm import Decoding

RESULTS = Path(__file__).parents[1] / "results" / "families.json"
COMMAND = "python -m benchmarks.studies.families"
RECORDINGS = 4
SAMPLE_RATE = 16_000  # Hz
PROMPTS = (1, 3, 8, 15, 16, 17, 32, 48, 96)  # positions; a sliding window of tiny_llms.py has 16
ENCODER = "parakeet"  # beside which the LLMs are exported
LLM = "smollm2"  # beside which the encoders are


@contextlib.contextmanager
def traced_once(*names: str) -> Iterator[None]:
    """Within it, the named functions, as export calls them, trace the first module only.

    Its graph is used for every later one: they must be equal, and each bundle's parity check holds
    that.
    """
    from unittest import mock

    from tiny_align.export import bundle, llm_files

    with contextlib.ExitStack() as stack:
        for name in names:
            caller = llm_files if name == "llm_graph" else bundle
            stack.enter_context(mock.patch.object(caller, name, _once(getattr(caller, name))))
        yield


def _once(trace: Callable) -> Callable:
    graphs: list = []

    def traced(module: Any) -> Any:
        if not graphs:
            graphs.append(trace(module))
        # an export drops the weights of its graph
        return dataclasses.replace(graphs[0], program=graphs[0].program.clone())

    return traced


def export(encoder: Path, llm: Path, out: Path, max_context: int) -> Path:
    from tiny_align.export.bundle import ExportOptions, export_bundle

    options = ExportOptions(
        str(encoder), str(llm), precision="fp32", encoder_layers=(1, -1), max_context=max_context
    )
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's own progress
        export_bundle(options, out)
    return out


def encoder_row(
    family: str, folder: Path, bundle: Path, recordings: list[np.ndarray]
) -> dict[str, Any]:
    """The largest difference between the runtime's features and transformers'."""
    from tests.support.tiny_encoders import features

    max_abs_diff = 0.0
    max_abs = 0.0
    n_frames = 0
    with Assistant.load(bundle, threads=1) as assistant:
        for audio in recordings:
            ours = assistant.encode_window(audio)
            theirs = features(family, folder, audio)
            max_abs_diff = max(max_abs_diff, float(np.abs(ours - theirs).max()))
            max_abs = max(max_abs, float(np.abs(theirs).max()))
            n_frames += len(theirs)
    return {"max_abs_diff": max_abs_diff, "max_abs": max_abs, "frames": n_frames}


Answers = tuple[list[int], list[int]]  # the runtime's tokens and transformers'


def llm_row(family: str, folder: Path, bundle: Path, sentences: list[str]) -> dict[str, Any]:
    """How many tokens of greedy answers equal transformers', without end tokens."""
    import torch

    from tests.support.tiny_llms import INSTRUCTION, N_TOKENS, ModelPair

    decoding = Decoding(max_tokens=N_TOKENS, loop_tokens=0)
    from_embeddings = []
    from_text = []
    with Assistant.load(bundle, threads=1) as assistant:
        pair = ModelPair.load(family, folder, assistant)
        parity = assistant.bundle.manifest.graphs["llm"].parity["max_abs_diff_to_pytorch"]
        with pair.endless():
            for n in PROMPTS:
                if n + N_TOKENS > assistant.llm.spec.max_context:
                    continue
                prompt = pair.prompt(n)
                ours = list(assistant.llm.generate(prompt, decoding))
                theirs = pair.generate(inputs_embeds=torch.from_numpy(prompt)[None])
                from_embeddings.append((ours, theirs))
            for text in sentences:
                ours = list(assistant.answer_text(text, INSTRUCTION, decoding).tokens)
                theirs = pair.generate(input_ids=pair.template(text))
                from_text.append((ours, theirs))
    return {
        "max_abs_diff": max(parity.values()),
        "embeddings": agreement(from_embeddings),
        "text": agreement(from_text),
    }


def agreement(answers: list[Answers]) -> dict[str, int]:
    """Tokens compared, and those equal up to the first that is not, over pairs of answers."""
    n_tokens = 0
    n_equal = 0
    for ours, theirs in answers:
        n_tokens += max(len(ours), len(theirs))
        for our_token, their_token in zip(ours, theirs):
            if our_token != their_token:
                break
            n_equal += 1
    return {"answers": len(answers), "tokens": n_tokens, "equal": n_equal}


def measure(encoders: list[str], llms: list[str]) -> dict[str, Any]:
    import torch

    from tests.support.tiny_encoders import make_encoder
    from tests.support.tiny_llms import CONTEXT, make_model
    from tiny_align.align.data.datasets import load_dataset

    torch.set_num_threads(1)
    utterances = load_dataset(shipped("voice"))[:RECORDINGS]
    recordings = [utterance.load(SAMPLE_RATE) for utterance in utterances]
    sentences = [utterance.text for utterance in utterances]
    report = stamp(COMMAND) | {"encoders": {}, "llms": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_encoder(ENCODER, folder / "encoder")
        make_model(LLM, folder / "llm")
        with traced_once("llm_graph", "projector_graph"):
            for family in tqdm(encoders, desc="encoders"):
                make_encoder(family, folder / family)
                bundle = export(folder / family, folder / "llm", folder / "bundle", CONTEXT)
                row = encoder_row(family, folder / family, bundle, recordings)
                report["encoders"][family] = row
        with traced_once("encoder_graph", "projector_graph"):
            for family in tqdm(llms, desc="LLMs"):
                make_model(family, folder / family)
                bundle = export(folder / "encoder", folder / family, folder / "bundle", CONTEXT)
                report["llms"][family] = llm_row(family, folder / family, bundle, sentences)
    return report


def encoder_table(report: dict[str, Any]) -> str:
    """The encoders as the README's table."""
    rows = []
    for name, row in report["encoders"].items():
        rows.append([name, row["frames"], f"{row['max_abs_diff']:.1e}", f"{row['max_abs']:.1f}"])
    return grid(["encoder", "features compared", "largest difference", "largest value"], rows)


def llm_table(report: dict[str, Any]) -> str:
    """The LLMs as the README's table."""
    rows = []
    for name, row in report["llms"].items():
        cells = [name, f"{row['max_abs_diff']:.1e}"]
        for found in (row["embeddings"], row["text"]):
            cells.append(f"{found['equal']} of {found['tokens']}")
        rows.append(cells)
    head = ["LLM", "graph to PyTorch", "tokens equal, from embeddings", "from typed text"]
    return grid(head, rows)


def main(argv: list[str] | None = None) -> int:
    from tests.support.tiny_encoders import MAKERS
    from tests.support.tiny_llms import FAMILIES

    parser = new_parser(__doc__, RESULTS)
    parser.add_argument("--encoders", nargs="*", choices=MAKERS, default=list(MAKERS))
    parser.add_argument("--llms", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    args = parser.parse_args(argv)
    report = measure(args.encoders, args.llms)
    return finish(report, args, f"{encoder_table(report)}\n\n{llm_table(report)}")


if __name__ == "__main__":
    raise SystemExit(main())
