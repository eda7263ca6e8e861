"""An LLM's chat template -> the prompt's pieces. What a template does is found by rendering it, not by its name.

Transformers renders it in jinja's sandbox, here only: the runtime puts pieces together.
"""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from tiny_align.runtime.bundle.manifest import PromptSpec
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.llm import encode_around, encode_in_place

INSTRUCTION, WORDS, ANSWER = "INSTRUCTION-goes-HERE", "SPEECH-goes-HERE", "ANSWER-goes-HERE"
MORE = "MORE-words-go-HERE"
IN_ONE_TURN = "\n\n"  # between instruction and words where a template takes no system message
SWITCHES = {
    "enable_thinking": False
}  # an answer to speech is said at once; templates without the switch ignore it
OTHER_USES = ("tool_use", "rag")  # names of templates that are not for a plain chat
OPEN, CLOSE = "\ue000", "\ue001"  # around the format of a date, while a template is taken apart
DATE = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
MARKED = "{%- macro strftime_now(format) -%}" + OPEN + "{{ format }}" + CLOSE + "{%- endmacro %}\n"
ON_A_DAY = "{%- macro strftime_now(format) -%}{{ tiny_align_days[format] }}{%- endmacro %}\n"
VARIABLE = re.compile(
    r"(?i)(\w*(?:date|today)\w*)(?:\s+is\s+(?:not\s+)?(?:defined|none)|\s*\|\s*default)"
)
DATE_FORMATS = (
    "%d %b %Y",
    "%d %B %Y",
    "%B %d, %Y",
    "%b %d, %Y",
    "%Y-%m-%d",
    "%A, %B %d, %Y",
    "%A, %d %B %Y",
)
FORMAT = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?["'](.*?)["']""")
DAYS = [
    datetime(2024, 1, 1, 0, 1, 2) + n * timedelta(days=37, hours=5, minutes=11, seconds=7)
    for n in range(100)
]
PROBES = (
    "what is the time",
    "Call my mother",
    "3 new e-mails, please!",
)  # nothing may change at a cut


def choose_template(tokenizer, wanted: str | None = None) -> str:
    """One chat template of a tokenizer that may have several.

    Args:
        wanted: the name of one, or a file with another; None: the one named "default", else the only one that takes
            plain chat messages.
    Raises:
        TinyAlignError: none at all, none of that name and no such file, or several to choose from.
    """
    templates = tokenizer.chat_template or {}
    templates = {"default": templates} if isinstance(templates, str) else templates
    if wanted is not None:
        return (
            templates[wanted] if wanted in templates else _read_template(wanted, sorted(templates))
        )
    if not templates:
        raise TinyAlignError(
            "the LLM's tokenizer has no chat template: use an instruction-tuned model, or give the template it was "
            "trained with as --chat-template FILE"
        )
    if "default" in templates:
        return templates["default"]
    fitting = [
        name
        for name in templates
        if name not in OTHER_USES and _takes_chat(tokenizer, templates[name])
    ]
    if len(fitting) != 1:
        raise TinyAlignError(
            f"the LLM's tokenizer has the chat templates {', '.join(sorted(templates))} and none named default: "
            "choose one with --chat-template NAME, or give a FILE"
        )
    return templates[fitting[0]]


def _read_template(file: str, names: list[str]) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        there = f"its chat templates are {', '.join(names)}" if names else "it has no chat template"
        raise TinyAlignError(
            f"--chat-template is {file}, expected a name or a text file: {there}, and no file can be read there "
            f"({getattr(error, 'strerror', None) or error})"
        ) from error


def _takes_chat(tokenizer, template: str) -> bool:
    draft = _Template(tokenizer, template)
    return any(_cut(draft.marked(turns(INSTRUCTION, WORDS))) for turns in (system_turn, user_turn))


def render(tokenizer, messages: list[dict], **options):
    """`apply_chat_template` as every prompt here is made: without thinking, ready for the answer."""
    return tokenizer.apply_chat_template(
        messages, **{"add_generation_prompt": True, **SWITCHES, **options}
    )


def system_turn(instruction: str, words: str) -> list[dict]:
    """The instruction as the system message."""
    return [{"role": "system", "content": instruction}, {"role": "user", "content": words}]


def user_turn(instruction: str, words: str) -> list[dict]:
    """The instruction in the user's turn, for templates that refuse or drop a system message."""
    return [{"role": "user", "content": f"{instruction}{IN_ONE_TURN}{words}"}]


class _Template:
    """A chat template whose date is not the day on which it is rendered.

    A template asks for the day by strftime_now(format), which transformers provides and which a macro of the same
    name stands in for here, or takes it as a variable with a date as its default.
    """

    def __init__(self, tokenizer, template: str):
        self._tokenizer, self._template = tokenizer, template
        self.formats = set(FORMAT.findall(template))  # in which it may ask for the day
        self._variables = {}  # name -> strftime format
        self._variables = dict(self._find_variables())

    def marked(self, messages: list[dict], **options) -> str:
        """Its text, with a mark around the format where a date stands; empty where it refuses such messages."""
        given = {name: f"{OPEN}{format_}{CLOSE}" for name, format_ in self._variables.items()}
        return self._text(MARKED, messages, **{**given, **options})

    def on(self, day: datetime, messages: list[dict]) -> str:
        """Its text on a day."""
        given = {name: day.strftime(format_) for name, format_ in self._variables.items()}
        given["tiny_align_days"] = {format_: day.strftime(format_) for format_ in self.formats}
        return self._text(ON_A_DAY, messages, **given)

    def _text(self, macro: str, messages: list[dict], **options) -> str:
        options |= {"chat_template": macro + self._template, "tokenize": False}
        try:
            return render(self._tokenizer, messages, **options)
        except Exception:  # of jinja or, as templates calculate, of Python
            return ""

    def _find_variables(self) -> Iterator[tuple[str, str]]:
        """Variables that hold a date unless given, such as Llama's date_string, with the format of that date."""
        for messages in (system_turn(INSTRUCTION, WORDS), user_turn(INSTRUCTION, WORDS)):
            if not (usual := self._text(MARKED, messages)):
                continue
            for name in sorted(set(VARIABLE.findall(self._template))):
                pieces = self._text(MARKED, messages, **{name: OPEN + CLOSE}).split(OPEN + CLOSE)
                default = re.fullmatch("(.+?)".join(map(re.escape, pieces)), usual, re.DOTALL)
                formats = {_format_of(text) for text in default.groups()} if default else set()
                if len(formats) == 1 and (format_ := formats.pop()):
                    yield name, format_
            return


def _format_of(text: str) -> str | None:
    """The strftime format of a date; None of what is none."""
    for format_ in DATE_FORMATS:
        with contextlib.suppress(ValueError):
            if datetime.strptime(text, format_).strftime(format_) == text:
                return format_
    return None


def prompt_spec(tokenizer, instruction: str, repeat_instruction: str) -> PromptSpec:
    """The chat template, rendered with marks in its two holes and cut there.

    Raises:
        TinyAlignError: no chat template, one without the two holes, one that calculates with the date, or a tokenizer
            that joins tokens over a cut.
    """
    template = _Template(tokenizer, choose_template(tokenizer))
    for turns in (system_turn, user_turn):
        if pieces := _cut(template.marked(turns(INSTRUCTION, WORDS))):
            spec = _with_dates(
                PromptSpec(*pieces, instruction, repeat_instruction, _next_turn(template, turns))
            )
            _check_cuts(tokenizer, template, spec, turns)
            return spec
    raise TinyAlignError(
        "the LLM's chat template does not take one system and one user message, "
        "nor both in the user's turn: it cannot be cut. Give another with --chat-template"
    )


def _cut(text: str) -> tuple[str, str, str] | None:
    """What stands before, between and after the marks; None unless each is there once, in order."""
    if text.count(INSTRUCTION) != 1 or text.count(WORDS) != 1:
        return None
    before, _, rest = text.partition(INSTRUCTION)
    between, mark, after = rest.partition(WORDS)
    return (before, between, after) if mark else None


def _next_turn(template: _Template, turns) -> str | None:
    """What stands between an answer and the next turn's words; None where the template takes one turn only.

    Some templates insist on a system message, others show it in the last turn only: then it is not in between.
    """
    for first in ([{"role": "user", "content": WORDS}], turns(INSTRUCTION, WORDS)):
        more = [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": MORE}]
        text = template.marked([*first, *more])
        between, mark, _ = text.partition(ANSWER)[2].partition(MORE)
        if mark and INSTRUCTION not in between:
            return between
    return None


def _with_dates(spec: PromptSpec) -> PromptSpec:
    """The marks of dates by names that can be read, with their formats beside the pieces."""
    pieces = {name: getattr(spec, name) for name in ("before", "between", "after", "next")}
    formats = dict.fromkeys(f for piece in pieces.values() for f in DATE.findall(piece or ""))
    names = {format_: f"DATE-{n}-goes-HERE" for n, format_ in enumerate(formats)}
    for name, piece in pieces.items():
        pieces[name] = piece and DATE.sub(lambda found: names[found[1]], piece)
    return dataclasses.replace(
        spec, **pieces, dates={mark: format_ for format_, mark in names.items()}
    )


def _check_cuts(tokenizer, template: _Template, spec: PromptSpec, turns) -> None:
    """The pieces, encoded one by one as the runtime does, must give the tokens of the whole, on any day."""
    backend = tokenizer.backend_tokenizer
    template.formats |= set(spec.dates.values())
    for day in DAYS if template.formats else DAYS[:1]:
        today = spec.on(day)
        before, after = encode_around(backend, today, spec.instruction)
        for words in PROBES:
            whole = template.on(day, turns(spec.instruction, words))
            joined = f"{today.before}{today.instruction}{today.between}{words}{today.after}"
            if template.formats and whole != joined:
                raise TinyAlignError(
                    "the LLM's chat template calculates with the date or changes its letters, so that no runtime can "
                    "put in another: give a template without a date with --chat-template FILE"
                )
            pieces = [*before, *encode_in_place(backend, today, words), *after]
            if pieces != tokenizer(whole, add_special_tokens=False)["input_ids"]:
                raise TinyAlignError(
                    "the LLM's tokenizer joins words and chat template into one token around "
                    f"{words!r}: there would be no place for speech. Use a template that puts a special token or a "
                    "line break there"
                )


def turn_end(tokenizer) -> list[int]:
    """The token that ends an answer in the chat template, if it is a token of its own there."""
    text = _answered(tokenizer)
    encoded = tokenizer.backend_tokenizer.encode(
        text.split(ANSWER)[-1], add_special_tokens=False
    ).ids
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return encoded[:1] if ANSWER in text and encoded and encoded[0] in added else []


def _answered(tokenizer) -> str:
    template = _Template(tokenizer, choose_template(tokenizer))
    for first in ([{"role": "user", "content": WORDS}], system_turn(INSTRUCTION, WORDS)):
        messages = [*first, {"role": "assistant", "content": ANSWER}]
        if text := template.marked(messages, add_generation_prompt=False):
            return text
    return ""
