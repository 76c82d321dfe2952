"""A format is found by its name, and by what is typical of a chat template."""

import pytest

from stallfree.parsers.formats import FORMATS, choose, named

QWEN = r"""
{%- if tools %}
    {{- "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call>
    XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- endif %}
"""
HERMES = r"""
{{- '{"name": <function-name>, "arguments": <args-dict>}\n' }}
{{- '<tool_call>\n' }}{{- '{"name": "' + tool_call.name + '", "arguments": ' }}{{- '}\n</tool_call>\n' }}
"""
QWEN_CODER = r"""
{{- "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n" }}
{{- "</function>\n</tool_call>" }}
"""
GLM = "{{ '<tool_call>' + tc.name }}\n<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>\n</tool_call>"
LLAMA = r"""
{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
{%- if builtin_tools is defined %}{{- "<|python_tag|>" + tool_call.name + ".call(" }}{%- endif %}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}
"""
LLAMA_4 = r"""
{{- "Respond in the format {\"name\": function name, \"parameters\": dictionary of argument name and its value}. " }}
{{- '<|python_start|>' }}{{- '<|python_end|>' }}
"""
LLAMA_PYTHONIC = r"""
{{- "If you decide to invoke any of the function(s), you MUST put it in the format of
[func_name1(params_name1=params_value1, params_name2=params_value2...), func_name2(params)]\n" }}
{{- '<|python_start|>' }}<|python_tag|>
"""
MISTRAL = """{{ "[TOOL_CALLS][" }}{{ '{"name": "' + tool_call.function.name }}{{ "]" + eos_token }}"""
MAGISTRAL = "{{- '[TOOL_CALLS]' + tool_call['function']['name'] + '[ARGS]' + arguments }}"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN, "hermes"),
        (HERMES, "hermes"),
        (QWEN_CODER, "plain"),
        (GLM, "plain"),
        (LLAMA, "llama_json"),
        (LLAMA_4, "llama_json"),
        (LLAMA_PYTHONIC, "pythonic"),
        (MISTRAL, "mistral"),
        (MAGISTRAL, "mistral"),
        (CHATML, "plain"),
        ("", "plain"),
    ],
)
def test_a_template_shows_its_format(template, expected):
    assert expected == choose(template).name


def test_a_format_is_found_by_its_name():
    for name, format in FORMATS.items():
        assert (format, name) == (named(name), format.name)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'xml' is not known; choose one of hermes, mistral, pythonic, llama_json, plain"):
        named("xml")
