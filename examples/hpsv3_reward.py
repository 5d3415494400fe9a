"""
A reward from a vision-language model with 8 billion weights.

    python train.py --preset dpm8 --rewards hpsv3 ...           # downloads 16.6 GB, once
"""
import functools
from pathlib import Path
import torch
from rewards import HUB, Published, fetch, load_strictly, local_file, read_weights
from torch import nn

QUESTION = (Path(__file__).parent / "hpsv3_prompt.txt").read_text(encoding="utf-8")


class HPSv3(Published):
    """HPSv3 (Ma et al., arXiv 2508.03789): Qwen2-VL-7B reads the picture and a question that has
    the prompt in it, and a head on the token <|Reward|> gives the score.

    Weights     HPSv3.safetensors of MizzenAI/HPSv3 (Apache-2.0; code MIT), and tokenizer.json of
                Qwen/Qwen2-VL-7B-Instruct (Apache-2.0), in the same folder if you give a path.
                15.5 GB in bfloat16 on a GPU, with a float32 head; 31 GB in float32 on a CPU.
    Image       PIL's bicubic to about 448 x 448 pixels: both sides multiples of 28, rounded down,
                or up if the picture is smaller. (By a rounding error, 768 x 768 becomes 420 x 420.)
    Score       mu, the first of the head's two numbers; the other is log sigma. Models have means
                from -0.2 (Stable Diffusion 2) to 10.6 (Kolors); FLUX.1-dev 10.4.
    Source      PyPI hpsv3 1.0.0, with transformers 4.45. There positions simply count the tokens,
                and the frequencies of rotary embeddings are rounded to bfloat16. Newer code does
                neither, but the network was trained so.
    """
    source, file = HUB + "MizzenAI/HPSv3", "HPSv3.safetensors"
    pin = "4f81e3e09edd82fe3c5f636444c721b592a735ca"
    qwen, qwen_pin = HUB + "Qwen/Qwen2-VL-7B-Instruct", "eed13092ef92e448dd6875b2a00151bd3f7db0ac"
    text = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
                num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6, vocab_size=151658,
                rope_parameters=dict(rope_type="default", rope_theta=1e6))
    vision = dict(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16)

    def __init__(self, location="", device="cpu"):
        from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessorPil
        super().__init__(location, device)
        path = fetch(location, self.source, self.file, self.pin)
        folder = path.parent if local_file(location, self.source, self.file) else ""
        words = fetch(str(folder), self.qwen, "tokenizer.json", self.qwen_pin)
        self.processor = Qwen2VLImageProcessorPil(min_pixels=448 * 448, max_pixels=448 * 448)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(words),
                                                 pad_token="<|endoftext|>", padding_side="right")
        self.tokenizer.add_tokens("<|Reward|>", special_tokens=True)
        if len(self.tokenizer) != self.text["vocab_size"]:
            raise ValueError(f"{words} is not the tokenizer of {self.qwen}")
        image, self.reward = self.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|Reward|>"])
        state, (net, head) = self.rename(read_weights(path, self.source)), self.build(image)
        heads = {name: state.pop(name) for name in list(state) if name.startswith("rm_head.")}
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.head = load_strictly(head, heads, path, self.source)["rm_head"].to(device)
        net = load_strictly(net, state, path, self.source, dtype).model     # without lm_head
        for part, name in (net.language_model, "rotary_emb"), (net.visual, "rotary_pos_emb"):
            rotary = type(getattr(part, name))(part.config).bfloat16()      # was on "meta"
            setattr(part, name, rotary)
        rotary.forward = functools.partial(bf16_angles, rotary)             # the picture's
        self.net = net.to(device)

    @classmethod
    def build(cls, image_token=151655):
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
        config = Qwen2VLConfig(text_config=cls.text, vision_config=cls.vision,
                               tie_word_embeddings=False, image_token_id=image_token)
        with torch.device("meta"):                      # no memory for random weights
            head = nn.Sequential(nn.Linear(cls.text["hidden_size"], 1024), nn.ReLU(),
                                 nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2))
            return Qwen2VLForConditionalGeneration(config), nn.ModuleDict(dict(rm_head=head))

    @staticmethod
    def rename(state):                                  # from transformers 4.45 to 5
        return {name.replace("model.", "model.language_model.").replace("visual.", "model.visual."):
                tensor for name, tensor in state.items()}

    def check_prompt(self, prompt):
        if "<|" in prompt:
            raise ValueError(f"scorer 'hpsv3' cannot use {prompt!r}: <| begins a control token")

    def inputs(self, pixels, prompts):
        images = self.processor(list(pixels.cpu().numpy()), return_tensors="pt")
        counts = images.image_grid_thw.prod(1) // 4             # 2 x 2 patches are one token
        texts = [QUESTION.format(prompt=prompt, image="<|image_pad|>" * n)
                 for prompt, n in zip(prompts, counts)]
        return dict(images, **self.tokenizer(texts, padding=True, return_tensors="pt"))

    def score(self, pixels, prompts):
        x = {key: value.to(self.device) for key, value in self.inputs(pixels, prompts).items()}
        ids, places = x["input_ids"], torch.arange(x["input_ids"].shape[1], device=self.device)
        hidden = self.net(ids, x["attention_mask"], places.expand(3, *ids.shape),
                          pixel_values=x["pixel_values"].to(self.net.dtype),
                          image_grid_thw=x["image_grid_thw"], use_cache=False).last_hidden_state
        return self.head(hidden[ids == self.reward].float())[:, 0]      # (G,)


def bf16_angles(rotary, x, places):
    """cos and sin for the rows and columns of patches, in bfloat16 as in transformers 4.45."""
    angles = places[..., None].bfloat16() * rotary.inv_freq             # (N, 2, d / 4)
    return tuple(rotary.recomposition_frequencies(f(angles)) for f in (torch.cos, torch.sin))
