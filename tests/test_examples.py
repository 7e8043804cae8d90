"""The examples run as a reader would run them, and print what they promise."""

import math
import os
import pathlib
import re
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parents[1]


def example_output(name: str) -> str:
    # JAX's own defaults, as in the reader's stack: optax's adam does not run under strict dtype promotion.
    ours = ("JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION", "XLA_FLAGS")
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    environment.update(JAX_PLATFORMS="cpu", PYTHONPATH=str(REPOSITORY))
    command = [sys.executable, str(REPOSITORY / "examples" / name)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_swap_loss_raises_the_bound_towards_its_ceiling():
    output = example_output("swap_loss.py")
    line = re.compile(r"^step +(\d+) +loss (\d+\.\d+) +mi_lower_bound (-?\d+\.\d+) of (\d+\.\d+) nats$", re.MULTILINE)
    lines = line.findall(output)
    assert len(lines) == len(output.splitlines()) > 1
    steps, loss, mi_nats, ceiling = zip(*(map(float, line) for line in lines), strict=True)
    assert set(ceiling) == {round(math.log(3), 4)}
    assert list(loss) == sorted(loss, reverse=True)
    assert list(mi_nats) == sorted(mi_nats)
    # The constitutions hardly matter to the base model (about 0.03 nats); after 60 steps 0.83 of log 3 = 1.10 is known.
    # The margins leave room for another version of the random generators or of optax.
    assert steps[0] == 0 and mi_nats[0] < 0.2
    assert steps[-1] == 60 and 0.7 < mi_nats[-1] <= ceiling[-1]
    assert loss[-1] < 0.4
