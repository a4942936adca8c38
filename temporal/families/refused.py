"""Files that an artist may choose by mistake: what they are, and where they belong.

These are the public files of temporal layers that this version does not take (docs/formats.md#refused-files), and all
other kinds of files in a ComfyUI models folder. They are recognised by names and shapes of tensors. The first entry
that fits names the file, so the order matters.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..formats.motion_lora import LORA
from ..formats.temporal_file import Identified
from ..formats.tensor_names import Keys

LATER = "This version of the pack does not take it."
LOADER = "Load it with core's {}."
LOAD_LORA = "Load it with core's Load LoRA, on the image MODEL before Load Temporal Layers."
LOAD_MODEL = "It is a model of its own: load it with core's Load Diffusion Model."
UPSCALER = "Load it with core's Load Checkpoint or Load Diffusion Model. " + LATER


class Entry(NamedTuple):
    """A kind of file, and how to recognise it by its tensors' names and shapes."""

    kind: str                           # fields as in Identified
    title: str
    advice: str
    has: tuple[str, ...]                # patterns of names: each is found in the file
    lacks: tuple[str, ...] = ()         # patterns of names: none is found in the file
    test: Callable[[Keys], bool] = lambda keys: True

    def fits(self, keys: Keys) -> bool:
        """Whether the file is of this kind."""
        return all(map(keys.has, self.has)) and not any(map(keys.has, self.lacks)) and self.test(keys)


MOTION = r".*motion_modules\.\d+\.temporal_transformer\."
ADAPTER = r".*motion_modules\.\d+\.transformer_blocks\.\d+\.attn1\."
TEMPORAL_LORA = r".*(?:temp_attentions|transformer_in|temp_convs|temopral_conv).*lora"


TEMPORAL = (
    Entry("cameractrl_other", "a CameraCtrl file for another model than AnimateDiff (Stable Video Diffusion has one)",
          LATER + " It takes the file for AnimateDiff v3.",
          (r".*encoder_down_conv_blocks\.\d+\.|.*\.qkv_merge\.",)),
    Entry("musev_referencenet", "a MuseV UNet for its ReferenceNet and IP-Adapter (musev_referencenet)",
          "Its temporal layers were trained with both, and without them they would be another model's. Use the file of "
          "the folder motion/musev with Load Temporal Layers.", (r".*\.temp_convs\.\d+\.temporal_weight$",)),
    Entry("pia_unet", "a whole UNet of PIA's (spatial layers and motion modules in one file)",
          "Use PIA's own file, pia.ckpt, with Load Temporal Layers.",
          (MOTION,), test=lambda keys: keys.shape(r"conv_in\.weight")[1:2] == (9,)),
    Entry("animatediff_unet", "a whole AnimateDiff UNet (spatial layers and motion modules in one file)",
          "Use the file of its motion modules alone with Load Temporal Layers.", (MOTION, r"conv_in\.")),
    Entry("animatediff_unknown", "a set of AnimateDiff motion modules with tensors that no published version has",
          "Use the published file of AnimateDiff v1, v2, v3, AnimateLCM, LongAnimateDiff, AnimateDiff SDXL beta or "
          "PIA.",
          (MOTION,)),
    Entry("hotshot_unet", "a whole Hotshot-XL UNet (spatial layers and temporal layers in one file)",
          "Use the file of its temporal layers alone, hsxl_temporal_layers.safetensors, with Load Temporal Layers.",
          (r".*temporal_attentions\.\d+\.transformer_blocks\.\d+\.attention_blocks",)),
    Entry("diffusers_unet_motion_model", "a whole UNetMotionModel (image layers and motion) in diffusers' naming",
          "Use its motion adapter alone with Load Temporal Layers, or the AnimateDiff file that it was made from.",
          (ADAPTER, r"conv_in\.")),
    Entry("motion_adapter_unknown", "a motion adapter in diffusers' naming with tensors that no published version has",
          "Use the file that it was made from (mm_sd_v15_v2.ckpt and its like).", (ADAPTER,)),
    Entry("sv4d", "an SV4D checkpoint (several views of a video)", LATER, (r".*time_mix_blocks\.0\.attn1\.to_q",)),
    Entry("upscale_a_video_vae", "the video VAE of Upscale-A-Video", LATER,
          (r"(?:.*\.)?decoder\..*\.conv_3d\.weight",)),
    Entry("lavie_unknown", "a UNet of LaVie's kind whose input channels no published one has",
          "Use LaVie's base or interpolation network or SEINE.", (r".*\.attn_temp\.to_q\.",)),
    Entry("dynamicrafter", "a DynamiCrafter checkpoint (image to video)", LATER,
          (r"init_attn\.0\.", r".*\.to_k_ip\."),
          test=lambda keys: keys.shape(r"input_blocks\.0\.0\.weight")[1:2] == (8,)),
    Entry("videocrafter_i2v", "a VideoCrafter image-to-video checkpoint",
          LATER + " The text-to-video files of VideoCrafter 1 and 2 are taken.",
          (r"init_attn\.0\.", r".*\.to_k_ip\.")),
    Entry("videocrafter_unknown", "a UNet of VideoCrafter's kind whose input channels no published one has",
          "Use the text-to-video file of VideoCrafter 1 or 2.", (r"init_attn\.0\.",)),
    Entry("i2vgen_xl", "an I2VGen-XL UNet (image to video)", LATER, (r"transformer_in\.", r"image_latents_")),
    Entry("show1_pixel", "a pixel-space UNet of the Show-1 kind", LATER, (r".*temp_attentions\.\d+\.",),
          test=lambda keys: keys.shape(r"conv_in\.weight")[1:2] not in ((4,), ())),
    Entry("videoldm_srpkdyy", "a UNet of the unofficial VideoLDM by srpkdyy",
          "Its layers follow another design than the paper's. " + LATER,
          (r".*tempo_attns\.\d+\.q_proj", r".*conv3ds\.\d+\.")),
)

