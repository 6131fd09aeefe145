"""The rooms that the three scripts lean on, one job each. docs/code.md is the map.

This file sets only what cv2, torch and transformers read once, when they are imported. What the user has set stays.
"""

import os

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # no decoder chatter
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait: 10 times slower on a busy CPU
if "PYTORCH_ALLOC_CONF" not in os.environ:  # its new name
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # fewer fragments: 14.5 GiB, not 14.9
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # else: "should be kept in float32: []", several times a clip
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else: torchvision is missing, which SVD does not use
