"""What run.py and the host tests share: finding, setting up, starting and asking a ComfyUI. Standard library only."""
