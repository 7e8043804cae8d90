"""Running out of memory says what helps, for each of the ways in which it is told."""

import jax.numpy as jnp
import numpy as np
import pytest

from sami_jax.errors import BadDataError, ExitCode, OutOfMemoryError, enough_memory, exit_code, is_out_of_memory

TPU = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.10G of "
    "15.48G hbm. Exceeded hbm capacity by 4.62G."
)
GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes."


def told(text: str):
    def fail():
        raise RuntimeError(text)

    return fail


@pytest.mark.parametrize(
    ("fail", "how_much"),
    [
        (lambda: jnp.zeros(2**44), " (70368.7 GB more at once)"),  # XLA's own, on this platform
        (lambda: np.zeros(2**55), " (256. PiB more at once)"),
        (lambda: [0] * 2**60, ""),
        (told(TPU), " (it takes 20.10G of a device's 15.48G)"),
        (told(GPU), " (17.2 GB more at once)"),
    ],
)
def test_what_was_missing_and_what_helps(fail, how_much):
    with pytest.raises(OutOfMemoryError) as caught, enough_memory("sampling 8 rows", "lower --rows", "", "buy more"):
        fail()
    assert str(caught.value) == f"out of memory sampling 8 rows{how_much}: lower --rows; buy more."
    assert exit_code(caught.value) == ExitCode.NON_FINITE == 70
    assert is_out_of_memory(caught.value.__cause__)


@pytest.mark.parametrize("error", [ValueError("no"), BadDataError("bad."), KeyboardInterrupt()])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, enough_memory("sampling", "lower --rows"):
        raise error
    assert caught.value is error
