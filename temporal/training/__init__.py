"""Training in plain PyTorch: any nn.Module called as `backbone(x, timesteps, context=...)` can be trained.

    diffusion.py      the variance-preserving schedule, its targets and loss
    loop.py           the loop: resumable, one device or torchrun, mixed precision, EMA, log
    image.py          losses of an image LDM, also on the frames of clips
    temporal.py       losses of temporal layers on an image LDM, also jointly with images
    clips.py          random windows of encoded clips or of video frames, with their captions
    checkpointing.py  gradient checkpointing of a network whose temporal layers are hooks
    drawn.py graph.py what a step draws apart from what it computes, which a GPU can record
    ema.py checkpoint.py distributed.py progress.py plot.py   what the loop is made of
"""
