"""
Rollouts in float8, and updates in their usual precision.

    pip install torchao==0.18.0
    python -m paper.float8 --preset dpm8 --prompts hpdv2_train      # train.py's settings

The linear layers of FLUX's blocks multiply in float8 when gradients are off: in rollouts, and in
all evaluations. Weights and inputs are rounded only for the product, with a scale for each row. The
weights themselves do not change, so an update needs no second copy.

On the small world, the velocity changes by 3 to 5 % of its length. The old anchor is replayed from
this velocity, so the first ratio differs from 1 by 5e-4. The gain did not change (LOG.md). On a CPU
float8 is slower. On a GPU it has not been timed.
"""
import importlib.util
import torch
import train

def check(device):
    """ValueError, in one sentence, if float8 is not possible on the device."""
    if not importlib.util.find_spec("torchao"):
        raise ValueError("float8 needs torchao; pip install torchao")
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise ValueError("float8 needs a GPU of compute capability 8.9 (Ada, Hopper) or more")

def prepare(model):
    """Let the linear layers of a Flux's blocks multiply in float8 while gradients are off, except
    the small layers of norms and LoRA's adapters. Returns the model."""
    check(model.device)
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    class WithoutGradients(Float8Linear):
        def forward(self, x):
            if torch.is_grad_enabled():
                return torch.nn.Linear.forward(self, x)
            return super().forward(x)

    def is_wanted(layer, name):
        fits = layer.in_features % 16 == layer.out_features % 16 == 0
        return fits and "norm" not in name and "lora" not in name

    config = Float8LinearConfig.from_recipe_name("rowwise")
    for block in model.blocks():
        convert_to_float8_training(block, module_filter_fn=is_wanted, config=config)
        for layer in block.modules():
            if type(layer) is Float8Linear:
                layer.__class__ = WithoutGradients      # one class, so that blocks of a kind
    return model                                        # still share their compiled graphs

if __name__ == "__main__":
    load = train.load
    train.load = lambda cfg: prepare(load(cfg))         # so the base is evaluated in float8, too
    train.exit_process(train.main())
