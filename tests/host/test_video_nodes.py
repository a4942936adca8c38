"""Load Video Frames and Save Video File in a real ComfyUI."""

import json
import os
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.video import open_video, read_audio, write_video
from video_ldm.tests.host.client import Interrupted, NodeError
from video_ldm.tests.video_help import clip, psnr, write_exact

WORKFLOW = {"nodes": [{"id": 7, "title": "a } brace"}], "version": 0.4}


@pytest.fixture
def source(server):
    """The name of a 12 frame, 6 fps clip with sound in the input folder."""
    tone = np.sin(np.arange(2 * 44100) / 20).astype(np.float32)[None] * 0.5
    write_video(server.input_path("source.mp4"), clip(), 6, crf=4, audio=(tone, 44100))
    return "source.mp4"


def load(file, **settings):
    return {"class_type": "VideoLDMLoadVideo",
            "inputs": {"file": file, "start_frame": 0, "frame_count": 0, "stride": 1, **settings}}


def save(**settings):
    return {"class_type": "VideoLDMSaveVideo", "inputs": {
        "filename_prefix": "video/clip", "format": "mp4", "fps": 0.0, "crf": 10, "contact_sheet": 16, **settings}}


def show(node, slot):
    return {"class_type": "PreviewAny", "inputs": {"source": [node, slot]}}


def metadata(path):
    with av.open(str(path)) as container:
        return {key.lower(): text for key, text in container.metadata.items()}


def saved(server, result, node="save"):
    return server.output_path(result.outputs[node]["images"][0])


def leftovers(server):
    return [name for _, _, names in os.walk(server.base / "output") for name in names if ".part" in name]


def everything_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("node", ["VideoLDMLoadVideo", "VideoLDMSaveVideo"])
def test_every_input_and_output_is_explained(server, client, node):
    info = client.object_info(node)[node]
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    assert info["description"] and info["category"] == "video ldm/video"
    assert all(spec[1].get("tooltip") for spec in inputs.values())
    assert all(info["output_tooltips"])


def test_a_clip_goes_in_and_out_at_its_rate(server, client, source):
    result = client.run({"load": load(source), "save": save(images=["load", 0], fps=["load", 2]),
                         "count": show("load", 3), "fps": show("load", 2)})
    video = open_video(saved(server, result))
    assert (video.frames, video.rate) == (12, 6)
    assert psnr(video.read(), clip()) > 38
    assert result.outputs["count"]["text"] == ["12"] and result.outputs["fps"]["text"] == ["6.0"]
    assert result.outputs["save"]["animated"] == [True]
    assert leftovers(server) == []


def test_a_range_and_a_stride_give_those_frames_and_their_rate(server, client, source):
    result = client.run({"load": load(source, start_frame=2, frame_count=4, stride=2),
                         "save": save(images=["load", 0], fps=["load", 2], format="webp", crf=0)})
    video = open_video(saved(server, result))
    whole = open_video(server.input_path(source)).read()
    assert (video.frames, video.rate) == (4, 3)
    assert np.abs(video.read() - whole[2:10:2]).max() < 1e-6


def test_a_video_keeps_its_own_rate_and_sound(server, client, source):
    loaders = {"load": load(source), "core": {"class_type": "LoadVideo", "inputs": {"file": source}},
               "parts": {"class_type": "GetVideoComponents", "inputs": {"video": ["core", 0]}},
               "made": {"class_type": "CreateVideo",
                        "inputs": {"images": ["parts", 0], "audio": ["parts", 1], "fps": ["parts", 2]}}}
    for node, slot in (("load", 1), ("core", 0), ("made", 0)):
        path = saved(server, client.run({**loaders, "save": save(video=[node, slot])}))
        video = open_video(path)
        assert (video.frames, video.rate) == (12, 6), node
        assert psnr(video.read(), clip()) > 38, node
        sound, rate = read_audio(open_video(path))
        assert abs(sound.shape[1] / rate - 2) < 0.1 and np.abs(sound).max() > 0.3, node


