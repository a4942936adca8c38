"""Temporal layers and what surrounds them, in plain PyTorch: nothing here imports ComfyUI."""
