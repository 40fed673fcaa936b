"""A small Stable Diffusion pipeline with random weights, made from configurations."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

CALL = {"prompt": "a cat", "num_inference_steps": 3, "height": 16, "width": 16, "output_type": "np"}


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<start>": 1, "<end>": 2, "a": 3, "cat": 4}
    text = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    text.pre_tokenizer = pre_tokenizers.Whitespace()
    text.post_processor = processors.TemplateProcessing("<start> $A <end>", None, [("<start>", 1), ("<end>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<pad>", unk_token="<end>", model_max_length=8)


def stable_diffusion(pipeline_class: type = StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Return a pipeline that makes images of 16 x 16 pixels."""
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    pipe = pipeline_class(
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(4, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=2,
        ),
        vae=AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=2,
        ),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text, **ends, vocab_size=5, max_position_embeddings=8)).eval(),
        tokenizer=_tokenizer(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ddim() -> DDIMPipeline:
    """Return a pipeline with a denoiser and nothing else."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, **blocks)
    pipe = DDIMPipeline(unet=unet, scheduler=DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe
