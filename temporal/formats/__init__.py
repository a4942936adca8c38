"""Model files: opening them, and what stands in each kind of file that is no family of layers.

    files               opening a file without running what is in it
    tensor_names        asking for names and shapes of its tensors
    temporal_file       what a file of temporal layers says
    decoder, motion_lora, pixel_upscaler, scene_layout      one kind of file each

What a file is, and how it is loaded, is asked in `temporal.families`.
"""
