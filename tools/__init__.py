"""What run.py and the host tests share: finding, setting up, starting and asking a ComfyUI.

Finding, setting up and starting need the standard library only. client, console and demo run in the host's Python.
"""
