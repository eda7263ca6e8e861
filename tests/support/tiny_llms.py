"""Tiny random LLMs of every family, each with what is peculiar to it; answers by transformers.

Tokenizers are trained here; chat templates are our own, with the roles and the structure of the
family's. The suite compares the exported ones with these; benchmarks/studies/families.py makes the
README's table of them.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tiny_align.export.pretrained import load_pretrained
from tiny_align.runtime.assistant import Assistant
from tiny_align.runtime.bundle.bundle import Bundle

INSTRUCTION = "Repeat what the user says."
ENDED_TEXT = "what is the time"  # a text whose answer ends by an end token
WINDOW = 16  # positions of a sliding window
CONTEXT = 160  # positions
LONGROPE_CONTEXT = 120  # positions
N_TOKENS = 40  # of an answer
WORDS = (
    "Answer the user.",
    "Repeat what the user says.",
    "what is the time",
    "Call my mother",
    "two three four",
)

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SYSTEM_IN_USER = (
    "{{ bos_token }}"
    "{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ first if loop.first else '' }}{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
SMOLLM3 = (
    "<|im_start|>system\n## Metadata\n"
    "Reasoning Mode: {{ '/no_think' if enable_thinking is false else '/think' }}\n\n"
    "## Custom Instructions\n"
    "{{ messages[0]['content'].rstrip() if messages[0]['role'] == 'system' else '' }}\n\n"
    "<|im_end|>\n{% for m in messages if m['role'] != 'system' %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


HfTokenizer = transformers.PreTrainedTokenizerBase


def training_texts() -> list[str]:
    from tiny_align.reference import corpus

    texts = [*WORDS]
    for sentence in corpus.sentences(150, 0):
        texts += [sentence.text, sentence.answer]
    return texts


def train_bpe(
    tokenizer: Tokenizer, special: list[str], size: int, alphabet: list[str]
) -> Tokenizer:
    """Train in place; returns the tokenizer."""
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return tokenizer


def byte_level_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return train_bpe(tokenizer, [], 400, sorted(pre_tokenizers.ByteLevel.alphabet()))


def vocab_and_merges(tokenizer: Tokenizer) -> dict[str, Any]:
    """As transformers' own tokenizer classes take them."""
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def fast(special: list[str], **names: str) -> HfTokenizer:
    """A tokenizer that is just its tokenizer.json, as Llama 3's, SmolLM's and StableLM-2's."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(), **names)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def qwen(special: list[str], **names: str) -> HfTokenizer:
    tokenizer = transformers.Qwen2Tokenizer(**vocab_and_merges(byte_level_bpe()), **names)
    for token in special:
        is_special = not token.startswith(("<think", "</think"))
        tokenizer.add_tokens([AddedToken(token, special=is_special)])
    return tokenizer


def sentence_pieces(
    special: list[str],
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
) -> dict[str, Any]:
    """A sentencepiece-like vocabulary with byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer:
        tokenizer.normalizer = normalizer
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    return vocab_and_merges(train_bpe(tokenizer, [*special, *byte_tokens], 430, []))


