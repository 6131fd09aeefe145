"""Which parts of the UNet are trained, in which precision, and what is recomputed in the backward pass.

torch is imported inside the functions, so that the command line can list the tables without loading torch.
"""

from svd_parts.actions import PREFIX
from svd_parts.lora import adapter_forward
from svd_parts.shortcuts import SingleTokenAttention, avoid_conv3d, convolve

# The choices of --trainable: a parameter is trained if its name holds one of these texts.
TRAINABLE = {
    "temporal": ("temporal_transformer_blocks", "temporal_res_block", "time_pos_embed", "time_mixer"),
    "temporal_attention": ("temporal_transformer_blocks",),
    "all": ("",),
}
# SVD's cross-attention sees one token, so its softmax is always 1. So these parameters never get a gradient.
WITHOUT_GRADIENT = ("attn2.to_q.", "attn2.to_k.", ".norm2.")


def is_trained(name, trainable):
    """Whether the UNet parameter `name` is trained under --trainable."""
    idle = any(part in name for part in WITHOUT_GRADIENT) and "transformer_blocks" in name
    return any(group in name for group in TRAINABLE[trainable]) and not idle


def trained_layers(options):
    """The trained layers as text: `temporal, LoRA of rank 32`."""
    return options.trainable + (f", LoRA of rank {options.lora_rank}" if options.lora_rank else "")


# The modules whose activations are recomputed in the backward pass. At 512x320x25 with AdamW, none needs 37.0 GiB and
# 45.8 TFLOP, transformers 17.4 and 56.0, full 13.8 and 62.7. Recomputing only the resnets would save little memory.
RECOMPUTED = {
    "none": (),
    "transformers": ("TransformerSpatioTemporalModel",),
    "full": ("TransformerSpatioTemporalModel", "SpatioTemporalResBlock"),
}
DTYPES = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}


def compute_dtype(mixed_precision):
    """The torch dtype of --mixed_precision: the UNet computes in it and keeps its frozen weights in it."""
    import torch

    return getattr(torch, DTYPES[mixed_precision])


def forward_in_input_dtype(module):
    """The forward pass of a layer with fp32 weights, in the dtype of its input, as autocast would do it."""
    import torch.nn.functional as F
    from torch.nn import Conv2d, Conv3d, GroupNorm, LayerNorm, Linear

    if not isinstance(module, (Linear, Conv2d, Conv3d, GroupNorm, LayerNorm)):
        return module.forward  # AlphaBlender, which casts its scalar itself

    def forward(x):
        weight = module.weight.to(x.dtype)
        bias = None if module.bias is None else module.bias.to(x.dtype)
        if isinstance(module, Linear):
            return F.linear(x, weight, bias)
        if isinstance(module, GroupNorm):
            return F.group_norm(x, module.num_groups, weight, bias, module.eps)
        if isinstance(module, LayerNorm):
            return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        return convolve(module, x, weight, bias)

    return forward


def prepare_unet(unet, trainable, weight_dtype, checkpointing):
    """Freezes, casts and wraps a UNet for training, in place. Names and shapes in its state dict stay the same.

    Trained weights, their gradients and AdamW's states are fp32; frozen weights are in `weight_dtype`. A UNet with LoRA
    adapters trains only these; `trainable` was used to place them. An encoder of actions is always trained.
    """
    import torch
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock

    has_adapters = any("lora_" in name for name, _ in unet.named_parameters())
    for name, parameter in unet.named_parameters():
        chosen = "lora_" in name if has_adapters else is_trained(name, trainable)
        parameter.requires_grad_(chosen or name.startswith(PREFIX))
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else weight_dtype)
    avoid_conv3d(unet)
    for module in unet.modules():
        if weight_dtype != torch.float32 and any(p.requires_grad for p in module.parameters(recurse=False)):
            module.forward = forward_in_input_dtype(module)
        if hasattr(module, "lora_A"):
            module.forward = adapter_forward(module)
        if isinstance(module, (BasicTransformerBlock, TemporalBasicTransformerBlock)) and module.attn2 is not None:
            module.attn2.set_processor(SingleTokenAttention())
        if isinstance(module, GEGLU) and checkpointing != "none":
            module.forward = gated_recomputed(module)
        if type(module).__name__ in RECOMPUTED[checkpointing]:  # diffusers' checkpointing skips the temporal layers
            module.forward = checkpointed(module.forward)
    return unet.train()


def checkpointed(forward):
    """Makes the backward pass recompute the activations of `forward`. Nothing there draws random numbers in SVD."""
    import torch
    from torch.utils.checkpoint import checkpoint

    def run(*inputs, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*inputs, **kwargs)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


def gated_recomputed(geglu):
    """A GEGLU's forward pass that keeps the matrix product and recomputes the rest, which costs next to nothing."""

    def gate(projected):
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * geglu.gelu(gate)

    recomputed = checkpointed(gate)
    return lambda x: recomputed(geglu.proj(x))


def trained_parameters(unet):
    """The trained parameters, {name: parameter}, in the model's order."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
