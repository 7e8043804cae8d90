"""A comparison's numbers as a table for the terminal."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

_NAMED = 5  # of a list of names, so many are shown
_WIDTH = 60  # of a principle


def comparison_table(summary: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """Who won, how sure that is, and what was left out, in lines.

    Args:
      summary: of `comparison.summarize_pairs`.
      details: of `comparison.detail_pairs`.
    """
    counts = "{wins} won, {ties} tied, {losses} lost, {inconsistent} inconsistent".format_map(summary)
    rows = [
        ("win rate", f"{_rate(summary['win_rate'])}   {counts}"),
        ("  Wilson, bootstrap", " ".join(_ends(details[f"win_rate_{name}"]) for name in ("wilson", "bootstrap"))),
        ("  t, p", f"{_number(summary['t'], '.2f')}, {_number(summary['p'], '.2g')}"),
        ("length-balanced", _corrected(summary["length_balanced"])),
        ("length-corrected", _corrected(summary["length_corrected"])),
        ("  words", _words(details["words"])),
    ]
    if summary["position_bias"]:
        rows.append(("first shown wins", f"{_rate(summary['position_bias'])} of all pairs; 50 % is no bias"))
    if details["inconsistency"]:
        rows.append(("inconsistent", f"{_rate(details['inconsistency'])} of all pairs judged in both orders"))
    left_out = f"; {summary['excluded']} queries without a verdict in every order are left out" * bool(
        summary["excluded"]
    )
    rows.append(("coverage", f"{summary['n']} queries, {summary['coverage']:.1%}{left_out}"))
    rows += _power(details["power"], summary["n"])
    if summary["cost_usd"]:
        rows.append(("cost", f"${summary['cost_usd']:.4f}"))
    lines = [f"{label:20} {text}" for label, text in rows]
    principles = _principles(summary["per_principle"])
    if principles and details["orders"] and not details["per_principle"]:
        principles.append("(of whole constitutions that ask for it; --per_principle has each principle judged alone)")
    return "\n".join([f"judge: {details['judge']}", *lines, *principles, *_left_out(details)])


def _principles(per_principle: Mapping[str, Any]) -> list[str]:
    if not per_principle:
        return []
    lines = [f"{'principle':{_WIDTH}}  win rate               n      p (Holm)"]
    for name, found in per_principle.items():
        short = textwrap.shorten(name, _WIDTH, placeholder="...")
        p, rate = _number(found["p_holm"], ".2g"), _rate(found["win_rate"])
        lines.append(f"{short:{_WIDTH}}  {rate:22} {found['n']:<6} {p:8} {found['verdict']}")
    return lines


def _left_out(details: Mapping[str, Any]) -> list[str]:
    what = {
        "inconsistent": "whose two orders name different winners",
        "excluded": "without a verdict",
        "only_in_responses": "answered in --responses alone",
        "only_in_baseline": "answered in --baseline alone",
        "answered_under_another_constitution": "that the baseline answered under another constitution",
    }
    return [f"{len(names)} {text}: {_names(names)}" for key, text in what.items() if (names := details[key])]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f", and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _power(power: Mapping[str, Any], n: int) -> list[tuple[str, str]]:
    needed, found = power["queries_for_a_difference_of_0.05"], power["detectable_difference"]
    if not needed:
        return []
    text = f"{n} queries find a difference of {100 * found:.1f} points; " if found else ""
    return [("power of 80 %", f"{text}5 points need {needed}")]


def _corrected(found: Mapping[str, Any]) -> str:
    return f"not defined: {found['undefined']}" if found["undefined"] else _rate(found)


def _rate(found: Mapping[str, Any]) -> str:
    if found["mean"] is None:
        return "not defined: no query has a score"
    return f"{100 * found['mean']:.2f} % {_ends(found)}".rstrip()


def _ends(found: Mapping[str, Any] | None) -> str:
    if not found or found["low"] is None:
        return ""
    return f"[{100 * found['low']:.2f}, {100 * found['high']:.2f}]"


def _words(found: Mapping[str, Any]) -> str:
    return f"{found['response']['mean']:.1f}, the baseline's {found['baseline']['mean']:.1f}"


def _number(value: float | None, spec: str) -> str:
    return "not defined" if value is None else format(value, spec)
