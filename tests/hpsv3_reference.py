"""
HPSv3 as its authors wrote it, on a small random model: what tests/test_hpsv3.py compares with.

Run as a program, in an environment of its own, it writes hpsv3_reference.json:

    python -m venv authors && authors/bin/pip install torch==2.13.0 transformers==4.45.2 \\
        hpsv3==1.0.0 trl==0.11.4 datasets==3.1.0 peft==0.13.2 tensorboard
    authors/bin/python tests/hpsv3_reference.py

There the package's own HPSv3RewardInferencer reads the files that `write` makes. Two things differ
from a real run. The network is small. And the head gets float32 numbers on a CPU too: on a GPU
autocast gives it those, and on a CPU the package would stop with an error about types.
"""
import hashlib, json, tempfile, zlib
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

RECORDED = Path(__file__).with_suffix(".json")
PROMPTS = ["a red apple", "Zwölf Bücher, {one} red 猫 in the image:  100%\n", ""]
SIZES = [(64, 64), (768, 768), (96, 400)]       # (H, W); a side of 768 becomes 420, not 448
SPECIAL = ("endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start "
           "quad_end vision_start vision_end vision_pad image_pad video_pad").split()
REWARD = "<|Reward|>"
WORDS = ("You are a helpful assistant evaluate image the overall visual quality text alignment of "
         "prompt should be with red apple rating ratings Please provide system user")
TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32768, rms_norm_eps=1e-6)
VISION = dict(depth=2, embed_dim=32, hidden_size=64, num_heads=2)
SECTIONS = [2, 3, 3]
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>"
    "system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if 'image' in content %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}")                              # Qwen2-VL's, without its branch for videos


def letters():
    """The 256 characters that stand for bytes in a byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + n) for n in range(len(others))]


def tokenizer():
    """tokenizer.json with Qwen2's rules, few words and the same special tokens. Each word is
    joined from the left, letter by letter."""
    vocab, merges = {letter: n for n, letter in enumerate(letters())}, []
    for word in WORDS.split():
        for start in ("", "Ġ"):
            for n in range(1, len(start + word)):
                left, right = (start + word)[:n], (start + word)[n]
                if left + right not in vocab:
                    vocab[left + right] = len(vocab)
                    merges.append(f"{left} {right}")
    rule = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    return dict(
        version="1.0", truncation=None, padding=None, normalizer=dict(type="NFC"),
        added_tokens=[dict(id=len(vocab) + n, content=f"<|{name}|>", **plain)
                      for n, name in enumerate(SPECIAL)],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="Split", pattern=dict(Regex=rule), behavior="Isolated", invert=False),
            level]),
        post_processor=level, decoder=level,
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix="",
                   end_of_word_suffix="", fuse_unk=False, byte_fallback=False, vocab=vocab,
                   merges=merges))


def layout(text, vision, vocab):
    """Names and shapes of the published file, in the names of transformers 4.45."""
    D, I, V, E = text["hidden_size"], text["intermediate_size"], vocab, vision["embed_dim"]
    kv = D // text["num_attention_heads"] * text["num_key_value_heads"]
    out = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for n in range(text["num_hidden_layers"]):
        for name, shape in {
                "self_attn.q_proj.weight": (D, D), "self_attn.q_proj.bias": (D,),
                "self_attn.k_proj.weight": (kv, D), "self_attn.k_proj.bias": (kv,),
                "self_attn.v_proj.weight": (kv, D), "self_attn.v_proj.bias": (kv,),
                "self_attn.o_proj.weight": (D, D), "mlp.gate_proj.weight": (I, D),
                "mlp.up_proj.weight": (I, D), "mlp.down_proj.weight": (D, I),
                "input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}.items():
            out[f"model.layers.{n}.{name}"] = shape
    linear = {"visual.merger.mlp.0": (4 * E, 4 * E), "visual.merger.mlp.2": (D, 4 * E),
              "rm_head.0": (1024, D), "rm_head.3": (16, 1024), "rm_head.5": (2, 16)}
    norms = ["visual.merger.ln_q"]
    for n in range(vision["depth"]):
        block = f"visual.blocks.{n}"
        linear |= {f"{block}.attn.qkv": (3 * E, E), f"{block}.attn.proj": (E, E),
                   f"{block}.mlp.fc1": (4 * E, E), f"{block}.mlp.fc2": (E, 4 * E)}
        norms += [f"{block}.norm1", f"{block}.norm2"]
    out["visual.patch_embed.proj.weight"] = (E, 3, 2, 14, 14)
    for name, shape in linear.items():
        out |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        out |= {f"{name}.weight": (E,), f"{name}.bias": (E,)}
    return out


def tensor(name, shape):
    """Random weights that depend on the name alone, large enough that all of them matter. The
    backbone's are bfloat16 numbers, the head's float32."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        values = noise * (1 if "embed_tokens" in name else 1.5 / np.prod(shape[1:]) ** 0.5)
    else:
        values = 0.1 * noise + (name.endswith("weight"))
    values = torch.from_numpy(values).float()
    return values if name.startswith("rm_head") else values.bfloat16()


