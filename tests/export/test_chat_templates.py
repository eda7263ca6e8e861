"""Chat templates -> the prompt's pieces: today's date, system messages, named templates.

The oracle is transformers' own rendering, on whatever day its clock shows.
"""

import dataclasses
import json
import shutil
from datetime import datetime, timedelta

import pytest

torch = pytest.importorskip("torch", reason="models are exported from torch")
transformers = pytest.importorskip("transformers", reason="models are exported from transformers")

from conftest import make_tokenizer  # noqa: E402 - needs the packages above
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from tests.support.tiny_llms import CHATML, IM, LLAMA3, NO_SYSTEM, SMOLLM3, fast  # noqa: E402
from tiny_align.export.llms import load_tokenizer  # noqa: E402
from tiny_align.export.prompts import choose_template, prompt_spec, turn_end  # noqa: E402
from tiny_align.runtime.errors import TinyAlignError  # noqa: E402
from tiny_align.runtime.llm import encode_around, encode_in_place  # noqa: E402

INSTRUCTION, WORDS = "Answer the user.", "what is the time"
DAY = datetime(2031, 5, 9, 17, 3, 8)
TODAY_IN_SYSTEM = LLAMA3.replace("{{ bos_token }}", "{{ bos_token }}Today Date: {{ TODAY }}\n\n", 1)
DATED = {  # template -> what the prompt of DAY contains
    "Llama 3.2's": (
        "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}"
        "{%- endif %}{%- endif %}" + TODAY_IN_SYSTEM.replace("TODAY", "date_string"),
        "Today Date: 09 May 2031\n",
    ),
    "SmolLM3's": (
        "{%- set today = strftime_now('%d %B %Y') -%}"
        + SMOLLM3.replace("## Metadata\n", "## Metadata\n{{ 'Today Date: ' ~ today ~ '\\n' }}", 1),
        "## Metadata\nToday Date: 09 May 2031\nReasoning Mode: /no_think",
    ),
    "several formats": (
        "{{ strftime_now('%A') }}, {{ strftime_now('%Y-%m-%d') }} or {{ strftime_now('%A') }}\n"
        + CHATML.replace("{{ m['content'] }}", "[{{ strftime_now('%H:%M') }}]\n{{ m['content'] }}"),
        "Friday, 2031-05-09 or Friday\n<|im_start|>system\n[17:03]\n",
    ),
    "a format in a macro": (
        "{% macro day(format) %}{{ strftime_now(format) }}{% endmacro %}"
        + TODAY_IN_SYSTEM.replace("TODAY", "day('%B %d, %Y')"),
        "Today Date: May 09, 2031\n",
    ),
}  # fmt: skip


