"""objective.py: its maths against independent references."""

import torch

from svd_parts.objective import loss_weight, sample_sigmas, scalings, v_target


def test_v_target_equals_weighted_denoising_loss():
    generator = torch.Generator().manual_seed(0)
    latents, noise, output = (torch.randn(64, 2, 4, 3, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    sigmas = torch.logspace(-3, 3, 64, dtype=torch.float64)[:, None, None, None, None]
    x = latents + sigmas * noise
    denoised = x / (sigmas**2 + 1) - sigmas / (sigmas**2 + 1).sqrt() * output  # GM denoiser_scaling.py, written out
    reference = (sigmas**2 + 1) / sigmas**2 * (denoised - latents) ** 2  # with GM's VWeighting
    assert torch.allclose((output - v_target(latents, noise, sigmas)) ** 2, reference, rtol=1e-9, atol=1e-12)
    c_skip, c_out, c_in, c_noise = scalings(sigmas)
    assert torch.allclose(c_skip * x + c_out * output, denoised, rtol=1e-12)
    assert torch.allclose(c_noise, sigmas.log() / 4)
    many = [torch.randn(64, 20_000, dtype=torch.float64, generator=generator) for _ in range(2)]  # of variance 1
    variance = (c_in.view(-1, 1) * (many[0] + sigmas.view(-1, 1) * many[1])).var(dim=1)
    assert (variance - 1).abs().max() < 0.05


def test_noise_loss_is_the_error_of_the_predicted_noise():
    generator = torch.Generator().manual_seed(1)
    latents, noise, output = (torch.randn(8, 2, 4, 3, 3, dtype=torch.float64, generator=generator) for _ in range(3))
    sigmas = torch.logspace(-2, 2, 8, dtype=torch.float64)[:, None, None, None, None]
    c_skip, c_out, _, _ = scalings(sigmas)
    x = latents + sigmas * noise
    predicted_noise = (x - (c_skip * x + c_out * output)) / sigmas
    error = (output - v_target(latents, noise, sigmas)) ** 2 * loss_weight(sigmas, "noise")
    assert torch.allclose(error, (predicted_noise - noise) ** 2, rtol=1e-7)


def test_sigmas_are_log_normal():
    sigmas = sample_sigmas(torch.randn(200_000, generator=torch.Generator().manual_seed(0)), 0.7, 1.6)
    assert abs(sigmas.log().mean() - 0.7) < 0.02 and abs(sigmas.log().std() - 1.6) < 0.02
