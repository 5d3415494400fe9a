"""
Small pipelines of diffusers with random weights, in their own classes, made from configurations.
`build(name)` gives one and the settings with which it is used in tests. Their prompts are read as
bytes; CLIP's and T5's tokenizers are those of tiny/.
"""
import json
import machine                                                  # noqa: F401  (before diffusers)
import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler as Euler
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tests.conftest import TINY

CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}")


def byte_tokenizer(length=2048, end=""):
    """A token for every byte, and the frame that Qwen3's tokenizer puts around a prompt. `end`: a
    token at the end of each text."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer = transformers.Qwen2TokenizerFast(
        vocab={letter: i for i, letter in enumerate(letters)}, merges=[], chat_template=CHAT,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"], model_max_length=length)
    if end:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.convert_tokens_to_ids(end))])
    return tokenizer


def tiny_text():
    """The tokenizers and encoders of tiny/flux: CLIP's and T5's, 64 numbers wide."""
    pipe = diffusers.FluxPipeline.from_pretrained(TINY / "flux", transformer=None, vae=None,
                                                 dtype=torch.float32)
    return pipe.tokenizer, pipe.text_encoder, pipe.tokenizer_2, pipe.text_encoder_2


def decoder_config(**more):
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=8, vocab_size=300, max_position_embeddings=4096)
    return sizes | more


def t5_encoder(kind=transformers.T5EncoderModel, config=transformers.T5Config):
    return kind(config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4))


def clip_encoder(tokenizer, kind):
    return kind(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=16, max_position_embeddings=77,
        bos_token_id=0, eos_token_id=2))


def image_vae(channels=4, **more):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=channels, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        **dict(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1) | more)


def flux():
    clip, text, t5, text_2 = tiny_text()
    width = text_2.config.d_model
    net = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=width, axes_dims_rope=(4, 4, 8),
        pooled_projection_dim=text.config.hidden_size, guidance_embeds=True)
    return diffusers.FluxPipeline(Euler(use_dynamic_shifting=True), image_vae(), text, clip, text_2,
                                  t5, net), dict(resolution=32)


def klein(distilled=False):
    qwen = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        **decoder_config(num_hidden_layers=28)))                # the pipeline reads 9, 18 and 27
    net = diffusers.Flux2Transformer2DModel(
        num_layers=1, num_single_layers=1, guidance_embeds=False, in_channels=16,
        num_attention_heads=2, attention_head_dim=32, joint_attention_dim=48,
        axes_dims_rope=(8, 8, 8, 8))
    vae = diffusers.AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1,
                                       latent_channels=4, norm_num_groups=4)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return diffusers.Flux2KleinPipeline(
        Euler(shift=3.0, use_dynamic_shifting=True), vae, qwen, byte_tokenizer(64), net, distilled
    ), dict(resolution=64)


def sd3():
    clip, _, t5, text_3 = tiny_text()
    clips = [clip_encoder(clip, transformers.CLIPTextModelWithProjection) for _ in range(2)]
    net = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=text_3.config.d_model, caption_projection_dim=32,
        pooled_projection_dim=32, out_channels=4, pos_embed_max_size=16, qk_norm="rms_norm")
    return diffusers.StableDiffusion3Pipeline(
        net, Euler(shift=3.0), image_vae(), clips[0], clip, clips[1], clip, text_3, t5
    ), dict(resolution=32)


def qwen_image():
    text = transformers.Qwen2_5_VLForConditionalGeneration(transformers.Qwen2_5_VLConfig(
        text_config=decoder_config(rope_scaling=dict(type="mrope", mrope_section=[1, 1, 2])),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2,
                           out_hidden_size=16)))
    net = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 4, 8))
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    scheduler = Euler(use_dynamic_shifting=True, shift_terminal=0.02, time_shift_type="exponential")
    return diffusers.QwenImagePipeline(scheduler, vae, text, byte_tokenizer(), net
                                       ), dict(resolution=32)


def z_image():
    text = transformers.Qwen3Model(transformers.Qwen3Config(**decoder_config()))
    net = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[4, 4, 8], axes_lens=[256, 32, 32])
    for w in (net.x_pad_token, net.cap_pad_token):              # which nobody initialises
        w.normal_()
    return diffusers.ZImagePipeline(Euler(shift=3.0), image_vae(), text, byte_tokenizer(), net
                                    ), dict(resolution=32)


def wan(scheduler=None):
    text = t5_encoder(transformers.UMT5EncoderModel, transformers.UMT5Config)
    net = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=32,
        freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1] * 4, latents_std=[1.5] * 4, scale_factor_temporal=2,
        scale_factor_spatial=2)
    scheduler = scheduler or diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return diffusers.WanPipeline(byte_tokenizer(512), text, vae, scheduler, net
                                 ), dict(resolution=16, call=dict(num_frames=5))


def ltx():
    net = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=1, caption_channels=32)
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        spatial_compression_ratio=4, temporal_compression_ratio=4)
    scheduler = Euler(use_dynamic_shifting=True, shift_terminal=0.1, max_shift=2.05,
                      base_shift=0.95, base_image_seq_len=1024)
    return diffusers.LTXPipeline(scheduler, vae, t5_encoder(), byte_tokenizer(512), net
                                 ), dict(resolution=32, call=dict(num_frames=9))


def sana():
    text = transformers.Gemma2Model(transformers.Gemma2Config(**decoder_config()))
    net = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=16, sample_size=16)
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.41)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    call = dict(complex_human_instruction=None, use_resolution_binning=False)
    return diffusers.SanaPipeline(byte_tokenizer(), text, vae, net, scheduler
                                  ), dict(resolution=32, call=call)


def lumina2():
    text = transformers.Gemma2Model(transformers.Gemma2Config(**decoder_config()))
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=48, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(8, 8, 8),
        axes_lens=(300, 32, 32), cap_feat_dim=16)
    return diffusers.Lumina2Pipeline(net, Euler(shift=6.0), image_vae(), text, byte_tokenizer()
                                     ), dict(resolution=32, call=dict(system_prompt="draw"))


def chroma():
    net = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1)
    return diffusers.ChromaPipeline(Euler(use_dynamic_shifting=True), image_vae(), t5_encoder(),
                                    byte_tokenizer(512), net), dict(resolution=32)


def cogview4():
    text = transformers.GlmModel(transformers.GlmConfig(**decoder_config(pad_token_id=0)))
    net = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4, rope_axes_dim=(8, 8))
    scheduler = Euler(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75,
                      base_image_seq_len=256, time_shift_type="linear")
    tokenizer = byte_tokenizer(end="<|im_end|>")
    return diffusers.CogView4Pipeline(tokenizer, text, image_vae(), net, scheduler
                                      ), dict(resolution=32)


def hunyuan_video():
    clip, *_ = tiny_text()
    text_2 = clip_encoder(clip, transformers.CLIPTextModel)
    text = transformers.LlamaModel(transformers.LlamaConfig(**decoder_config(num_hidden_layers=4)))
    net = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=16, rope_axes_dim=(4, 4, 4),
        pooled_projection_dim=16)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4)
    call = dict(num_frames=5, prompt_template=dict(template="{}", crop_start=0))
    return diffusers.HunyuanVideoPipeline(text, byte_tokenizer(), net, vae, Euler(shift=7.0),
                                          text_2, clip), dict(resolution=32, call=call)


PIPELINES = dict(flux=flux, klein=klein, sd3=sd3, qwen_image=qwen_image, z_image=z_image, wan=wan,
                 ltx=ltx, sana=sana, lumina2=lumina2, chroma=chroma, cogview4=cogview4,
                 hunyuan_video=hunyuan_video)


@torch.no_grad()
def build(name, **more):
    """-> a pipeline, and the settings for pipeline.Pipeline. Layers that begin at zero do not."""
    torch.manual_seed(0)
    pipe, settings = PIPELINES[name](**more)
    for w in pipe.transformer.parameters():
        w.add_(0.1 * torch.randn_like(w))
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()                         # as from_pretrained does; T5 has dropout
    pipe.set_progress_bar_config(disable=True)
    return pipe, settings


def save(name, path, **more):
    """-> the folder of a pipeline, and the words that train.py and eval.py need for it."""
    pipe, settings = build(name, **more)
    pipe.save_pretrained(path)
    call = json.dumps(settings.get("call", {}))
    return ["--model", str(path), "--resolution", str(settings["resolution"]), "--call", call]
