"""Shortcuts through SVD's UNet and VAE, for training and inference. Results are equal but for rounding."""


def convolve(module, x, weight, bias):
    """The forward pass of a convolution with these weights. In half precision SVD's 3-D ones run as equal 2-D ones.

    All of SVD's 3-D kernels are (3, 1, 1), so over (B, C, T, H * W) they are 2-D. cuDNN 9.8 to 9.14 has no fast 3-D
    convolution in half precision (pytorch#166122), and oneDNN's bf16 backward pass on a CPU never ends.
    """
    import torch

    if x.ndim < 5 or x.dtype in (torch.float32, torch.float64) or module.kernel_size[1:] != (1, 1):
        return module._conv_forward(x, weight, bias)
    out = torch.nn.functional.conv2d(x.flatten(3), weight.flatten(3), bias, padding=(module.padding[0], 0))
    return out.unflatten(3, x.shape[3:])


def avoid_conv3d(model):
    """Makes the 3-D convolutions of a UNet or VAE use `convolve`, in place."""
    from torch.nn import Conv3d

    for module in model.modules():
        if isinstance(module, Conv3d):
            module.forward = lambda x, module=module: convolve(module, x, module.weight, module.bias)


class SingleTokenAttention:
    """Cross-attention over SVD's one token. The softmax over one key is 1, so the output is to_out(to_v(token)).

    The output is computed once for all queries. It equals the stock result but for rounding, and bitwise in CPU tests.
    """

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        assert encoder_hidden_states.shape[1] == 1, "the shortcut holds for one token only"
        hidden = attn.to_out[0](attn.to_v(encoder_hidden_states))  # (B, 1, C)
        return hidden.expand(-1, hidden_states.shape[1], -1)


def compile_blocks(unet):
    """Compiles each large block by itself, in place, so that the names in the state dict stay the same."""
    import torch._dynamo
    from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock
    from diffusers.models.resnet import SpatioTemporalResBlock

    torch._dynamo.config.cache_size_limit = 64  # the blocks have more shapes than the default of 8
    for module in unet.modules():
        if isinstance(module, (BasicTransformerBlock, TemporalBasicTransformerBlock, SpatioTemporalResBlock)):
            module.compile()


def wrap_unet(unet, compiled=False):
    """Gives a stock UNet these shortcuts, in place. The frames stay the same, but for the rounding of torch.compile."""
    avoid_conv3d(unet)
    processors = unet.attn_processors.items()  # attn2 is the attention over the image's one token
    unet.set_attn_processor({n: SingleTokenAttention() if ".attn2." in n else p for n, p in processors})
    if compiled:
        compile_blocks(unet)


def save_memory(unet):
    """Makes a UNet need less memory, in place, for --low_vram.

    Feed-forward layers run in chunks, and guidance's two samples one after the other, which halves the activations.
    """
    import torch

    def one_at_a_time(sample, timestep, encoder_hidden_states, added_time_ids, return_dict=True):
        parts = zip(sample.split(1), encoder_hidden_states.split(1), added_time_ids.split(1))
        made = [unet.forward_of_all(x, timestep, e, ids, return_dict=False)[0] for x, e, ids in parts]
        return (torch.cat(made),)

    if not hasattr(unet, "forward_of_all"):
        unet.enable_forward_chunking(1, dim=0)
        unet.forward_of_all, unet.forward = unet.forward, one_at_a_time


def move_to_device(pipe, low_vram, device):
    """Puts a pipeline on the device. With --low_vram, each part is there only while it works (diffusers' offload)."""
    import torch

    if pipe.vae.dtype != pipe.unet.dtype:
        pipe.vae.to(dtype=pipe.unet.dtype)  # the pipeline encodes in fp32, and ran out of memory there
    if low_vram:
        save_memory(pipe.unet)
    if low_vram and device == "cuda":
        pipe.enable_model_cpu_offload(gpu_id=torch.cuda.current_device())  # the default is always the first GPU
    else:
        pipe.to(device)
