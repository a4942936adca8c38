"""The nodes that an artist sees. One file per stage, each with a list NODES. `extension.py` gathers the lists."""
