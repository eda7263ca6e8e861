"""Tiny random LLMs of every supported family, each with what is peculiar to it, and their answers by transformers.

Tokenizers are trained here; chat templates are our own, with the roles and the structure of the family's. The suite
holds the exported ones to these; benchmarks/studies/families.py makes the README's table.
"""

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

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

INSTRUCTION, ENDED_TEXT = "Repeat what the user says.", "what is the time"
WINDOW, CONTEXT, LONGROPE_CONTEXT = 16, 160, 120  # positions
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
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
NO_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SYSTEM_IN_USER = (
    "{{ bos_token }}{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
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
    "<|im_start|>system\n## Metadata\nReasoning Mode: {{ '/no_think' if enable_thinking is false else '/think' }}\n\n"
    "## Custom Instructions\n{{ messages[0]['content'].rstrip() if messages[0]['role'] == 'system' else '' }}\n\n"
    "<|im_end|>\n{% for m in messages if m['role'] != 'system' %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def _texts() -> list[str]:
    from tiny_align.reference import corpus

    return [*WORDS, *(text for s in corpus.sentences(150, 0) for text in (s.text, s.answer))]


def _trained(tokenizer: Tokenizer, special: list[str], size: int, alphabet: list[str]) -> Tokenizer:
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(_texts(), trainers.BpeTrainer(vocab_size=size, **options))
    return tokenizer


def _bytes_bpe() -> Tokenizer:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return _trained(tokenizer, [], 400, sorted(pre_tokenizers.ByteLevel.alphabet()))


def _model_of(tokenizer: Tokenizer) -> dict:
    """vocab and merges, as transformers' own tokenizer classes take them."""
    value = json.loads(tokenizer.to_str())["model"]
    return {"vocab": value["vocab"], "merges": [tuple(m) for m in value["merges"]]}


def fast(special: list[str], **names):
    """A tokenizer that is nothing but its tokenizer.json, as Llama 3's, SmolLM's and StableLM-2's."""
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=_bytes_bpe(), **names)
    tokenizer.add_tokens([AddedToken(t, special=True) for t in special])
    return tokenizer


def qwen(special: list[str], **names):
    tokenizer = transformers.Qwen2Tokenizer(**_model_of(_bytes_bpe()), **names)
    tokenizer.add_tokens(
        [AddedToken(t, special=not t.startswith(("<think", "</think"))) for t in special]
    )
    return tokenizer


def _pieces(special: list[str], pre_tokenizer) -> dict:
    """A sentencepiece-like vocabulary with byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if pre_tokenizer:
        tokenizer.pre_tokenizer = pre_tokenizer
    else:
        tokenizer.normalizer, tokenizer.pre_tokenizer = (
            normalizers.Replace(" ", "▁"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        )
    return _model_of(
        _trained(tokenizer, [*special, *(f"<0x{i:02X}>" for i in range(256))], 430, [])
    )


def gemma(special: list[str], **names):
    """No space before the first word, spaces and line breaks in the vocabulary."""
    tokenizer = transformers.GemmaTokenizer(
        **_pieces(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], None), **names
    )
    tokenizer.add_tokens([AddedToken(t, special=True) for t in special])
    return tokenizer


def metaspace(special: list[str], **names):
    """Llama 2's and Phi's: a space before the first word of a text, special tokens that swallow what follows."""
    pieces = _pieces(["<unk>", "<s>", "</s>"], pre_tokenizers.Metaspace())
    tokenizer = transformers.LlamaTokenizer(**pieces, **names)
    tokenizer.add_tokens([AddedToken(t, special=True, rstrip=True) for t in special])
    return tokenizer


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is made."""

    config: str  # class in transformers
    sizes: dict
    make_tokenizer: object
    special: tuple[str, ...]
    names: dict  # of the tokenizer's special tokens
    template: str
    ends: tuple[str, ...]  # listed in generation_config.json
    takes_system: bool = True
    also_ends: tuple[str, ...] = field(default=())  # known from the tokenizer and its template only


IM = ("<|im_start|>", "<|im_end|>")
TURN = ("<start_of_turn>", "<end_of_turn>")
END_OF_TEXT = {"eos_token": "<|endoftext|>"}
NEAR = {"sliding_window": WINDOW}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
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
}
LONGROPE |= {
    "long_factor": [4.0 + n for n in range(9)],
    "original_max_position_embeddings": LONGROPE_CONTEXT,
}
LONGROPE |= {"partial_rotary_factor": 0.75}
GEMMA3_ROPE = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
GEMMA3_ROPE |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
QUARTER = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
BOTH = {"layer_types": ["sliding_attention", "full_attention"]}

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
        {**NEAR, "use_sliding_window": True, "max_window_layers": 1, "tie_word_embeddings": True},
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
        {**NEAR, **BOTH, "head_dim": 16, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 5.0}
        | {"final_logit_softcapping": 3.0, "tie_word_embeddings": True},
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
        {**NEAR, **BOTH, "head_dim": 16, "query_pre_attn_scalar": 12, "rope_parameters": GEMMA3_ROPE}
        | {"tie_word_embeddings": True},
        gemma,
        TURN,
        {},
        SYSTEM_IN_USER,
        ("<eos>", "<end_of_turn>"),
    ),
    "phi3": Family(
        "Phi3Config",
        {**NEAR, "rope_parameters": LONGROPE, "original_max_position_embeddings": LONGROPE_CONTEXT},
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
        {**NEAR, "use_sliding_window": True, "no_rope_layer_interval": 2, "tie_word_embeddings": True},
        fast,
        (*IM, "<think>", "</think>"),
        {"eos_token": "<|im_end|>"},
        SMOLLM3,
        ("<|im_end|>",),
    ),
}  # fmt: skip


