"""Model files: how they are opened, and the formats that are not temporal layers.

    files               opens a file without running code from it
    tensor_names        searches the names and shapes of its tensors
    temporal_file       the content of a file of temporal layers
    decoder, motion_lora, pixel_upscaler, scene_layout_file one kind of file each

`temporal.families` identifies and loads files.
"""
