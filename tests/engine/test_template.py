"""Chat templates give the same text as `transformers`; an error in a template is reported in the template's words."""

import json
import pickle
import warnings
from datetime import datetime
from pathlib import Path

import pytest

from stallfree.engine.template import Template
from stallfree.engine.text import Text, TextError
from tests.engine.tokenizers import byte_level

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # transformers warns of its own deprecations while it is imported
    from transformers.utils.chat_template_utils import render_jinja_template

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
USER = {"role": "user", "content": " Why is the sky blue? é < & ' \" "}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nScattering."}
AGAIN = {"role": "user", "content": "And the sea?"}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sea", "n": 3}}}
TOOL_TALK = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "blue", "name": "look"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Look <there>", "parameters": {"type": "object", "z": 1, "a": []}},
    }
]
DOCUMENTS = [{"title": "Sky", "text": "It is blue."}, {"title": "Sea", "text": "So is it."}]
TALKS = {
    "a question": [USER],
    "with a system prompt": [SYSTEM, USER],
    "two turns": [SYSTEM, USER, ASSISTANT, AGAIN],
    "tools": TOOL_TALK,
}

FORMS = {file.stem: file.read_text("utf-8") for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
"""Templates of public models, some of them shortened."""


def rendered(source, messages, **values):
    return Template(source).render({**SPECIALS, "messages": messages, "tools": None, "documents": None, **values})


def reference(source, messages, *, tools=None, documents=None, **values):
    return render_jinja_template([messages], tools, documents, source, **{**SPECIALS, **values})[0][0]


def outcome(render, *args, **values):
    """The rendered text, or None if rendering fails."""
    try:
        return render(*args, **values)
    except Exception:  # transformers passes on exceptions of Jinja and of Python
        return None


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "values",
    [
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"tools": TOOLS},
        {"documents": DOCUMENTS},
        {"tools": TOOLS, "documents": DOCUMENTS, "enable_thinking": False},
    ],
    ids=lambda values: ", ".join(values),
)
def test_a_form_is_rendered_as_transformers_renders_it(form, talk, values):
    values = {"add_generation_prompt": True, **values}
    expected = outcome(reference, FORMS[form], TALKS[talk], **values)
    assert expected == outcome(rendered, FORMS[form], TALKS[talk], **values)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_renders_a_question(form):
    assert "sky" in rendered(FORMS[form], [USER], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ 1 % 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
        ("{{ (10.0 ** 400) }}", "too large"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 200,000 steps"),
        ("{{ ('a' * 10**18) }}", "too large"),
        ("{{ messages[99].content.strip() }}", "undefined|no element"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{{ messages.append(1) }}", "unsafe|not safe"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ [1, 2][:1].nothing() }}", "no attribute 'nothing'"),
        ("{{ 'x'.encode('no-such') }}", "LookupError"),
        ("{{ [1, 'a'] | sort }}", "TypeError"),
        ("{{ range(1, 2, 0) }}", "ValueError"),
        ("{{ messages | tojson(indent=messages) }}", "TypeError"),
        ("{{ namespace | tojson }}", "TypeError"),
        ("{{ strftime_now(1) }}", "TypeError"),
        ("{% include 'other' %}", "Error|loader"),
        ("{{ {}.popitem() }}", "unsafe|not safe|KeyError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{{ raise_exception('x' * 9999) }}", r"x{300} \.\.\."),
    ],
)
def test_whatever_a_template_raises_is_quoted(source, says):
    text = Text(byte_level(), source, ())
    with pytest.raises(TextError, match=f"refuses these messages: .*({says})") as caught:
        text.chat([USER])
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "source", ["{% if %}", "{% generation %}", "{{", "{% nothing %}", "{{ " + "(" * 9999 + " }}", "{% break %}"]
)
def test_a_template_that_does_not_parse_says_so_when_it_is_loaded(source):
    with pytest.raises(TextError, match="does not parse"):
        Template(source)


def test_today_is_today():
    assert datetime.now().strftime("%Y") == rendered("{{ strftime_now('%Y') }}", [])


TOOLED = {"default": "{{ 'd' }}", "tool_use": "{{ tools | length }}"}


def test_of_several_templates_tools_choose_theirs():
    text = Text(byte_level(), TOOLED, ())
    assert [text.encode("d"), text.encode("1"), text.encode("0")] == [
        text.chat([USER]), text.chat([USER], tools=TOOLS), text.chat([USER], tools=[])
    ]  # fmt: skip


def test_several_templates_without_a_default_are_named():
    text = Text(byte_level(), {"rag": "r", "tool_use": "t"}, ())
    assert text.encode("t") == text.chat([USER], tools=TOOLS)
    with pytest.raises(TextError, match="none of them is 'default': rag, tool_use"):
        text.chat([USER])


def folder(path, config, **files):
    byte_level().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        file = path / {"jinja": "chat_template.jinja", "legacy": "chat_template.json"}.get(
            name, f"additional_chat_templates/{name}.jinja"
        )
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    return Text.from_folder(path)


LISTED = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]


@pytest.mark.parametrize(
    ("configured", "files", "plain", "tooled"),
    [
        ("one", {}, "one", "one"),
        (LISTED, {}, "d", "t"),
        ({"default": "d", "tool_use": "t"}, {}, "d", "t"),
        ("one", {"jinja": "file"}, "file", "file"),
        (None, {"jinja": "file", "tool_use": "more"}, "file", "more"),
        (LISTED, {"jinja": "file"}, "file", "file"),
        (None, {"legacy": '{"chat_template": "old"}'}, "old", "old"),
    ],
)
def test_templates_are_found_wherever_a_folder_has_them(tmp_path, configured, files, plain, tooled):
    text = folder(tmp_path, {"chat_template": configured}, **files)
    assert [text.encode(plain), text.encode(tooled)] == [text.chat([USER]), text.chat([USER], tools=TOOLS)]


def test_special_tokens_have_their_names_and_those_that_are_not_there_are_undefined(tmp_path):
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "pad_token": None,
        "chat_template": "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}",
    }
    text = folder(tmp_path, config)
    assert text.encode("<s></s>False") == text.chat([USER])


def test_a_text_is_the_same_after_it_was_pickled():
    text = Text(byte_level(), TOOLED | {"default": FORMS["smollm_3"]}, (3, 4), SPECIALS, 999)
    text.chat([USER], control=False)
    again = pickle.loads(pickle.dumps(text))  # noqa: S301  # our own
    for copy in (text, again):
        assert (frozenset({3, 4}), 999) == (copy.eos_ids, copy.vocab_size)
    assert text.chat([SYSTEM, USER, ASSISTANT, AGAIN]) == again.chat([SYSTEM, USER, ASSISTANT, AGAIN])
    assert text.chat([USER], tools=TOOLS) == again.chat([USER], tools=TOOLS)
    assert text.chat([{"role": "user", "content": "<|end|>"}], control=False) == again.chat(
        [{"role": "user", "content": "<|end|>"}], control=False
    )
    assert ["é<|end|>", b"\xf0\x9f"] == [
        again.decode(again.encode("é<|end|>"), skip_special=False),
        again.pieces[again.tokenizer.token_to_id("ðŁ")],
    ]


def test_a_key_of_a_message_without_a_value_is_not_there():
    text = Text(byte_level(), "{{ 'tool_calls' in messages[0] }}{{ messages[0].content is defined }}", ())
    assert text.encode("FalseTrue") == text.chat([{"role": "assistant", "content": "", "tool_calls": None}])