def test_part_of_a_video_comes_with_that_part_of_its_sound(server, client, source):
    result = client.run({"load": load(source, start_frame=3, frame_count=3), "save": save(video=["load", 1])})
    sound, rate = read_audio(open_video(saved(server, result)))
    assert abs(sound.shape[1] / rate - 0.5) < 0.06


def test_the_sound_of_a_range_goes_by_wire_and_through_cores_nodes(server, client):
    """8 frames at stride 2 of 30000/1001 a second, from frame 5: what is heard from frame 5 to frame 20.

    Then it is 400 Hz on the left and 700 Hz on the right, before and after 1600 and 2300 Hz.
    """
    first, last = (round(k * 44100 * Fraction(1001, 30000)) for k in (5, 21))
    time, inside = np.arange(66_150) / 44100, np.zeros(66_150, bool)
    inside[first:last] = True
    waves = [np.where(inside, np.sin(2 * np.pi * a * time), np.sin(2 * np.pi * b * time))
             for a, b in ((400, 1600), (700, 2300))]
    write_exact(server.input_path("exact.mov"), "pcm_s16le", (np.stack(waves) * 16000).astype(np.int16), "stereo",
                frames=40)
    ranged = {"load": load("exact.mov", start_frame=5, frame_count=8, stride=2),
              "parts": {"class_type": "GetVideoComponents", "inputs": {"video": ["load", 1]}},
              "made": {"class_type": "CreateVideo",
                       "inputs": {"images": ["parts", 0], "audio": ["parts", 1], "fps": ["parts", 2]}},
              "core": {"class_type": "SaveVideo", "inputs": {"video": ["load", 1], "filename_prefix": "core/clip",
                                                             "format": "mp4", "codec": "h264"}},
              "wired": save(images=["load", 0], audio=["load", 5], fps=["load", 2], filename_prefix="video/wired"),
              "again": save(video=["made", 0], filename_prefix="video/again")}
    result = client.run(ranged)
    for node in ("core", "wired", "again"):
        video = open_video(saved(server, result, node))
        assert video.frames == 8 and abs(float(video.rate) - 15000 / 1001) < 0.01, node
        sound, rate = read_audio(video)
        assert rate == 44100 and len(sound) == 2 and abs(sound.shape[1] - (last - first)) <= 1, node
        for channel, pitch, elsewhere in ((0, 400, 1600), (1, 700, 2300)):
            spectrum = np.abs(np.fft.rfft(sound[channel]))
            bins = sound.shape[1] / 44100       # for each Hz
            assert abs(spectrum.argmax() / bins - pitch) < 2, (node, channel)
            assert spectrum[round((elsewhere - 40) * bins):round((elsewhere + 40) * bins)].max() < spectrum.max() / 50


def test_videos_in_folders_are_listed_and_the_node_shows_the_chosen_frames(server, client):
    path = server.input_path("trip/day 1/beach.mts")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in clip():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    options = client.object_info("VideoLDMLoadVideo")["VideoLDMLoadVideo"]["input"]["required"]["file"]
    assert "trip/day 1/beach.mts" in str(options)
    result = client.run({"load": load("trip/day 1/beach.mts", start_frame=2, frame_count=3, stride=4),
                         "count": show("load", 3)})
    assert result.outputs["load"]["animated"] == [True]
    preview = open_video(server.output_path(result.outputs["load"]["images"][0]))
    assert (preview.frames, preview.rate, preview.width) == (3, Fraction(25, 4), 96)
    assert psnr(preview.read(), clip()[2::4]) > 30


def test_core_saves_the_video_that_was_loaded(server, client, source):
    core = {"class_type": "SaveVideo", "inputs": {"video": ["load", 1], "filename_prefix": "core/clip",
                                                  "format": "mp4", "codec": "h264"}}
    for settings, frames, rate in (({}, 12, 6), ({"stride": 2}, 6, 3)):
        video = open_video(saved(server, client.run({"load": load(source, **settings), "save": core})))
        assert (video.frames, video.rate) == (frames, rate)