def gemma(special: list[str], **names: str) -> HfTokenizer:
    """No space before the first word, spaces and line breaks in the vocabulary."""
    pieces = sentence_pieces(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"],
        pre_tokenizers.Split("▁", "merged_with_next"),
        normalizers.Replace(" ", "▁"),
    )
    tokenizer = transformers.GemmaTokenizer(**pieces, **names)
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def metaspace(special: list[str], **names: str) -> HfTokenizer:
    """Llama 2's and Phi's: a space before a text's first word; special tokens swallow the next."""
    pieces = sentence_pieces(["<unk>", "<s>", "</s>"], pre_tokenizers.Metaspace())
    tokenizer = transformers.LlamaTokenizer(**pieces, **names)
    tokenizer.add_tokens([AddedToken(token, special=True, rstrip=True) for token in special])
    return tokenizer


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is made."""

    config: str  # class in transformers
    sizes: dict[str, Any]  # and other fields of the configuration
    make_tokenizer: Callable[..., HfTokenizer]
    special: tuple[str, ...]  # tokens
    names: dict[str, str]  # of the tokenizer's special tokens
    template: str
    ends: tuple[str, ...]  # listed in generation_config.json
    takes_system: bool = True
    also_ends: tuple[str, ...] = field(default=())  # known from the tokenizer and its template only


IM = ("<|im_start|>", "<|im_end|>")
TURN = ("<start_of_turn>", "<end_of_turn>")
END_OF_TEXT = {"eos_token": "<|endoftext|>"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 40,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1 + 0.1 * n for n in range(9)],
    "long_factor": [4.0 + n for n in range(9)],
    "original_max_position_embeddings": LONGROPE_CONTEXT,
    "partial_rotary_factor": 0.75,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
QUARTER = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}

FAMILIES = {
    "llama": Family(
        "LlamaConfig",
        {"rope_parameters": LLAMA3_ROPE, "head_dim": 16},
        fast,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        LLAMA3,
        ("<|eom_id|>", "<|eot_id|>"),
    ),
    "smollm2": Family(
        "LlamaConfig",
        {"tie_word_embeddings": True, "rope_parameters": DYNAMIC},
        fast,
        IM,
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        CHATML,
        ("<|im_end|>",),
    ),
    "qwen2": Family(
        "Qwen2Config",
        {
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        qwen,
        IM,
        END_OF_TEXT,
        CHATML,
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen3": Family(
        "Qwen3Config",
        {"rope_parameters": YARN, "head_dim": 16},
        qwen,
        (*IM, "<think>", "</think>"),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        THINKING,
        ("<|endoftext|>",),
        also_ends=("<|im_end|>",),
    ),
    "gemma2": Family(
        "Gemma2Config",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
        gemma,
        TURN,
        {},
        NO_SYSTEM,
        ("<eos>",),
        takes_system=False,
        also_ends=("<end_of_turn>",),
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "head_dim": 16,
            "query_pre_attn_scalar": 12,
            "rope_parameters": GEMMA3_ROPE,
            "tie_word_embeddings": True,
        },
        gemma,
        TURN,
        {},
        SYSTEM_IN_USER,
        ("<eos>", "<end_of_turn>"),
    ),
    "phi3": Family(
        "Phi3Config",
        {
            "sliding_window": WINDOW,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": LONGROPE_CONTEXT,
        },
        metaspace,
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        END_OF_TEXT,
        PHI,
        ("<|endoftext|>", "<|end|>"),
    ),
    "stablelm": Family(
        "StableLmConfig",
        {"use_qkv_bias": True, "qk_layernorm": True, "rope_parameters": QUARTER},
        fast,
        IM,
        END_OF_TEXT,
        CHATML,
        ("<|endoftext|>",),
        also_ends=("<|im_end|>",),
    ),
    "smollm3": Family(
        "SmolLM3Config",
        {
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "no_rope_layer_interval": 2,
            "tie_word_embeddings": True,
        },
        fast,
        (*IM, "<think>", "</think>"),
        {"eos_token": "<|im_end|>"},
        SMOLLM3,
        ("<|im_end|>",),
    ),
}


def make_model(name: str, folder: Path, **other_sizes: Any) -> None:
    """Two layers of size 96, random weights that fit float16, tokenizer and chat template."""
    torch.manual_seed(0)
    family = FAMILIES[name]
    tokenizer = family.make_tokenizer(list(family.special), **family.names)
    tokenizer.chat_template = family.template
    ends = [tokenizer.convert_tokens_to_ids(end) for end in family.ends]
    sizes = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends,
        "pad_token_id": ends[0],
        "initializer_range": 0.2,
    }
    config = getattr(transformers, family.config)(**(sizes | family.sizes | other_sizes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    for value in model.parameters():
        value.data += 0.1 * torch.randn_like(value)  # norms and biases too
    embeddings = model.get_input_embeddings()
    scale = getattr(embeddings, "embed_scale", 1.0)
    if scale != 1:
        embeddings.weight.data /= 3 * scale  # or it repeats its last token for ever
    model.half().float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _add_end_token(name, folder, ends)


def typed(name: str, instruction: str, words: str) -> list[dict]:
    """The messages of a typed prompt, as the family takes them."""
    if not FAMILIES[name].takes_system:
        return [{"role": "user", "content": f"{instruction}\n\n{words}"}]
    return [{"role": "system", "content": instruction}, {"role": "user", "content": words}]


def typed_prompt(tokenizer: HfTokenizer, name: str, text: str) -> dict[str, torch.Tensor]:
    """What the model takes of a typed text: token ids (1, T) and their mask."""
    return tokenizer.apply_chat_template(
        typed(name, INSTRUCTION, text),
        add_generation_prompt=True,
        enable_thinking=False,
        return_dict=True,
        return_tensors="pt",
    )


def _add_end_token(name: str, folder: Path, ends: list[int]) -> None:
    """Make an end token of one that the model gives after a while in answer to ENDED_TEXT."""
    model = load_pretrained(transformers.AutoModelForCausalLM, folder).eval()
    tokenizer = load_pretrained(transformers.AutoTokenizer, folder)
    prompt = typed_prompt(tokenizer, name, ENDED_TEXT)
    model.generation_config.eos_token_id = None
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=20)
    answer = tokens[0, prompt["input_ids"].shape[1] :].tolist()
    for n in range(6, len(answer)):
        if answer[n] not in answer[:n]:
            break
    else:
        raise ValueError(f"{name} repeats itself: {answer}")
    model.generation_config.eos_token_id = [*ends, answer[n]]
    model.generation_config.save_pretrained(folder)


@dataclass
class ModelPair:
    """A family's bundle, loaded, and the model that it was made of."""

    name: str
    assistant: Assistant
    model: torch.nn.Module
    tokenizer: HfTokenizer
    also_ends: tuple[str, ...]

    @classmethod
    def load(cls, name: str, folder: Path, assistant: Assistant) -> "ModelPair":
        auto_model = transformers.AutoModelForCausalLM
        model = load_pretrained(auto_model, folder, dtype=torch.float32).eval()
        tokenizer = load_pretrained(transformers.AutoTokenizer, folder)
        return cls(name, assistant, model, tokenizer, FAMILIES[name].also_ends)

    @property
    def bundle(self) -> Bundle:
        return self.assistant.bundle

    def generate(self, **prompt: torch.Tensor) -> list[int]:
        """transformers' greedy answer to `input_ids` or `inputs_embeds`, without the end token."""
        ends = [*(self.model.generation_config.eos_token_id or []), *self.ids(self.also_ends)]
        n_prompt = next(iter(prompt.values())).shape[1]
        tokens = self.model.generate(
            attention_mask=torch.ones(1, n_prompt, dtype=torch.long),
            **prompt,
            do_sample=False,
            max_new_tokens=N_TOKENS,
            eos_token_id=ends or None,
            pad_token_id=0,
        )[0]
        if "input_ids" in prompt:  # which come before the answer
            tokens = tokens[n_prompt:]
        answer = tokens.tolist()
        return answer[:-1] if answer[-1] in ends else answer

    def ids(self, tokens: tuple[str, ...]) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(token) for token in tokens]

    def prompt(self, n: int) -> np.ndarray:
        """(n, D) float32: embeddings of random tokens."""
        ids = np.random.default_rng(n).integers(0, len(self.tokenizer), n)
        return self.assistant.llm.embed(ids)

    def template(self, text: str) -> torch.Tensor:
        """(1, T): a typed prompt."""
        return typed_prompt(self.tokenizer, self.name, text)["input_ids"]

    @contextlib.contextmanager
    def endless(self) -> Iterator[None]:
        """Within it no token ends an answer, neither transformers' nor the runtime's."""
        llm = self.assistant.llm
        config = self.model.generation_config
        spec = llm.spec
        eos_token_id = config.eos_token_id
        also_ends = self.also_ends
        llm.spec = dataclasses.replace(spec, end_tokens=())
        config.eos_token_id = None
        self.also_ends = ()
        try:
            yield
        finally:
            llm.spec = spec
            config.eos_token_id = eos_token_id
            self.also_ends = also_ends
