"""Real vLLM servers on this machine, started from an environment of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2

from stableopd.rollout.vllm_worker import WeightUpdates

ROOT = Path(__file__).parent.parent
PYTHON = os.environ.get("STABLEOPD_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
# On a quiet machine a server is up in half a minute; on a busy one it has taken half an hour.
PATIENCE_S = float(os.environ.get("STABLEOPD_VLLM_PATIENCE_S", "3600"))

# CPUs, without a connection to anywhere, and with as little memory as goes.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
}


class PlainWeightUpdates(WeightUpdates):
    """What a server does whose head is not packed again; it runs inside vLLM."""

    def stableopd_load(self, folder, tag):
        self.model_runner.reload_weights(weights_path=folder)
        self.stableopd_tag = tag
        return {"tag": tag}


def prepare(folder: Path) -> Path:
    """The embedded student as recipes/vllm makes it for vLLM."""
    file = ROOT / "recipes" / "vllm" / "prepare.py"
    subprocess.run([sys.executable, str(file), str(folder)], check=True)
    return folder


class Server:
    """A server on one port, which can be started again after it was killed."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.log = log
        self.command = [PYTHON, "-m", "stableopd.rollout.vllm_worker", "--model", str(model)]
        self.command += ["--port", str(self.port), "--enforce-eager", "--dtype", "float32"]
        self.command += ["--max-model-len", "128", *options]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and do not wait for it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=log,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,  # its processes are ended as one group
            )

    def wait(self) -> None:
        """Wait until it answers."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            try:
                if httpx2.get(self.url.replace("/v1", "/health"), timeout=60).status_code == 200:
                    return
            except httpx2.TransportError:
                time.sleep(0.5)
        raise AssertionError(self.log.read_text()[-5000:])

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End all its processes."""
        if self.process is not None:
            os.killpg(self.process.pid, how)
            self.process.wait(timeout=120)
            self.process = None