def test_the_workflow_is_stored_as_core_stores_it(server, client, source):
    prompt = {"load": load(source), "save": save(video=["load", 1]), "webm": save(video=["load", 1], format="webm"),
              "core": {"class_type": "SaveVideo", "inputs": {"video": ["load", 1], "filename_prefix": "core/clip",
                                                             "format": "mp4", "codec": "h264"}}}
    result = client.run(prompt, extra_data={"extra_pnginfo": {"workflow": WORKFLOW}})
    core, own, webm = (metadata(saved(server, result, node)) for node in ("core", "save", "webm"))
    for key in ("prompt", "workflow"):
        assert own[key] == core[key] and json.loads(webm[key]) == json.loads(core[key])
    assert json.loads(own["workflow"]) == WORKFLOW
    sheet = Image.open(server.output_path(result.outputs["save"]["contact_sheet"][0]))
    assert json.loads(sheet.text["workflow"]) == WORKFLOW and json.loads(sheet.text["prompt"]).keys() == prompt.keys()


def test_the_contact_sheet_lies_beside_the_video_and_comes_out(server, client, source):
    prompt = {"load": load(source), "save": save(video=["load", 1], contact_sheet=6),
              "image": {"class_type": "PreviewImage", "inputs": {"images": ["save", 1]}}}
    result = client.run(prompt)
    path = server.output_path(result.outputs["save"]["contact_sheet"][0])
    video = saved(server, result)
    assert path.parent == video.parent and path.name == video.stem + "sheet.png"
    shown = np.asarray(Image.open(server.output_path(result.outputs["image"]["images"][0])))
    assert np.array_equal(np.asarray(Image.open(path)), shown)
    prompt["save"]["inputs"]["contact_sheet"] = 0
    before = len(everything_in(server.base / "output"))
    assert "contact_sheet" not in client.run(prompt).outputs["save"]
    assert len(everything_in(server.base / "output")) == before + 1


@pytest.mark.parametrize("format", ["mp4", "webm", "webp", "gif"])
def test_every_format_saves_an_odd_size(server, client, format):
    write_video(server.input_path("odd.webp"), clip(5, 33, 47), 6, "webp", crf=0)
    result = client.run({"load": load("odd.webp"), "save": save(video=["load", 1], format=format, contact_sheet=0),
                         "report": show("save", 2)})
    path = saved(server, result)
    video, report = open_video(path), result.outputs["report"]["text"][0]
    padded = format in ("mp4", "webm")
    assert path.suffix == "." + format and video.frames == 5
    assert (video.width, video.height) == ((48, 34) if padded else (47, 33))
    assert ("padded to even sides" in report) == padded
    assert result.outputs["save"]["animated"] == [format != "gif"]


def test_images_without_a_rate_are_saved_at_8_fps_and_the_report_says_so(server, client, source):
    result = client.run({"load": load(source), "save": save(images=["load", 0]), "report": show("save", 2)})
    assert open_video(saved(server, result)).rate == 8
    assert "8 fps is assumed" in result.outputs["report"]["text"][0]


def test_another_rate_leaves_the_sound_out_and_the_report_says_so(server, client, source):
    result = client.run({"load": load(source), "save": save(video=["load", 1], fps=12.0), "report": show("save", 2)})
    video = open_video(saved(server, result))
    assert video.rate == 12 and not video.has_audio
    assert "sound was left out" in result.outputs["report"]["text"][0]


def test_sound_goes_from_one_video_onto_another_and_ends_with_its_pictures(server, client, source):
    """The source's sound lasts 2 s, and six frames at 6 fps last 1 s."""
    result = client.run({"core": {"class_type": "LoadVideo", "inputs": {"file": source}},
                         "parts": {"class_type": "GetVideoComponents", "inputs": {"video": ["core", 0]}},
                         "load": load(source, frame_count=6),
                         "save": save(images=["load", 0], fps=6.0, audio=["parts", 1], format="mov prores 422"),
                         "report": show("save", 2)})
    [file] = result.outputs["save"]["files"]
    sound, rate = read_audio(open_video(server.output_path(file)))
    assert file["filename"].endswith(".mov") and sound.shape[1] == rate and np.abs(sound).max() > 0.3
    assert "was cut where the pictures end, after 1.00 s" in result.outputs["report"]["text"][0]
    preview = open_video(saved(server, result))
    assert result.outputs["save"]["images"][0]["type"] == "temp" and (preview.frames, preview.has_audio) == (6, True)


