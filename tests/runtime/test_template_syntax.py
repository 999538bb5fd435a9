"""How numbers, lists and JSON become text: every expression against jinja2 as transformers sets it up."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_runtime.text.template_helper import TemplateFailure, compile_template
from mpo_runtime.text.template_syntax import PRELUDE, translate
from tests.runtime.test_chat_template import TALK, jinja2_render

DATA: dict[str, Any] = {
    "x": 1.0,
    "small": 1e-05,
    "large": 1e16,
    "whole": 12345678901234567890,
    "negative": -1.5e20,
    "infinite": math.inf,
    "yes": True,
    "text": 'it\'s "q" \n é',
    "numbers": {"f": 2.0, "list": [1.0, 1e-7, None, True, "1e-7"], "nothing": None},
    "mixed": [1e16, 1, None, False, "a'b"],
}
# One expression a line.
EXPRESSIONS = r"""
1.0
1e-5
1e5
1e15
1e16
1e22
0.1
1e-4
1.10
0.00001234
123456.789e3
5e-324
1.7976931348623157e308
-0.0
100000000000000000000
9007199254740993.0
1_000
0x10
1/3
6/2
2*1.0
2**0.5
2**3
7//2
7.0//2
-7//2
-7%3
7.5%2
0.1 + 0.2
1 - 0.5
- x
+x
x
small
large
whole
negative
infinite
yes
none
true
false
None
True
False
missing
1 < 2.5 < 3
x == 1
x is float
1 is number
x is none
none or 1.0
1.0 if yes else 2
[1.0, 2, none, true, 'a', "it's", 'a\nb', x]
{'a': 1.0, 'b': none}
(1.0, 2)
(1,)
1.0, 2
[]
{}
[1e-5, 1e16, {'k': [1e20, "1e-5", '1.0e5']}]
[missing]
numbers
numbers.list
mixed
mixed[0]
[numbers, mixed]
range(3)|list
messages[0]
"a" ~ 1.0
"a" ~ none ~ true ~ 1e20
'a' ~ small ~ 'b' + 'c'
1 ~ 2 ~ -3
1 * 2 ~ 3 * 4
x ~ (small ~ large)
"a" ~ [1.0, none, 1e-5]
'a' ~ x is none
'a' ~ missing
not x ~ ''
[1 ~ 2, 3.0 ~ 4]
{'k': 1e-5 ~ ''}
1.0|string
large|string
-1e20|string
small|string ~ 'a'
'a' + 1e16|string
[1.0, 'b', 1e-5]|string
none|string
true|string
missing|string
(1.0 + 2)|string|length
numbers.f|string|upper
messages|map(attribute='role')|list|string
1.0|tojson
1e20|tojson
1e-7|tojson
x|tojson
whole|tojson
none|tojson
[1.0, 1e16, 2]|tojson
numbers|tojson
numbers.list[0]|tojson
{'b': 1, 'a': 2.0}|tojson(indent=4)
{'b': 1, 'a': [1, {'c': 2}]}|tojson(indent=2)
{'b': 1}|tojson(4)
[]|tojson(indent=2)
{'z': 1, 'a': 2.5}|tojson(sort_keys=true)
[1, 2.0]|tojson(separators=(',', ':'))
[1, 2]|tojson(indent=2, separators=(',', ': '))
'é\u2028</script>&\''|tojson
'é'|tojson(ensure_ascii=true)
text|tojson
{'a': 1.0}|tojson|string|length
[1.0, 2]|map('tojson')|join(' ')
[1.0, 2.5]|join(', ')
[none, true, 1.0]|join('-')
[3.0, 1]|sum
[1.0, 2]|max
2.5|round
2.567|round(2)
x|round|int
'1'|float
1|float
'1.5'|int
'x'|int
'x'|float
'x'|int(7)
'0x1A'|int(0, 16)
none|int
1e20|int
"%s"|format(1.0)
"%s %d %.2f"|format(true, 3, 2.5)
"%s" % x
'%.2f' % x
'%5.1f|%-5s|' % (x, 'a')
"{}".format(1.0)
'{:.2f}'.format(x)
1.5|lower
1.50|string|replace('.', ',')
numbers.items()|list
numbers|dictsort
[2.5, 1]|sort
x|default('d')
'\x41\u00e9\U0001F600\t\\ \'q\' "q"'
"\u200b\N{BULLET}"
'a' 'b'
'abc'[::-1]
messages[-1].content[:4]
loop
strftime_now('%Y')
""".strip().splitlines()


def render(source: str) -> str:
    others = {"tools": None, "documents": None, "add_generation_prompt": False}
    return compile_template(source)({**DATA, **others, "messages": TALK})


def oracle(source: str) -> str:
    return jinja2_render(source, messages=TALK, **DATA)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_prints_what_jinja2_prints(expression: str) -> None:
    for source in (
        "[{{ " + expression + " }}]",
        "{{-" + expression + "-}}  ",
        "{% set v = " + expression + " %}{{ v }}",
        "{% set v %}{{ " + expression + " }}{% endset %}{{ v|length }}",
    ):
        if expression.startswith("1.0, 2") and "set v =" in source:
            continue  # a tuple is written with brackets there
        assert render(source) == oracle(source)


STATEMENTS = [
    "{% for call in [1.0, 1e-5] %}{{ call }}{{ call ~ ',' }}{% if not loop.last %} {% endif %}{% endfor %}",
    "{% for block in messages %}{{ block.role ~ ': ' ~ block.content|trim }}\n{% endfor %}",
    "{% for k, v in numbers.items() recursive %}{{ k }}={{ v }};{% endfor %}",
    "{% for t in [{'v': 1.0, 'c': [{'v': 2e-7, 'c': []}]}] recursive %}{{ t.v }}({{ loop(t.c) }}){% endfor %}",
    "{% macro show(filter, with=1.0) %}<{{ filter }}|{{ with ~ '' }}>{% endmacro %}{{ show(1e-5) }}{{ show(x, with=large) }}",
    "{% macro outer() %}[{{ caller() }}]{% endmacro %}{% call outer() %}{{ small }}{% endcall %}",
    "{% set ns = namespace(total=0.0) %}{% for i in range(3) %}{% set ns.total = ns.total + 0.5 %}{% endfor %}{{ ns.total }}",
    "{% if 'a' ~ 1.0 == 'a1.0' and x is not none %}yes{% elif 1 ~ 2 in '12' %}no{% endif %}",
    "{% set text = 'a' ~ small if x else 'b' %}{{ text }}{%- set y = 1 -%} {{- y }}",
    "{% filter upper %}{{ small }}{% endfilter %}",
    "{# {{ 1e-5 }} #}{% raw %}{{ 1e-5 }} {% if %}{%- endraw %}{{ 1e-5 }}",
    "{{ {'a': {'b': {}}} }}{{ '}}' ~ '%}' }}{{ \"{{ x }}\" }}",
    "1e-5|string {{ x }} a ~ b \\n {%- if true %}\n  {{ small }}\n{% endif %}\n",
    "{{ messages|length ~ ' of ' ~ (messages|length / 1) }}{{ [1, 2][0] ~ messages[0]['role'] }}",
    "{{ (x if x else small) ~ '' }}{{ x\n~\n'b' }}{{ - 1 ~ '' }}{{ 2 - 1 ~ '' if false }}",
    "{{ raise_exception('no') if false }}{{ 1 if x is none else 2 }}",
    "{{ 3 is not divisibleby 2 and x }}{{ x is none or x is in [1.0] }}{{ 'a' ~ 4 is divisibleby(2) ~ 1e-5 }}",
    "{%- for m in messages -%}{%- if m.role == 'user' and m.content is string -%}{{ m.content }}{%- endif -%}{%- endfor %}",
    "{% generation %}{{ 1e-5 }}{% endgeneration %}",
]


@pytest.mark.parametrize("source", STATEMENTS)
def test_statements_print_what_jinja2_prints(source: str) -> None:
    assert render(source) == oracle(source)


@given(st.floats(), st.floats(allow_nan=False))
def test_any_float_of_the_data(value: float, other: float) -> None:
    source = "{{ v }} {{ [v, w] }} {{ v ~ w }} {{ w|string }} {{ w + 1 }}"
    source += "{% for k, a in d.items() %}{{ a }}{{ a|tojson }}{% endfor %}"
    data = {"v": value, "w": other, "d": {"k": other}}
    if math.isinf(other):
        source = source.replace("{{ a|tojson }}", "")  # no JSON
    rendered = compile_template(source)({**data, "messages": []})
    assert rendered == jinja2_render(source, messages=[], **data)


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**63)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab<'\"", max_size=3), inner, max_size=3),
        max_leaves=8,
    )
)
def test_any_data_as_json(value: Any) -> None:
    source = "{{ v|tojson }}\n{{ v|tojson(indent=2) }}\n{{ [v, 1.0]|tojson(sort_keys=true, ensure_ascii=true) }}"
    rendered = compile_template(source)({"v": value, "messages": []})
    assert rendered == jinja2_render(source, messages=[], v=value)


@pytest.mark.parametrize(
    "source", ["{{ x", "{{ x ) }}", "{% if", "{{ a | }}", "{{ ` }}", "{{ 'a }}", "{% set x = %}", "{{ ~ }}", "{# x"]
)
def test_templates_that_are_not_valid_keep_minijinjas_message(source: str) -> None:
    try:
        compile_template(source)
    except TemplateFailure as error:
        assert "__" not in str(error)


def test_text_outside_tags_is_kept() -> None:
    for text in ("", "plain {x} | tojson 1e-5 ~\n", "{# a #}b{% raw %}{{ x }}{% endraw %}"):
        assert translate(text) == PRELUDE + text
    assert translate("{{ x") == "{{ x"
    deep = "{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}"
    assert translate(deep) == deep
