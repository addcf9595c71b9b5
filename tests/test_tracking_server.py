"""A real MLflow server over PostgreSQL that keeps the artifacts, behind a door that asks for who comes in."""

from __future__ import annotations

import base64
import datetime
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.postgres import Postgres
from tests.sweeps import make_sweep, play
from tune.checks import check_tracking
from tune.report.projection import Projection
from tune.report.tracker import Tracker
from tune.search.coordinator import Coordinator
from tune.search.ledger import Ledger

SECRET = "correct-horse-battery"
BASIC = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
LOGINS = {
    BASIC: {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": SECRET},
    f"Bearer {SECRET}": {"MLFLOW_TRACKING_TOKEN": SECRET},
}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def server(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an MLflow server whose runs are in PostgreSQL and whose artifacts are in a folder of its own."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", postgres.new_database(), "--artifacts-destination", str(folder / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 240
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
    yield address
    process.terminate()
    process.wait(60)


@pytest.fixture(params=LOGINS, ids=["user and password", "token"])
def door(request: pytest.FixtureRequest, server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A proxy in front of the server that lets in one login, which is in the environment, and nobody else."""

    class Door(BaseHTTPRequestHandler):
        def do(self) -> None:
            if self.headers.get("Authorization") != request.param:
                self.send_error(401)
                return
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            passed = {key: value for key, value in self.headers.items() if key.lower() not in ("host", "authorization")}
            asked = urllib.request.Request(server + self.path, content or None, passed, method=self.command)
            try:
                answer = urllib.request.urlopen(asked, timeout=60)
            except urllib.error.HTTPError as error:
                answer = error
            body = answer.read()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers.get("Content-Type", ""))
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do  # noqa: N815  the names that http.server looks for

        def log_message(self, *words: object) -> None:
            """Nothing."""

    for name in (name for login in LOGINS.values() for name in login):
        monkeypatch.delenv(name, raising=False)
    for name, value in LOGINS[request.param].items():
        monkeypatch.setenv(name, value)
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_address[1]}"
    proxy.shutdown()
    proxy.server_close()


def test_a_sweep_is_projected_with_a_login_from_the_environment(
    door: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from mlflow.tracking import MlflowClient

    check_tracking(door)
    name = request.node.callspec.id.replace(" ", "-")
    sweep = make_sweep(tmp_path, name, trials=3)
    ledger = Ledger(sweep)
    play(Coordinator(ledger, total=3, concurrent=2))
    projection = Projection(ledger, door)
    projection.close(finished=True)
    client = MlflowClient(tracking_uri=door)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    assert experiment.artifact_location.startswith("mlflow-artifacts:")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    assert len(runs) == 4
    client.download_artifacts(projection.parent, "leaderboard.json", str(tmp_path))
    assert [row["trial"] for row in json.loads((tmp_path / "leaderboard.json").read_text())] == [
        record.number for record in ledger.leaderboard()
    ]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize(("status", "code"), [(401, "UNAUTHENTICATED"), (403, "PERMISSION_DENIED")])
def test_a_login_that_is_refused_in_json(status: int, code: str) -> None:
    """As servers other than MLflow's own refuse it: without the number in what they say."""

    class Refusing(BaseHTTPRequestHandler):
        def do(self) -> None:
            body = json.dumps({"error_code": code, "message": "not you"}).encode()
            self.send_response(200 if self.path == "/health" else status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do  # noqa: N815  the names that http.server looks for

        def log_message(self, *words: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ValueError, match=f"{code}: not you; a login comes from MLFLOW_TRACKING_USERNAME"):
            check_tracking(f"http://127.0.0.1:{server.server_address[1]}")
    finally:
        server.shutdown()
        server.server_close()


def test_without_the_login_the_sweep_says_that_mlflow_is_behind(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (name for login in LOGINS.values() for name in login):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ValueError, match=f"{door} cannot be used: .*401.*MLFLOW_TRACKING_PASSWORD, or from MLFLOW_TRACKING_TOKEN"
    ):
        check_tracking(door)  # that is what a launch asks first
    tracker = Tracker(Ledger(make_sweep(tmp_path)), door)
    tracker.close(finished=True, patience=2)
    assert "401" in tracker.problem


@pytest.fixture
def certified(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server that speaks HTTPS with a certificate of its own making: its address, and the certificate."""
    path = tmp_path / "server.pem"
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]), datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    certificate = made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + certificate)
    (tmp_path / "certificate.pem").write_bytes(certificate)

    class Empty(BaseHTTPRequestHandler):
        def do(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = do  # noqa: N815  the names that http.server looks for

        def log_message(self, *words: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Empty)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"https://localhost:{server.server_address[1]}", tmp_path / "certificate.pem"
    server.shutdown()
    server.server_close()


def test_certificates_are_judged_as_mlflow_is_told_to(certified: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    address, certificate = certified
    with pytest.raises(ValueError, match="cannot be used"):
        check_tracking(address)
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
        check_tracking(address)
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate))
    check_tracking(address)
