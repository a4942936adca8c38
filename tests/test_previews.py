"""What a sampler shows while it samples a clip: frames of all of it, in one picture, and how far it is.

The page plays these frames. What it is told of them must fit the picture that it gets.
"""

from types import SimpleNamespace

import latent_preview
import pytest
import torch
from PIL import Image

from video_ldm.nodes.host import moving_preview, notes, pvdm, sampling
from video_ldm.nodes.host.options import CLIP, ClipOptions

MODEL = SimpleNamespace(load_device="cpu", get_model_object=lambda name: None)


WIDTH, HEIGHT = 8, 4        # of a picture


class Core:
    """Core's previewer: a picture of a latent. Its shade is the latent's."""

    def decode_latent_to_preview(self, x0):
        return Image.new("RGB", (WIDTH, HEIGHT), (int(x0.mean()),) * 3)

    def decode_latent_to_preview_image(self, format, x0):
        raise AssertionError("the pack makes the sheet itself")


class Animated:
    """A previewer that another pack has put in core's place: it gives tensors, and shows the clip by itself."""

    def decode_latent_to_preview(self, x0):
        return torch.zeros(1, 4, 8, 3)

    def decode_latent_to_preview_image(self, format, x0):
        return format, len(x0), 512


@pytest.fixture
def shown(monkeypatch):
    """[(value, total, preview)] of the progress bar. `shown.by(previewer)` gives a progress with a previewer."""
    class Shown(list):
        def by(self, previewer):
            monkeypatch.setattr(latent_preview, "get_previewer", lambda *args: previewer)
            progress = sampling.RolloutProgress(MODEL, 1, 4)
            progress.bar = SimpleNamespace(update_absolute=lambda *args: self.append(args))
            return progress
    return Shown()


@pytest.mark.parametrize("frames", [1, 8, 16, 40])
def test_the_preview_of_a_clip_shows_up_to_sixteen_of_its_frames_from_the_first_to_the_last(shown, frames):
    clip = torch.arange(frames).float()[:, None, None, None].expand(-1, 4, 2, 2)
    shown.by(Core()).show_clip(0, clip, clip, 4)
    (value, total, (format, sheet, _)), = shown
    assert (value, total, format) == (1, 4, "JPEG")
    shades = sheet.convert("L").getcolors()
    assert sheet.width * sheet.height >= min(frames, 16) * 32
    assert {0, frames - 1} <= {shade for _, shade in shades} and len(shades) == min(frames, 16)


def test_the_bar_counts_the_steps_that_are_sampled(shown):
    progress = shown.by(None)
    for step in range(12):
        progress.show_clip(step, torch.zeros(2, 4, 2, 2), None, 12)         # 3 runs of FreeInit
    assert [entry[:2] for entry in shown] == [(step + 1, 12) for step in range(12)]


def test_another_packs_previewer_shows_the_clip_in_its_own_way(shown):
    shown.by(Animated()).show_clip(0, torch.zeros(6, 4, 2, 2), None, 4)
    assert shown == [(1, 4, ("JPEG", 6, 512))]


def test_a_longer_video_is_sampled_beside_another_packs_previewer(shown):
    progress = shown.by(Animated())
    progress.bar = SimpleNamespace(update_absolute=lambda value, preview=None: shown.append((value, preview)))
    progress.callback(0, torch.zeros(6, 4, 2, 2), None, 4)
    progress.finish(torch.zeros(6, 4, 2, 2))
    assert shown == [(1, None), (4, None)]


# What the page is told, to play them

@pytest.fixture
def told(monkeypatch):
    """What was sent to the page, in order: ("preview", the event), then ("sheet", the picture)."""
    sent = []
    running = SimpleNamespace(client_id="me", send_sync=lambda event, data, client: sent.append((event, data, client)))
    monkeypatch.setattr(notes, "server", lambda: running)
    monkeypatch.setattr(notes, "get_executing_context", lambda: SimpleNamespace(prompt_id="run", node_id="3:5"))
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *args: Core())
    return sent


def progress_of(told, clips, rate=None):
    progress = sampling.RolloutProgress(MODEL, clips, 4, rate)
    progress.bar = SimpleNamespace(update_absolute=lambda *args, preview=None: told.append(
        ("sheet", ([*args[2:], preview])[0], None)))
    return progress


