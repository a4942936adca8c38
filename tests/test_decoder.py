"""The temporal decoder: layout, sign, the image path, and decoding in windows and tiles."""

import pytest
import torch
from einops import rearrange
from torch import nn

from video_ldm.temporal.decoder import KERNELS, SVD_KERNEL, DecoderParams, TemporalDecoder
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.windows import (
    decode_in_tiles,
    decode_in_windows,
    join_overlapping,
    ramp,
    tile_count,
    window_starts,
)
from video_ldm.tests.decoder_help import image_decoder, latents, small_params, temporal_decoder
from video_ldm.tests.formats_help import PUBLISHED
from video_ldm.tests.small import randomise, relative_error

each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)


@each_kernel
def test_a_window_is_decoded_as_by_comfyuis_own_temporal_decoder(kernel):
    from comfy.ldm.modules.temporal_ae import VideoDecoder
    params = small_params(kernel)
    ours = temporal_decoder(params)
    core = VideoDecoder(**params.config(), video_kernel_size=list(kernel))
    core.load_state_dict(ours.state_dict())         # every key and shape is SVD's
    z = latents(6)
    assert relative_error(ours(z), core(z).detach()) < 1e-5


def test_the_temporal_layers_of_svds_size_have_the_published_names_and_number_of_parameters():
    from comfy.ldm.modules.diffusionmodules.model import Decoder
    params = DecoderParams(4, 128, (1, 2, 4, 4), 2, SVD_KERNEL)
    with torch.device("meta"):
        decoder = TemporalDecoder(Decoder(**params.config()), SVD_KERNEL, device="meta")
    published = {key.removeprefix("first_stage_model.decoder."): tuple(shape)
                 for key, shape in PUBLISHED["svd_temporal_decoder"].items()}
    assert {key: tuple(value.shape) for key, value in decoder.state_dict().items()} == published
    parameters = dict(decoder.named_parameters())
    # docs/papers.md#temporal-decoder
    assert sum(parameters[name].numel() for name in decoder.temporal_names()) == 14_089_004


@each_kernel
def test_the_image_path_is_the_image_decoder_bit_for_bit(kernel):
    decoder = temporal_decoder(small_params(kernel))
    image = image_decoder(small_params(kernel))
    image.load_state_dict({key: value for key, value in decoder.state_dict().items() if key in image.state_dict()})
    z = latents(5)
    assert torch.equal(decoder(z, skip_video=True), image(z))
    assert relative_error(decoder(z), image(z)) > 0.1           # and the temporal one is another


@each_kernel
def test_fresh_layers_change_nothing(kernel):
    import comfy.ops
    for operations in (nn, comfy.ops.disable_weight_init):
        image, z = image_decoder(small_params(kernel)), latents(4)
        before = image(z)
        fresh = TemporalDecoder(image, kernel, operations)
        assert torch.equal(fresh(z).detach(), before)


def test_the_mix_weights_the_temporal_branch():
    decoder, z = temporal_decoder(small_params()), latents(4)
    with torch.no_grad():
        nn.init.dirac_(decoder.conv_out.time_mix_conv.weight)
        decoder.conv_out.time_mix_conv.bias.zero_()
        for value, same in ((-40.0, True), (40.0, False)):      # sigmoid 0 and 1: the other way round than in the U-Net
            for block in decoder.blocks():
                block.mix_factor.fill_(value)
            assert torch.equal(decoder(z), decoder(z, skip_video=True)) == same


def test_clips_of_a_batch_do_not_see_each_other_and_frames_of_a_clip_do():
    decoder, z = temporal_decoder(small_params()), latents(6)
    both = decoder(z, frames=3)
    assert relative_error(both[:3], decoder(z[:3])) < 1e-5 and relative_error(both[3:], decoder(z[3:])) < 1e-5
    changed = z.clone()
    changed[5] += 1
    moved = (decoder(changed, frames=3) - both).abs().amax((1, 2, 3))
    assert (moved[:3] == 0).all() and (moved[3:] > 1e-4).all()
    with pytest.raises(VideoLDMError, match="6 latents does not divide into clips of 4"):
        decoder(z, frames=4)


def test_one_frame_and_any_size_are_decoded():
    decoder = temporal_decoder(small_params())
    from comfy.ldm.modules.temporal_ae import VideoDecoder
    core = VideoDecoder(**small_params().config(), video_kernel_size=list(small_params().kernel))
    core.load_state_dict(decoder.state_dict())
    for frames, height, width in ((1, 4, 4), (2, 3, 5), (3, 1, 7)):
        z = latents(frames, height, width)
        pictures = decoder(z)
        assert pictures.shape == (frames, 3, 8 * height, 8 * width)
        assert relative_error(pictures, core(z).detach()) < 1e-5


def test_a_decoder_of_another_kind_is_refused():
    class Other(nn.Module):
        pass
    with pytest.raises(VideoLDMError, match=r"This decoder \(Other\) is not the image decoder"):
        TemporalDecoder(Other())
    with pytest.raises(VideoLDMError, match="TemporalDecoder"):
        TemporalDecoder(temporal_decoder(small_params()))       # it is temporal already
    with pytest.raises(ValueError, match="kernel"):
        TemporalDecoder(image_decoder(small_params()), (5, 1, 1))


# Windows

@pytest.mark.parametrize("length, window, overlap", [
    (16, 12, 4), (17, 6, 2), (100, 12, 4), (13, 12, 11), (9, 3, 0), (7, 8, 2)])
