from __future__ import annotations

import jinja2.sandbox
import pytest

from castalia.data import template_bounds
from castalia.data.template import compile_template

MESSAGES = [{"role": "user", "content": "Ask, <b>and</b> it shall be given you. " * 3}] * 3
LOOP = "{{% for i in range(64) %}}{}{{% endfor %}}"
NESTED = "{{% set ns = namespace(x={}) %}}" + LOOP.replace("64", "60") + "{{{{ ns.x | {} }}}}"
HOSTILE = {
    "concatenation": NESTED.format("'xx'", "{% set ns.x = ns.x ~ ns.x %}", "length"),
    "concatenation of lists": NESTED.format("['xx']", "{% set ns.x = ns.x + ns.x %}", "length"),
    "addition": NESTED.format("'xx'", "{% set ns.x = ns.x + ns.x %}", "length"),
    "self-containing output": NESTED.format(
        "'xx'", "{% set b %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = b %}", "length"
    ),
    "join": NESTED.format("'xx'", "{% set ns.x = [ns.x, ns.x] | join(ns.x) %}", "length"),
    "join method": NESTED.format("'xx'", "{% set ns.x = ns.x.join([ns.x, ns.x]) %}", "length"),
    "replace": NESTED.format("'xx'", "{% set ns.x = ns.x.replace('x', ns.x) %}", "length"),
    "replace filter": NESTED.format("'xx'", "{% set ns.x = ns.x | replace('x', ns.x) %}", "length"),
    "replace within map": "{{ ['x' * 9999] | map('replace', 'x', 'y' * 9999) | list }}",
    "nested lists": NESTED.format("'x'", "{% set ns.x = [ns.x, ns.x] %}", "string"),
    "nested dicts": NESTED.format("'x'", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}", "tojson"),
    "nested dict calls": NESTED.format("'x'", "{% set ns.x = dict(a=ns.x, b=ns.x) %}", "tojson"),
    "nested namespaces": NESTED.format("1", "{% set ns.x = namespace(a=ns.x, b=ns.x) %}", "string"),
    "compared nests": NESTED.format("1", "{% set ns.x = [ns.x, ns.x] %}", "list == []"),
    "format": "{{ '{:>99999999}'.format('x') }}",
    "format by index": "{{ '{:>{}}'.format('x', 99999999) }}",
    "format map": "{{ '{x:>99999999}'.format_map({'x': 1}) }}",
    "many formats": "{{ ('{0:>99999}' * 999).format('x') }}",
    "percent": "{{ '%99999999s' % 'x' }}",
    "percent star": "{{ '%*d' % (99999999, 1) }}",
    "format filter": "{{ '%99999999s' | format('x') }}",
    "repetition": "{{ 'x' * 10**9 }}",
    "repetition of lists": "{{ ([0] * 10**8) | length }}",
    "multiplication by a size": "{{ 10**9 * 'x' }}",
    "center": "{{ 'x'.center(10**9) }}",
    "zfill": "{{ 'x'.zfill(999999999) }}",
    "expandtabs": "{{ ('\t' * 999).expandtabs(99999) }}",
    "center filter": "{{ 'x' | center(10**9) }}",
    "indent": "{{ ('x\n' * 9999) | indent(9999) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list | length }}",
    "slices": "{{ [1] | slice(10**9) | list | length }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "powers": "{{ 10 ** (10 ** 9) }}",
    "powers of powers": "{{ (10 ** 900) ** 900 }}",
    "squares": NESTED.format("3", "{% set ns.x = ns.x * ns.x %}", "string"),
    "long loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "long output": "{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}",
    "output of a value": "{% set x = 'x' * 99999 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "doubling recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
    "recursive loop": "{% for i in range(99) recursive %}{{ loop(range(99)) }}{% endfor %}",
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "own loops": "{% for i in range(99999) if range(99999) | list %}{% endfor %}",
    "ranges": "{% for i in range(9999) %}{{ (range(99999) | list) | length }}{% endfor %}",
    "sorting": "{% set x = range(99999) | list %}{% for i in range(9999) %}{% set y = x | sort %}{% endfor %}",
    "searching": "{% set x = 'x' * 999999 %}{% for i in range(99999) %}{% if 'y' in x %}{% endif %}{% endfor %}",
    "searching a list": "{% set x = range(99999) | list %}{% for i in range(99999) %}{{ -1 in x }}{% endfor %}",
    "comparing": "{% set x, y = 'x' * 999999, 'x' * 999999 %}{% for i in range(99999) %}{{ x == y }}{% endfor %}",
    "slicing": "{% set x = 'x' * 999999 %}{% for i in range(99999) %}{% set y = x[1:] %}{% endfor %}",
    "slow filter": "{% set x = 'word ' * 9999 %}{% for i in range(9999) %}{% set y = x | wordwrap(9) %}{% endfor %}",
    "taken names": "{% macro run() %}{% endmacro %}{% set built, joined = 1, 1 %}{% for i in range(9) %}"
    "{{ 'x' * 10**9 }}{% endfor %}",
    "random text": "{{ lipsum(n=100000) }}",
    "date": "{{ strftime_now('%99999999d') }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_line(name: str) -> None:
    render, _ = compile_template(HOSTILE[name])
    with pytest.raises(ValueError, match=r"^the chat template does not render: [^\n]+$"):
        render(messages=MESSAGES)


ORDINARY = [
    "{% for m in messages %}<|{{ m.role ~ '|>' ~ m['content'] }}{{ loop.index0 * 2 + 1 }}{% endfor %}",
    "{% if 1 < messages | length <= 3 and 'and' in messages[0].content and 'no' not in 'yes' %}yes"
    "{% else %}no{% endif %}",
    "{% for m in messages[::-1] %}{{ m.content.split('</b>')[-1].strip() }}{% if not loop.last %}, "
    "{% endif %}{% endfor %}",
    "{% macro turn(m, end='!') %}{{ m.content | trim }}{{ end }}{% endmacro %}{% for m in messages %}"
    "{{ turn(m) }}{% endfor %}",
    "{% set ns = namespace(found=none) %}{% for m in messages if m.role == 'user' %}{% set ns.found = m %}{% endfor %}"
    "{{ ns.found is mapping }}{{ ns.found['content'] is string }}{{ ns.missing is defined }}"
    "{{ nothing }}{{ x is undefined }}",
    "{% for key, value in {'a': [1, 2], 'b': (3,)}.items() %}{{ key }}={{ value | join('+') }};{% endfor %}",
    "{{ '%05.1f of %s' % (2.5, 'a') }}{{ '{} {:>8}'.format('a', 1700000000) }}{{ 1700000000 | round }}{{ -7 // 2 }}",
    "{{ messages | map(attribute='role') | list | unique | join('/') }}{{ [3, 1] | sort }}{{ 'a\nb' | indent(4) }}",
    "{% set text %}a{{ 1 == 1.0 }}b{% endset %}{{ text | upper }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{% call(x) outer() %}[{{ x }}]{% endcall %}{{ 7 is even }}{% set a, b = 1, 2 %}"
    "{{ a if a >= b else b }}{{ 2 ** 10 }}",
]


@pytest.mark.parametrize("template", ORDINARY)
def test_what_ordinary_templates_render_is_jinjas(template: str) -> None:
    template = "{% macro outer() %}{{ caller('in') }}{% endmacro %}\n" + template
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert compile_template(template)[0](messages=MESSAGES).text == plain.from_string(template).render(
        messages=MESSAGES
    )


def test_bounds_grow_with_the_conversation() -> None:
    long = [{"role": "user", "content": "x" * 20}] * 3000
    template = (
        "{% for m in messages %}{{ m.content | trim }}{{ messages | length }}{{ 'a' in m.content }}{% endfor %}" * 9
    )
    assert len(compile_template(template)[0](messages=long).text) == 9 * 3000 * 29
    assert template_bounds.MAX_STEPS < 9 * 3000 * 8
