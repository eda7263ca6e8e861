"""The checkpoints of `make pretrained` are the models whose names they bear."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models run in torch")
transformers = pytest.importorskip("transformers", reason="the models are transformers'")

from tiny_align.align.evaluation.word_errors import error_rates  # noqa: E402
from tiny_align.export.pretrained import load_pretrained, load_whole  # noqa: E402
from tiny_align.runtime.audio.samples import read_audio  # noqa: E402

pytestmark = pytest.mark.real
SAMPLE_RATE = 16_000
RECORDINGS = {  # shipped, of a synthetic child's voice
    "train-001.flac": "i need to cook the bread for one minute",
    "train-003.flac": "play quiet music in the office",
}


def next_tokens(folder, kind, ids: torch.Tensor, n: int) -> torch.Tensor:
    """The `n` tokens that a model writes after a prompt, greedily."""
    model = load_whole(kind, folder, dtype=torch.float32)
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=n, do_sample=False)
    return written[0, ids.shape[1] :]


def transcribe(model, processor, samples: np.ndarray, **options) -> str:
    inputs = processor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**inputs, **options)
    return processor.batch_decode(ids, skip_special_tokens=True)[0]


def test_smollm2_names_the_capital_of_france(pretrained_model):
    folder = pretrained_model("smollm2-135m-instruct")
    tokenizer = load_pretrained(transformers.AutoTokenizer, folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = next_tokens(folder, transformers.LlamaForCausalLM, prompt["input_ids"], 12)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The capital of France is Paris."
    assert (folder / "SmolLM2-135M-Instruct.Q4_1.gguf").is_file()


def test_gemma_knows_what_paris_is_the_capital_of(pretrained_model):
    folder = pretrained_model("gemma-3-270m")
    tokenizer = load_pretrained(transformers.AutoTokenizer, folder)
    ids = tokenizer("Paris is the capital of", return_tensors="pt").input_ids
    following = next_tokens(folder, transformers.Gemma3ForCausalLM, ids, 1)
    assert tokenizer.decode(following) == " France"


def test_moonshines_features_are_those_of_its_ort_file(pretrained_model, voice_path):
    """Its activations are INT8 there: the features agree by direction, frame by frame."""
    import onnxruntime

    folder = pretrained_model("moonshine-tiny")
    samples = read_audio(voice_path / "train-001.flac", SAMPLE_RATE)[None]  # (1, S)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        folder / "encoder_model.ort", options, providers=["CPUExecutionProvider"]
    )
    inputs = {"input_values": samples, "attention_mask": np.ones(samples.shape, np.int64)}
    expected = torch.from_numpy(session.run(None, inputs)[0])  # (1, N, Da)
    kind = transformers.MoonshineForConditionalGeneration
    model = load_whole(kind, folder, dtype=torch.float32)
    with torch.no_grad():
        features = model.model.encoder(torch.from_numpy(samples)).last_hidden_state
    cosine = torch.nn.functional.cosine_similarity(features, expected, dim=-1)
    assert features.shape == expected.shape
    assert cosine.mean() >= 0.99 and cosine.min() >= 0.97, (cosine.mean(), cosine.min())


@pytest.mark.parametrize("name", ["moonshine-tiny", "whisper-base"])
def test_a_recogniser_transcribes_shipped_recordings(pretrained_model, voice_path, name):
    folder = pretrained_model(name)
    processor = load_pretrained(transformers.AutoProcessor, folder)
    if name == "moonshine-tiny":
        kind = transformers.MoonshineForConditionalGeneration
        options = {}
    else:
        kind = transformers.WhisperForConditionalGeneration
        options = {"language": "en", "task": "transcribe"}
    model = load_whole(kind, folder, dtype=torch.float32)
    written = []
    for file in RECORDINGS:
        samples = read_audio(voice_path / file, SAMPLE_RATE)
        written.append(transcribe(model, processor, samples, **options))
    word_errors, _ = error_rates(list(RECORDINGS.values()), written)
    assert word_errors == 0, written