def test_windows_cover_a_clip_evenly_with_the_overlap_asked_for_or_more(length, window, overlap):
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0 and starts[-1] == max(length - window, 0)
    gaps = [after - before for before, after in zip(starts, starts[1:])]
    assert all(0 < gap <= window - overlap for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)
    if len(starts) > 1:         # the fewest: one less would not reach
        assert (len(starts) - 1) * (window - overlap) + overlap < length


def test_the_outer_quarters_of_an_overlap_belong_to_one_side():
    assert ramp(8).tolist() == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1])
    assert ramp(7).tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])     # a quarter, rounded down
    assert ramp(16).tolist() == pytest.approx([0] * 4 + [n / 9 for n in range(1, 9)] + [1] * 4)
    assert ramp(3).tolist() == pytest.approx([1 / 4, 2 / 4, 3 / 4])
    assert ramp(4).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1]) and ramp(1).tolist() == [0.5] and not len(ramp(0))


def test_pieces_that_agree_are_joined_to_exactly_what_they_agree_on():
    x = torch.randn(3, 20, 5)
    for overlap in range(9):
        assert torch.equal(join_overlapping(x[:, :12], x[:, 12 - overlap:], overlap, 1), x)


class Local(nn.Module):
    """What remains of the decoder with norms and attention stubbed: convolutions, each reaching one place further."""

    def __init__(self, layers=2):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv3d(4, 4, 3, padding=1) for _ in range(layers))
        randomise(self)

    def forward(self, z):
        x = rearrange(z, "t c h w -> 1 c t h w")
        for conv in self.convs:
            x = torch.tanh(conv(x))
        return rearrange(x, "1 c t h w -> t c h w")


@torch.no_grad()
def test_with_norms_and_attention_stubbed_windows_and_tiles_give_the_whole():
    """Exact once a quarter of the overlap covers what the convolutions reach: beyond it only true neighbours count."""
    local, z = Local(2), latents(40, 36, 44)
    whole = local(z)
    windowed = torch.cat(list(decode_in_windows(local, z, 16, 8)))
    assert relative_error(windowed, whole) < 1e-6
    assert relative_error(decode_in_tiles(local, z, 20, 8), whole) < 1e-6
    both = torch.cat(list(decode_in_windows(lambda part: decode_in_tiles(local, part, 20, 8), z, 16, 8)))
    assert relative_error(both, whole) < 1e-6
    # It can fail: with less overlap than that, padding shows.
    assert relative_error(torch.cat(list(decode_in_windows(local, z, 16, 2))), whole) > 1e-3
    assert relative_error(decode_in_tiles(local, z, 20, 2), whole) > 1e-3


@torch.no_grad()
@each_kernel
def test_the_decoder_itself_is_exact_in_windows_where_its_norms_and_attention_are_stubbed(kernel):
    """Its temporal reach: two convolutions in each ResBlock, and the last one."""
    decoder = temporal_decoder(small_params(kernel, (1, 1)))
    for block in decoder.blocks():
        block.time_stack.in_layers[0] = block.time_stack.out_layers[0] = nn.Identity()
    decoder.mid.attn_1 = nn.Identity()
    for part in [*decoder.blocks(), decoder]:
        for name in ("norm1", "norm2", "norm_out"):
            if hasattr(part, name):
                setattr(part, name, nn.Identity())
    reach = 2 * sum(1 for _ in decoder.blocks()) + 1
    overlap = 4 * reach
    z = latents(2 * (overlap + 10) - 2, 2, 2)
    whole = decoder(z)
    windowed = torch.cat(list(decode_in_windows(decoder, z, overlap + 10, overlap)))
    assert relative_error(windowed, whole) < 1e-5
    assert relative_error(torch.cat(list(decode_in_windows(decoder, z, overlap + 10, 2))), whole) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("first, last", [(0, 1), (7, 13), (11, 12), (29, 30), (0, 30)])
def test_a_part_of_a_clip_is_that_part_of_it_and_windows_outside_are_not_decoded(first, last):
    decoder, z, decoded = temporal_decoder(small_params(mult=(1, 1))), latents(30, 2, 3), []

    def decode(part):
        decoded.append(part)
        return decoder(part)
    whole = torch.cat(list(decode_in_windows(decode, z, 8, 3)))
    count = len(decoded)
    assert torch.equal(torch.cat(list(decode_in_windows(decode, z, 8, 3, first, last))), whole[first:last])
    again = len(decoded) - count
    assert again <= count if last - first == 30 else again < count


@torch.no_grad()
def test_frames_come_out_in_order_while_later_windows_are_still_to_be_decoded():
    z, decoded = latents(24), []
    for piece in decode_in_windows(lambda part: decoded.append(1) or part, z, 8, 4):
        assert len(piece) <= 8
        if len(decoded) < 3:
            break
    assert len(decoded) < len(window_starts(24, 8, 4))


def test_tiles_lie_in_rows_and_columns_that_are_spread_like_windows():
    z, corners = torch.arange(29.0 * 29).reshape(1, 1, 29, 29), []
    whole = decode_in_tiles(lambda part: corners.append(part[0, 0, 0, 0].item()) or part, z, 16, 4)
    assert torch.equal(whole, z)
    assert corners == [29 * top + left for top in (0, 6, 13) for left in (0, 6, 13)]


def test_tiles_that_hold_the_whole_picture_are_one_call():
    calls = []
    decode_in_tiles(lambda part: calls.append(part.shape) or part, latents(2, 5, 7), 8, 2)
    assert calls == [(2, 4, 5, 7)] and tile_count(5, 7, 8, 2) == 1 and tile_count(5, 30, 8, 2) == 5
