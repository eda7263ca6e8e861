"""An LLM's chat template -> the prompt's pieces.

No template is known by its name: it is rendered, and the result is taken apart. Transformers
renders it in jinja's sandbox, here only: the runtime joins pieces.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiny_align.runtime.bundle.manifest import PromptSpec
from tiny_align.runtime.errors import TinyAlignError
from tiny_align.runtime.llm import encode_around, encode_in_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Message = dict[str, str]  # role and content
MakeTurns = Callable[[str, str], list[Message]]  # instruction and words -> messages

# Texts that are rendered in the places of real ones, and found again.
INSTRUCTION = "INSTRUCTION-goes-HERE"
WORDS = "SPEECH-goes-HERE"
ANSWER = "ANSWER-goes-HERE"
MORE = "MORE-words-go-HERE"

IN_ONE_TURN = "\n\n"  # between instruction and words if a template takes no system message
SWITCHES = {"enable_thinking": False}  # speech is answered at once; other templates ignore it
OTHER_USES = ("tool_use", "rag")  # names of templates that are not for chat

# The format of a date, marked while a template is taken apart.
OPEN = "\ue000"
CLOSE = "\ue001"
DATE = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
MARKED = "{%- macro strftime_now(format) -%}" + OPEN + "{{ format }}" + CLOSE + "{%- endmacro %}\n"
ON_A_DAY = "{%- macro strftime_now(format) -%}{{ tiny_align_days[format] }}{%- endmacro %}\n"
VARIABLE = re.compile(
    r"(?i)(\w*(?:date|today)\w*)(?:\s+is\s+(?:not\s+)?(?:defined|none)|\s*\|\s*default)"
)
FORMAT = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?["'](.*?)["']""")
DATE_FORMATS = (
    "%d %b %Y",
    "%d %B %Y",
    "%B %d, %Y",
    "%b %d, %Y",
    "%Y-%m-%d",
    "%A, %B %d, %Y",
    "%A, %d %B %Y",
)

# Days and words with which the pieces must give the tokens of the whole.
FIRST_DAY = datetime(2024, 1, 1, 0, 1, 2)
STEP = timedelta(days=37, hours=5, minutes=11, seconds=7)
DAYS = [FIRST_DAY + n * STEP for n in range(100)]
PROBES = ("what is the time", "Call my mother", "3 new e-mails, please!")


# --- which template ---


def choose_template(tokenizer: "PreTrainedTokenizerBase", wanted: str | None = None) -> str:
    """One chat template of a tokenizer that may have several.

    Args:
        wanted: the name of one, or a file with another; None: the one named "default", else the
            only one that takes ordinary chat messages.
    Raises:
        TinyAlignError: none at all, none of that name and no such file, or several to choose from.
    """
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    if wanted is not None:
        if wanted in templates:
            return templates[wanted]
        return _read_template(wanted, sorted(templates))
    if not templates:
        raise TinyAlignError(
            "the LLM's tokenizer has no chat template: use an instruction-tuned model, or give the "
            "template it was trained with as --chat-template FILE"
        )
    if "default" in templates:
        return templates["default"]
    fitting = []
    for name, template in templates.items():
        rendered = _Template(tokenizer, template)
        takes_chat = any(_cut(rendered.marked(turns(INSTRUCTION, WORDS))) for turns in TURNS)
        if takes_chat and name not in OTHER_USES:
            fitting.append(template)
    if len(fitting) != 1:
        raise TinyAlignError(
            f"the LLM's tokenizer has the chat templates {', '.join(sorted(templates))} and none "
            "named default: choose one with --chat-template NAME, or give a FILE"
        )
    return fitting[0]


def _read_template(file: str, names: list[str]) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        there = f"its chat templates are {', '.join(names)}" if names else "it has no chat template"
        raise TinyAlignError(
            f"--chat-template is {file}, expected a name or a text file: {there}, and no file can "
            f"be read there ({why})"
        ) from error


# --- rendering ---


def render(tokenizer: "PreTrainedTokenizerBase", messages: list[Message], **options: Any) -> Any:
    """`apply_chat_template` as for every prompt here: without thinking, ready for the answer."""
    options = {"add_generation_prompt": True, **SWITCHES, **options}
    return tokenizer.apply_chat_template(messages, **options)


def user_alone(words: str) -> list[Message]:
    """The user's message and no system message."""
    return [{"role": "user", "content": words}]


def system_turn(instruction: str, words: str) -> list[Message]:
    """The instruction as the system message."""
    return [{"role": "system", "content": instruction}, {"role": "user", "content": words}]


