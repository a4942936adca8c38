"""How a brick acts at a site: forward hooks on the spatial module that the site belongs to (sites.py).

Every hook leaves alone whatever is not part of the call it was made for. A call says with `acting` whether it is open
here, and `run(site, args, x)` gives what its brick makes of x.
"""

from einops import rearrange
from torch import cat, nn


def hook_site(call, site, module: nn.Module, channels: int) -> list:
    """Put the hooks of one site on its module, of `channels`; returns the handles that take them off again."""
    if site.slot == "in_attn_pre_ff":
        return [module.norm3.register_forward_pre_hook(before_feed_forward(call, site)),
                module.register_forward_hook(after_feed_forward(call, site))]
    if site.slot == "post_level":
        return [module.register_forward_pre_hook(after_level(call, site, channels))]
    return [module.register_forward_hook(after_module(call, site))]


def after_module(call, site):
    def hook(module, args, output):
        return call.run(site, args, output) if call.acting else None
    return hook


def before_feed_forward(call, site):
    """Before the last norm of a transformer block: the feed-forward sees the brick's residual. The block keeps its skip
    from before this norm, so the residual is due once more at its end."""
    def hook(module, args):
        if not call.acting:
            return None
        residual = call.due[site] = call.run(site, args, args[0])
        return args[0] + residual, *args[1:]
    return hook


def after_feed_forward(call, site):
    def hook(module, args, output):
        return output + call.due.pop(site) if call.acting and site in call.due else None
    return hook


def after_level(call, site, channels: int):
    """Before the first layer of the block that follows a level: what went into the skips is not touched. On the output
    side the skip's channels are behind those of the main path by then, and stay as they are."""
    def hook(module, args):
        if not call.acting:
            return None
        main, skip = args[0][:, :channels], args[0][:, channels:]
        main = call.run(site, args, main)
        return cat([main, skip], dim=1) if skip.shape[1] else main, *args[1:]
    return hook


def note_emb(call):
    """At the first ResBlock of the network: its timestep embedding, which the module after the last level is not
    given."""
    def hook(module, args):
        if call.acting:
            call.emb = args[1]
    return hook


def fold_hook(call):
    """Before a spatial norm: frames side by side in height, so that it pools over the clip."""
    def hook(module, args):
        if not call.acting:
            return None
        return rearrange(args[0], "(b t) c h w -> b c (t h) w", t=call.settings.frames), *args[1:]
    return hook


def unfold_hook(call):
    def hook(module, args, output):
        if not call.acting:
            return None
        return rearrange(output, "b c (t h) w -> (b t) c h w", t=call.settings.frames)
    return hook