def tokenizer_of(template):
    tokenizer = fast(
        [*IM, "<|eot_id|>", "<think>", "</think>"], bos_token="<s>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def spec_of(template):
    return prompt_spec(tokenizer_of(template), INSTRUCTION, "Repeat.")


def clock(monkeypatch, day: datetime) -> None:
    """Let transformers' templates believe that it is this day."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return day

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def default_tokens(tokenizer, spec, day: datetime = DAY) -> list[int]:
    """The runtime's prompt of WORDS without an instruction from the caller."""
    backend, today = tokenizer.backend_tokenizer, spec.on(day)
    before, after = encode_around(backend, today, spec.instruction)
    return [*before, *encode_in_place(backend, today, WORDS), *after]


def alone(tokenizer) -> list[int]:
    """Transformers' prompt of the user's message alone."""
    messages = [{"role": "user", "content": WORDS}]
    options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": True}
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


# --- today's date ---


@pytest.mark.parametrize(("template", "text"), DATED.values(), ids=DATED)
def test_date_is_that_of_the_conversation(template, text):
    spec = spec_of(template)
    assert text in spec.on(DAY).before and spec.on(DAY).dates == {}
    assert datetime.now().strftime("%Y") not in json.dumps(
        [spec.before, spec.between, spec.after, spec.next]
    )


@pytest.mark.parametrize("template", [t for t, _ in DATED.values()], ids=DATED)
def test_tokens_equal_transformers_on_any_day(template, monkeypatch):
    tokenizer, spec = tokenizer_of(template), spec_of(template)
    messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": WORDS}]
    options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": True}
    for n in range(40):
        clock(monkeypatch, day := DAY + n * timedelta(days=23, hours=7, minutes=31))
        backend, today = tokenizer.backend_tokenizer, spec.on(day)
        before, after = encode_around(backend, today, INSTRUCTION)
        got = [*before, *encode_in_place(backend, today, WORDS), *after]
        assert got == tokenizer.apply_chat_template(messages, **options)["input_ids"]


@pytest.mark.parametrize("template", [t for t, _ in DATED.values()], ids=DATED)
def test_tokens_without_instruction_equal_transformers_on_any_day(template, monkeypatch):
    tokenizer = tokenizer_of(template)
    spec = prompt_spec(tokenizer, None, "Repeat.")
    assert spec.instruction == ""
    for n in range(10):
        clock(monkeypatch, day := DAY + n * timedelta(days=23, hours=7, minutes=31))
        assert default_tokens(tokenizer, spec, day) == alone(tokenizer)


def test_date_in_every_turn_is_in_next_too():
    spec = spec_of(DATED["several formats"][0])
    assert spec.on(DAY).next.endswith("<|im_start|>user\n[17:03]\n")


@pytest.mark.parametrize(
    ("default", "text"),
    [
        ("26 Jul 2024", "09 May 2031"),
        ("2024-07-26", "2031-05-09"),
        ("July 26, 2024", "May 09, 2031"),
    ],
)
def test_variable_with_a_default_date_is_today(default, text):
    """As in Llama 3.1's first template; the date has the default's format."""
    defined = (
        "{%- if not date_string is defined %}{%- set date_string = '" + default + "' %}{%- endif %}"
    )
    variable = defined + TODAY_IN_SYSTEM.replace("TODAY", "date_string")
    assert f"Today Date: {text}\n" in spec_of(variable).on(DAY).before
    piped = TODAY_IN_SYSTEM.replace("TODAY", f"today_date | default('{default}')")
    assert f"Today Date: {text}\n" in spec_of(piped).on(DAY).before


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        "Cutting Knowledge Date: December 2023\n" + CHATML,
        "{% if date is defined %}{{ date }}{% endif %}" + CHATML,
    ],
)
def test_template_without_a_date_has_no_dates(template):
    assert spec_of(template).dates == {}
    assert spec_of(template).on(DAY) == spec_of(template)


@pytest.mark.parametrize(
    "expression",
    [
        "strftime_now('%Y') | int + 1",
        "strftime_now('%B') | upper",
        "'Merry' if strftime_now('%m') == '12' else 'Hello'",
    ],
)
def test_template_that_calculates_with_the_date_is_refused(expression):
    with pytest.raises(TinyAlignError, match="calculates with the date or changes its letters"):
        spec_of(TODAY_IN_SYSTEM.replace("TODAY", expression))


