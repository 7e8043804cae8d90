"""Prompts: a template, a constitution and a query become the text a model continues."""


def render(template: str, *, constitution: str, query: str) -> str:
    """The prompt text; braces inside the constitution or the query stay as they are."""
    before, _, after = template.partition("{constitution}")
    if "{query}" in before:
        return before.replace("{query}", query) + constitution + after
    return before + constitution + after.replace("{query}", query)