def test_transparency_of_core_goes_into_a_folder_of_pictures(server, client, source):
    result = client.run({"load": load(source, frame_count=3),
                         "mask": {"class_type": "ImageToMask", "inputs": {"image": ["load", 0], "channel": "green"}},
                         "join": {"class_type": "JoinImageWithAlpha", "inputs": {"image": ["load", 0],
                                                                                 "alpha": ["mask", 0]}},
                         "save": save(images=["join", 0], format="png", ping_pong=True)})
    [first] = result.outputs["save"]["files"]
    pictures = sorted(server.output_path(first).parent.iterdir())
    frames = next(open_video(server.input_path(source)).iterate())
    picture = np.asarray(Image.open(pictures[0]))
    assert len(pictures) == 4 and np.array_equal(picture[..., :3], frames)
    assert np.array_equal(picture[..., 3], 255 - frames[..., 1]), "core's masks are the opposite of alpha"
    assert leftovers(server) == []


def test_nothing_or_two_things_to_save_is_refused_before_anything_runs(server, client, source):
    both = {"images": ["load", 0], "video": ["load", 1]}
    for settings, sentence in (({}, "nothing to save"), (both, "Disconnect one")):
        with pytest.raises(NodeError, match=sentence) as caught:
            client.run({"load": load(source), "save": save(**settings)})
        assert caught.value.node_id == "save" and caught.value.exception_type == "custom_validation_failed"


def test_bad_files_and_ranges_are_refused_in_one_sentence_at_the_node(server, client, source):
    server.input_path("page.mp4").write_text("<html>404</html>")
    for node, sentence in ((load("page.mp4"), "page.mp4 cannot be read as a video: it is a web page"),
                           (load(source, start_frame=12), "start_frame can be at most 11"),
                           (load(source, frame_count=13), "there are 12, and 13 were asked for")):
        with pytest.raises(NodeError, match=sentence) as caught:
            client.run({"load": node, "save": save(images=["load", 0])})
        assert caught.value.node_id == "load" and caught.value.exception_type == "Video LDM"
    with pytest.raises(NodeError, match="There is no file 'gone.mp4'"):
        client.run({"load": load("gone.mp4"), "save": save(images=["load", 0])})
    with pytest.raises(NodeError, match="leads outside ComfyUI's output folder"):
        client.run({"load": load(source), "save": save(images=["load", 0], filename_prefix="../clip")})


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(server, client, source):
    prompt = {"load": load(source), "count": show("load", 3)}
    assert client.run(prompt).outputs["count"]["text"] == ["12"]
    assert "load" not in client.run(prompt).executed()
    write_video(server.input_path(source), clip(5), 6)
    assert client.run(prompt).outputs["count"]["text"] == ["5"]


def test_cancelling_leaves_no_file(server, client):
    write_video(server.input_path("long.mp4"), clip(60, 256, 384), 8)
    before = everything_in(server.base / "output")

    def stop(kind, data):
        if kind == "progress" and data["node"] == "save" and data["value"] >= 3:
            client.interrupt()
    with pytest.raises(Interrupted):
        client.run({"load": load("long.mp4"), "save": save(images=["load", 0], format="webm")}, on_event=stop)
    assert everything_in(server.base / "output") == before


