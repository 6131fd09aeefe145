"""How much GPU memory there is, and what to do if it is not enough."""

import importlib.util
import os
import re
import warnings

from tqdm.auto import tqdm

from svd_parts.weights import size_multiple

LOW_VRAM_CHUNK = 4  # frames decoded at once: that takes as much memory as the UNet at 1024x576


def usable_memory(device, size=None):
    """GiB that a run may use, of `size` bytes or of what is free now."""
    import psutil
    import torch

    # No forecast sees CUDA's context and workspaces (0.6) and fragments: 5 %, and 12 % on Windows, where torch has no
    # expandable segments.
    is_cuda = device.type == "cuda"
    size = size or (torch.cuda.mem_get_info(device)[0] if is_cuda else psutil.virtual_memory().available)
    return size / 2**30 * (0.88 if is_cuda and os.name == "nt" else 0.95) - 0.6


def is_out_of_memory(error):
    """Whether the error says that the GPU's memory ran out; torch, cuBLAS and cuDNN use different words."""
    import torch

    words = "out of memory|CUBLAS_STATUS_ALLOC_FAILED|ALLOCATION_FAILED|unable to find an engine"
    told = isinstance(error, RuntimeError) and re.search(words, str(error))
    return bool(told) or isinstance(error, torch.cuda.OutOfMemoryError)


def smaller_memory(settings, reason):
    """The settings in the next mode that needs less memory, or None. Prints the change, if there is a reason."""
    for low_vram, chunk in ((settings.low_vram, 8), (True, LOW_VRAM_CHUNK), (True, 1)):
        change = {"low_vram": low_vram, "decode_chunk_size": min(chunk, settings.decode_chunk_size)}
        change = {name: value for name, value in change.items() if getattr(settings, name) != value}
        if change:
            flags = " ".join(f"--{name}" + ("" if value is True else f" {value}") for name, value in change.items())
            if reason:
                tqdm.write(f"{reason}: going on with {flags}")
            return settings._replace(**change, fallback=reason)
    return None


def fit_memory(settings, folder):
    """Reduces the settings until the forecast fits the GPU's free memory, before anything is loaded."""
    import torch

    from svd_parts.forecast import forecast_clip

    available = usable_memory(torch.device("cuda"))
    while (needed := forecast_clip(folder, settings)[0]) > available:
        smaller = smaller_memory(settings, f"needs {needed:.1f} GiB, {available:.1f} GiB are free")
        if smaller is None:
            break  # the forecast may be wrong, so the run is tried
        settings = smaller
    return settings


def advice(options, folder, weight_dtype, available):
    """A sentence with changes of the command line that would fit, cheapest first. Each adds to the one before."""
    from svd_parts.forecast import forecast

    multiple, fitting, flags = size_multiple(folder), [], []
    batch = options.train_batch_size * options.gradient_accumulation_steps
    smaller = {s: max(multiple, int(getattr(options, s) * 0.7) // multiple * multiple) for s in ("width", "height")}
    for change in (
        {"gradient_checkpointing": "full"},
        {"train_batch_size": 1, "gradient_accumulation_steps": batch},
        {"optimizer": "adamw8bit", "max_grad_norm": 0},
        {"lora_rank": 32, "lora_alpha": 32.0} if importlib.util.find_spec("peft") and not options.lora_rank else {},
        {"num_frames": min(14, options.num_frames)},
        smaller,
    ):
        change = {name: value for name, value in change.items() if getattr(options, name) != value}
        if not change:
            continue
        options = options._replace(**change)
        flags += [f"--{name} {value}" for name, value in change.items()]
        needed = forecast(options, folder, "full", weight_dtype)["peak_memory_gib"]
        if needed <= available:
            fitting.append(f"{' '.join(flags)} ({needed:.1f} GiB)")
    found = "; or ".join(fitting) or "nothing that the options can change; use a larger card"
    return f"What would fit, cheapest first: {found}"


def why_no_cuda():
    """A text that says why torch finds no CUDA GPU, and what to do."""
    import torch

    with warnings.catch_warnings(record=True) as caught:  # torch warns if the driver is too old
        warnings.simplefilter("always")
        torch.cuda.is_available()
    if any("driver" in str(warning.message) for warning in caught):
        return "the NVIDIA driver is too old for this torch: update the driver, or install a torch for an older CUDA"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA: install one with CUDA, see pytorch.org"
    return "no NVIDIA GPU or driver found: check whether nvidia-smi lists one"
