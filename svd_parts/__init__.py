"""The parts of the three scripts, one job each. docs/code.md is the map.

This file only sets variables that cv2, torch and transformers read when they are imported. What the user has set stays.
"""

import os

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # decoders print nothing
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # a picture that cannot be read gets a line of ours
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin while they wait make a busy CPU 10 times slower
if "PYTORCH_ALLOC_CONF" not in os.environ:  # the new name of the variable below
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # fewer gaps: 14.5 GiB, not 14.9
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # or "should be kept in float32: []" with every clip
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # or it misses torchvision, which SVD does not use
