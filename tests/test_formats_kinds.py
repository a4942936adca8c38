"""What a file is, from its keys and shapes alone."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from video_ldm.temporal import families
from video_ldm.temporal.errors import VideoLDMError
from video_ldm.temporal.families import (
    LOADERS,
    identify_keys,
    listing,
    load_camera,
    load_decoder,
    load_layout,
    load_motion_lora,
    load_pvdm,
    load_sparse_control,
    load_temporal,
    load_upscaler,
    load_video_model,
    refusal,
    taken_by,
)
from video_ldm.temporal.formats.temporal_file import Base, TemporalFile
from video_ldm.temporal.params import StackParams
from video_ldm.temporal.pvdm.files import AUTOENCODER, DIFFUSION
from video_ldm.tests.formats_help import PUBLISHED, REFUSED, lora_shapes, motion_shapes

KINDS = {
    "ad_mm_sd_v15": "animatediff_v1", "ad_mm_sd_v15_v2": "animatediff_v2", "ad_v3_sd15_mm": "animatediff_v3",
    "animatelcm_sd15_t2v": "animatelcm", "motion_lora_v2": "motion_lora", "motion_lora_diffusers": "motion_lora",
    "ad_mm_sdxl_v10_beta": "animatediff_sdxl", "ad_v3_sd15_adapter": "v3_domain_adapter", "hotshotxl": "hotshot_xl",
    "diffusers_motion_adapter_v1": "diffusers_motion_adapter",
    "diffusers_motion_adapter_v2": "diffusers_motion_adapter",
    "diffusers_motion_adapter_sdxl": "diffusers_motion_adapter_sdxl", "svd_unet": "svd_unet",
    "diffusers_svd_unet": "diffusers_svd_unet", "svd_temporal_decoder": "svd_temporal_decoder",
    "diffusers_vae_temporal_decoder": "diffusers_svd_temporal_decoder", "lavie_base": "lavie_base",
    "lavie_interpolation": "lavie_interpolation", "lavie_vsr": "lavie_vsr", "modelscope_t2v": "modelscope",
    "diffusers_unet3d_modelscope": "modelscope", "pvdm_autoencoder": "pvdm_autoencoder",
    "pvdm_diffusion": "pvdm_diffusion", "upscale_a_video_unet": "upscale_a_video",
    "upscale_a_video_decoder_vae_3d": "diffusers_vae", "upscale_a_video_decoder_vae_video": "upscale_a_video_vae",
    "videocrafter_i2v_512_v1.0": "videocrafter_i2v", "videocrafter_t2v_1024_v1.0": "videocrafter1_1024",
    "videocrafter_t2v_512_v1.0": "videocrafter1_512", "videocrafter_t2v_512_v2.0": "videocrafter2",
    "videoldm_srpkdyy": "videoldm_srpkdyy", "makeavid_sd": "makeavid_sd", "musev": "musev",
    "ad_v3_sd15_sparsectrl_rgb": "sparsectrl_rgb",
    "ad_v3_sd15_sparsectrl_scribble": "sparsectrl_scribble", "cameractrl_adv3": "cameractrl",
}
TAKEN = {"ad_mm_sd_v15", "ad_mm_sd_v15_v2", "ad_v3_sd15_mm", "ad_mm_sdxl_v10_beta", "animatelcm_sd15_t2v", "hotshotxl",
         "lavie_vsr", "upscale_a_video_unet", "diffusers_motion_adapter_v1", "diffusers_motion_adapter_v2",
         "diffusers_motion_adapter_sdxl", "makeavid_sd", "musev"}
LORAS = {"motion_lora_v2", "motion_lora_diffusers"}
DECODERS = {"svd_temporal_decoder", "diffusers_vae_temporal_decoder"}
NETWORKS = {"lavie_base", "lavie_interpolation", "modelscope_t2v", "diffusers_unet3d_modelscope",
            "videocrafter_t2v_512_v1.0", "videocrafter_t2v_1024_v1.0", "videocrafter_t2v_512_v2.0"}
PVDM = {"pvdm_autoencoder", "pvdm_diffusion"}
SPARSE = {"ad_v3_sd15_sparsectrl_rgb", "ad_v3_sd15_sparsectrl_scribble"}


def load_autoencoder(path):
    return load_pvdm(path, AUTOENCODER)


def load_diffusion(path):
    return load_pvdm(path, DIFFUSION)


def test_there_is_an_expectation_for_every_published_file():
    assert set(KINDS) == set(PUBLISHED) and len(PUBLISHED) == 36


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "unet.", "module.unet."])
def test_every_published_file_is_told_by_its_keys(name, prefix):
    shapes = PUBLISHED[name]
    found = identify_keys({prefix + key: shape for key, shape in shapes.items()})
    assert found.kind == KINDS[name]
    kinds = {"temporal": TAKEN, "motion_lora": LORAS, "decoder": DECODERS, "video_model": NETWORKS,
             "pvdm": PVDM, "sparse_control": SPARSE, "camera": {"cameractrl_adv3"}}
    assert found.takes == next((kind for kind, names in kinds.items() if name in names), None)


def test_an_artists_mistake_gets_a_sentence_with_the_file_what_it_is_and_where_it_belongs():
    found = identify_keys(PUBLISHED["videocrafter_i2v_512_v1.0"])
    file = SimpleNamespace(name="model.ckpt")
    sentence = str(refusal(file, found, "temporal", "a file of temporal layers that this pack takes"))
    assert sentence == (
        "model.ckpt is a VideoCrafter image-to-video checkpoint, not a file of temporal layers that this pack takes. "
        "This version of the pack does not take it. The text-to-video files of VideoCrafter 1 and 2 are taken.")


def test_a_network_whose_layers_do_not_work_alone_says_why_in_load_temporal_layers_only():
    found = identify_keys(PUBLISHED["videocrafter_t2v_512_v2.0"])
    file = SimpleNamespace(name="model.ckpt")
    assert str(refusal(file, found, "temporal", "a file of temporal layers")) == (
        "model.ckpt is VideoCrafter2's text-to-video network, not a file of temporal layers. Its spatial layers were "
        "trained together with its temporal layers, so on an image model its temporal layers would give noise. Load it "
        "with Load Video Model.")
    assert str(refusal(file, found, "motion_lora", "a Motion LoRA")) == (
        "model.ckpt is VideoCrafter2's text-to-video network, not a Motion LoRA. Load it with Load Video Model.")


@pytest.mark.parametrize("load, takes", [
    (load_temporal, "temporal"), (load_motion_lora, "motion_lora"), (load_decoder, "decoder"),
    (load_upscaler, "video_model"), (load_layout, "layout"), (load_autoencoder, "pvdm"), (load_diffusion, "pvdm"),
    (load_sparse_control, "sparse_control"),
    (load_camera, "camera"),
])
def test_a_file_that_nobody_knows_is_answered_with_what_that_loader_takes(tmp_path, load, takes):
    save_file({"weight": torch.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(VideoLDMError) as caught:
        load(tmp_path / "odd.safetensors")
    sentence = str(caught.value)
    assert "kind that this pack does not know (1 tensor, the first: weight), not " in sentence
    assert sentence.endswith(f". {LOADERS[takes]} takes {listing(takes)}.")
    assert listing(takes) and all(listing(other) not in sentence for other in LOADERS if other != takes)


@pytest.mark.parametrize("levels, words", [(3, "Core's Load VAE cannot load it"), (4, "Load it with core's Load VAE.")])
def test_a_vae_in_diffusers_naming_is_sent_to_core_only_where_core_reads_it(levels, words):
    shapes = {f"decoder.up_blocks.{level}.resnets.0.conv1.weight": (64, 64, 3, 3) for level in range(levels)}
    found = identify_keys(shapes | {"decoder.mid_block.resnets.0.conv1.weight": (64, 64, 3, 3)})
    assert found.kind == "diffusers_vae" and words in found.advice


@pytest.mark.parametrize("base, words", [
    (Base("Video LDM demo", 128), "made for the Video LDM demo, and the connected MODEL is SD15: its text has a width "
     "of 768 instead of 128. Connect the MODEL of Load Demo Models, or choose"),
    (Base("the Video LDM demo's upscaler", 128), "made for the Video LDM demo's upscaler, and .* Connect the MODEL of "
     "Load Video Model with video_ldm_driving_upscaler.safetensors, or choose"),
    (Base("Stable Diffusion 2.x", 1024), "made for Stable Diffusion 2.x, and .* Connect the MODEL of a Stable "
     "Diffusion 2.x checkpoint, or choose"),
])
def test_layers_for_another_model_name_where_theirs_comes_from(base, words):
    params = StackParams("Video LDM", (), 8, None)
    layers = TemporalFile("layers.safetensors", "video_ldm", "a file of layers", params, {}, None, base)
    with pytest.raises(VideoLDMError, match=words):
        layers.check_base({}, 768, "SD15")


def test_what_the_loaders_take_is_told_by_the_header_alone(tmp_path):
    demo = Path(__file__).resolve().parent.parent / "models" / "demo"
    kinds = {"video_ldm_driving": "temporal", "video_ldm_driving_x4": "temporal",
             "video_ldm_driving_decoder": "decoder",
             "video_ldm_driving_layout": "layout", "video_ldm_driving_upscaler": "video_model",
             "video_ldm_driving_upscaler_layers": "temporal"}
    for name, kind in kinds.items():
        assert taken_by(demo / f"{name}.safetensors") == {kind}
    assert taken_by(demo / "image.safetensors") == frozenset()
    torch.save({"weight": torch.zeros(3)}, tmp_path / "old.ckpt")
    assert taken_by(tmp_path / "old.ckpt") is None


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name not in TAKEN | LORAS])
def test_every_refused_file_has_a_title_with_an_article_and_a_place(name):
    found = identify_keys(PUBLISHED[name])
    assert found.title.split()[0] in ("a", "an", "the", "LaVie's", "VideoCrafter1's", "VideoCrafter2's")
    assert found.advice.endswith(".") and len(found.advice) > 20


OTHERS_REFUSED = {
    "dynamicrafter_256": ("dynamicrafter", "a DynamiCrafter checkpoint"),
    "dynamicrafter_512": ("dynamicrafter", "a DynamiCrafter checkpoint"),
    "musev_referencenet": ("musev_referencenet", "a MuseV UNet for its ReferenceNet"),
}
# Files of this fixture that the pack takes: {name: kind}
OTHERS_TAKEN = {"animatelcm_sd15_i2v": "animatelcm_i2v", "pia": "pia"}


@pytest.mark.parametrize("name", OTHERS_TAKEN)
@pytest.mark.parametrize("prefix", ["", "module.", "unet."])
def test_every_other_file_that_is_taken_is_told_by_its_keys(name, prefix):
    found = identify_keys({prefix + key: shape for key, shape in REFUSED[name].items()})
    assert (found.kind, found.takes, found.also) == (OTHERS_TAKEN[name], "temporal", None)


@pytest.mark.parametrize("name", [name for name in REFUSED if name not in OTHERS_TAKEN])
def test_every_other_public_file_is_told_by_its_keys_and_refused(name):
    kind, title = OTHERS_REFUSED[name]
    found = identify_keys(REFUSED[name])
    assert (found.kind, found.takes, found.also) == (kind, None, None)
    assert found.title.startswith(title) and found.advice.endswith(".") and len(found.advice) > 20


PLACES = {"temporal": load_temporal, "video_model": load_video_model}


@pytest.mark.parametrize("takes", PLACES)
@pytest.mark.parametrize("name", [*PUBLISHED, *REFUSED])
def test_a_node_refuses_a_public_file_that_it_does_not_take_by_name_and_place(monkeypatch, name, takes):
    shapes = (PUBLISHED | REFUSED)[name]
    found = identify_keys(shapes)
    if takes in (found.takes, found.also):
        pytest.skip("this node takes the file")
    file = SimpleNamespace(name=f"{name}.pt", raw_shapes=shapes, metadata={})
    monkeypatch.setattr(families, "open_file", lambda path: file)
    with pytest.raises(VideoLDMError) as caught:
        PLACES[takes](f"{name}.pt")
    assert str(caught.value).startswith(f"{name}.pt is {found.title}, not a ")
    assert str(caught.value).endswith(f". {found.advice}") and found.advice


@pytest.mark.parametrize("table, middle, kind", [
    (24, False, "animatediff_v1"), (32, False, "animatediff_v3"), (32, True, "animatediff_v2"),
    (64, True, "longanimatediff"), (0, True, "animatelcm"),
])
@pytest.mark.parametrize("channels, resblocks", [((64, 128), 1), ((32, 32), 2), ((320, 640, 1280, 1280), 2)])
def test_animatediff_versions_are_told_by_their_table_and_middle_in_networks_of_any_size(
        table, middle, kind, channels, resblocks):
    assert identify_keys(motion_shapes(channels, resblocks, middle, table)).kind == kind


def test_the_stand_in_shapes_are_the_published_ones():
    four = (320, 640, 1280, 1280)
    for name, shapes in {"ad_mm_sd_v15": motion_shapes(four, 2, False, 24), "ad_mm_sd_v15_v2": motion_shapes(four, 2),
                         "animatelcm_sd15_t2v": motion_shapes(four, 2, True, 0),
                         "motion_lora_v2": lora_shapes(four, 2, True, 64)}.items():
        assert shapes == {key: tuple(shape) for key, shape in PUBLISHED[name].items()}


def with_more(name: str, **more) -> dict:
    return PUBLISHED[name] | {key.replace("__", "."): shape for key, shape in more.items()}


SD15_UNET = {
    "time_embed.0.weight": (1280, 320), "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768), "middle_block.0.in_layers.0.weight": (1280,),
    "output_blocks.0.0.in_layers.0.weight": (2560,), "out.2.weight": (4, 320, 3, 3),
}
VAE = {"decoder.conv_in.weight": (512, 4, 3, 3), "decoder.mid.block_1.norm1.weight": (512,),
       "encoder.conv_in.weight": (128, 3, 3, 3)}


def wide(unet: dict, width: int, conv_in: int = 4) -> dict:
    changed = {"input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, width),
               "input_blocks.0.0.weight": (320, conv_in, 3, 3)}
    return unet | changed


def checkpoint(unet: dict, text: str = "cond_stage_model.transformer.text_model.embeddings.position_ids") -> dict:
    return ({f"model.diffusion_model.{key}": shape for key, shape in unet.items()} | {text: (1, 77)}
            | {f"first_stage_model.{key}": shape for key, shape in VAE.items()})


OTHERS = {
    "sd1_unet": SD15_UNET,
    "sd1_checkpoint": checkpoint(SD15_UNET),
    "sd2_checkpoint": checkpoint(wide(SD15_UNET, 1024)),
    "sdxl_checkpoint": checkpoint(wide(SD15_UNET, 2048), "conditioner.embedders.0.transformer.text_model.x"),
    "x4_upscaler": checkpoint(wide(SD15_UNET, 1024, conv_in=7)),
    "vae": VAE,
    "vae ": {f"first_stage_model.{key}": shape for key, shape in VAE.items()},
    "diffusers_vae": {"decoder.conv_in.weight": (512, 4, 3, 3), "decoder.mid_block.resnets.0.norm1.weight": (512,)},
    "video_vae": {"encoder.conv1.weight": (96, 3, 3, 3, 3), "decoder.conv1.weight": (384, 16, 3, 3, 3)},
    "controlnet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3),
                   "control_model.zero_convs.0.0.weight": (320,),
                   "control_model.input_hint_block.0.weight": (16, 3, 3, 3)},
    "controlnet ": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3), "conv_in.weight": (320, 4, 3, 3),
                    "down_blocks.0.resnets.0.norm1.weight": (320,),
                    "controlnet_down_blocks.0.weight": (320, 320, 1, 1)},
    "control_lora": {"lora_controlnet": (), "input_blocks.0.0.weight": (320, 4, 3, 3), "zero_convs.0.0.weight": (320,)},
    "t2i_adapter": {"body.0.block1.weight": (320, 320, 3, 3), "conv_in.weight": (320, 192, 3, 3)},
    "ip_adapter": {"image_proj.proj.weight": (3072, 1024), "ip_adapter.1.to_k_ip.weight": (320, 768)},
    "style_model": {"style_embedding": (1, 8, 1024), "transformer_layes.0.attn.in_proj_bias": (3072,)},
    "gligen": {"position_net.linears.0.weight": (512, 832)},
    "lora": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (8, 320),
             "lora_unet_down_blocks_0_attentions_0_proj_in.alpha": ()},
    "lora ": {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": (8, 320)},
    "lora  ": {"lora_unet_x.hada_w1_a": (8, 320)},
    "motion_director": {"transformer_in.transformer_blocks.0.attn1.to_q.lora_up.weight": (512, 8),
                        "down_blocks.0.temp_attentions.0.transformer_blocks.0.attn1.to_q.lora_down.weight": (8, 320)},
    "embedding": {"emb_params": (4, 768)},
    "embedding ": {"string_to_param.*": (4, 768)},
    "text_encoder": {"text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)},
    "text_encoder ": {"encoder.block.0.layer.0.SelfAttention.q.weight": (4096, 4096)},
    "clip_vision": {"vision_model.encoder.layers.0.mlp.fc1.weight": (3072, 768)},
    "upscale_model": {"model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3)},
    "upscale_model ": {"conv_first.weight": (64, 3, 3, 3), "body.0.rdb1.conv1.weight": (32, 64, 3, 3)},
    "vae_approximation": {"1.weight": (64, 4, 3, 3), "3.conv.0.weight": (64, 64, 3, 3)},
    "flux": {"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "img_in.weight": (3072, 64)},
    "diffusion_transformer": {"joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)},
    "video_transformer": {"blocks.0.self_attn.q.weight": (1536, 1536), "patch_embedding.weight": (1536, 16, 1, 2, 2)},
    "unknown": {"fc.weight": (10, 10)},
    "pia_unet": with_more("ad_mm_sd_v15", conv_in__weight=(320, 9, 3, 3), conv_in__bias=(320,),
                          down_blocks__0__resnets__0__norm1__weight=(320,)),
    "animatediff_unknown ": with_more("animatelcm_sd15_t2v", img_encoder__conv_in__weight=(320, 4, 3, 3),
                                      pose__weight=(320, 4, 3, 3)),
    "animatediff_unet": with_more("ad_mm_sd_v15", conv_in__weight=(320, 4, 3, 3)),
    "animatediff_unknown": with_more("ad_mm_sd_v15", pose__weight=(320, 4, 3, 3)),
    "i2vgen_xl": with_more("diffusers_unet3d_modelscope", image_latents_proj_in__0__weight=(16, 4, 3, 3)),
    "lavie_unknown": with_more("lavie_base", conv_in__weight=(320, 5, 3, 3)),
    "sv3d": with_more("svd_unet") | {"model.diffusion_model.label_emb.0.0.weight": (1280, 256)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_files_of_other_kinds_are_named(kind):
    found = identify_keys(OTHERS[kind])
    assert (found.kind, found.takes) == (kind.strip(), None)


def test_a_motion_adapter_with_a_first_convolution_of_nine_channels_is_pias():
    shapes = with_more("diffusers_motion_adapter_v1", conv_in__weight=(320, 9, 3, 3), conv_in__bias=(320,))
    found = identify_keys(shapes)
    assert (found.kind, found.takes) == ("diffusers_pia", "temporal")
    assert identify_keys(shapes | {"pose.weight": (320, 4)}).takes is None
    assert identify_keys(shapes | {"conv_in.weight": (320, 4, 3, 3)}).takes is None


def test_the_temporal_part_of_svd_alone_is_still_svd():
    part = {key: shape for key, shape in PUBLISHED["svd_unet"].items() if ".time_" in key}
    found = identify_keys(part)
    assert (found.kind, found.takes, found.title) == ("svd_unet", None, "the temporal part of Stable Video Diffusion")
    assert "silent garbage" in found.advice


def test_the_same_layout_with_another_text_width_lacks_its_metadata():
    part = {key: (shape[0], 768) if "attn2.to_" in key else shape
            for key, shape in PUBLISHED["svd_unet"].items() if ".time_" in key}
    assert identify_keys(part).kind == "video_ldm_bare"


def test_a_training_checkpoint_of_the_pack_is_told_by_its_metadata():
    assert identify_keys({"layers.x": (1,)}, {"format": "video_ldm_training"}).kind == "training_checkpoint"
