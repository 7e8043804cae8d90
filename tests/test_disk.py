"""How much disk a run takes at its fullest: by hand for small cases."""

import pytest

from sami_jax.config.training import TrainConfig
from sami_jax.disk import human, peak_bytes


@pytest.mark.parametrize(
    ("steps", "settings", "expected"),
    [
        # One save: a checkpoint (12), then the export (4) beside it.
        ([2], {"checkpoint_every": 10}, 16),
        # Two saves are both kept: 24, and 4.
        ([11], {"checkpoint_every": 10}, 28),
        # The third is written before the first is deleted: 36.
        ([30], {"checkpoint_every": 10}, 36),
        # The checkpoints of an iteration are gone when the next begins, its export is not: 4 + 4 + 36.
        ([30, 30, 30], {"checkpoint_every": 10}, 44),
        # The first iteration may be the fullest.
        ([30, 1], {"checkpoint_every": 10}, 36),
        # Kept, they add up: twice 28, and 36.
        ([30, 30, 30], {"checkpoint_every": 10, "keep_checkpoints": True}, 92),
    ],
)
def test_the_fullest_moment(steps, settings, expected):
    assert peak_bytes(TrainConfig(**settings), steps, state=12, weights=4) == expected


def test_sizes_are_read_at_a_glance():
    assert [human(size) for size in (0, 2_600_000, 84_000_000_000)] == ["0.0 MB", "2.6 MB", "84.0 GB"]
