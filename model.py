"""
FLUX behind a few methods. Time t runs from 1 (noise) to 0 (image): x_t = (1-t) x_0 + t eps,
v ~ eps - x_0. FLUX has the same convention, so nothing is flipped or rescaled here.

Whatever `diffusers.FluxPipeline` can load is loaded by the same lines: the small one in tiny/flux
and FLUX.1-dev alike. Letters: P prompts, M latents (a multiple of P), N image tokens, C channels of
a token, L text tokens.

What train() asks of a model, FLUX or not (examples/own_model.py has another one):

    device, latent_shape    a torch.device; the shape of one latent, here (N, C)
    encode(prompts)         P strings -> what `velocity` needs of them, of any type
    velocity(x, t, cond)    x (M, *latent_shape), t in [0, 1], one for all or (M,) -> v like x; the
                            rows are grouped by prompt, M/P each; float32; differentiable
    decode(x)               latents at t = 0 -> images (M, 3, H, W), float32 in [0, 1]
    trained()               the list of trained parameters, float32
    transformer             the module that has them; its state goes into the checkpoints
    save(path, weights)     write into the folder `path` what is needed to sample again
    net, blocks()           for several processes: the module that `velocity` calls, and its parts
"""
import json, logging, re, shutil
from pathlib import Path
import machine                                                  # noqa: F401  (before diffusers)
import diffusers
import torch
import transformers
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

diffusers.utils.logging.disable_progress_bar()                  # of loading and saving; train.py
transformers.utils.logging.disable_progress_bar()               # and eval.py show their own
# diffusers warns of every prompt that is cut. `Flux.cut` counts them once.
logging.getLogger("diffusers.pipelines.flux.pipeline_flux").setLevel(logging.ERROR)

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0",                # where LoRA goes
             "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


# ----------------------------------------------------------------------------------------------
# what can be loaded

def check_model(path):
    """Refuse, before anything is loaded, what is neither a FluxPipeline directory nor a hub id."""
    path = Path(path)
    if (path / "model_index.json").is_file():
        check_configs(path, lambda file: path / file)
    elif path.is_file():
        raise ValueError(f"{path} is a single file; name a FluxPipeline directory, which "
                         "diffusers makes of it: FluxPipeline.from_single_file, save_pretrained")
    elif path.exists() or len(path.parts) != 2 or path.parent.exists():
        raise ValueError(f"{path} is not a FluxPipeline directory; it must hold model_index.json, "
                         "or be a hub id like black-forest-labs/FLUX.1-dev")


def check_configs(path, find):
    """Refuse another pipeline, and a transformer that cannot be trained here. find(name) ->
    path."""
    def read(file):
        return json.loads(find(file).read_text(encoding="utf-8"))

    kind = read("model_index.json").get("_class_name")
    if kind != "FluxPipeline":
        raise ValueError(f"{path} is a {kind}, but must be a FluxPipeline, text to image")
    config = read("transformer/config.json")
    channels = config.get("in_channels", 64)
    if (config.get("out_channels") or channels) != channels:
        raise ValueError(f"the transformer of {path} takes {channels} channels and gives "
                         f"{config['out_channels']}; Fill, Depth and Canny models need more inputs "
                         "than a prompt, and cannot be aligned here")
    if config.get("quantization_config"):
        raise ValueError(f"the transformer of {path} is quantized; name the original weights, and "
                         "train adapters (--lora_rank 64) if memory is scarce")


def find_folder(path):
    """The folder of a pipeline. A hub id is downloaded, after a look at its configuration."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import hf_hub_download
    check_configs(path, lambda file: Path(hf_hub_download(str(path), file)))
    return Path(FluxPipeline.download(str(path)))


def parse_resolution(text):
    """ "720" or "832x640" (width x height) -> (height, width) in pixels."""
    if not (match := re.fullmatch(r"(\d+)(?:x(\d+))?", str(text).strip())):
        raise ValueError(f"resolution is {text}, but must be a number of pixels, or like 832x640")
    width, height = int(match[1]), int(match[2] or match[1])
    if not all(16 <= side <= 8192 and side % 16 == 0 for side in (width, height)):
        raise ValueError(f"resolution is {text}, but its sides must be multiples of 16, up to 8192")
    return height, width


# ----------------------------------------------------------------------------------------------
# adapters

def is_lora(path):
    """Whether a path names adapters: a .safetensors file, or a folder with one that diffusers or
    PEFT wrote."""
    return lora_file(path) is not None


def lora_file(path):
    path = Path(path)
    found = [path, path / "pytorch_lora_weights.safetensors", path / "adapter_model.safetensors"]
    return next((file for file in found if file.is_file() and file.suffix == ".safetensors"), None)


def add_lora(transformer, rank):
    """Add adapters of this rank to all attention projections. They are zero at first, and nothing
    else is trained. Alpha equals the rank, so programs that ignore alpha apply the same
    strength."""
    from peft import LoraConfig
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian",
                                       target_modules=ATTENTION))


def load_lora(pipe, path):
    """Load adapters, in any layout that diffusers knows or in PEFT's own."""
    file = lora_file(path)
    try:
        state, prefix = load_file(file), "base_model.model."    # PEFT's
        if all(name.startswith(prefix) and "transformer_blocks" in name for name in state):
            settings = json.loads((file.parent / "adapter_config.json").read_text(encoding="utf-8"))
            state = {name.replace(prefix, "transformer."): w for name, w in state.items()}
            for name in [name for name in state if name.endswith(".lora_A.weight")]:
                alpha = torch.tensor(float(settings["lora_alpha"]))
                state[name.replace(".lora_A.weight", ".alpha")] = alpha
            pipe.load_lora_weights(state, adapter_name="default")
        else:
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name="default")
    except Exception as error:
        raise ValueError(f"{file} could not be loaded as adapters: {error}") from error
    if not any("lora_" in name for name, _ in pipe.transformer.named_parameters()):
        raise ValueError(f"{file} holds no adapters of the transformer")


