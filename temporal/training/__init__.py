"""Training in plain PyTorch: any nn.Module called as `backbone(x, timesteps, context=...)` can be trained.

    loop.py                the loop: resumable, one device or torchrun, mixed precision, EMA, log
    image.py               losses of an image LDM, also on the frames of clips
    temporal.py            losses of temporal layers on an image LDM, also jointly with images
    decoder.py             losses of a temporal decoder
    upscaler.py            losses of an upscaler and of its temporal layers
    scene_layout_loss.py   the loss of a scene layout's conditioner
    clips.py               random windows of encoded clips or of video frames, with their captions
    checkpointing.py       gradient checkpointing of a network whose temporal layers are hooks
    loss_inputs.py         losses in two parts: random inputs first, then a computation that a GPU can record
    cuda_graph.py          a training step as a CUDA graph
    ema.py checkpoint.py distributed.py progress.py plot.py   what the loop is made of
"""
