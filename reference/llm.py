"""Trains the reference LLM: a 2 M parameter Llama with a BPE tokenizer of its own, on the corpus.

It learns to answer or to repeat, as the instruction says. In a part of its training the user's
words come as soft tokens would: stretched over more positions, blended at the seams and noisy, so
that it accepts speech it was never trained with. In the last third its weights are rounded to INT4
blocks in the forward pass (straight-through), so that quantising for the bundle costs nothing. A
last phase with fewer stretched rows keeps it exact on typed words: "two two" must not be taken for
a stretched "two".

    python -m tiny_align.reference.llm --work work --out reference/weights/llm
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

from tqdm import tqdm

from tiny_align.export.pretrained import load_pretrained
from tiny_align.reference import corpus

VOCABULARY = 800
SPECIAL = ("<unk>", "<bos>", "<eos>", "<user>", "<assistant>")
CHAT_TEMPLATE = (  # one turn: it was trained on no more
    "<bos>{% if messages | selectattr('role', 'equalto', 'user') | list | length > 1 %}"
    "{{ raise_exception('this model answers one turn') }}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<user>{{ m['content'] }}<assistant>"
    "{% else %}{{ m['content'] }}<eos>{% endif %}{% endfor %}"
)
IGNORE = -100
INT4_BLOCK = 32
STRETCHED = 0.4  # share of rows whose words come stretched


def build_tokenizer():
    """Word-piece-like BPE over the corpus; characters it never saw become <unk>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    drawn = corpus.sentences(40_000, 0, unique=False)
    texts = [t for s in drawn for t in (s.text, s.answer)]
    texts += [
        i for i in corpus.ANSWER_INSTRUCTIONS + corpus.REPEAT_INSTRUCTIONS for _ in range(300)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def load_tokenizer(path: Path):
    """The tokenizer that an interrupted training began with."""
    from transformers import AutoTokenizer

    return load_pretrained(AutoTokenizer, path)


def build_model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Example:
    """One training row as token ids.

    Before the user's words, the words, after them, and the output.
    """

    def __init__(self, encode, sentence: corpus.Sentence, rng: random.Random):
        repeat = rng.random() < 0.3
        instruction = rng.choice(
            corpus.REPEAT_INSTRUCTIONS if repeat else corpus.ANSWER_INSTRUCTIONS
        )
        self.before = encode(f"<bos>{instruction}<user>")
        self.words = encode(sentence.text)
        self.after = encode("<assistant>")
        self.output = encode((sentence.text if repeat else sentence.answer) + "<eos>")


def stretch_places(n_words: int, rng: random.Random) -> list[float]:
    """Fractional word positions, as a pooled utterance has them.

    Uneven, by rate or over a fixed number.
    """
    n_places = round(n_words * rng.uniform(1.0, 4.5)) if rng.random() < 0.5 else rng.randint(20, 32)
    edges = [0.0]
    for _ in range(n_words):
        edges.append(edges[-1] + rng.uniform(0.6, 1.4))
    total = max(n_words, n_places)
    places, word = [], 0
    for i in range(total):
        t = (i + 0.5) / total * edges[-1]
        while word < n_words - 1 and t >= edges[word + 1]:
            word += 1
        within = (t - edges[word]) / (edges[word + 1] - edges[word])
        blend = max(0.0, within - 0.75) * 2 * rng.random()  # the seam to the next word
        places.append(min(n_words - 1.0, word + blend))
    return places


def collate(model, rows: list[Example], rng: random.Random, stretched: float):
    """Input embeddings (B, T, D), attention mask and labels; some rows as speech would come."""
    import torch

    table = model.get_input_embeddings().weight
    scale = table.detach().std()
    embedded, labels = [], []
    for row in rows:
        words = table[torch.tensor(row.words)]
        kind = rng.random()
        if kind < stretched:
            places = torch.tensor(stretch_places(len(row.words), rng))
            low = places.long()
            share = (places - low).unsqueeze(-1)
            words = words[low] * (1 - share) + words[(low + 1).clamp(max=len(words) - 1)] * share
        if kind < stretched + 0.2:
            words = words + torch.randn_like(words) * scale * rng.uniform(0.0, 0.8)
        pieces = [
            table[torch.tensor(row.before)],
            words,
            table[torch.tensor(row.after + row.output)],
        ]
        embedded.append(torch.cat(pieces))
        hidden = len(row.before) + len(words) + len(row.after)
        labels.append(torch.tensor([IGNORE] * hidden + row.output))
    mask = [torch.ones(len(label)) for label in labels]
    pad = lambda xs, v: torch.nn.utils.rnn.pad_sequence(xs, batch_first=True, padding_value=v)  # noqa: E731
    return pad(embedded, 0.0), pad(mask, 0).long(), pad(labels, IGNORE)


def int4_rounding():
    """A parametrisation that rounds a linear weight (out, in) to symmetric INT4 blocks, gradient
    straight through.
    """
    import torch

    class Rounding(torch.nn.Module):
        def forward(self, weight):
            blocks = weight.reshape(len(weight), -1, INT4_BLOCK)
            peak = blocks.gather(
                -1, blocks.abs().argmax(-1, keepdim=True)
            )  # the largest, with its sign
            scale = peak / -8
            scale = torch.where(scale.abs() < 1e-9, torch.full_like(scale, 1e-9), scale)
            rounded = (blocks / scale).round().clamp(-8, 7) * scale
            return weight + (rounded.reshape_as(weight) - weight).detach()

    return Rounding()


def round_linears(model) -> list:
    """Round every linear layer of the decoder blocks from here on; returns them."""
    import torch
    from torch.nn.utils import parametrize

    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    for linear in linears:
        parametrize.register_parametrization(linear, "weight", int4_rounding())
    return linears


def exact_share(model, tokenizer, n: int = 300, batch: int = 50) -> float:
    """Share of held-out sentences answered exactly, greedily, in PyTorch."""
    import torch

    model.eval()
    drawn, right = corpus.sentences(n, 3, held_out=True, unique=False), 0
    for start in range(0, n, batch):
        part = drawn[start : start + batch]
        prompts = [
            tokenizer.encode(
                f"<bos>{corpus.ANSWER_INSTRUCTIONS[0]}<user>{s.text}<assistant>",
                add_special_tokens=False,
            )
            for s in part
        ]
        width = max(map(len, prompts))
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=40, do_sample=False
            )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        right += sum(t.strip() == s.answer for t, s in zip(texts, part))
    model.train()
    return right / n