def make_model(name: str, folder: Path) -> None:
    """Two lively layers x 96 with weights that fit float16, a tokenizer and a chat template, in `folder`."""
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
    }
    sizes |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    sizes |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": ends, "pad_token_id": ends[0]}
    config = getattr(transformers, family.config)(
        **{**sizes, "initializer_range": 0.2, **family.sizes}
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    for value in model.parameters():
        value.data += 0.1 * torch.randn_like(value)  # norms and biases too
    if (scale := getattr(model.get_input_embeddings(), "embed_scale", 1.0)) != 1:
        model.get_input_embeddings().weight.data /= 3 * scale  # or it says its last token for ever
    model.half().float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _end_somewhere(name, folder, ends)


def typed(name: str, instruction: str, words: str) -> list[dict]:
    """The messages of a typed prompt, as the family takes them."""
    if not FAMILIES[name].takes_system:
        return [{"role": "user", "content": f"{instruction}\n\n{words}"}]
    return [{"role": "system", "content": instruction}, {"role": "user", "content": words}]


def _end_somewhere(name: str, folder: Path, ends: list[int]) -> None:
    """Among the end tokens goes one that the model says after a while in answer to ENDED_TEXT."""
    model = load_pretrained(transformers.AutoModelForCausalLM, folder).eval()
    tokenizer = load_pretrained(transformers.AutoTokenizer, folder)
    messages = typed(name, INSTRUCTION, ENDED_TEXT)
    options = {"enable_thinking": False, "return_dict": True, "return_tensors": "pt"}
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
    model.generation_config.eos_token_id = None
    said = model.generate(**prompt, do_sample=False, max_new_tokens=20)[
        0, prompt["input_ids"].shape[1] :
    ].tolist()
    model.generation_config.eos_token_id = [
        *ends,
        next(t for n, t in enumerate(said) if n > 5 and t not in said[:n]),
    ]
    model.generation_config.save_pretrained(folder)


@dataclass
class Beside:
    """A family's bundle, loaded, beside the model that it was made of."""

    name: str
    assistant: Assistant
    model: torch.nn.Module
    tokenizer: object
    also_ends: tuple[str, ...]

    @classmethod
    def load(cls, name: str, folder: Path, assistant: Assistant) -> "Beside":
        model = load_pretrained(
            transformers.AutoModelForCausalLM, folder, dtype=torch.float32
        ).eval()
        tokenizer = load_pretrained(transformers.AutoTokenizer, folder)
        return cls(name, assistant, model, tokenizer, FAMILIES[name].also_ends)

    @property
    def bundle(self) -> Bundle:
        return self.assistant.bundle

    def generate(self, **prompt) -> list[int]:
        """transformers' greedy answer, without the end token."""
        ends = [*(self.model.generation_config.eos_token_id or []), *self.ids(self.also_ends)]
        given = {
            "attention_mask": torch.ones(1, next(iter(prompt.values())).shape[1], dtype=torch.long),
            **prompt,
        }
        said = self.model.generate(
            **given,
            do_sample=False,
            max_new_tokens=N_TOKENS,
            eos_token_id=ends or None,
            pad_token_id=0,
        )[0]
        said = said[prompt["input_ids"].shape[1] if "input_ids" in prompt else 0 :].tolist()
        return said[:-1] if said[-1] in ends else said

    def ids(self, tokens) -> list[int]:
        return [self.tokenizer.convert_tokens_to_ids(token) for token in tokens]

    def prompt(self, n: int) -> np.ndarray:
        """(n, D) float32: embeddings of any tokens."""
        return self.assistant.llm.embed(
            np.random.default_rng(n).integers(0, len(self.tokenizer), n)
        )

    def template(self, text: str) -> torch.Tensor:
        """(1, T): a typed prompt."""
        options = {"enable_thinking": False, "return_dict": True, "return_tensors": "pt"}
        messages = typed(self.name, INSTRUCTION, text)
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)[
            "input_ids"
        ]

    @contextlib.contextmanager
    def endless(self):
        """While it lasts no token ends an answer, neither transformers' nor the runtime's."""
        llm, config = self.assistant.llm, self.model.generation_config
        before = llm.spec, config.eos_token_id, self.also_ends
        llm.spec, config.eos_token_id, self.also_ends = (
            dataclasses.replace(llm.spec, end_tokens=()),
            None,
            (),
        )
        try:
            yield
        finally:
            llm.spec, config.eos_token_id, self.also_ends = before
