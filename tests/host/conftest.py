"""One real ComfyUI server for the whole test run."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from video_ldm.tests.host.client import HostServer


@pytest.fixture(scope="session")
def server(host, tmp_path_factory):
    """A running HostServer with folders of its own: see tests/host/client.py for what it can do."""
    host = replace(host, python=Path(sys.executable))      # the interpreter that has the tests' packages
    with HostServer(host, tmp_path_factory.mktemp("comfyui")) as running:
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