def test_date_that_joins_the_words_on_some_days_is_refused():
    """The tokenizer has one merge: an r before a w, as in "October" before "what"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*alphabet, "rw"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("r", "w")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }}\n{{ strftime_now('%B') }}{{ messages[-1]['content'] }}\n"
    )
    with pytest.raises(TinyAlignError, match="joins words and chat template into one token"):
        prompt_spec(tokenizer, INSTRUCTION, "Repeat.")


# --- system messages ---


def test_template_that_requires_a_system_message_has_a_next_turn():
    must = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system message first') }}"
        "{% endif %}"
    )
    tokenizer = tokenizer_of(must + CHATML)
    expected = spec_of(CHATML)
    spec = prompt_spec(tokenizer, INSTRUCTION, "Repeat.")
    assert spec == dataclasses.replace(expected, uninstructed=None) and expected.next
    assert turn_end(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_default_system_message_is_in_the_prompt_without_an_instruction_only():
    spec = spec_of(CHATML)
    assert "You are helpful" not in f"{spec.before}{spec.between}{spec.after}{spec.next}"
    assert "You are helpful" not in spec.lead("Be brief.")
    assert spec.lead(" ") == ("<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n")


WITHOUT_SYSTEM = {  # template -> what it puts before the words of a user's message alone
    "its own system text": (CHATML, "system\nYou are helpful.<|im_end|>\n<|im_start|>user\n"),
    "no system block": (CHATML.split("{% endif %}", 1)[1], "<|im_start|>user\n"),
    "an empty system block": (SMOLLM3, "## Custom Instructions\n\n\n<|im_end|>\n<|im_start|>user\n"),
    "the instruction in the user's turn": (NO_SYSTEM, "<s><start_of_turn>user\n"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "lead"), WITHOUT_SYSTEM.values(), ids=WITHOUT_SYSTEM)
def test_default_prompt_is_the_template_without_a_system_message(template, lead):
    tokenizer = tokenizer_of(template)
    spec = prompt_spec(tokenizer, None, "Repeat.")
    assert spec.lead(spec.instruction).endswith(lead)
    assert default_tokens(tokenizer, spec) == alone(tokenizer)
    assert (spec.uninstructed is None) == (template == SMOLLM3)  # an empty instruction is the same


def test_instruction_of_an_export_stands_where_the_template_has_the_system_message():
    spec = prompt_spec(tokenizer_of(CHATML), "Be brief.", "Repeat.")
    assert spec.lead(spec.instruction) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )


def test_template_that_ends_otherwise_without_a_system_message_is_refused():
    words = (
        "{% for m in messages if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}\n{% endfor %}"
    )
    system = "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}\n{% endif %}"
    tail = "{{ '<|im_end|>' if messages[0]['role'] == 'system' else '<|eot_id|>' }}"
    with pytest.raises(TinyAlignError, match=r"ends a prompt with .* expected the same"):
        spec_of(system + words + tail)


def test_template_that_refuses_system_messages_has_the_instruction_in_the_users_turn():
    assert spec_of(NO_SYSTEM).between == "\n\n" and spec_of(NO_SYSTEM).next


def test_system_message_shown_in_the_last_turn_is_not_in_next():
    """As Mistral's: the instruction would be in between."""
    template = (
        "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}<|im_start|>"
        "{{ messages[0]['content'] + '\n\n' if loop.last and messages[0]['role'] == 'system' else '' }}"
        "{{ m['content'] }}<|im_end|>{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    spec = spec_of(template)
    assert (spec.between, spec.next) == ("\n\n", "<|im_end|><|im_start|>")


@pytest.mark.parametrize(
    "escape",
    [
        "{{ cycler.__init__.__globals__.os.system('touch RAN') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ 1 // 0 }}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_template_is_rendered_in_a_sandbox(escape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TinyAlignError, match="it cannot be cut"):
        spec_of(escape + CHATML)
    assert not list(tmp_path.iterdir())


# --- named templates ---

TOOLS = "{% for t in tools %}{{ t }}{% endfor %}"  # not for chat


@pytest.mark.parametrize(
    ("templates", "chosen"),
    [
        (CHATML, CHATML),
        ({"default": CHATML, "other": NO_SYSTEM}, CHATML),
        ({"tool_use": NO_SYSTEM, "default": CHATML}, CHATML),
        ({"tool_use": NO_SYSTEM, "rag": NO_SYSTEM, "chat": CHATML}, CHATML),
        ({"tools": TOOLS, "chat": CHATML}, CHATML),
        ({"only": CHATML}, CHATML),
    ],
)
def test_default_or_only_fitting_template_is_chosen(templates, chosen):
    assert choose_template(tokenizer_of(templates)) == chosen


@pytest.mark.parametrize(
    ("templates", "names"),
    [
        ({"tool_use": CHATML, "rag": CHATML}, "rag, tool_use"),
        ({"one": CHATML, "two": NO_SYSTEM}, "one, two"),
        ({"tools": TOOLS}, "tools"),
    ],
)
def test_several_fitting_templates_need_a_choice(templates, names):
    tokenizer = tokenizer_of(templates)
    with pytest.raises(
        TinyAlignError,
        match=f"has the chat templates {names} and none named default: choose one with",
    ):
        choose_template(tokenizer)
    for name, template in templates.items():
        assert choose_template(tokenizer, name) == template


def test_template_is_read_from_a_file(tmp_path):
    (tmp_path / "mine.jinja").write_text(CHATML, encoding="utf-8")
    for templates in (None, {}, NO_SYSTEM, {"one": NO_SYSTEM, "two": NO_SYSTEM}):
        assert choose_template(tokenizer_of(templates), str(tmp_path / "mine.jinja")) == CHATML


@pytest.mark.parametrize(
    ("templates", "there"),
    [({"one": CHATML, "two": CHATML}, "its chat templates are one, two"), (None, "it has no chat")],
)
def test_unknown_template_is_refused(templates, there, tmp_path):
    for name in ("three", str(tmp_path), str(tmp_path / "no.jinja")):
        with pytest.raises(TinyAlignError, match=f"expected a name or a text file: {there}"):
            choose_template(tokenizer_of(templates), name)


def save(folder, how: str, templates: dict[str, str]) -> None:
    """A tokenizer with named templates, as older or newer transformers write them."""
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "chat_template.jinja").unlink()
    if how == "a list":
        value = json.loads((folder / "tokenizer_config.json").read_text())
        value["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
        (folder / "tokenizer_config.json").write_text(json.dumps(value))
        return
    (folder / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        inner = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
        (folder / f"{inner}.jinja").write_text(text)


@pytest.mark.parametrize("how", ["a list", "files"])
def test_named_templates_are_found_in_the_configuration_and_in_files(tmp_path, how):
    save(tmp_path / "default", how, {"default": CHATML, "tool_use": NO_SYSTEM})
    assert load_tokenizer(tmp_path / "default").chat_template == CHATML
    save(tmp_path / "none", how, {"rag": CHATML, "tool_use": NO_SYSTEM})
    assert load_tokenizer(tmp_path / "none", "tool_use").chat_template == NO_SYSTEM
    with pytest.raises(TinyAlignError, match="chat templates rag, tool_use and none named default"):
        load_tokenizer(tmp_path / "none")


def test_command_writes_the_chosen_template_and_its_date_format(
    tiny_llm, tmp_path, export, refused
):
    from test_export import make_encoder

    make_encoder(tmp_path / "encoder")
    shutil.copytree(tiny_llm, tmp_path / "llm")
    (tmp_path / "mine.jinja").write_text(
        "<bos>{{ strftime_now('%d %b %Y') }}\n{{ messages[0]['content'] }}"
        "<user>{{ messages[-1]['content'] }}<assistant>"
    )
    models = {"encoder": tmp_path / "encoder", "llm": tmp_path / "llm"}
    options = ("--chat-template", tmp_path / "mine.jinja", "--precision", "fp32")
    prompt = export(models, tmp_path / "out", *options).bundle.manifest.prompt
    assert prompt.before == "<bos>DATE-0-goes-HERE\n"
    assert prompt.dates == {"DATE-0-goes-HERE": "%d %b %Y"}
    sentence = refused(models, tmp_path / "no", "--chat-template", "rag")
    expected = (
        "--chat-template is rag, expected a name or a text file: its chat templates are default"
    )
    assert expected in sentence
    assert not (tmp_path / "no").exists()