PATCHES = (
    Entry("ip_adapter", "an IP-Adapter", "It needs a pack for IP-Adapters, and belongs in models/ipadapter.",
          (r"ip_adapter\.|image_proj\.",), lacks=(r"input_blocks\.",)),
    Entry("control_lora", "a Control-LoRA", LOADER.format("Load ControlNet Model"), (r"lora_controlnet$",)),
    Entry("v3_domain_adapter", "the AnimateDiff v3 domain adapter (a LoRA for the image model)",
          "Load it with core's Load LoRA, on the image MODEL before or behind Load Temporal Layers, at a strength of 1 "
          "or less.",
          (r".*\.attn[12]\.processor\.to_q_lora\.(?:down|up)\.weight",)),
    Entry("motion_director", "a MotionDirector LoRA for ModelScope or ZeroScope",
          "It patches temporal layers that this version of the pack does not take.", (TEMPORAL_LORA,)),
    Entry("lora", "a LoRA for an image model or text encoder (an LCM-LoRA is one too)", LOAD_LORA, (LORA,)),
    Entry("lora", "a LoRA for an image model or text encoder (LoHa, LoKr or a kin)", LOAD_LORA,
          (r"lora_(?:unet|te)|.*\.(?:hada_w1_a|lokr_w[12]|oft_blocks|oft_diag|dora_scale)",)),
)

CONTROLS = (
    Entry("controlnet", "a ControlNet", LOADER.format("Load ControlNet Model"),
          (r"(?:control_model\.)?(?:zero_convs|input_hint_block)\.|"
           r"(?:.*\.)?controlnet_(?:cond_embedding|down_blocks|blocks|x_embedder|mode_embedder)",)),
    Entry("t2i_adapter", "a T2I-Adapter", LOADER.format("Load ControlNet Model"),
          (r"(?:adapter\.)?body\.0\.(?:in_conv|block1|resnets\.0\.block1)\.",)),
    Entry("style_model", "a style model", LOADER.format("Load Style Model"), (r"style_embedding$",)),
    Entry("gligen", "a GLIGEN model", LOADER.format("GLIGENLoader"), (r"(?:.*\.)?position_net\.",)),
    Entry("embedding", "a textual-inversion embedding", "It belongs in models/embeddings and is used by writing "
          "embedding:NAME in a prompt.", (r"(?:emb_params|string_to_param\.|clip_[lg]$|t5xxl$)",),
          test=lambda keys: len(keys) <= 4),
)