def user_turn(instruction: str, words: str) -> list[Message]:
    """The instruction in the user's turn, for templates that refuse or drop a system message."""
    return [{"role": "user", "content": f"{instruction}{IN_ONE_TURN}{words}"}]


TURNS: tuple[MakeTurns, ...] = (system_turn, user_turn)


class _Template:
    """A chat template that can be rendered as on any day.

    A template asks for the day by strftime_now(format), which transformers provides and a macro of
    the same name replaces here, or takes it as a variable with a date as its default.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str):
        self._tokenizer = tokenizer
        self._template = template
        self.formats = set(FORMAT.findall(template))  # in which it may ask for the day
        self._variables = self._find_variables()

    def marked(self, messages: list[Message], **options: Any) -> str:
        """Its text, with marked formats in place of dates; empty if it refuses such messages."""
        variables = {}
        for name, date_format in self._variables.items():
            variables[name] = f"{OPEN}{date_format}{CLOSE}"
        return self._render(MARKED, messages, {**variables, **options})

    def on(self, day: datetime, messages: list[Message]) -> str:
        """Its text on a day."""
        variables: dict[str, Any] = {}
        for name, date_format in self._variables.items():
            variables[name] = day.strftime(date_format)
        days = {date_format: day.strftime(date_format) for date_format in self.formats}
        return self._render(ON_A_DAY, messages, {**variables, "tiny_align_days": days})

    def _render(self, macro: str, messages: list[Message], options: dict[str, Any]) -> str:
        options = {**options, "chat_template": macro + self._template, "tokenize": False}
        try:
            return render(self._tokenizer, messages, **options)
        except Exception:  # of jinja or, as templates calculate, of Python
            return ""

    def _find_variables(self) -> dict[str, str]:
        """Variables whose default is a date, such as Llama's date_string -> that date's format."""
        for turns in TURNS:
            messages = turns(INSTRUCTION, WORDS)
            text = self._render(MARKED, messages, {})
            if text:
                break
        else:
            return {}
        variables = {}
        for name in sorted(set(VARIABLE.findall(self._template))):
            holes = self._render(MARKED, messages, {name: OPEN + CLOSE}).split(OPEN + CLOSE)
            default = re.fullmatch("(.+?)".join(map(re.escape, holes)), text, re.DOTALL)
            formats = {_date_format(date) for date in default.groups()} if default else set()
            if len(formats) == 1:
                date_format = formats.pop()
                if date_format:
                    variables[name] = date_format
        return variables


def _date_format(text: str) -> str | None:
    """The strftime format of a date; None if it is none."""
    for date_format in DATE_FORMATS:
        with contextlib.suppress(ValueError):
            if datetime.strptime(text, date_format).strftime(date_format) == text:
                return date_format
    return None


# --- the prompt ---


def prompt_spec(
    tokenizer: "PreTrainedTokenizerFast", instruction: str | None, repeat_instruction: str
) -> PromptSpec:
    """The chat template, rendered with marks in its holes and cut there.

    Args:
        instruction: of the bundle; None: none, so that the prompt is what the template makes of the
            user's message alone, with the model's own system text if it has one.
    Raises:
        TinyAlignError: no chat template, one without the holes, one that calculates with the date,
            or a tokenizer that joins tokens over a cut.
    """
    template = _Template(tokenizer, choose_template(tokenizer))
    for turns in TURNS:
        pieces = _cut(template.marked(turns(INSTRUCTION, WORDS)))
        if pieces:
            following = _next_turn(template, turns)
            spec = PromptSpec(
                *pieces,
                instruction or "",
                repeat_instruction,
                following,
                uninstructed=_uninstructed(template, pieces),
            )
            spec = _name_dates(spec)
            _check_pieces(tokenizer, template, spec, turns)
            return spec
    raise TinyAlignError(
        "the LLM's chat template does not take one system and one user message, "
        "nor both in the user's turn: it cannot be cut. Give another with --chat-template"
    )


def _uninstructed(template: _Template, pieces: tuple[str, str, str]) -> str | None:
    """What the template puts before the words of a user's message alone.

    None if it is what is around an empty instruction, or if the template requires a system message
    or shows the words twice without.

    Raises:
        TinyAlignError: the prompt ends otherwise than with a system message.
    """
    before, between, after = pieces
    text = template.marked(user_alone(WORDS))
    if text.count(WORDS) != 1:
        return None
    lead, _, rest = text.partition(WORDS)
    if rest != after:
        raise TinyAlignError(
            f"the LLM's chat template ends a prompt with {after!r} after a system message, and "
            f"with {rest!r} without: expected the same. Give another with --chat-template"
        )
    return None if lead == before + between else lead


def _cut(text: str) -> tuple[str, str, str] | None:
    """What is before, between and after the marks; None unless each is there once, in order."""
    if text.count(INSTRUCTION) != 1 or text.count(WORDS) != 1:
        return None
    before, _, rest = text.partition(INSTRUCTION)
    between, mark, after = rest.partition(WORDS)
    return (before, between, after) if mark else None


def _next_turn(template: _Template, turns: MakeTurns) -> str | None:
    """What is between an answer and the next turn's words; None if the template takes one turn.

    Some templates require a system message. Others show it in the last turn only: then it would be
    in between.
    """
    more = [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": MORE}]
    for first in (user_alone(WORDS), turns(INSTRUCTION, WORDS)):
        _, _, rest = template.marked([*first, *more]).partition(ANSWER)
        between, mark, _ = rest.partition(MORE)
        if mark and INSTRUCTION not in between:
            return between
    return None


def _name_dates(spec: PromptSpec) -> PromptSpec:
    """Replace the marks of dates by readable names, with their formats in `dates`."""
    pieces = {"before": spec.before, "between": spec.between, "after": spec.after}
    for key in ("next", "uninstructed"):
        if getattr(spec, key) is not None:
            pieces[key] = getattr(spec, key)
    names: dict[str, str] = {}  # by format
    for piece in pieces.values():
        for date_format in DATE.findall(piece):
            names.setdefault(date_format, f"DATE-{len(names)}-goes-HERE")
    named = {key: DATE.sub(lambda found: names[found[1]], piece) for key, piece in pieces.items()}
    dates = {name: date_format for date_format, name in names.items()}
    return dataclasses.replace(spec, **named, dates=dates)


def _check_pieces(
    tokenizer: "PreTrainedTokenizerFast", template: _Template, spec: PromptSpec, turns: MakeTurns
) -> None:
    """Check that the pieces give the tokens of the whole, with and without instruction, on any day.

    They are encoded one by one, as the runtime does.
    """
    template.formats |= set(spec.dates.values())
    takes_user_alone = template.marked(user_alone(WORDS)).count(WORDS) == 1
    for day in DAYS if template.formats else DAYS[:1]:
        today = spec.on(day)
        for words in PROBES:
            for instruction in {spec.instruction, spec.repeat_instruction} - {""}:
                whole = template.on(day, turns(instruction, words))
                _check_whole(tokenizer, today, instruction, words, whole, bool(template.formats))
            if takes_user_alone:
                whole = template.on(day, user_alone(words))
                _check_whole(tokenizer, today, "", words, whole, bool(template.formats))


def _check_whole(
    tokenizer: "PreTrainedTokenizerFast",
    today: PromptSpec,
    instruction: str,
    words: str,
    whole: str,
    dated: bool,
) -> None:
    """Check the pieces of one prompt against the template's rendering of it, `whole`."""
    if dated and whole != f"{today.lead(instruction)}{words}{today.after}":
        raise TinyAlignError(
            "the LLM's chat template calculates with the date or changes its letters, so "
            "that no runtime can put in another: give a template without a date with "
            "--chat-template FILE"
        )
    backend = tokenizer.backend_tokenizer
    before, after = encode_around(backend, today, instruction)
    tokens = [*before, *encode_in_place(backend, today, words), *after]
    if tokens != tokenizer(whole, add_special_tokens=False)["input_ids"]:
        raise TinyAlignError(
            "the LLM's tokenizer joins words and chat template into one token around "
            f"{words!r}: there would be no place for speech. Use a template that puts a "
            "special token or a line break there"
        )


def turn_end(tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The token that ends an answer in the chat template, if it is a token of its own there."""
    template = _Template(tokenizer, choose_template(tokenizer))
    for first in (user_alone(WORDS), system_turn(INSTRUCTION, WORDS)):
        messages = [*first, {"role": "assistant", "content": ANSWER}]
        text = template.marked(messages, add_generation_prompt=False)
        if text:
            break
    if ANSWER not in text:
        return []
    backend = tokenizer.backend_tokenizer
    tokens = backend.encode(text.split(ANSWER)[-1], add_special_tokens=False).ids
    is_added = tokens and tokens[0] in backend.get_added_tokens_decoder()
    return tokens[:1] if is_added else []
