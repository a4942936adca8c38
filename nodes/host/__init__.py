"""The one door to ComfyUI: the only folder of the pack that imports comfy, folder_paths or server."""
