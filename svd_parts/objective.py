"""The loss: noise levels, scalings, the v target, one forward pass."""

import functools
import hashlib

import torch

from svd_parts.action_encoder import follow_actions


def random_generator(*key):
    """A CPU generator whose numbers depend on `key` alone: they are the same on every machine and in any order."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little"))


@functools.lru_cache(maxsize=4)  # the loader's threads may be in two epochs at once
def shuffled(count, *key):
    """The numbers 0 .. count - 1 in an order that depends on `key` alone."""
    return torch.randperm(count, generator=random_generator(*key)).tolist()


# SVD is a v-prediction model in EDM's continuous-sigma form (Karras et al. 2022; Blattmann et al. 2023, appendix D).
# With x = latents + sigma * noise, the network F gives the clean latents as c_skip * x + c_out * F(c_in * x, c_noise).
def sample_sigmas(normal, P_mean, P_std):
    """Noise levels from standard normal draws: ln(sigma) ~ N(P_mean, P_std^2) (EDM, table 1)."""
    return torch.exp(P_mean + P_std * normal)


def scalings(sigmas):
    """c_skip, c_out, c_in, c_noise of SVD for `sigmas` (generative-models, VScalingWithEDMcNoise)."""
    c_skip = 1 / (sigmas**2 + 1)
    c_out = -sigmas / (sigmas**2 + 1).sqrt()
    c_in = 1 / (sigmas**2 + 1).sqrt()
    c_noise = 0.25 * sigmas.log()
    return c_skip, c_out, c_in, c_noise


def v_target(latents, noise, sigmas):
    """The target of F: v = (noise - sigma * latents) / sqrt(sigma^2 + 1).

    MSE(F, v) equals SVD's weighted denoising loss, (sigma^2 + 1) / sigma^2 * MSE(denoised, latents), since that weight
    times c_out^2 is 1. In half precision the v form stays accurate at small sigma; the denoised form does not.
    """
    return (noise - sigmas * latents) / (sigmas**2 + 1).sqrt()


def loss_weight(sigmas, loss):
    """The weight of the squared v error: 1 for SVD's loss. 1 / (sigma^2 + 1) makes it MSE(predicted noise, noise).

    The predicted noise is (x - denoised) / sigma, so its error is the error of F divided by sqrt(sigma^2 + 1).
    """
    return torch.ones_like(sigmas) if loss == "v" else 1 / (sigmas**2 + 1)


def training_loss(unet, vae, batch, weight_dtype, loss="v"):
    """One forward pass: latents -> noise -> condition -> predict -> loss.

    batch: stacked samples of ClipDataset. Returns (the loss to minimise, {"loss_v", "loss_noise"}: detached scalars).
    """
    latents, noise = batch["latents"], batch["noise"]  # (B, T, 4, h, w)
    sigmas = batch["sigmas"].view(-1, 1, 1, 1, 1)
    keep = batch["keep"].view(-1, 1, 1, 1, 1)
    _, _, c_in, c_noise = scalings(sigmas)
    with torch.no_grad():  # as in the pipeline: the mode, not a sample, and without the scaling factor
        image_latents = vae.encode(batch["conditioning_image"]).latent_dist.mode()  # (B, 4, h, w)
    image_latents = image_latents[:, None].expand_as(latents) * keep

    noisy_latents = latents + sigmas * noise
    with follow_actions(unet, batch.get("actions"), batch.get("keep_actions")):
        model_pred = unet(
            torch.cat([noisy_latents * c_in, image_latents], dim=2).to(weight_dtype),
            c_noise.flatten(),
            encoder_hidden_states=(batch["image_embeddings"] * keep[:, 0, 0]).to(weight_dtype),
            added_time_ids=batch["added_time_ids"],
        ).sample

    errors = (model_pred.float() - v_target(latents, noise, sigmas)).square().mean((1, 2, 3, 4))  # (B,)
    losses = {name: (loss_weight(batch["sigmas"], name) * errors).mean() for name in ("v", "noise")}
    return losses[loss], {f"loss_{name}": value.detach() for name, value in losses.items()}
