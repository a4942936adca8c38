"""Talks to a running ComfyUI over HTTP and websocket, as its own page does. Runs in the host's Python, for aiohttp."""

import asyncio
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import aiohttp

FINISHED = ("execution_success", "execution_error", "execution_interrupted")


class NodeError(Exception):
    """A prompt that was refused or that failed.

    Args:
        node_id, node_type: the node where it failed.
        exception_type: the name of the exception's class, or of the server's kind of refusal.
        message: the sentence that a user reads.
        traceback: its lines, empty for a refusal.
    """

    def __init__(self, node_id, node_type, exception_type, message, traceback=()):
        super().__init__(f"node {node_id} ({node_type}): {message}")
        self.node_id, self.node_type = node_id, node_type
        self.exception_type, self.message, self.traceback = exception_type, message, list(traceback)


class Interrupted(Exception):
    """The prompt was cancelled while it ran."""


@dataclass
class Result:
    """What a prompt left."""
    prompt_id: str
    outputs: dict                       # what /history lists, by node id
    events: list = field(repr=False)    # every event (kind, data), in order

    def executed(self) -> list[str]:
        """The ids of the nodes that ran, cached ones left out, in order."""
        ids = [data.get("node") for kind, data in self.events if kind == "executing" and data.get("node")]
        return list(dict.fromkeys(ids))

    def files(self) -> list[dict]:
        """Every file that an output node reported, as dicts with filename, subfolder and type, in order."""
        lists = [value for output in self.outputs.values() for value in output.values() if isinstance(value, list)]
        return [file for values in lists for file in values if isinstance(file, dict) and "filename" in file]


