"""What an artist sees: one file per stage, each exporting NODES; `extension.py` gathers them."""
