"""A `gcloud` that keeps one TPU as files, runs what is sent to its workers here, and fails or stalls as it was told.

Its folder, $STUB: calls.jsonl, every command line; plan.json, {"workers": 2, "fail": {"ssh": 1}, "stall": {"scp": 1}};
node and queue, the states; worker-0 …, the workers' home folders.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

STUB = Path(os.environ["STUB"])


def main(words: list[str]) -> int:
    with (STUB / "calls.jsonl").open("a") as file:
        file.write(json.dumps(words) + "\n")
    kind, verb, name = words[2], words[3], words[4]
    options = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    plan = json.loads((STUB / "plan.json").read_text())
    if take(plan, "stall", verb):
        time.sleep(60)
    if take(plan, "fail", verb):
        print("ERROR: the server could not complete the request", file=sys.stderr)
        return 1
    if verb == "scp":
        source, target = words[4], words[5].split(":")[1]
        for home in homes(plan):
            shutil.copy(source, home / target)
        return 0
    if verb == "ssh":
        started = [start(home, options["--command"]) for home in homes(plan, options["--worker"])]
        return max(process.wait() for process in started)
    state = STUB / ("queue" if kind == "queued-resources" else "node")
    if verb == "create":
        if kind == "queued-resources":
            (STUB / "queue").write_text("ACTIVE")
        (STUB / "node").write_text("READY")
        return 1 if take(plan, "fail_late", verb) else 0
    if not state.exists():
        print(f"ERROR: NOT_FOUND: {name}", file=sys.stderr)
        return 1
    if verb == "delete":
        for path in (STUB / "queue", STUB / "node"):
            path.unlink(missing_ok=True)
        for home in homes(plan):
            shutil.rmtree(home)
        return 0
    assert verb == "describe"
    print(plan["workers"] if "networkEndpoints" in options["--format"] else state.read_text())
    return 0


def take(plan: dict, what: str, verb: str) -> bool:
    left = plan.get(what, {}).get(verb, 0)
    if left:
        plan[what][verb] = left - 1
        (STUB / "plan.json").write_text(json.dumps(plan))
    return left > 0


def homes(plan: dict, worker: str = "all") -> list[Path]:
    numbers = range(plan["workers"]) if worker == "all" else [int(worker)]
    folders = [STUB / f"worker-{n}" for n in numbers]
    for folder in folders:
        if not folder.exists():
            shutil.copytree(STUB / "new-machine", folder)
    return folders


def start(home: Path, command: str) -> subprocess.Popen:
    """As sshd would: the user's shell is given the command as one string."""
    environment = os.environ | {"HOME": str(home), "WORKER": home.name}
    return subprocess.Popen(["bash", "-c", command], env=environment, cwd=home)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
