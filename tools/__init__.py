"""What run.py and the host tests share: finding or setting up a ComfyUI, starting it, talking to it. Standard library."""