def _rate(step: int, steps: int, finish: int) -> float:
    """Share of the peak rate.

    Up over a tenth, down by a cosine; then a smaller cosine to finish.
    """
    if step >= steps:
        return 0.3 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - steps) / finish)))
    rise = steps / 10
    return (
        (step + 1) / rise
        if step < rise
        else 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))
    )


def train(
    work: Path, out: Path, steps: int, finish: int, batch: int, seed: int, rate: float
) -> dict:
    import torch
    from torch.nn.utils import parametrize

    rng = random.Random(seed)
    torch.manual_seed(seed)
    checkpoint, done = work / "llm.pt", 0
    tokenizer = load_tokenizer(out) if checkpoint.exists() else build_tokenizer()
    tokenizer.save_pretrained(out)
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    sentences = corpus.sentences(150_000, 1, unique=False)
    model = build_model(tokenizer)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
    rounding_from, linears, log = int(steps * 0.65), [], []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        linears = round_linears(model) if state["rounded"] else []
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        done, log = state["step"], json.loads(state["log"])
        rng.seed(seed + done)
    for step in tqdm(
        range(done, steps + finish),
        initial=done,
        total=steps + finish,
        file=sys.stderr,
        mininterval=10,
    ):
        if step == rounding_from:
            linears = round_linears(model)
        model.get_input_embeddings().weight.requires_grad_(step < steps)
        rows = [Example(encode, s, rng) for s in rng.sample(sentences, batch)]
        embeddings, mask, labels = collate(
            model, rows, rng, STRETCHED if step < steps else STRETCHED / 3
        )
        loss = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss
        for group in optimiser.param_groups:
            group["lr"] = rate * _rate(step, steps, finish)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if (step + 1) % 300 == 0 or step + 1 in (steps, steps + finish):
            log.append(
                {
                    "step": step + 1,
                    "loss": round(float(loss.detach()), 4),
                    "exact": exact_share(model, tokenizer),
                }
            )
            print(json.dumps(log[-1]), flush=True)
            state = {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "step": step + 1,
            }
            state |= {"log": json.dumps(log), "rounded": bool(linears)}
            torch.save(state, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
    for linear in linears:
        parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
    model.save_pretrained(out)
    return {"parameters": sum(p.numel() for p in model.parameters()), "log": log}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("work"))
    parser.add_argument("--out", type=Path, default=Path("reference/weights/llm"))
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument(
        "--finish",
        type=int,
        default=600,
        help="more steps, embeddings frozen, fewer rows stretched",
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    report = train(args.work, args.out, args.steps, args.finish, args.batch, args.seed, args.rate)
    (args.out / "training.json").write_text(
        json.dumps(vars(args) | report, indent=1, default=str) + "\n"
    )
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
