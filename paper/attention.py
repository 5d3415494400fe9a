"""
Other kinds of attention, and rollouts in one CUDA graph: what do they bring at FLUX.1-dev's size?
`python -m paper.bench ladder --attention KIND` times them; train.py has none of them. KIND is

    flash   what torch takes when cuDNN's is off (machine.py)
    cudnn   cuDNN's, but only while gradients are off: its gradients were the fault
    FA3     FlashAttention-3, of the package flash_attn_interface
    FA4     FlashAttention's CuTe kernels, of the package flash-attn-4
    flex    FlexAttention, compiled
    plain   products of matrices
"""
import functools
import torch
import torch.nn.functional as F
from torch.nn import attention
from torch.nn.attention.flex_attention import flex_attention

TORCHS = F.scaled_dot_product_attention

def cudnn(query, key, value, attn_mask=None, **more):
    if torch.is_grad_enabled() or attn_mask is not None:
        return TORCHS(query, key, value, attn_mask, **more)
    with attention.sdpa_kernel(attention.SDPBackend.CUDNN_ATTENTION):
        return TORCHS(query, key, value, **more)

def plain(*args, **more):
    with attention.sdpa_kernel(attention.SDPBackend.MATH):
        return TORCHS(*args, **more)

def flex(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
    if attn_mask is not None or dropout_p or is_causal:
        return TORCHS(query, key, value, attn_mask, dropout_p, is_causal, **more)
    inside = torch.compiler.is_compiling()      # of a compiled block
    return (flex_attention if inside else compiled_flex())(query, key, value, **more)

@functools.cache
def compiled_flex():
    return torch.compile(flex_attention, dynamic=False)

KINDS = dict(flash=TORCHS, cudnn=cudnn, FA3=TORCHS, FA4=TORCHS, flex=flex, plain=plain)

def use(kind):
    """Let all attention of this process be of a kind. Raises what torch raises if there is none."""
    if attention.current_flash_attention_impl():
        attention.restore_flash_attention_impl()
    F.scaled_dot_product_attention = KINDS[kind]
    if kind in ("FA3", "FA4"):
        attention.activate_flash_attention_impl(kind)

def in_one_graph(model):
    """Let rollouts replay one CUDA graph of the whole transformer, for each shape of its inputs."""
    if model.device.type != "cuda":
        raise ValueError("a CUDA graph needs a GPU")
    call, recorded = model.transformer.forward, {}

    def forward(**inputs):
        if torch.is_grad_enabled():
            return call(**inputs)
        names = [name for name, x in inputs.items() if torch.is_tensor(x)]
        tensors = tuple(inputs[name] for name in names)
        shapes = tuple(x.shape for x in tensors)
        if shapes not in recorded:              # without autocast's cache, which would be freed
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
                recorded[shapes] = torch.cuda.make_graphed_callables(
                    lambda *tensors: call(**inputs | dict(zip(names, tensors))),
                    tuple(x.clone() for x in tensors))
        return recorded[shapes](*tensors)

    model.transformer.forward = forward
    return model
