"""Every family of encoders and LLMs that `tiny-align export` takes, beside transformers: features and greedy answers.

    python -m benchmarks.studies.families [--json]

Each is a tiny random model (tiny_encoders.py, tiny_llms.py), exported in FP32 as the command does and run by the
runtime on the shipped recordings and on prompts of several lengths. Writes benchmarks/results/families.json; the last
line of stdout is the same document.
"""

import argparse
import contextlib
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tiny_align.benchmarks import finish
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.shipped import shipped
from tiny_align.runtime.llm import Decoding
from tiny_align.runtime.machine import describe

RESULTS = Path(__file__).parents[1] / "results" / "families.json"
COMMAND = "python -m benchmarks.studies.families"
RECORDINGS = 4
PROMPTS = (1, 3, 8, 15, 16, 17, 32, 48, 96)  # embeddings; a window of tiny_llms.py is 16
WITH_ENCODER, WITH_LLM = "parakeet", "smollm2"  # what the others are exported beside


@contextlib.contextmanager
def traced_once(*names: str):
    """While it lasts, the named functions of export/bundle.py trace the first module only.

    Its graph serves every later one: they must be equal, and each bundle's parity check holds that.
    """
    from unittest import mock

    from tiny_align.export import bundle

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(bundle, name, _once(getattr(bundle, name))))
        yield


def _once(trace):
    graphs = []

    def traced(module):
        graphs.append(graphs[0] if graphs else trace(module))
        return graphs[0]

    return traced


def export(encoder: Path, llm: Path, out: Path, max_context: int) -> Path:
    from tiny_align.export.bundle import ExportOptions, export_bundle

    options = ExportOptions(
        str(encoder), str(llm), precision="fp32", encoder_layers=(1, -1), max_context=max_context
    )
    with contextlib.redirect_stdout(sys.stderr):  # the exporter's own progress
        export_bundle(options, out)
    return out


def encoder_row(family: str, folder: Path, bundle: Path, recordings: list[np.ndarray]) -> dict:
    """The largest difference between the runtime's features and transformers'."""
    from tests.support.tiny_encoders import features

    worst, largest, n_frames = 0.0, 0.0, 0
    with Assistant.load(bundle, threads=1) as assistant:
        for audio in recordings:
            ours, theirs = assistant.encode_window(audio), features(family, folder, audio)
            worst, largest = (
                max(worst, float(np.abs(ours - theirs).max())),
                max(largest, float(np.abs(theirs).max())),
            )
            n_frames += len(theirs)
    return {"max_abs_diff": worst, "max_abs": largest, "frames": n_frames}


def llm_row(family: str, folder: Path, bundle: Path, sentences: list[str]) -> dict:
    """How many tokens of the runtime's greedy answers are those of `generate`, end tokens left out of both."""
    import torch

    from tests.support.tiny_llms import INSTRUCTION, N_TOKENS, Beside

    decoding, pairs = Decoding(max_tokens=N_TOKENS, loop_tokens=0), {"embeddings": [], "text": []}
    with Assistant.load(bundle, threads=1) as assistant:
        both = Beside.load(family, folder, assistant)
        parity = assistant.bundle.manifest.graphs["llm"].parity["max_abs_diff_to_pytorch"]
        with both.endless():
            for n in (n for n in PROMPTS if n + N_TOKENS <= assistant.llm.spec.max_context):
                prompt = both.prompt(n)
                theirs = both.generate(inputs_embeds=torch.from_numpy(prompt)[None])
                pairs["embeddings"].append((list(assistant.llm.generate(prompt, decoding)), theirs))
            for text in sentences:
                ours = assistant.answer_text(text, INSTRUCTION, decoding).tokens
                pairs["text"].append((list(ours), both.generate(input_ids=both.template(text))))
    return {"max_abs_diff": max(parity.values())} | {
        name: _agreement(said) for name, said in pairs.items()
    }


def _agreement(pairs: list[tuple[list[int], list[int]]]) -> dict:
    """Tokens compared, and those equal up to the first that is not, over pairs of answers."""
    equal = [
        next((i for i, (a, b) in enumerate(zip(*p)) if a != b), min(map(len, p))) for p in pairs
    ]
    return {
        "answers": len(pairs),
        "tokens": sum(max(map(len, p)) for p in pairs),
        "equal": sum(equal),
    }


def measure(encoders: list[str], llms: list[str]) -> dict:
    import torch

    from tests.support.tiny_encoders import make_encoder
    from tests.support.tiny_llms import CONTEXT, make_model
    from tiny_align.align.data.datasets import load_dataset

    torch.set_num_threads(1)
    spoken = load_dataset(shipped("voice"))[:RECORDINGS]
    recordings, sentences = [u.load(16_000) for u in spoken], [u.text for u in spoken]
    report = {
        "machine": describe(),
        "date": str(date.today()),
        "command": COMMAND,
        "encoders": {},
        "llms": {},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_encoder(WITH_ENCODER, folder / "encoder")
        make_model(WITH_LLM, folder / "llm")
        with traced_once("llm_graph", "projector_graph"):
            for family in tqdm(encoders, desc="encoders"):
                made = make_encoder(family, folder / family)
                bundle = export(made, folder / "llm", folder / "bundle", CONTEXT)
                report["encoders"][family] = encoder_row(family, made, bundle, recordings)
        with traced_once("encoder_graph", "projector_graph"):
            for family in tqdm(llms, desc="LLMs"):
                make_model(family, folder / family)
                bundle = export(folder / "encoder", folder / family, folder / "bundle", CONTEXT)
                report["llms"][family] = llm_row(family, folder / family, bundle, sentences)
    return report


def encoder_table(report: dict) -> str:
    """The encoders as the README's table."""
    lines = [
        "| encoder | features compared | largest difference | largest value |",
        "|---|---|---|---|",
    ]
    for name, row in report["encoders"].items():
        lines.append(
            f"| {name} | {row['frames']} | {row['max_abs_diff']:.1e} | {row['max_abs']:.1f} |"
        )
    return "\n".join(lines)


def llm_table(report: dict) -> str:
    """The LLMs as the README's table."""
    lines = [
        "| LLM | graph to PyTorch | tokens equal, from embeddings | from typed text |",
        "|---|---|---|---|",
    ]
    for name, row in report["llms"].items():
        cells = (f"{row[way]['equal']} of {row[way]['tokens']}" for way in ("embeddings", "text"))
        lines.append(f"| {name} | {row['max_abs_diff']:.1e} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None) -> int:
    from tests.support import tiny_encoders, tiny_llms

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--encoders", nargs="*", choices=tiny_encoders.MAKERS, default=list(tiny_encoders.MAKERS)
    )
    parser.add_argument(
        "--llms", nargs="*", choices=tiny_llms.FAMILIES, default=list(tiny_llms.FAMILIES)
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    report = measure(args.encoders, args.llms)
    return finish(report, args, f"{encoder_table(report)}\n\n{llm_table(report)}")


if __name__ == "__main__":
    raise SystemExit(main())
