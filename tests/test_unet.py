"""unet.py and shortcuts.py: what is trained, and that the wrapped UNet computes what the stock one does."""

import torch
from conftest import TINY
from diffusers import UNetSpatioTemporalConditionModel

import svd_common as common
from svd_parts.shortcuts import avoid_conv3d
from svd_parts.unet import TRAINABLE, is_trained, prepare_unet, trained_parameters
from svd_parts.weights import SVD_XT_CONFIG


def test_wrapped_unet_computes_what_the_stock_unet_computes():
    """Dtype split, single-token shortcut and checkpointing change no output, and give the stock gradients."""
    torch.manual_seed(0)
    stock = common.load_part(TINY, "unet", torch.float32)
    ours = common.load_part(TINY, "unet", torch.float32)
    prepare_unet(ours, "temporal", torch.float32, "full")
    stock, ours = stock.double(), ours.double()
    embedding = torch.randn(1, 1, stock.config.cross_attention_dim).double()
    inputs = torch.randn(1, 8, 8, 16, 24).double(), torch.tensor([0.3]), embedding
    ids, target = torch.tensor([[6.0, 127.0, 0.05]]), torch.randn(1, 8, 4, 16, 24)
    gradients = []
    for unet in (stock, ours):
        out = unet(*inputs, added_time_ids=ids).sample
        (out - target).square().mean().backward()
        gradients.append({name: p.grad for name, p in unet.named_parameters()})
        gradients[-1]["out"] = out.detach()
    assert torch.allclose(gradients[0]["out"], gradients[1]["out"], atol=1e-10)
    trained = trained_parameters(ours)
    for name in trained:
        assert torch.allclose(gradients[0][name], gradients[1][name], rtol=1e-6, atol=1e-12), name
    dead = [n for n, p in stock.named_parameters() if "temporal_transformer" in n and n not in trained]
    assert dead and all(gradients[0][name].abs().max() < 1e-12 for name in dead)  # what is not trained cannot be


def test_temporal_groups_of_svd_xt():
    """SVD-XT's published configuration: 656 M temporal parameters, less the 25 M that can have no gradient."""
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel.from_config(SVD_XT_CONFIG["unet"])
    sizes = {name: p.numel() for name, p in unet.named_parameters()}
    temporal = sum(n for name, n in sizes.items() if any(g in name for g in TRAINABLE["temporal"]))
    trained = sum(n for name, n in sizes.items() if is_trained(name, "temporal"))
    assert round(sum(sizes.values()) / 1e6, 1) == 1524.6
    assert round(temporal / 1e6, 1) == 656.1 and round((temporal - trained) / 1e6, 1) == 25.2


def test_half_precision_convolutions_over_time_equal_the_stock_ones():
    torch.manual_seed(0)
    module = torch.nn.Conv3d(16, 24, (3, 1, 1), padding=(1, 0, 0)).to(torch.bfloat16)
    x = torch.randn(2, 16, 5, 6, 7, dtype=torch.bfloat16)
    stock = module(x)
    avoid_conv3d(module)
    assert torch.equal(module(x), stock)
    x64, module64 = x.double(), module.double()
    assert torch.equal(module64(x64), module64._conv_forward(x64, module64.weight, module64.bias))