def write(folder):
    """HPSv3.safetensors as it is published, and beside it the tokenizer.json that it needs."""
    rules = tokenizer()
    vocab = len(rules["model"]["vocab"]) + len(SPECIAL) + 1     # the last is <|Reward|>
    Path(folder, "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    state = {name: tensor(name, shape) for name, shape in layout(TEXT, VISION, vocab).items()}
    save_file(state, Path(folder, "HPSv3.safetensors"), metadata=dict(format="pt"))
    return vocab


def picture(size):
    """Coarse colours and fine noise, (H, W, 3) uint8."""
    H, W = size
    random = np.random.RandomState(H + W)
    coarse = random.randint(0, 200, (H // 16, W // 16, 3)).repeat(16, 0).repeat(16, 1)
    return (coarse + random.randint(0, 56, (H, W, 3))).astype(np.uint8)


def write_base(folder, vocab):
    """What transformers 4.45 needs beside `write`'s files to read the folder as Qwen2-VL."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
    ids = {name: vocab - 1 - len(SPECIAL) + n for n, name in enumerate(SPECIAL)}
    config = Qwen2VLConfig(
        **TEXT, vocab_size=vocab + 40, vision_config=VISION, rope_theta=1e6,
        rope_scaling=dict(type="mrope", mrope_section=SECTIONS), tie_word_embeddings=False,
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"])      # Qwen2-VL-7B has unused embeddings, too
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    files = {
        "tokenizer_config.json": dict(
            tokenizer_class="Qwen2Tokenizer", pad_token="<|endoftext|>", eos_token="<|im_end|>",
            bos_token=None, unk_token=None, model_max_length=32768),
        "chat_template.json": dict(chat_template=TEMPLATE),
        "preprocessor_config.json": dict(
            processor_class="Qwen2VLProcessor", image_processor_type="Qwen2VLImageProcessor",
            min_pixels=3136, max_pixels=12845056, patch_size=14, temporal_patch_size=2,
            merge_size=2, image_mean=[0.48145466, 0.4578275, 0.40821073],
            image_std=[0.26862954, 0.26130258, 0.27577711])}
    for name, content in files.items():
        Path(folder, name).write_text(json.dumps(content), encoding="utf-8")


def main():
    from hpsv3 import HPSv3RewardInferencer
    from hpsv3 import inference
    with tempfile.TemporaryDirectory() as folder:
        vocab = write(folder)
        write_base(folder, vocab)
        published = Path(inference.__file__).parent / "config/HPSv3_7B.yaml"
        config = Path(folder, "HPSv3_7B.yaml")
        config.write_text(published.read_text().replace("Qwen/Qwen2-VL-7B-Instruct", folder))
        scorer = HPSv3RewardInferencer(str(config), f"{folder}/HPSv3.safetensors", device="cpu")
    model, ids = scorer.model, scorer.processor.tokenizer
    shapes = {name: tuple(w.shape) for name, w in model.state_dict().items()}
    assert shapes == layout(TEXT, VISION, vocab)
    assert ids.convert_tokens_to_ids(REWARD) == vocab - 1
    model.rm_head.register_forward_pre_hook(lambda head, args: (args[0].float(),))
    out = dict(hidden=model.config.hidden_size, cases=[])
    with torch.no_grad():
        cases = [[Image.fromarray(picture(size))] * len(PROMPTS) for size in SIZES]
        bf16 = [scorer.reward(pictures, PROMPTS) for pictures in cases]
        for w in model.parameters():            # but not the rounded frequencies of the positions
            w.data = w.data.float()
        for size, pictures, rounded in zip(SIZES, cases, bf16):
            batch = scorer.prepare_batch(pictures, PROMPTS)
            rows = batch["input_ids"].tolist()
            pixels = batch["pixel_values"].flatten()
            out["cases"].append(dict(
                size=size, grid=batch["image_grid_thw"][0].tolist(),
                text=[hashlib.sha256(scorer.processor.decode(r).encode()).hexdigest()
                      for r in rows],
                ids=[hashlib.sha256(json.dumps(r).encode()).hexdigest() for r in rows],
                pixels=pixels[:: len(pixels) // 50].tolist(), sum=pixels.double().sum().item(),
                bf16=rounded.tolist(), float32=scorer.reward(pictures, PROMPTS).tolist()))
    RECORDED.write_text(json.dumps(out, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
