import http.server
import json
import subprocess
import sys
import threading

import pytest

from scaling_jax.parallel import processes

CALM = {"maintenanceEvent": "NONE", "preempted": "FALSE", "name": "worker"}


class MetadataServer(http.server.ThreadingHTTPServer):
    """As on Google's machines: answers at once, or once something has changed since the caller's ETag."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("localhost", 0), Handler)
        self.changed = threading.Condition()
        self.version, self.instance = 1, CALM
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def change(self, **instance):
        with self.changed:
            self.version, self.instance = self.version + 1, self.instance | instance
            self.changed.notify_all()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.path.startswith("/computeMetadata/v1/instance/?recursive=true")
        assert self.headers["Metadata-Flavor"] == "Google"
        with self.server.changed:
            if "wait_for_change=true" in self.path:
                self.server.changed.wait_for(lambda: f"last_etag={self.server.version}&" not in self.path)
            version, body = self.server.version, json.dumps(self.server.instance).encode()
        self.send_response(200)
        self.send_header("ETag", str(version))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    server = MetadataServer()
    monkeypatch.setenv("GCE_METADATA_HOST", f"localhost:{server.server_port}")
    yield server
    server.shutdown()


class Told:
    def __init__(self):
        self.words: list[str] = []
        self._event = threading.Event()

    def __call__(self, why):
        self.words.append(why)
        self._event.set()

    def within(self, seconds):
        return self._event.wait(seconds)


@pytest.mark.parametrize(
    ("notice", "why"),
    [
        ({"preempted": "TRUE"}, "preempted"),
        ({"maintenanceEvent": "TERMINATE_ON_HOST_MAINTENANCE"}, "maintenance"),
    ],
)
def test_a_notice_is_told_when_it_comes(server, notice, why):
    told = Told()
    processes.watch_notices(told)
    server.change(name="other")
    server.change(maintenanceEvent="MIGRATE_ON_HOST_MAINTENANCE")
    assert not told.within(0.5)
    server.change(**notice)
    assert told.within(10)
    (words,) = told.words
    assert why in words


def test_a_notice_that_is_there_already_stops_nobody(server):
    server.change(maintenanceEvent="TERMINATE_ON_HOST_MAINTENANCE")
    told = Told()
    processes.watch_notices(told)
    server.change(name="other")
    assert not told.within(0.5)


def test_elsewhere_than_on_googles_machines_nobody_is_asked(monkeypatch, tmp_path):
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    monkeypatch.setattr(processes, "_MADE_BY", tmp_path / "nothing")
    monkeypatch.setattr("threading.Thread.start", pytest.fail)
    processes.watch_notices(pytest.fail)


def test_a_run_is_saved_before_maintenance_and_ends_with_exit_code_0(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SCALING_JAX_SAVED", str(tmp_path / "saved"))
    options = ["--model=1x16", "--learning-rate=1e-2", "--batch-tokens=1024", "--max-steps=1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "scaling_jax.cli.main", "train", *options, "--results", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout.readline().startswith("step 10 of")
        server.change(maintenanceEvent="TERMINATE_ON_HOST_MAINTENANCE")
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0, output
    *_, why, last = output.splitlines()
    assert "maintenance" in why
    assert "saved" in last
    assert "same command" in last
    assert (tmp_path / "saved").exists()
    assert list(tmp_path.glob("runs/*/checkpoints/*"))
