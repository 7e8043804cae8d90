"""Prompts put constitution and query in their places, and read nothing into them."""

import pytest

from sami_jax.data.prompts import render


def test_by_hand():
    assert render("A {constitution} B {query} C", constitution="1. x", query="q") == "A 1. x B q C"


def test_the_query_may_come_first():
    assert render("{query}|{constitution}", constitution="c", query="q") == "q|c"


@pytest.mark.parametrize("template", ["{constitution}\n{query}\nSummary:", "{query}\n{constitution}\nSummary:"])
@pytest.mark.parametrize("text", ["{query}", "{constitution}", "{}", "{0!r}", "%s", "{{query}}", "\\1 $& {", "}{"])
def test_nothing_inside_the_texts_is_a_place(template, text):
    for constitution, query in ((text, "Q"), ("C", text), (text, text)):
        first, second = (constitution, query) if template.startswith("{constitution}") else (query, constitution)
        assert render(template, constitution=constitution, query=query) == f"{first}\n{second}\nSummary:"


def test_other_braces_of_the_template_stay():
    assert render("{x} {constitution} {{query}}", constitution="c", query="q") == "{x} c {q}"
