"""`tiny-align export --llm` for every supported family: what the runtime says is what transformers says, token by token.

Each family's tiny model (llm_families.py) is exported once, through the command, in FP32. The reference is
transformers' own `generate` on the saved folder, with its own sliding caches; the runtime's cache is whole.
"""

import contextlib
import dataclasses
import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from tiny_align.runtime import Assistant, Decoding
from tiny_align.runtime.backend import load_runner
from tiny_align.runtime.cli import main

torch = pytest.importorskip("torch", reason="models are exported from torch")
transformers = pytest.importorskip("transformers", reason="models are exported from transformers")
onnx = pytest.importorskip("onnx", reason="exported graphs are read with onnx")

from llm_families import CONTEXT, FAMILIES, LONGROPE_CONTEXT, WINDOW, make_model  # noqa: E402 - needs the packages
from test_export import make_encoder  # noqa: E402

from tiny_align.export.llms import LLMS, load_llm  # noqa: E402
from tiny_align.export.parity import TOLERANCE  # noqa: E402
from tiny_align.export.prompts import prompt_spec  # noqa: E402

INSTRUCTION, TEXTS = "Repeat what the user says.", ("what is the time", "Call my mother", "  two three four ")
N_TOKENS = 40
ALL_TOKENS = Decoding(max_tokens=N_TOKENS, loop_tokens=0)
INT4_LAYERS = 2  # of the models
SLIDING = [name for name, family in FAMILIES.items() if "sliding_window" in family.sizes]


@dataclasses.dataclass
class Exported:
    """A family's bundle, loaded, beside the model that it was made of."""

    folder: Path
    assistant: Assistant
    llm: object
    tokenizer: object

    @property
    def manifest(self):
        return self.assistant.bundle.manifest

    def said(self, decoding: Decoding = ALL_TOKENS, **prompt) -> list[int]:
        """transformers' greedy answer, without the end token."""
        ends = list(self.manifest.llm.end_tokens)
        given = {"attention_mask": torch.ones(next(iter(prompt.values())).shape[:2], dtype=torch.long), **prompt}
        out = self.llm.generate(
            **given, do_sample=False, max_new_tokens=decoding.max_tokens, eos_token_id=ends, pad_token_id=ends[0]
        )
        tokens = out[0, prompt["input_ids"].shape[1] if "input_ids" in prompt else 0 :].tolist()
        return tokens[:-1] if tokens[-1] in ends else tokens


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    make_encoder(folder := tmp_path_factory.mktemp("encoder"))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param, folder / "llm")
    call = ["export", "--encoder", encoder, "--llm", folder / "llm", "--out", folder / "out", "--json"]
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([str(a) for a in (*call, "--precision", "fp32", "--max-context", CONTEXT)]) == 0
    llm = transformers.AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "llm")
    with Assistant.load(folder / "out", threads=1) as assistant:
        yield Exported(folder, assistant, llm, tokenizer)
    shutil.rmtree(folder)


def family_of(request):
    return FAMILIES[request.node.callspec.params["exported"]]


@contextlib.contextmanager
def without_end(exported):
    """No token ends an answer, neither in the runtime nor in the manifest that the reference reads."""
    kept = exported.assistant.llm.spec
    exported.assistant.llm.spec = dataclasses.replace(kept, end_tokens=())
    yield
    exported.assistant.llm.spec = kept


def ids_of(exported, n: int) -> list[int]:
    return np.random.default_rng(n).integers(0, len(exported.tokenizer), n).tolist()


def test_embeddings_are_what_the_model_looks_up(exported):
    ids = ids_of(exported, 50)
    with torch.no_grad():
        wanted = exported.llm.get_input_embeddings()(torch.tensor(ids)).numpy()
    np.testing.assert_array_equal(exported.assistant.llm.embed(ids), wanted)


@pytest.mark.parametrize("n_prompt", [3, 3 * WINDOW])
def test_generation_from_embeddings_is_transformers_own(exported, n_prompt):
    prompt = exported.assistant.llm.embed(ids_of(exported, n_prompt))
    got = list(exported.assistant.llm.generate(prompt, ALL_TOKENS))
    assert got == exported.said(inputs_embeds=torch.from_numpy(prompt)[None])
