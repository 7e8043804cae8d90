"""Stands for gcloud: a cloud of one TPU node, played in a folder, whose workers are folders and whose ssh is bash.

CLOUD names the folder. There, calls.jsonl gets the arguments of each call, script.json may hold what the next calls
answer ({"describe": ["READY", "!UNAVAILABLE: try again"], "create": [...], "ssh": [...]}; with `!` a failure and its
words, null for what really is), node.json the state and how often the node was made, queue.json the request for it.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from subprocess import PIPE

cloud = pathlib.Path(os.environ["CLOUD"])
arguments = sys.argv[1:]
flags = dict(argument[2:].partition("=")[::2] for argument in arguments if argument.startswith("--"))
words = [argument for argument in arguments if not argument.startswith("--")]
workers = int(os.environ.get("CLOUD_WORKERS", "2"))


def read(name, otherwise):
    file = cloud / name
    return json.loads(file.read_text()) if file.exists() else otherwise


def write(name, record):  # another call may be reading
    new = cloud / f"{name}.{os.getpid()}"
    new.write_text(json.dumps(record))
    new.replace(cloud / name)


def fail(message):
    print(f"ERROR: (gcloud.{'.'.join(words[:4])}) {message}", file=sys.stderr)
    sys.exit(1)


def as_scripted(kind):
    script = read("script.json", {})
    if not script.get(kind):
        return None
    answer = script[kind].pop(0)
    write("script.json", script)
    if answer is not None and answer.startswith("!"):
        fail(answer[1:])
    return answer


def home(worker):
    folder = cloud / f"node-{node['made']}" / f"worker-{worker}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def on(worker, command, stdout=None):
    environment = os.environ | {
        "HOME": str(home(worker)),
        "TPU_WORKER_ID": str(worker),
        "TPU_WORKER_HOSTNAMES": ",".join(f"host-{i}" for i in range(workers)),
    }
    return subprocess.Popen(
        command, env=environment, cwd=home(worker), stdin=subprocess.DEVNULL, stdout=stdout, text=True
    )


def make():
    node.update(state="READY", made=node["made"] + 1)
    write("node.json", node)
    startup = flags.get("metadata-from-file", "").removeprefix("startup-script=")
    if startup:
        kept = cloud / f"startup-{node['made']}.sh"
        shutil.copyfile(startup, kept)
        said = [process.communicate()[0] for process in [on(worker, ["bash", kept], PIPE) for worker in range(workers)]]
        write(f"boot-{node['made']}.json", said)


with (cloud / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps(arguments) + "\n")
node = read("node.json", {"state": "ABSENT", "made": 0})
queue = read("queue.json", {"state": "ABSENT"})

if words[:3] == ["secrets", "versions", "access"]:
    print(f"value of {flags['secret']}")
    sys.exit()
group, verb, name = words[2:5]
scripted = as_scripted("queue" if (group, verb) == ("queued-resources", "describe") else verb)
if verb == "describe":
    state = scripted or (queue if group == "queued-resources" else node)["state"]
    if state == "ABSENT":
        fail(f"NOT_FOUND: Resource 'projects/p/locations/z/nodes/{name}' was not found")
    print(state)
elif verb == "create":
    if group == "queued-resources":
        write("queue.json", {"state": "ACTIVE"})
    make()
elif verb == "delete":
    (cloud / "queue.json").unlink(missing_ok=True)
    node["state"] = "ABSENT"
    write("node.json", node)
elif node["state"] != "READY":
    print("ssh: connect to host port 22: Connection timed out", file=sys.stderr)
    sys.exit(255)
elif verb == "ssh":
    asked = range(workers) if flags["worker"] == "all" else [int(flags["worker"])]
    codes = [process.wait() for process in [on(worker, ["bash", "-c", flags["command"]]) for worker in asked]]
    sys.exit(next((code for code in codes if code), 0))
elif verb == "scp":
    *files, target = words[4:]
    for worker in range(workers):
        for file in files:
            shutil.copy(file, home(worker) / target.partition(":")[2])
elif verb == "start":
    node["state"] = "READY"
    write("node.json", node)
