"""One real ComfyUI server for the whole test run, or for each process of it."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from video_ldm.tests.host.client import HostServer


@pytest.fixture(scope="session")
def server(host, tmp_path_factory):
    """A running HostServer with folders of its own: see tests/host/client.py for what it can do."""
    host = replace(host, python=Path(sys.executable))      # the interpreter that has the tests' packages
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    # Two servers with a thread for each processor wait for each other more than they compute.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))} if processes > 1 else None
    with HostServer(host, tmp_path_factory.mktemp("comfyui"), environment=threads) as running:
        yield running


@pytest.fixture
def client(server):
    """The HTTP and websocket client of the running server. Every test starts with nothing cached or loaded."""
    server.client.free()
    return server.client


@pytest.fixture(scope="session")
def library(server):
    """The small random files that tests/host/graphs.py names, in the server's folders."""
    from video_ldm.tests.host.graphs import write_library
    write_library(server)
    return server