MODELS = (
    Entry("video_transformer", "a video transformer (Wan, HunyuanVideo, LTX, Mochi, Cosmos or a kin)", LOAD_MODEL,
          (r"(?:.*\.)?(?:blocks\.\d+\.self_attn\.q\.weight|txt_in\.individual_token_refiner|t5_yproj|patchify_proj|"
           r"transformer_blocks\.\d+\.scale_shift_table|blocks\.block0\.)",)),
    Entry("flux", "a Flux model", LOAD_MODEL, (r"(?:.*\.)?(?:double_blocks|single_transformer_blocks)\.\d+\.",)),
    Entry("diffusion_transformer", "a diffusion transformer (SD3, AuraFlow, PixArt, Lumina or a kin)", LOAD_MODEL,
          (r"(?:.*\.)?(?:joint_blocks|double_layers|joint_transformer_blocks|adaln_single|x_embedder|"
           r"noise_refiner)\b",)),
    Entry("stable_cascade", "a Stable Cascade model", LOAD_MODEL, (r"(?:.*\.)?clip_txt_pooled_mapper\.",)),
    Entry("clip_vision", "a CLIP vision model", LOADER.format("Load CLIP Vision"),
          (r"(?:vision_model\.(?:encoder|embeddings)|visual\.(?:transformer|conv1)|visual_projection)",)),
    Entry("text_encoder", "a text encoder", LOADER.format("Load CLIP"),
          (r"(?:.*\.)?(?:text_model\.(?:encoder|embeddings)|transformer\.resblocks\.|"
           r"encoder\.block\.0\.layer\.0\.SelfAttention|layers\.0\.self_attn\.q_proj)",)),
    Entry("vae_approximation", "a small preview autoencoder (TAESD)",
          "It belongs in models/vae_approx, where core's previews find it.",
          (r"(?:taesd_(?:de|en)coder|\d+\.conv\.\d+\.weight)",)),
    Entry("video_vae", "a VAE of a video model", LOADER.format("Load VAE"),
          (r"(?:.*\.)?(?:de|en)coder\..*conv.*\.weight",),
          test=lambda keys: len(keys.shape(r"(?:.*\.)?decoder\..*conv_?(?:in|1).*\.weight")) == 5),
    Entry("vae", "a VAE", LOADER.format("Load VAE"), (r"(?:first_stage_model\.|vae\.)?decoder\.mid\.block_1\.norm1",)),
    Entry("diffusers_vae", "a VAE in diffusers' naming that has not four levels (the x4 upscaler's has three)",
          "Core's Load VAE cannot load it: in that naming it reads VAEs of four levels alone. Use the same VAE out of "
          "a whole checkpoint, such as x4-upscaler-ema.safetensors, with core's Load Checkpoint.",
          (r"decoder\.(?:mid_block|up_blocks\.0)\.resnets\.",),
          test=lambda keys: len(keys.found(r"decoder\.up_blocks\.(\d+)\.")) not in (0, 4)),
    Entry("diffusers_vae", "a VAE in diffusers' naming", LOADER.format("Load VAE"),
          (r"decoder\.(?:mid_block|up_blocks\.0)\.resnets\.",)),
    Entry("upscale_model", "an upscale model (ESRGAN, SwinIR or a kin)", LOADER.format("Load Upscale Model"),
          (r"(?:.*\.)?(?:RDB1|rdb1|RRDB_trunk|conv_first|residual_group|block_1\.c1_r)\b|body\.0\.weight",)),
)


def identify(keys: Keys, metadata: Mapping[str, str]) -> Identified:
    """Identify a file that no family recognises."""
    if metadata.get("format") == "video_ldm_training":
        return Identified("training_checkpoint", "a checkpoint of a training run",
                          "Resume the training with it; its layers are written as a file of their own at the end.")
    entry = first_fit(PATCHES + TEMPORAL + CONTROLS, keys)
    if entry is None:
        found = stable_diffusion(keys)
        if found is not None:
            return found
        entry = first_fit(MODELS, keys)
    return Identified(entry.kind, entry.title, entry.advice) if entry else unknown(keys)


def first_fit(entries: tuple[Entry, ...], keys: Keys) -> Entry | None:
    """The first entry that fits a file."""
    return next((entry for entry in entries if entry.fits(keys)), None)


# {width of the text: (kind, name)}
WIDTHS = {768: ("sd1", "Stable Diffusion 1.x"), 1024: ("sd2", "Stable Diffusion 2.x"), 2048: ("sdxl", "SDXL"),
          1280: ("sdxl_refiner", "SDXL refiner")}


def stable_diffusion(keys: Keys) -> Identified | None:
    """Identify a checkpoint or a UNet of the Stable Diffusion family, in LDM's or diffusers' naming."""
    ldm = keys.has(r"input_blocks\.0\.0\.weight") and keys.has(r"output_blocks\.0\.")
    if not ldm and not (keys.has(r"conv_in\.weight") and keys.has(r"up_blocks\.\d+\.resnets\.")
                        and keys.has(r"down_blocks\.\d+\.")):
        return None
    width = (*keys.shape(r".*\.attn2\.to_k\.weight"), 0, 0)[1]
    kind, family = WIDTHS.get(width, ("unet", "image diffusion"))
    if keys.shape(r"(?:input_blocks\.0\.0|conv_in)\.weight")[1:2] == (7,):
        return Identified("x4_upscaler", "a Stable Diffusion x4 upscaler", UPSCALER)
    if keys.has(r"(?:first_stage_model|cond_stage_model|conditioner)\."):
        return Identified(f"{kind}_checkpoint", f"a whole {family} checkpoint",
                          "Load it with core's Load Checkpoint and connect its MODEL to Load Temporal Layers.")
    return Identified(f"{kind}_unet", f"a plain {family} UNet" + ("" if ldm else " in diffusers' naming"),
                      "Load it with core's Load Diffusion Model and connect its MODEL to Load Temporal Layers.")


def unknown(keys: Keys) -> Identified:
    """A file of an unknown kind. It has no advice, so the loader says what it takes instead."""
    first = next(iter(keys.shapes), "none")
    counted = f"{len(keys)} tensor" + "s" * (len(keys) != 1)
    return Identified("unknown", f"a file of a kind that this pack does not know ({counted}, the first: "
                      f"{first})", advice="")
