"""One real ComfyUI server for the whole test run, or for each process of it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from video_ldm.tests.host.client import HostServer


def pytest_collection_modifyitems(items):
    from video_ldm.tests.host.page import TEST_WITHIN
    for item in items:
        if "page" in getattr(item, "fixturenames", ()) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TEST_WITHIN))


@pytest.fixture(scope="session")
def server(host, tmp_path_factory):
    """A running HostServer with folders of its own: see tests/host/client.py for what it can do."""
    with HostServer(tested(host), tmp_path_factory.mktemp("comfyui")) as running:
        yield running


def tested(host):
    """The host with the interpreter that has the tests' packages."""
    return replace(host, python=Path(sys.executable))


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


@pytest.fixture(scope="session")
def page_server(host, tmp_path_factory):
    """A server for the browser: samplers show previews, and its page opens no tutorial."""
    from video_ldm.tests.host.page import find_browser
    from video_ldm.tools.server import skip_first_run_dialog
    find_browser()                      # without one the test is skipped before a server starts
    base = tmp_path_factory.mktemp("page")
    skip_first_run_dialog(base)
    arguments = ("--disable-api-nodes", "--preview-method", "latent2rgb")
    with HostServer(tested(host), base, arguments=arguments) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    from video_ldm.tests.host.page import browser
    with browser() as context:
        yield context


@pytest.fixture(scope="module")
def page_faults():
    """Why ComfyUI's page did not open in this module."""
    return []


@pytest.fixture(scope="module", params=["classic", "vue"])
def page(page_server, browser, page_faults, request):
    """ComfyUI's page in the browser, once in each of its two renderings: see tests/host/page.py."""
    from video_ldm.tests.host.page import open_page
    page = open_page(browser, page_faults, page_server.address, vue=request.param == "vue", name=request.param)
    yield page
    page.tab.close()
