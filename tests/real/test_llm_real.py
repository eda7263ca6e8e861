"""SmolLM2, exported in FP32, stays itself: it answers as transformers does, and in words.

Its parity figures are those of a right graph; a graph of it with one thing wrong is refused.
"""

import os
import subprocess
import sys
from datetime import datetime

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models run in torch")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")

from tests.support.damaged_graphs import DAMAGES, damage  # noqa: E402 - needs the packages above
from tiny_align.export import parity  # noqa: E402
from tiny_align.export.llms import load_llm  # noqa: E402
from tiny_align.runtime import Assistant, Decoding  # noqa: E402
from tiny_align.runtime.backends.registry import load_decoder, load_runner  # noqa: E402
from tiny_align.runtime.bundle.bundle import Bundle  # noqa: E402
from tiny_align.runtime.errors import TinyAlignError  # noqa: E402

pytestmark = pytest.mark.real
N_TOKENS = 24
NEAR_TIE = 1e-3  # of the logits' standard deviation
LENGTHS = ((24, 0), (9, 40))  # (tokens, past) at which damaged graphs are compared
PROMPTS = (
    "What is the capital of France?",
    "What is the capital of Japan?",
    "How many days are in a week?",
    "How many legs does a spider have?",
    "What color is the sky?",
    "Name three fruits.",
    "Name two animals that live in the sea.",
    "What do bees make?",
    "Who wrote Romeo and Juliet?",
    "What is two plus two?",
    "What is ten minus three?",
    "Write a short poem about rain.",
    "Tell me a joke.",
    "Tell me a story about a cat.",
    "How do I boil an egg?",
    "How do I make a cup of tea?",
    "What should I cook for dinner?",
    "Give me a recipe for pancakes.",
    "Why is the sea salty?",
    "Why do leaves fall in autumn?",
    "What is the largest planet?",
    "What is the moon?",
    "How far away is the sun?",
    "What is water made of?",
    "Explain gravity to a child.",
    "What is a computer?",
    "What is the internet?",
    "Translate good morning into Spanish.",
    "How do you say thank you in French?",
    "Write a birthday wish for my sister.",
    "Write a message to my boss that I am ill.",
    "Suggest a name for a dog.",
    "I am sad today.",
    "I cannot sleep.",
    "I am bored, what can I do?",
    "Remind me to call my mother.",
    "Turn on the light in the kitchen.",
    "Set an alarm for seven o'clock.",
    "What is the weather like?",
    "Good morning!",
    "Hello, who are you?",
    "What can you do?",
    "Thank you for your help.",
    "What is the opposite of hot?",
    "Spell the word apple.",
    "List the colors of the rainbow.",
    "Which month comes after May?",
    "What is a good gift for a child?",
    "How can I learn to swim?",
    "What should I pack for a trip to the beach?",
)


@pytest.fixture(scope="module")
def smollm2(pretrained_model):
    """The model in PyTorch, FP32, and its tokenizer."""
    return load_llm(str(pretrained_model("smollm2-135m-instruct")))


def test_every_graph_is_far_below_the_bound(smollm2_fp32):
    _, document = smollm2_fp32
    for name, graph in document["graphs"].items():
        figures = graph["parity"]["max_diff_over_std"]
        assert max(figures.values()) < parity.TOLERANCE / 5, (name, figures)
        assert graph["precision"] == "fp32" and graph["tensorrt_violations"] == {}
    assert document["context"] == 2048
    assert document["cache_bytes_per_position"] == 2 * 30 * 3 * 64 * 4


