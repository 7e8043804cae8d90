"""Stands for kubectl and the cluster behind it: plays a JobSet here, pods by pods, as its manifest says.

CLUSTER names a folder: kubectl.jsonl gets the arguments, jobset.yaml the manifest, jobset.json how it ended.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import yaml

cluster = pathlib.Path(os.environ["CLUSTER"])
root = pathlib.Path(__file__).parents[2]
with (cluster / "kubectl.jsonl").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\n")
if "create" not in sys.argv:
    sys.exit()
if (cluster / "jobset.yaml").exists():
    print("Error from server (AlreadyExists): error when creating STDIN", file=sys.stderr)
    sys.exit(1)
text = sys.stdin.read()
(cluster / "jobset.yaml").write_text(text)
jobset = yaml.safe_load(text)
(replicated,) = jobset["spec"]["replicatedJobs"]
job = replicated["template"]["spec"]
pod = job["template"]["spec"]
(container,) = pod["containers"]


def filled_in(value):
    """As Kubernetes does in `args` and values: `$(NAME)` of the environment, `$$` for a dollar."""

    def one(match):
        return "$" if match[0] == "$$" else os.environ.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([A-Za-z_]\w*)\)", one, value)


def start_pods(attempt):
    count = job["completions"]
    for number in range(count):
        environment = os.environ | {
            "JOB_COMPLETION_INDEX": str(number),
            "TPU_WORKER_ID": str(number),
            "TPU_WORKER_HOSTNAMES": ",".join(f"host-{i}" for i in range(count)),
        }
        for variable in container["env"]:
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                value = "value of {name}/{key}".format(**source["secretKeyRef"])
            elif "fieldRef" in source:
                assert source["fieldRef"]["fieldPath"] == "metadata.labels['jobset.sigs.k8s.io/restart-attempt']"
                value = str(attempt)
            else:
                value = filled_in(variable["value"])
            environment[variable["name"]] = value
        command = [word.replace("/opt/sami", str(root)) for word in container["command"]]
        command += [filled_in(word) for word in container["args"]]
        with (cluster / f"pod-{number}.log").open("a") as log:
            yield subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


attempt = 0
while True:
    pods = list(start_pods(attempt))
    (cluster / "pods.json").write_text(json.dumps([process.pid for process in pods]))
    codes = [process.wait() for process in pods]
    failed = [code for code in codes if code]
    if not failed:
        outcome = "Completed"
        break
    (rule,) = job["podFailurePolicy"]["rules"]
    by_policy = rule["action"] == "FailJob" and set(failed) & set(rule["onExitCodes"]["values"])
    assert job["backoffLimit"] == 0
    reason = "PodFailurePolicy" if by_policy else "BackoffLimitExceeded"
    rules = jobset["spec"]["failurePolicy"]["rules"]
    action = next((rule["action"] for rule in rules if reason in rule["onJobFailureReasons"]), "RestartJobSet")
    if action == "FailJobSet" or attempt == jobset["spec"]["failurePolicy"]["maxRestarts"]:
        outcome = "Failed"
        break
    attempt += 1
(cluster / "jobset.json").write_text(json.dumps({"outcome": outcome, "restarts": attempt, "codes": codes}))