class Client:
    """Speaks to the server at `address` ("127.0.0.1:8188") as one browser tab would."""

    def __init__(self, address: str):
        self.address, self.client_id = address, uuid.uuid4().hex

    # ---- HTTP -------------------------------------------------------------------------------------------------

    def request(self, path, body=None, headers=None, timeout=120):
        """GET, or POST where there is a body (dict as JSON, or bytes); the response's bytes."""
        if isinstance(body, dict):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{self.address}{path}", data=body, headers=headers or {})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read()

    def json(self, path, body=None):
        return json.loads(self.request(path, body) or b"null")

    def object_info(self, node=None):
        return self.json("/object_info" + (f"/{node}" if node else ""))

    def history(self, prompt_id):
        """The record of a finished prompt, or None while it is not there."""
        return self.json(f"/history/{prompt_id}").get(prompt_id)

    def interrupt(self):
        self.request("/interrupt", {})

    def free(self):
        """Ask the server to unload every model and forget cached results; it does so before its next prompt."""
        self.request("/free", {"unload_models": True, "free_memory": True})

    def view(self, file):
        """The bytes of an output file that a Result names."""
        return self.request("/view?" + urllib.parse.urlencode(file))

    def upload_image(self, name, data, subfolder=""):
        """Put bytes into the input folder as `name`, over what was there; the name to give a loader node."""
        boundary = uuid.uuid4().hex
        parts = [("image", f'; filename="{name}"', data), ("overwrite", "", b"true"),
                 ("subfolder", "", subfolder.encode())]
        body = b"".join(f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"{more}\r\n\r\n'.encode()
                        + value + b"\r\n" for key, more, value in parts) + f"--{boundary}--\r\n".encode()
        answer = json.loads(self.request("/upload/image", body,
                                         {"Content-Type": f"multipart/form-data; boundary={boundary}"}))
        return "/".join(part for part in (answer["subfolder"], answer["name"]) if part)

    def queue(self, prompt, extra_data=None):
        """Queue an API-form prompt; its id. NodeError where the server refuses any part of it."""
        body = {"prompt": prompt, "client_id": self.client_id, "extra_data": extra_data or {}}
        try:
            answer = self.json("/prompt", body)
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            answer = json.loads(error.read())
        refused = refusal(answer, prompt)
        if refused is not None:
            if "prompt_id" in answer:        # the server would run the valid rest
                self.request("/queue", {"delete": [answer["prompt_id"]]})
                self.interrupt()
            raise refused
        return answer["prompt_id"]

    # ---- running ----------------------------------------------------------------------------------------------

    def run(self, prompt: dict, on_event: Callable[[str, dict], None] | None = None, timeout: float = 600.0,
            extra_data: dict | None = None) -> Result:
        """Run a prompt to its end. Raises NodeError, Interrupted, or TimeoutError after it interrupted the run.

        Args:
            prompt: the workflow in API form.
            on_event: sees every event (kind, data) as it comes: "executing", "progress", "executed", ... and "preview"
                with the picture's bytes. It may call `interrupt`.
            timeout: seconds.
            extra_data: goes to the server beside the prompt: what output nodes write into their files.
        """
        prompt_id, events = asyncio.run(self.follow(prompt, on_event, timeout, extra_data))
        kind, data = events[-1]
        record = self.wait_for_history(prompt_id)
        if kind == "execution_error":
            raise NodeError(data["node_id"], data["node_type"], data["exception_type"].rsplit(".", 1)[-1],
                            data["exception_message"].strip(), data.get("traceback", ()))
        if kind == "execution_interrupted":
            raise Interrupted(f"cancelled in node {data.get('node_id')}")
        return Result(prompt_id, record["outputs"], events)

    async def follow(self, prompt, on_event, timeout, extra_data) -> tuple[str, list]:
        """Queue a prompt and listen until it has ended: its id and all its events."""
        address = f"http://{self.address}/ws?clientId={self.client_id}"
        events = []
        # No limit on a message's size: previews of long videos are large.
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            prompt_id = self.queue(prompt, extra_data)
            async for event in self.events(socket, prompt_id, time.monotonic() + timeout):
                events.append(event)
                if on_event is not None:
                    on_event(*event)
        return prompt_id, events

    async def events(self, socket, prompt_id: str, deadline: float) -> AsyncIterator[tuple[str, dict]]:
        """(kind, data) of this prompt's events, until one of FINISHED."""
        while True:
            try:
                message = await socket.receive(max(0.01, deadline - time.monotonic()))
            except asyncio.TimeoutError:
                self.request("/queue", {"delete": [prompt_id]})
                self.interrupt()
                raise TimeoutError(f"prompt {prompt_id} did not finish in time and was interrupted") from None
            if message.type == aiohttp.WSMsgType.BINARY:
                yield "preview", {"image": message.data[8:]}
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                raise ConnectionError("the server closed the connection before the prompt had ended")
            event = json.loads(message.data)
            data = event.get("data") or {}
            if data.get("prompt_id", prompt_id) == prompt_id:
                yield event["type"], data
                if event["type"] in FINISHED and data.get("prompt_id") == prompt_id:
                    return

    def wait_for_history(self, prompt_id, seconds=30.0):
        """The record of a prompt whose last event has come: the server writes it a moment later."""
        deadline = time.monotonic() + seconds
        while True:
            record = self.history(prompt_id)
            if record is not None:
                return record
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server finished prompt {prompt_id} but lists no record of it")
            time.sleep(0.05)


def refusal(answer, prompt):
    """The NodeError in a /prompt answer, or None where the whole prompt was accepted."""
    for node_id, found in (answer.get("node_errors") or {}).items():
        if found.get("errors"):
            first = found["errors"][0]
            message = ". ".join(text for text in (first.get("message"), first.get("details")) if text)
            return NodeError(node_id, found.get("class_type"), first.get("type"), message)
    error = answer.get("error")
    if error:
        node_id = (error.get("extra_info") or {}).get("node_id") if isinstance(error, dict) else None
        kind = (prompt.get(node_id) or {}).get("class_type")
        text = ". ".join(filter(None, (error.get("message"), str(error.get("details") or "")))) \
            if isinstance(error, dict) else str(error)
        return NodeError(node_id, kind, error.get("type") if isinstance(error, dict) else "error", text)
    return None
