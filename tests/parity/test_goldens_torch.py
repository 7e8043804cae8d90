"""The goldens are what torch says today: made anew, and compared with the files."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDENS = Path(__file__).parents[1] / "goldens"
sys.path.insert(0, str(GOLDENS))

import make_families  # noqa: E402
import make_losses  # noqa: E402


def test_the_losses_are_made_again():
    kept, made = json.loads((GOLDENS / "losses.json").read_text()), make_losses.goldens()
    assert kept["script"] == made["script"], "run python tests/goldens/make_losses.py"
    assert kept.keys() == made.keys()
    for name in kept.keys() - {"script", "made_by"}:
        for before, now in zip(leaves(kept[name]), leaves(made[name]), strict=True):
            np.testing.assert_allclose(
                now, before, rtol=1e-12, atol=1e-12, err_msg=name
            )  # float64, summed in any order


def leaves(value: Any) -> list[float]:
    """The numbers of a JSON value, in order."""
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]
    return [float(value)]


@pytest.mark.parametrize("family", make_families.MADE)
def test_a_family_is_made_again(family):
    with np.load(GOLDENS / f"{family}.npz") as file:
        kept = dict(file)
    assert str(kept["script"]) == make_families.script_hash(), "run python tests/goldens/make_families.py"
    made = make_families.goldens(family)
    assert kept.keys() == made.keys()
    for name in kept.keys() - {"versions", "config"}:  # another transformers may write other keys into config.json
        if np.issubdtype(kept[name].dtype, np.floating):
            # Other builds of torch sum in another order.
            np.testing.assert_allclose(made[name], kept[name], rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(made[name], kept[name], err_msg=name)