def test_chat_names_the_capital_of_france(smollm2_fp32):
    folder, _ = smollm2_fp32
    line = [sys.executable, "-m", "tiny_align.runtime.commands.cli", "chat", "--bundle"]
    done = subprocess.run(
        [*line, str(folder)],
        input="What is the capital of France?\nAnd of Italy?\n",
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "The capital of France is Paris."
    assert "Rome" in done.stdout.splitlines()[1]


def logits_of(model, ids: list[int]) -> np.ndarray:
    """(T, V): transformers' logits after each of the tokens."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def differing(model, end_tokens, prompt: list[int], answer: list[int]) -> list[tuple[int, float]]:
    """Where an answer is not transformers' greedy one: its position, and how near a tie it was.

    That is the distance of transformers' two logits in standard deviations. Where there is none,
    transformers writes the same answer, token by token.
    """
    logits = logits_of(model, [*prompt, *answer])[len(prompt) - 1 :]
    found = []
    for position, token in enumerate(answer):
        best = int(logits[position].argmax())
        if token != best:
            gap = logits[position][best] - logits[position][token]
            found.append((position, float(gap / logits[position].std())))
    if len(answer) < N_TOKENS and int(logits[len(answer)].argmax()) not in end_tokens:
        found.append((len(answer), float("inf")))  # it ended, transformers does not
    return found


def test_greedy_answers_to_50_prompts_equal_transformers(smollm2_fp32, smollm2):
    model, tokenizer = smollm2
    decoding = Decoding(max_tokens=N_TOKENS, loop_tokens=0)
    ties = []
    with Assistant.load(smollm2_fp32[0], threads=1) as assistant:
        ends = assistant.llm.spec.end_tokens
        for words in PROMPTS:
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": words}], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            answer = list(assistant.answer_text(words, decoding=decoding).tokens)
            for position, gap in differing(model, ends, prompt, answer):
                ties.append((words, position, gap))
    print(f"{len(PROMPTS)} prompts, different tokens (prompt, position, gap): {ties}")
    assert len(set(PROMPTS)) == 50
    assert all(gap < NEAR_TIE for _, _, gap in ties), ties


def test_a_wrong_answer_is_found(smollm2):
    model, tokenizer = smollm2
    prompt = tokenizer("The capital of France is").input_ids
    right = int(logits_of(model, prompt)[-1].argmax())
    assert differing(model, (), prompt, [right] * N_TOKENS)[0][0] > 0
    ((position, gap),) = differing(model, (), prompt, [right])
    assert (position, gap) == (1, float("inf"))
    assert differing(model, (), prompt, [right + 1] * N_TOKENS)[0][1] > NEAR_TIE


def test_the_prompt_is_the_models_own(smollm2_fp32, smollm2):
    _, tokenizer = smollm2
    prompt = Bundle.open(smollm2_fp32[0], verify=False).manifest.prompt
    assert prompt.instruction == ""
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert own in prompt.lead("")
    today = prompt.on(datetime.now())
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], add_generation_prompt=True, tokenize=False
    )
    assert f"{today.lead('')}Hello{today.after}" == rendered


# --- wrong graphs ---


@pytest.fixture(scope="module")
def prompts(smollm2):
    return parity.llm_prompts(smollm2[0], lengths=LENGTHS)


@pytest.fixture(scope="module", params=["standard", "onnxruntime"])
def graph(request, smollm2_fp32, tmp_path_factory):
    """A graph's file, beside hard links to its weights, and its specification."""
    bundle = Bundle.open(smollm2_fp32[0], verify=False)
    folder = tmp_path_factory.mktemp("graph")
    for path in bundle.path.glob("llm.*"):
        os.link(path, folder / path.name)
    spec = bundle.manifest.graphs["llm"].on(None if request.param == "standard" else request.param)
    return folder / spec.file, spec


def compare(path, spec, prompts) -> parity.Differences:
    if path.name.endswith("llm.ort.onnx"):
        with load_decoder(path, spec, "onnxruntime", 1) as decoder:
            return parity.decoder_parity(decoder, prompts)
    with load_runner(path, spec, "onnxruntime", 1) as runner:
        return parity.llm_parity(runner, prompts)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_graph_is_refused(graph, prompts, name):
    path, spec = graph
    differences = compare(damage(path, name), spec, prompts)
    print(name, path.name, differences.relative, differences.outputs)
    with pytest.raises(TinyAlignError, match=r"differs from PyTorch by .* standard deviations of"):
        parity.check("llm", differences)
    assert max(differences.relative.values()) > 10 * parity.TOLERANCE
