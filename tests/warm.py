"""Imported once by the server of conftest.py, from which every run of a script is forked: what each would do again."""

import gc
import importlib
from pathlib import Path

for name in (
    "accelerate cv2 diffusers.optimization diffusers.pipelines.stable_video_diffusion diffusers.training_utils"
    " torch._dynamo torch.utils.flop_counter transformers.models.clip"
).split():
    importlib.import_module(name)

from transformers import CLIPVisionModelWithProjection

# transformers makes some thousand regular expressions when it loads its first model
CLIPVisionModelWithProjection.from_pretrained(Path(__file__).parent / "tiny_svd" / "image_encoder")
gc.collect()
gc.freeze()  # the scripts collect garbage, and would look at all that was imported
