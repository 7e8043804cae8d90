"""Stands for the interpreter of a worker, started as `python -m sami_jax run ...`: plays how each start of a run ends.

runs.jsonl of the folder that CLOUD names gets arguments and some of the environment. outcomes.json there holds a code
for each start, or a list with one for each worker: "preempt" has the node preempted, "wait" ends with 75 on SIGTERM.
"""

import json
import os
import pathlib
import signal
import sys
import time

cloud = pathlib.Path(os.environ["CLOUD"])
worker = int(os.environ["TPU_WORKER_ID"])
runs = cloud / "runs.jsonl"
before = [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []
start = sum(run["worker"] == worker for run in before)
names = ("HF_TOKEN", "HF_HOME", "JAX_PLATFORMS", "OTHER")
outcomes = json.loads((cloud / "outcomes.json").read_text())
outcome = outcomes[min(start, len(outcomes) - 1)]
if isinstance(outcome, list):
    outcome = outcome[worker]
if outcome == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with runs.open("a") as log:
    here = {name: os.environ[name] for name in names if name in os.environ}
    log.write(json.dumps({"worker": worker, "arguments": sys.argv[1:], "environment": here}) + "\n")
print(f"run {start} of worker {worker}", flush=True)
if outcome == "wait":
    time.sleep(60)
if outcome == "preempt":
    for name, state in (("queue.json", "SUSPENDED"), ("node.json", "PREEMPTED")):
        if (cloud / name).exists():
            new = cloud / f"{name}.new"  # another call may be reading
            new.write_text(json.dumps(json.loads((cloud / name).read_text()) | {"state": state}))
            new.replace(cloud / name)
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(outcome))