# ----------------------------------------------------------------------------------------------
# the transformer's blocks

def blocks(transformer):
    """What is gathered, recomputed and compiled one at a time."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def recompute(transformer, count):
    """Recompute the activations of the first `count` blocks (-1: all) in the backward pass."""
    if count:
        chosen = blocks(transformer)[: count if count > 0 else None]
        transformer.enable_gradient_checkpointing(lambda block, *inputs: (
            checkpoint(block, *inputs, use_reentrant=False) if block in chosen else block(*inputs)))


# ----------------------------------------------------------------------------------------------

class Flux:
    """
    path         a FluxPipeline directory or a hub id; or a FluxPipeline, if it is not to be saved
    resolution   pixels, multiples of 16: a side, or "832x640" for width x height
    guidance     FLUX.1-dev takes its guidance scale as an input; 3.5 is its usual value
    checkpoint_blocks  number of blocks whose activations are recomputed in the backward pass, -1:
                 all; it saves memory and costs up to half of an update's time
    compiled     compile the blocks: one graph for each kind of block and size of batch
    frozen       only sample from it
    lora_rank    train only adapters of this rank on the attention projections; 0: all weights
    lora         adapters, a file or a folder: to sample with if frozen, else to train further
    text_device  where the text encoders are: "" beside the transformer, "cpu", or "offload", on the
                 CPU between uses
    sharded      leave the transformer on the CPU; FSDP moves it
    batch        at most this many latents in one call of a network, to save memory; 0: all

    Trained weights are float32. On a GPU the network runs in bf16 by autocast, and frozen weights
    are bf16. Latents and velocities go in and come out as float32. Raises ValueError for a
    resolution or adapters that do not fit.
    """

    def __init__(self, path, resolution, device="cpu", guidance=3.5, checkpoint_blocks=0,
                 compiled=False, frozen=False, lora_rank=0, lora="", text_device="", sharded=False,
                 batch=0):
        self.device, self.text_device, self.batch = torch.device(device), text_device, batch
        train_all = not (frozen or lora_rank or lora)
        self.pipe, self.folder = path, None
        if not isinstance(path, FluxPipeline):
            self.folder = find_folder(path)
            small = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            dtype = {"transformer": torch.float32 if train_all else small, "default": small}
            self.pipe = FluxPipeline.from_pretrained(self.folder, dtype=dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.transformer = self.pipe.transformer.requires_grad_(train_all)
        self.net = self.transformer                             # what is called; DDP wraps it
        if lora:
            load_lora(self.pipe, lora)
        elif lora_rank:
            add_lora(self.transformer, lora_rank)
        for name, w in self.transformer.named_parameters():
            if "lora_" in name and not frozen:
                w.requires_grad_()
                w.data = w.data.float()
        if not sharded:
            self.transformer.to(self.device)
        self.encoders = (self.pipe.text_encoder, self.pipe.text_encoder_2)      # CLIP, T5
        for part in (self.pipe.vae, *self.encoders):
            part.requires_grad_(False).eval()
        self.pipe.vae.to(self.device)
        for part in self.encoders:
            part.to("cpu" if text_device else self.device)
        recompute(self.transformer, checkpoint_blocks)
        if compiled:
            # A graph for each batch size, with gradients and without; blocks of a kind share them.
            torch._dynamo.config.recompile_limit = 64
            for block in self.blocks():
                block.compile(dynamic=False)
        step = 2 * self.pipe.vae_scale_factor                   # pixels per token: 8, packed 2 x 2
        self.height, self.width = (side // step for side in parse_resolution(resolution))
        self.latent_shape = (self.height * self.width, self.transformer.config.in_channels)
        self.img_ids = FluxPipeline._prepare_latent_image_ids(
            1, self.height, self.width, self.device, torch.float32)             # (N, 3)
        self.guidance = guidance if self.transformer.config.guidance_embeds else None

    def trained(self):
        """The weights that are trained."""
        return [w for w in self.transformer.parameters() if w.requires_grad]

    def blocks(self):
        return blocks(self.transformer)

    @torch.no_grad()
    def encode(self, prompts):
        """P prompts -> what `velocity` needs: dict(txt (P, L, .) of T5, vec (P, .) of CLIP)."""
        where = "cpu" if self.text_device == "cpu" else self.device
        for part in self.encoders:
            part.to(where)
        txt, vec, _ = self.pipe.encode_prompt(prompts, None, where,
                                              max_sequence_length=self.text_length())
        for part in self.encoders if self.text_device == "offload" else ():
            part.to("cpu")
        return dict(txt=txt.to(self.device), vec=vec.to(self.device))

    def text_length(self):
        return min(512, self.pipe.tokenizer_2.model_max_length)                 # FLUX.1-dev: 512

    def cut(self, prompts):
        """How many prompts are too long: {"CLIP": for CLIP's 77 tokens, "T5": for T5's 512}."""
        encoders = dict(CLIP=(self.pipe.tokenizer, self.pipe.tokenizer.model_max_length),
                        T5=(self.pipe.tokenizer_2, self.text_length()))
        return {name: sum(len(ids) > limit for ids in tokenizer(prompts, verbose=False).input_ids)
                for name, (tokenizer, limit) in encoders.items()}

    def velocity(self, x, t, cond):
        """v_theta(x, t): x (M, N, C), t a number or (M,), cond of P prompts; the rows are grouped
        by prompt, M/P each -> (M, N, C)."""
        each, M = len(x) // len(cond["vec"]), len(x)
        if not (torch.is_tensor(t) and t.ndim):
            t = torch.full((M,), float(t))
        t = t.to(self.device, torch.float32)                    # in [0, 1]; FLUX multiplies by 1000
        txt, vec = (cond[key].repeat_interleave(each, 0) for key in ("txt", "vec"))     # (M, ...)
        txt_ids = self.img_ids.new_zeros(txt.shape[1], 3)
        v = []
        with torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda"):
            for some in self.parts(M):
                scale = None if self.guidance is None else torch.full_like(t[some], self.guidance)
                v.append(self.net(
                    hidden_states=x[some], timestep=t[some], guidance=scale,
                    encoder_hidden_states=txt[some], pooled_projections=vec[some],
                    img_ids=self.img_ids, txt_ids=txt_ids, return_dict=False)[0])
        return torch.cat(v).float()

    def parts(self, M, most=None):
        """Slices of M latents, `batch` at a time and at most `most`."""
        size = min(self.batch or M, most or M)
        return [slice(i, i + size) for i in range(0, M, size)]

    def unpack(self, x):
        """Tokens to the VAE's grid: "b (h w) (c ph pw) -> b c (h ph) (w pw)" with ph = pw = 2."""
        h, w = self.height, self.width
        x = x.unflatten(1, (h, w)).unflatten(3, (-1, 2, 2))                     # (M, h, w, c, 2, 2)
        x = x.permute(0, 3, 1, 4, 2, 5)                                         # (M, c, h, 2, w, 2)
        return x.reshape(len(x), -1, 2 * h, 2 * w)                              # (M, c, 2h, 2w)

    @torch.no_grad()
    def decode(self, x):
        """Latents at t = 0, (M, N, C) -> images (M, 3, H, W) in [0, 1], float32. Sixteen at a time:
        on a CPU 96 at once take twice as long, because they do not fit in its cache."""
        vae = self.pipe.vae
        z = self.unpack(x) / vae.config.scaling_factor + vae.config.shift_factor
        images = [vae.decode(z[some].to(vae.dtype), return_dict=False)[0].float()
                  for some in self.parts(len(z), most=16)]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def save(self, path, weights=None):
        """Write a directory for `FluxPipeline.from_pretrained`, or adapters for its
        `load_lora_weights`. `weights`: {name: full tensor}, if the transformer is sharded."""
        if hasattr(self.transformer, "peft_config"):
            from diffusers.training_utils import _collate_lora_metadata
            from peft import get_peft_model_state_dict
            adapters = get_peft_model_state_dict(self.transformer, state_dict=weights)
            metadata = _collate_lora_metadata({"transformer": self.transformer})
            FluxPipeline.save_lora_weights(path, adapters, **metadata)
            return
        whole = self.transformer
        if weights is not None:
            with torch.device("meta"):
                whole = type(self.transformer).from_config(self.transformer.config)
            whole.load_state_dict(weights, assign=True)
        whole.save_pretrained(Path(path) / "transformer")
        self.copy_untrained(Path(path))

    def copy_untrained(self, path):
        """Copy the rest of the base byte for byte: what loads the base then loads this, too."""
        if self.folder is None:
            raise ValueError("a model that was not loaded from a folder cannot be saved")
        index = json.loads((self.folder / "model_index.json").read_text(encoding="utf-8"))
        parts = [name for name in index if name[0] != "_" and name != "transformer"]
        files = [self.folder / "model_index.json", self.folder / "transformer/config.json"]
        files += [file for name in parts for file in (self.folder / name).rglob("*")]
        for file in filter(Path.is_file, files):
            target = path / file.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)       # not its mode, which may be read-only
