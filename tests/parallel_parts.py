"""Two processes that compute together, shared by the tests of several processes.

Loading torch takes longer than these tests. So one server loads everything once and forks the
processes of each launch, with the variables that torchrun would set.
"""

import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SERVER = """
import importlib, json, os, pickle, signal, sys, traceback
import peft, torch.distributed.fsdp, stableopd.report.page, stableopd.terminal
import stableopd.training.loop, stableopd.training.preflight
from stableopd.cli import main
from transformers import LlamaForCausalLM

def call(order, rank):
    if order["function"]:
        module, _, name = order["function"].partition(":")
        result = getattr(importlib.import_module(module), name)(*order["arguments"])
        with open(os.path.join(order["folder"], f"{rank}.pkl"), "wb") as file:
            pickle.dump(result, file)
    else:
        sys.argv = ["stableopd", *order["arguments"]]
        stableopd.report.page.write_page = lambda *_: None
        main()

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    children = []
    for rank in range(order["num"]):
        child = os.fork()
        if child == 0:
            os.environ |= order["environment"]
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for number, name in ((1, "out"), (2, "err")):
                path = os.path.join(order["folder"], f"{rank}.{name}")
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            code = 70
            signal.alarm(order["limit"])  # a process that waits for another is ended
            try:
                call(order, rank)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        children.append(child)
    print(json.dumps(children), flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print(json.dumps(codes), flush=True)
"""

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
OFFLOAD = FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}
KINDS = {"copies": {}, "sharded": FSDP, "offloaded": OFFLOAD}


class Launch:
    """Processes under way: their ids, and at the end their exit codes and what they printed."""

    def __init__(self, server, folder, children):
        self.server, self.folder, self.children = server, folder, children

    def end(self):
        return json.loads(self.server.process.stdout.readline())

    def printed(self, rank, stream):
        """What a process printed, without what older versions of gloo print by themselves."""
        lines = (self.folder / f"{rank}.{stream}").read_text().splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith("[Gloo]"))


class Server:
    """Forks the processes of one launch at a time."""

    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self.process.stdout.readline() == "ready\n"

    def start(self, arguments, *, num=2, environment=None, function="", limit=600):
        order = {
            "function": function,
            "arguments": arguments,
            "num": num,
            "limit": limit,
            "folder": str(self.folder),
            "environment": rendezvous(num) | (environment or {}),
        }
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return Launch(self, self.folder, json.loads(self.process.stdout.readline()))

    def train(self, *arguments, **options):
        """Run `stableopd train`: exit codes, and what each process printed to standard error."""
        launch = self.start(["train", *map(str, arguments)], **options)
        codes = launch.end()
        return codes, [launch.printed(rank, "err") for rank in range(len(codes))]

    def call(self, function, *arguments, **options):
        """What a function of a test module returned in each process."""
        launch = self.start(arguments, function=function, **options)
        codes = launch.end()
        assert not any(codes), [launch.printed(rank, "err") for rank in range(len(codes))]
        return [pickle.loads((self.folder / f"{r}.pkl").read_bytes()) for r in range(len(codes))]


def rendezvous(num):
    """The variables by which processes find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return {"WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.process.communicate()
