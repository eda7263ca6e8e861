"""An LLM's chat template -> the prompt's pieces. What a template does is found by rendering it, not by its name."""

from tiny_align.runtime.bundle import PromptSpec
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.llm import encode_around, encode_in_place

INSTRUCTION, WORDS, ANSWER = "INSTRUCTION-goes-HERE", "SPEECH-goes-HERE", "ANSWER-goes-HERE"
MORE = "MORE-words-go-HERE"
IN_ONE_TURN = "\n\n"  # between instruction and words where a template takes no system message
SWITCHES = {"enable_thinking": False}  # an answer to speech is said at once; templates without the switch ignore it
PROBES = ("what is the time", "Call my mother", "3 new e-mails, please!")  # nothing may change at a cut


def render(tokenizer, messages: list[dict], **options):
    """`apply_chat_template` as every prompt here is made: without thinking, ready for the answer."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **SWITCHES, **options)


def system_turn(instruction: str, words: str) -> list[dict]:
    """The instruction as the system message."""
    return [{"role": "system", "content": instruction}, {"role": "user", "content": words}]


def user_turn(instruction: str, words: str) -> list[dict]:
    """The instruction in the user's turn, for templates that refuse or drop a system message."""
    return [{"role": "user", "content": f"{instruction}{IN_ONE_TURN}{words}"}]


def prompt_spec(tokenizer, instruction: str, repeat_instruction: str) -> PromptSpec:
    """The chat template, rendered with marks in its two holes and cut there.

    Raises:
        TinyAlignError: no chat template, one without the two holes, or a tokenizer that joins tokens over a cut.
    """
    if not tokenizer.chat_template:
        raise TinyAlignError("the LLM's tokenizer has no chat template: use an instruction-tuned model")
    for turns in (system_turn, user_turn):
        if pieces := _cut(_rendered(tokenizer, turns(INSTRUCTION, WORDS))):
            spec = PromptSpec(*pieces, instruction, repeat_instruction, _next_turn(tokenizer))
            _check_cuts(tokenizer, spec, turns)
            return spec
    raise TinyAlignError(
        "the LLM's chat template does not take one system and one user message, "
        "nor both in the user's turn: it cannot be cut"
    )


def _rendered(tokenizer, messages: list[dict]) -> str:
    """The template's text; empty where it refuses such messages."""
    from jinja2 import TemplateError

    try:
        return render(tokenizer, messages, tokenize=False)
    except TemplateError:
        return ""


def _cut(text: str) -> tuple[str, str, str] | None:
    """What stands before, between and after the marks; None unless each is there once, in order."""
    if text.count(INSTRUCTION) != 1 or text.count(WORDS) != 1:
        return None
    before, _, rest = text.partition(INSTRUCTION)
    between, mark, after = rest.partition(WORDS)
    return (before, between, after) if mark else None


def _next_turn(tokenizer) -> str | None:
    """What stands between an answer and the next turn's words; None where the template takes one turn only."""
    answered = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": ANSWER}]
    text = _rendered(tokenizer, [*answered, {"role": "user", "content": MORE}])
    between = text.partition(ANSWER)[2].partition(MORE)
    return between[0] if between[1] else None


def _check_cuts(tokenizer, spec: PromptSpec, turns) -> None:
    """The pieces, encoded one by one as the runtime does, must give the tokens of the whole."""
    backend = tokenizer.backend_tokenizer
    before, after = encode_around(backend, spec, spec.instruction)
    for words in PROBES:
        whole = render(tokenizer, turns(spec.instruction, words), return_dict=True)["input_ids"]
        if [*before, *encode_in_place(backend, spec, words), *after] != list(whole):
            raise TinyAlignError(
                f"the LLM's tokenizer joins words and chat template into one token around {words!r}: "
                "there would be no place for speech. Use a template that puts a special token or a line break there"
            )


def turn_end(tokenizer) -> list[int]:
    """The token that ends an answer in the chat template, if it is a token of its own there."""
    text = _answered(tokenizer)
    encoded = tokenizer.backend_tokenizer.encode(text.split(ANSWER)[-1], add_special_tokens=False).ids
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return encoded[:1] if ANSWER in text and encoded and encoded[0] in added else []


def _answered(tokenizer) -> str:
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": ANSWER}]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **SWITCHES)
    except TemplateError:
        return ""
