"""An exception in a chat template becomes the request's error, in the template's words."""

import pytest

from stallfree.engine.assemble import bytes_as_text
from stallfree.engine.text import Text
from tests.server.conftest import Server
from tests.server.test_bad_input import CHAT, HELLO, error_of

TEMPLATE = """{% macro again() %}{{ again() }}{% endmacro %}{% set said = messages[-1].content %}
{%- if said == 'zero' %}{{ 1 / 0 }}{% elif said == 'recursion' %}{{ again() }}
{%- elif said == 'overflow' %}{% for i in range(10**9) %}{% endfor %}{% elif said == 'memory' %}{{ 'a' * 10**18 }}
{%- elif said == 'missing' %}{{ messages[5].content }}{% elif said == 'refuse' %}{{ raise_exception('not you') }}{% endif %}
{{- said }}"""


@pytest.fixture(scope="module")
def server():
    with Server(text=Text(bytes_as_text().tokenizer, TEMPLATE, ())) as running:
        yield running
        running.settled()


@pytest.mark.parametrize(
    ("content", "quoted"),
    [
        ("zero", "ZeroDivisionError: division by zero"),
        ("recursion", "RecursionError"),
        ("overflow", "OverflowError: Range too big"),
        ("memory", "too large"),
        ("missing", "has no element 5"),
        ("refuse", "not you"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_a_template_s_error_is_a_400_that_quotes_it(server, path, content, quoted):
    error = error_of(server.post(path, {"messages": [{"role": "user", "content": content}]}), 400)
    assert "messages" == error["param"]
    assert quoted in error["message"]
    assert 200 == server.post(CHAT, {"messages": HELLO, "max_tokens": 1}).status_code
