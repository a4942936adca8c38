"""The server and client that host tests use.

    def test_something(server, client):
        server.put_input_latent("x.latent", tensor)
        latent = server.latent(prompt, "3")              # runs the prompt, gives node 3's LATENT bit for bit
        with pytest.raises(NodeError, match="..."):      # from video_ldm.tests.host.client import NodeError
            client.run(prompt)
"""

import io

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from ...tools.client import Client, Interrupted, NodeError, Result
from ...tools.server import Server

__all__ = ["HostServer", "Interrupted", "NodeError", "Result"]

PACK_WORDS = ("video-ldm", "video_ldm", "VideoLDM")


class HostServer(Server):
    """A real ComfyUI in empty folders under `base`, this pack its only custom node. `client` talks to it."""

    def __init__(self, host, base, arguments=("--disable-api-nodes",)):
        super().__init__(host, base, arguments=arguments)
        self.client = Client(self.address)

    # ---- files ------------------------------------------------------------------------------------------------

    def model_path(self, kind, name):
        """Where to write a model file so that loaders list it. `kind` is checkpoints, loras, controlnet or another."""
        path = self.base / "models" / kind / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save_model(self, kind, name, state, metadata=None):
        """Write a state dict as models/KIND/NAME (safetensors) and return the name for a loader's widget."""
        state = {key: value.contiguous() for key, value in state.items()}
        safetensors.torch.save_file(state, self.model_path(kind, name), metadata=metadata)
        return name

    def input_path(self, name):
        return self.base / "input" / name

    def output_path(self, file):
        """The path of a file dict of a Result."""
        return self.base / file["type"] / file.get("subfolder", "") / file["filename"]

    def put_input_latent(self, name, samples):
        """Write a latent batch (b c h w) for core's LoadLatent, which takes its `name` ("something.latent")."""
        state = {"latent_tensor": samples.contiguous(), "latent_format_version_0": samples.new_zeros(0)}
        safetensors.torch.save_file(state, self.input_path(name))
        return name

    def put_input_image(self, name, image):
        """Upload an image (h w 3, 0..1) as PNG. Returns the name for core's LoadImage."""
        buffer = io.BytesIO()
        Image.fromarray(np.rint(np.asarray(image) * 255).astype("uint8")).save(buffer, "PNG")
        return self.client.upload_image(name, buffer.getvalue())

    # ---- running ----------------------------------------------------------------------------------------------

    def latent(self, prompt, node, slot=0, **options):
        """Run a prompt and return the LATENT on output `slot` of `node` as saved by core's SaveLatent, bit for bit."""
        return self.latents(prompt, [(node, slot)], **options)[0]

    def latents(self, prompt, places, **options):
        """Like `latent` for several (node, slot) of one run. `options` go to Client.run."""
        prompt = dict(prompt)
        for number, (node, slot) in enumerate(places):
            prompt[f"save {number}"] = {"class_type": "SaveLatent", "inputs": {
                "samples": [str(node), slot], "filename_prefix": f"latents/test_{number}"}}
        result = self.client.run(prompt, **options)
        files = [result.outputs[f"save {number}"]["latents"][0] for number in range(len(places))]
        return [safetensors.torch.load_file(self.output_path(file))["latent_tensor"] for file in files]

    def cancelled(self, prompt, node, slot=0):
        """Run a prompt and press Cancel at its second step. Returns the steps that it still made."""
        steps = []

        def cancel(kind, data):
            if kind == "progress":
                steps.append(data["value"])
                if len(steps) == 2:
                    self.client.interrupt()
        with pytest.raises(Interrupted):
            self.latent(prompt, node, slot, on_event=cancel)
        return steps

    # ---- the log ----------------------------------------------------------------------------------------------

    def start(self):
        super().start()
        self.start_log = self.log_text()        # later tests make the pack refuse things, which is logged too
        return self

    def complaints(self):
        """Lines logged while starting that blame this pack: failed imports, traceback lines that pass through it."""
        signs = ("error", "fail", "cannot import", "traceback", "warning", 'file "')
        return [line for line in self.start_log.splitlines()
                if any(word in line for word in PACK_WORDS) and any(sign in line.lower() for sign in signs)]