def test_model_files_of_the_pack_its_demo_and_its_neighbours_are_listed_together(host, tmp_path, monkeypatch):
    """In this process, with the host's real folder_paths."""
    import folder_paths

    from video_ldm.nodes.host import files
    own, demo, neighbour, loras = (tmp_path / name for name in ("video_ldm", "demo", "animatediff_models", "loras"))
    for folder, names in ((own, ("mine.safetensors", "notes.txt")), (neighbour, ("mm_sd_v15_v2.ckpt",)),
                          (demo, ("image.safetensors", "video_ldm_driving.safetensors")), (loras, ("zoom.ckpt",))):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"12345")
    monkeypatch.setattr(files, "DEMO_FOLDER", demo)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    known = folder_paths.folder_names_and_paths
    monkeypatch.setitem(known, "animatediff_motion_lora", ([str(loras)], set()))
    monkeypatch.delitem(known, "animatediff_models", raising=False)
    for kind, expected in ((files.LAYERS, ["mine.safetensors", "mm_sd_v15_v2.ckpt", "video_ldm_driving.safetensors"]),
                           (files.MOTION_LORA, ["mine.safetensors", "zoom.ckpt"])):
        monkeypatch.delitem(known, kind, raising=False)
        folder_paths.filename_list_cache.pop(kind, None)
        assert files.list_files(kind) == files.list_files(kind) == expected
        assert all(os.path.isfile(files.resolve(name, kind)) for name in expected)
        assert files.fingerprint("mine.safetensors", kind)[1] == 5
        with pytest.raises(VideoLDMError, match="There is no file gone.safetensors in .*video_ldm"):
            files.resolve("gone.safetensors", kind)
        folder_paths.filename_list_cache.pop(kind, None)


def test_work_that_does_not_fit_into_memory_is_refused_before_it_starts(host):
    from video_ldm.nodes.host import files
    files.refuse_beyond_memory(1000, "4 frames", "Lower frame_count.")
    with pytest.raises(VideoLDMError, match=r"9 frames need 1024.0 GB of memory and .* GB are free. Lower frame_count"):
        files.refuse_beyond_memory(2**40, "9 frames", "Lower frame_count.")


def test_a_video_that_makes_its_frames_is_streamed(host, tmp_path, monkeypatch):
    """The pack's own VIDEO classes give their frames one by one: never all of them at once."""
    from video_ldm.nodes.host.streamed_video import StreamedVideo
    from video_ldm.nodes.host.video_sources import video_source
    from video_ldm.temporal.video import beside
    alive = []

    class Lazy(StreamedVideo):
        def get_components(self):
            raise AssertionError("would hold every frame")

        save_to = as_trimmed = get_components       # newer hosts also ask for as_trimmed

        def get_dimensions(self):
            return 96, 64

        def get_frame_rate(self):
            return Fraction(6)

        def get_frame_count(self):
            return 12

        def iterate_frames(self, broken=None, bits=8):
            for frame in clip():
                alive.append(1)
                yield frame

    source = video_source(Lazy())
    seen = []
    monkeypatch.setattr(beside, "MOST_FRAMES", 2)
    write_video(tmp_path / "clip.mp4", source.frames(), source.rate,
                on_frame=lambda done: seen.append(len(alive) - done))
    # Two frames wait, the next one is being encoded, and one more may be made.
    assert len(seen) == 12 and max(seen) <= 4 and open_video(tmp_path / "clip.mp4").frames == 12
    assert source.sound is None and (source.count, source.width, source.height) == (12, 96, 64)


def test_images_become_bytes_by_rounding_and_grey_or_transparent_ones_are_saved_too(host):
    from video_ldm.nodes.host.pixels import frame_bytes
    levels = torch.arange(256).div(255).view(16, 16, 1)
    assert np.array_equal(frame_bytes(levels.expand(16, 16, 3))[..., 0].ravel(), np.arange(256))
    assert np.array_equal(frame_bytes(levels), frame_bytes(levels.expand(16, 16, 3)))
    transparent = torch.cat([levels.expand(16, 16, 3), torch.zeros(16, 16, 1)], -1)
    assert np.array_equal(frame_bytes(transparent), frame_bytes(levels))
    assert frame_bytes(torch.tensor([[[-1.0, 2.0, 0.5]]])).tolist() == [[[0, 255, 128]]]
