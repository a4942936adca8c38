"""The client of `run.py demo` and of the host tests, against a made-up server, and what the console shows of a run."""

import asyncio
import io
import json
import re
import threading

import pytest
from aiohttp import web

from video_ldm.tools import console
from video_ldm.tools.client import Client, Interrupted, NodeError

PROMPT = {"1": {"class_type": "Loader", "inputs": {}, "_meta": {"title": "Load"}},
          "2": {"class_type": "Sampler", "inputs": {}}}


class FakeServer:
    """Answers as ComfyUI does. For each prompt it sends `messages` over the websocket, then closes it if `closes`."""

    def __init__(self, messages, closes=False):
        self.messages, self.closes = messages, closes
        self.asked = []             # (path, body) of every POST
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()
        self.queued = asyncio.Event()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()
        assert self.ready.wait(30)

    def serve(self):
        asyncio.set_event_loop(self.loop)
        app = web.Application()
        app.add_routes([web.get("/ws", self.socket), web.get("/history/p", self.history),
                        *(web.post(path, self.post) for path in ("/prompt", "/queue", "/interrupt"))])
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.address = f"127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        self.ready.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())
        self.loop.close()

    async def socket(self, request):
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        await self.queued.wait()
        for message in self.messages:
            await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_str(json.dumps(message)))
        if not self.closes:
            await socket.receive()      # until the client goes
        return socket

    async def history(self, request):
        return web.json_response({"p": {"outputs": {"2": {"images": [{"filename": "a.png"}]}}}})

    async def post(self, request):
        self.asked.append((request.path, json.loads(await request.text() or "null")))
        if request.path == "/prompt":
            self.queued.set()
        return web.json_response({"prompt_id": "p"})

    def stop(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)


@pytest.fixture
def serve():
    """serve(messages): a client of a server that sends them, and that server."""
    servers = []

    def start(messages, **options):
        servers.append(FakeServer(messages, **options))
        return Client(servers[-1].address), servers[-1]
    yield start
    for server in servers:
        server.stop()


def event(kind, **data):
    return {"type": kind, "data": {"prompt_id": "p", **data}}


DONE = event("execution_success")


def test_a_run_gives_its_events_in_order_and_its_outputs(serve):
    picture = b"\0" * 8 + b"x" * 5_000_000          # more than aiohttp takes by default
    client, server = serve([event("executing", node="1"), {"type": "status", "data": {}}, picture,
                            {"type": "executing", "data": {"node": "9", "prompt_id": "somebody else's"}},
                            event("executing", node="2"), DONE])
    seen = []
    result = client.run(PROMPT, lambda kind, data: seen.append(kind), timeout=30, extra_data={"a": 1})
    assert seen == ["executing", "status", "preview", "executing", "execution_success"]
    assert result.events[2][1]["image"] == picture[8:] and result.executed() == ["1", "2"]
    assert result.files() == [{"filename": "a.png"}]
    assert server.asked == [("/prompt", {"prompt": PROMPT, "client_id": client.client_id, "extra_data": {"a": 1}})]


def test_a_failure_and_an_interruption_are_told_apart(serve):
    client, _ = serve([event("execution_error", node_id="2", node_type="Sampler", exception_type="x.y.ValueError",
                             exception_message="No.\n", traceback=["line"])])
    with pytest.raises(NodeError, match=r"node 2 \(Sampler\): No\.") as caught:
        client.run(PROMPT, timeout=30)
    assert (caught.value.exception_type, caught.value.traceback) == ("ValueError", ["line"])
    client, _ = serve([event("execution_interrupted", node_id="2")])
    with pytest.raises(Interrupted, match="cancelled in node 2"):
        client.run(PROMPT, timeout=30)


def test_a_run_that_takes_too_long_is_taken_out_of_the_queue_and_interrupted(serve):
    client, server = serve([event("executing", node="1")])
    with pytest.raises(TimeoutError, match="did not finish in time"):
        client.run(PROMPT, timeout=0.2)
    assert [path for path, _ in server.asked] == ["/prompt", "/queue", "/interrupt"]
    assert server.asked[1][1] == {"delete": ["p"]}


def test_a_server_that_goes_away_ends_the_run(serve):
    client, _ = serve([event("executing", node="1")], closes=True)
    with pytest.raises(ConnectionError, match="closed the connection"):
        client.run(PROMPT, timeout=30)


# ---- the console --------------------------------------------------------------------------------------------------

class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(stream):
    progress = console.NodeProgress(PROMPT, stream)
    for kind, data in (("executing", {"node": "1"}), ("executing", {"node": "2"}),
                       *(("progress", {"node": "2", "value": step, "max": 20}) for step in range(1, 21)),
                       ("progress", {"node": "1", "value": 1, "max": 2}), ("executing", {"node": None})):
        progress(kind, data)
    progress.close()
    return stream.getvalue()


def test_a_file_gets_lines_now_and_then_and_one_at_the_end_of_each_node():
    text = show(io.StringIO())
    assert re.fullmatch(r"  Load  0\.\d s\n  Sampler 1/20\n  Sampler 20/20  0\.\d s\n", text)


def test_a_terminal_gets_a_bar_that_ends_as_one_line():
    text = show(Terminal())
    lasting = [part for part in re.split(r"[\r\n]", text) if part.rstrip().endswith(" s")]
    assert [re.sub(r"[\d.]+ s$", "", part).strip() for part in lasting] == ["Load", "Sampler 20/20"]
    assert "\n" in text and "\x1b[A" not in text