def latents(*shades):
    return torch.tensor(shades).float()[:, None, None, None].expand(-1, 4, 2, 2)


def cells(event, sheet):
    """The shades of the pictures that the page cuts out: those that move, and those that stand still."""
    assert sheet.size == (event["columns"] * WIDTH, event["rows"] * HEIGHT)
    found = [sheet.getpixel((number % event["columns"] * WIDTH + WIDTH // 2,
                             number // event["columns"] * HEIGHT + HEIGHT // 2))[0]
             for number in range(event["frames"] + event["still"])]
    return found[:event["frames"]], found[event["frames"]:]


@pytest.mark.parametrize("frames, rate, shown, fps", [
    (2, 8.0, [0, 1], 8.0),
    (8, 4.0, list(range(8)), 4.0),
    (16, None, list(range(16)), 8.0),
    (24, 8.0, [0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23], 16 / 3),      # windows, or three clips of 8
    (31, 12.0, list(range(0, 31, 2)), 12 * 16 / 31),
])
def test_the_page_is_told_where_the_frames_are_in_the_sheet_and_plays_them_at_their_own_speed(told, frames, rate, shown,
                                                                                              fps):
    progress_of(told, 1, rate).show_clip(0, latents(*range(frames)), None, 4)
    (name, event, client), (kind, (_, sheet, _), _) = told
    assert (name, client, kind, event["node"]) == ("video_ldm.preview", "me", "sheet", "3:5")
    assert cells(event, sheet) == (shown, []) and event["fps"] == pytest.approx(fps)


def test_one_picture_is_not_played(told):
    progress_of(told, 1).show_clip(0, latents(7), None, 4)
    assert [entry[0] for entry in told] == ["sheet"]


def test_of_a_longer_video_the_finished_clip_is_played_and_the_clip_in_progress_stands_still_beside_it(told):
    progress = progress_of(told, 3, 6.0)
    progress.callback(0, latents(9, 8), None, 4)                # nothing is finished: one picture
    progress.finish(latents(10, 11, 12))
    progress.callback(0, latents(90, 80), None, 4)
    assert [entry[0] for entry in told] == ["sheet", moving_preview.EVENT, "sheet", moving_preview.EVENT, "sheet"]
    assert cells(told[1][1], told[2][1][1]) == ([10, 11, 12], [])
    assert cells(told[3][1], told[4][1][1]) == ([10, 11, 12], [90])
    assert told[1][1]["fps"] == told[3][1]["fps"] == 6.0


def test_another_packs_previewer_is_not_played_by_this_pack(told, monkeypatch):
    monkeypatch.setattr(latent_preview, "get_previewer", lambda *args: Animated())
    progress_of(told, 1).show_clip(0, latents(1, 2, 3), None, 4)
    assert told == [("sheet", ("JPEG", 3, 512), None)]


def test_pvdm_tells_the_page_how_a_finished_clip_is_played(told, monkeypatch):
    monkeypatch.setattr(pvdm, "previews", lambda: True)
    clip = torch.arange(20).float()[:, None, None, None].expand(-1, HEIGHT, WIDTH, 3) / 255
    monkeypatch.setattr(pvdm, "decode_clip", lambda *args: clip)
    progress = pvdm.ClipProgress(None, 4, 10.0)
    progress.bar = SimpleNamespace(update_absolute=lambda done, steps, sheet: told.append(("sheet", sheet, None)))
    progress.finish(torch.zeros(1))
    (_, event, _), (_, (_, sheet, _), _) = told
    moving, still = cells(event, sheet)
    assert moving == pytest.approx([0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15, 16, 18, 19], abs=1) and still == []
    assert event["fps"] == 8.0


@pytest.mark.parametrize("options, rate", [({}, None), ({CLIP: ClipOptions()}, None),
                                           ({CLIP: ClipOptions(fps=4.0)}, 4.0)])
def test_the_speed_is_that_of_the_clips_which_the_model_makes(options, rate):
    assert sampling.clip_rate(SimpleNamespace(model_options={"transformer_options": options})) == rate
    assert sampling.clip_rate(SimpleNamespace(model_options={})) is None
