"""tpu_setup.sh against a stub of gcloud: its workers are folders here, their scaling-jax is a few lines of bash."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "tpu_setup.sh"
ODD = ["a b", "it's", '"quoted"', "$HOME", "`id`", "back\\slash", "*", "two\nlines", "", "--x=$(id)", "ü;&|"]

HOSTNAME = '#!/bin/bash\necho "$WORKER"\n'
UV = """#!/bin/bash
case "$1" in
  --version) echo "uv $(sed -n 's/^UV_VERSION=//p' "$SCRIPT") (stub)" ;;
  venv) mkdir -p .venv/bin && cp "$STUB/scaling-jax" "$STUB/python" .venv/bin ;;
esac
"""
PYTHON = '#!/bin/bash\necho "$WORKER: Python, ${*: -1} workers"\n'
BARE_PYTHON = f"{sys.executable} -IS"  # starts in a fifth of the time
SCALING_JAX = f"""#!/bin/bash
{BARE_PYTHON} -c 'import json, os, sys; print(json.dumps([os.environ["SCALING_JAX_RUN_ID"], sys.argv[1:]]))' "$@" \
    >>"$STUB/ran-$WORKER"
echo "hello from scaling-jax"
source "$STUB/behaviour"
"""


class Cloud:
    """A folder that the stub keeps its TPU in."""

    def __init__(self, folder: Path):
        self.folder = folder
        for path, text in {
            "bin/gcloud": f'#!/bin/bash\nexec {BARE_PYTHON} {ROOT / "tests" / "stub_gcloud.py"} "$@"\n',
            "bin/hostname": HOSTNAME,
            "new-machine/.local/bin/uv": UV,
            "python": PYTHON,
            "scaling-jax": SCALING_JAX,
            "behaviour": "",
            "checkout/tpu_setup.sh": SCRIPT.read_text(),
            "checkout/.gitignore": "results/",
            "checkout/results/large": "",
            "checkout/experiments/mine.py": "EXPERIMENT = None",
            "calls.jsonl": "",
        }.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
            (folder / path).chmod(0o755)
        subprocess.run(["git", "init", "--quiet", folder / "checkout"], check=True)
        self.plan()

    def plan(self, workers=1, **failures):
        (self.folder / "plan.json").write_text(json.dumps({"workers": workers} | failures))

    def ready(self):
        (self.folder / "node").write_text("READY")

    def behave(self, bash):
        (self.folder / "behaviour").write_text(bash)

    def __call__(self, *words, **environment):
        settings = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "STUB": str(self.folder),
            "SCRIPT": str(SCRIPT),
            "TPU_SETUP_BACKOFF_SECONDS": "0",
            "TPU_SETUP_POLL_SECONDS": "0.1",
            "TPU_SETUP_WAIT_SECONDS": "0",
        }
        return subprocess.run(
            ["bash", str(self.folder / "checkout" / "tpu_setup.sh"), *words],
            env=os.environ | settings | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    @property
    def calls(self):
        return [json.loads(line) for line in (self.folder / "calls.jsonl").read_text().splitlines()]

    @property
    def verbs(self):
        return [call[3] for call in self.calls]

    def ran(self, worker=0):
        path = self.folder / f"ran-worker-{worker}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_the_end(self, run_id, workers=1):
        deadline = time.monotonic() + 20
        for worker in range(workers):
            while not (self.folder / f"worker-{worker}/scaling_jax_runs/{run_id}/exit").exists():
                assert time.monotonic() < deadline, f"worker {worker} doesn't end"
                time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.fixture
def set_up(cloud):
    """A cloud whose TPU is ready for runs."""
    cloud.ready()
    programs = cloud.folder / "new-machine" / "scaling_jax" / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("scaling-jax", "python"):
        shutil.copy(cloud.folder / name, programs)
    return cloud


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    assert shellcheck.exists()
    done = subprocess.run([shellcheck, SCRIPT, *(ROOT / ".ci").iterdir()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (["--type=v5litepod-8"], "tpu-vm create t --accelerator-type=v5litepod-8 --version=v2-alpha-tpuv5-lite"),
        (["--type", "v4-8", "--spot"], "tpu-vm create t --accelerator-type=v4-8 --version=tpu-ubuntu2204-base --spot"),
        (
            ["--type=v5p-8", "--queued", "--create-flag=--reserved"],
            "queued-resources create t --accelerator-type=v5p-8 --node-id=t --runtime-version=v2-alpha-tpuv5"
            " --reserved",
        ),
        (
            ["--type=v6e-16", "--queued", "--spot", "--runtime", "mine"],
            "queued-resources create t --accelerator-type=v6e-16 --node-id=t --runtime-version=mine --spot",
        ),
    ],
)
def test_create_asks_gcloud_for_this_tpu(cloud, options, command):
    assert cloud("create", "t", "--zone=z", "--project", "p", *options).returncode == 0
    (created,) = (call for call in cloud.calls if call[3] == "create")
    assert " ".join(created) == "compute tpus " + command.replace(" t ", " t --quiet --zone=z --project=p ", 1)


def test_create_again_creates_nothing(cloud):
    cloud.ready()
    done = cloud("create", "t", "--type=v4-8")
    assert done.returncode == 0
    assert "exists already" in done.stderr
    assert "create" not in cloud.verbs


def test_a_create_that_came_through_although_gcloud_failed_is_not_repeated(cloud):
    cloud.plan(fail_late={"create": 1})
    assert cloud("create", "t", "--type=v4-8").returncode == 0
    assert cloud.verbs.count("create") == 1


@pytest.mark.parametrize("state", ["PREEMPTED", "SUSPENDED", "CREATING"])
def test_create_does_not_wait_for_what_will_not_come(cloud, state):
    (cloud.folder / "node").write_text(state)
    done = cloud("create", "t", "--type=v4-8")
    assert done.returncode == 1
    assert state in done.stderr
    assert set(cloud.verbs) == {"describe"}


@pytest.mark.parametrize(("failures", "code"), [(4, 0), (5, 1)])
def test_a_command_is_tried_five_times(cloud, failures, code):
    cloud.ready()
    cloud.plan(fail={"scp": failures})
    done = cloud("setup", "t")
    assert done.returncode == code
    assert cloud.verbs.count("scp") == 5
    assert ("gave up after 5 attempts" in done.stderr) == bool(code)
    assert ("ssh" in cloud.verbs) == (code == 0)


def test_a_command_that_stalls_is_ended_and_tried_again(cloud):
    cloud.ready()
    cloud.plan(stall={"scp": 1})
    assert cloud("setup", "t", TPU_SETUP_TIMEOUT_SECONDS="2").returncode == 0
    assert cloud.verbs.count("scp") == 2


def test_a_tpu_that_cannot_be_described_is_not_taken_for_gone(cloud):
    cloud.plan(fail={"describe": 99})
    done = cloud("create", "t", "--type=v4-8")
    assert done.returncode == 1
    assert cloud.verbs == ["describe"] * 5


def test_setup_brings_this_checkout_to_every_worker(cloud):
    cloud.ready()
    cloud.plan(workers=2)
    done = cloud("setup", "t")
    assert done.returncode == 0, done.stderr
    for worker in ("worker-0", "worker-1"):
        home = cloud.folder / worker / "scaling_jax"
        assert (home / "experiments" / "mine.py").read_text() == "EXPERIMENT = None"
        assert not (home / "results").exists()
        assert worker in done.stdout


def test_locked_versions_cover_every_requirement_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {re.match(r"[\w-]+", r)[0].replace("_", "-") for r in project["dependencies"]}
    locked = re.findall(r"^([\w-]+)==\S+$", (ROOT / "tpu_requirements.txt").read_text(), re.MULTILINE)
    assert named | {"libtpu"} <= set(locked)


def test_check_refuses_a_backend_that_is_not_a_tpu(set_up):
    python = set_up.folder / "new-machine/scaling_jax/.venv/bin/python"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    done = set_up("check", "t", XLA_FLAGS="--xla_force_host_platform_device_count=3")
    assert done.returncode == 9
    assert "process 0 of 1, 3 of 3 cpu devices" in done.stdout
    assert "psum of ones 3" in done.stdout
    assert "the backend is cpu, not tpu" in done.stderr
    assert set_up.verbs.count("ssh") == 1  # trying again would not make it one


def test_check_tells_every_worker_how_many_there_are(set_up):
    set_up.plan(workers=2)
    assert sorted(set_up("check", "t").stdout.splitlines()) == [
        "worker-0: Python, 2 workers",
        "worker-1: Python, 2 workers",
    ]


def test_arguments_arrive_as_they_were_given(set_up):
    done = set_up("run", "t", "--run-id", "r", "--", "scan", *ODD)
    assert done.returncode == 0, done.stderr
    set_up.wait_for_the_end("r")
    assert set_up.ran() == [["r", ["scan", *ODD]]]


def test_one_run_id_reaches_every_worker_and_its_log(set_up):
    set_up.plan(workers=2)
    started = set_up("run", "t", "--", "scan", "x.py", "--results=gs://b/x")
    run_id = re.search(r"worker-0: run (t-\d{8}T\d{6}Z) started", started.stdout)[1]
    set_up.wait_for_the_end(run_id, workers=2)
    assert set_up.ran(0) == set_up.ran(1) == [[run_id, ["scan", "x.py", "--results=gs://b/x"]]]
    logs = set_up("logs", "t", "--run-id", run_id).stdout
    assert sorted(logs.splitlines()) == ["worker-0: hello from scaling-jax", "worker-1: hello from scaling-jax"]
    assert set_up("logs", "t", "--worker=1").stdout == "worker-1: hello from scaling-jax\n"


@pytest.mark.parametrize(
    "results", [[], ["--results", "here"], ["--results=/tmp/x"], ["--results", "gs://b", "--results=x"]]
)
def test_several_workers_take_shared_results(cloud, results):
    cloud.ready()
    cloud.plan(workers=2)
    done = cloud("run", "t", "--", "scan", "x.py", *results)
    assert done.returncode == 2
    assert "--results gs://" in done.stderr
    assert "ssh" not in cloud.verbs


def test_a_run_goes_on_by_itself_until_it_is_stopped(set_up):
    set_up.behave("trap 'echo saved; exit 0' TERM; while true; do sleep 0.05; done")
    assert set_up("run", "t", "--run-id=r", "--", "train").returncode == 0
    assert "run r: running" in set_up("status", "t").stdout
    again = set_up("run", "t", "--run-id=r", "--", "train")
    assert again.returncode == 0
    assert "run r is running" in again.stdout
    for refused in (set_up("run", "t", "--run-id=other", "--", "train"), set_up("setup", "t")):
        assert refused.returncode == 9
        assert "run r is running on worker-0: stop it first" in refused.stderr
    assert set_up("stop", "t").returncode == 0
    assert "saved" in set_up("logs", "t").stdout
    assert "run r: exit stopped" in set_up("status", "t").stdout
    assert len(set_up.ran()) == 1
    assert "nothing is running" in set_up("stop", "t").stdout


def test_babysit_makes_a_preempted_tpu_again_and_resumes(cloud):
    cloud.behave('[ -f "$STUB/once" ] || { touch "$STUB/once"; echo SUSPENDED >"$STUB/queue"; sleep 9; }')
    command = ("babysit", "t", "--type=v5litepod-8", "--queued", "--spot", "--recreate", "--", "scan", "x.py")
    done = cloud(*command)
    assert done.returncode == 0, done.stderr
    assert [verb for verb in cloud.verbs if verb in ("create", "delete")] == ["create", "delete", "create"]
    (deleted,) = (call for call in cloud.calls if call[3] == "delete")
    assert deleted == ["compute", "tpus", "queued-resources", "delete", "t", "--quiet", "--force"]
    assert cloud.ran() == [["t", ["scan", "x.py"]]] * 2
    assert "run t is done" in done.stderr


def test_babysit_deletes_nothing_unless_told_to(cloud):
    cloud.behave('echo PREEMPTED >"$STUB/node"; sleep 9')
    done = cloud("babysit", "t", "--type=v4-8", "--spot", "--", "scan", "x.py")
    assert done.returncode == 1
    assert "t is PREEMPTED; --recreate" in done.stderr
    assert "delete" not in cloud.verbs


@pytest.mark.parametrize(("code", "starts"), [(2, 1), (1, 3)])
def test_babysit_starts_again_what_ended_early_but_not_what_was_refused(cloud, code, starts):
    cloud.behave(f"exit {code}")
    done = cloud("babysit", "t", "--type=v4-8", "--max-restarts=2", "--", "scan", "x.py")
    assert done.returncode == 1
    assert len(cloud.ran()) == starts
    assert ("refused run t" in done.stderr) == (code == 2)
    assert cloud.verbs.count("create") == 1
    assert "delete" not in cloud.verbs


@pytest.mark.parametrize("left", ['kill -TERM "$PPID"', 'touch "$SCALING_JAX_SAVED"'])
def test_babysit_resumes_what_was_saved_because_its_machine_goes_away(cloud, left):
    """With exit code 0: whether SIGTERM ended the shell as well, or a notice came to the run alone."""
    cloud.behave(f'[ -f "$STUB/once" ] || {{ touch "$STUB/once"; {left}; }}; exit 0')
    done = cloud("babysit", "t", "--type=v4-8", "--", "scan", "x.py")
    assert done.returncode == 0, done.stderr
    assert len(cloud.ran()) == 2


def test_delete_wants_a_yes(cloud):
    cloud.ready()
    done = cloud("delete", "t")
    assert done.returncode == 2
    assert "add --yes" in done.stderr
    assert cloud.calls == []
    assert cloud("delete", "t", "--yes", "--zone=z").returncode == 0
    assert cloud.calls == [["compute", "tpus", "tpu-vm", "delete", "t", "--quiet", "--zone=z"]]


@pytest.mark.parametrize("command", ["create", "setup", "check", "run", "logs", "status", "stop", "babysit", "delete"])
def test_a_dry_run_prints_commands_that_a_shell_can_read_and_runs_none(cloud, command):
    options = ["--type=v4-8", "--queued", "--recreate", "--zone=z", "--dry-run", "--", *ODD]
    done = cloud(command, "t", *options)
    assert done.returncode == 0, done.stderr
    assert cloud.calls == []
    assert "gcloud compute tpus " in done.stdout
    gcloud = cloud.folder / "bin" / "gcloud"
    record = "import json, sys; print(json.dumps(sys.argv[1:]))"
    gcloud.write_text(f"#!/bin/bash\n{BARE_PYTHON} -c '{record}' \"$@\" >>{cloud.folder}/calls.jsonl\n")
    path = {"PATH": f"{gcloud.parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-e"], input=done.stdout, env=os.environ | path, text=True, check=True)
    assert {"create": "create", "setup": "scp", "delete": "delete"}.get(command, "ssh") in cloud.verbs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly", "t"], "no command fly"),
        (["create"], "needs the TPU's name"),
        (["create", "t"], "needs --type"),
        (["create", "t", "--typ", "x"], "unknown option --typ"),
        (["run", "t"], "arguments after --"),
        (["run", "t", "--run-id", "../x", "--", "scan"], "letters, digits"),
        (["run", "t", "--run-id", "..", "--", "scan"], "letters, digits"),
        (["babysit", "t", "--type=v4-8"], "arguments after --"),
        (["babysit", "t", "--type=v4-8", "--max-restarts", "many", "--", "scan"], "--max-restarts many"),
        (["babysit", "t", "--type=v4-8", "--max-restarts", "-1", "--", "scan"], "--max-restarts -1"),
        (["babysit", "t", "--type=v4-8", "--max-restarts", "09", "--", "scan"], "--max-restarts 09"),
        (["logs", "t", "--lines", "x"], "--lines x"),
        (["logs", "t", "--worker", "x"], "--worker x"),
        (["status", "t:x"], "t:x"),
    ],
)
def test_a_mistake_is_one_line_and_runs_nothing(cloud, words, message):
    done = cloud(*words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert cloud.calls == []


EVIL = "attempts[$(touch evil)]"


@pytest.mark.parametrize("command", ["babysit", "logs"])
@pytest.mark.parametrize("option", ["--max-restarts", "--lines", "--worker", "--run-id", "--type", "--zone"])
def test_no_option_runs_what_stands_in_it(cloud, tmp_path, monkeypatch, command, option):
    """Bash's arithmetic runs the text in an index; a number is checked before any machine is made."""
    monkeypatch.chdir(tmp_path)
    done = cloud(command, "t", "--type=v4-8", option, EVIL, "--dry-run", "--", "scan", EVIL)
    done_for_good = cloud(command, "t", "--type=v4-8", option, EVIL, "--", "scan", EVIL)
    assert not list(tmp_path.rglob("evil"))
    if option in ("--max-restarts", "--lines", "--worker", "--run-id"):
        for said in (done, done_for_good):
            assert said.returncode == 2
            assert said.stderr.count("\n") == 1
            assert option in said.stderr
        assert cloud.calls == []


@pytest.mark.parametrize("setting", ["ATTEMPTS", "BACKOFF_SECONDS", "POLL_SECONDS", "WAIT_SECONDS", "TIMEOUT_SECONDS"])
def test_no_setting_in_the_environment_runs_what_stands_in_it(cloud, tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    done = cloud("create", "t", "--type=v4-8", **{f"TPU_SETUP_{setting}": EVIL})
    assert done.returncode == 2
    assert f"TPU_SETUP_{setting}" in done.stderr
    assert cloud.calls == []
    assert not list(tmp_path.rglob("evil"))


def test_what_gcloud_says_is_not_run(cloud, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cloud.ready()
    cloud.plan(workers=EVIL)
    done = cloud("run", "t", "--", "scan", "x.py")
    assert done.returncode == 1
    assert "number of workers" in done.stderr
    assert not list(tmp_path.rglob("evil"))


def test_help_shows_every_command():
    text = subprocess.run(["bash", SCRIPT, "help"], capture_output=True, text=True, check=True).stdout
    for name in ("create", "setup", "check", "run", "logs", "status", "stop", "babysit", "delete", "--dry-run"):
        assert name in text
