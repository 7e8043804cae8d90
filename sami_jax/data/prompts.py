"""Prompts: a template, a constitution and a query become the text a model continues."""

from sami_jax.errors import BadConfigError

FIELDS = ("{constitution}", "{query}")


def check_template(template: str, *, field: str) -> None:
    """Refuses a template without its two places. Raises BadConfigError naming the config field."""
    for place in FIELDS:
        if template.count(place) != 1:
            raise BadConfigError(f"{field} must contain {place} exactly once.")


def render(template: str, *, constitution: str, query: str) -> str:
    """The prompt text; braces inside the constitution or the query stay as they are."""
    before, _, after = template.partition("{constitution}")
    if "{query}" in before:
        return before.replace("{query}", query) + constitution + after
    return before + constitution + after.replace("{query}", query)
