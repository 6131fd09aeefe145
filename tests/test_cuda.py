"""The real scripts on pretended CUDA tensors: every device and dtype mistake of a GPU run shows on a CPU.

A few lines of C++ tell a CPU build of torch that there is one CUDA device with streams but no kernels; torch's own
FakeTensorMode does the rest: tensors that have a shape, a dtype and a device, and no data. The library must be loaded
before torch is, so a second process runs the scripts' main(); one serves all cases, since importing takes longest.
"""

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import traceback
import types
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SIZE, TINY, moving_square, write_clip

SHIM = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return getDevice(); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, 0)); }
  Stream getDefaultStream(Device d) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const { return true; }  // from torch 2.6 on, as the next
  bool isAvailable() const { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at { using CUDAHooks = ::Hooks; REGISTER_CUDA_HOOKS(CUDAHooks) }
"""
# What CUDA computes in one dtype only. (A CPU build cannot ask CUDA which attention it would take: see `attention`.)
PRODUCTS = "mm addmm bmm baddbmm convolution native_group_norm native_layer_norm".split()
PRODUCTS += ["_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"]
# torch's list of what raises on CUDA under use_deterministic_algorithms(True), as names of operations: fake tensors
# never reach the kernels that would.
NONDETERMINISTIC = re.compile(
    r"(adaptive_(avg|max)|avg|fractional_max)_pool[23]d_backward|max_unpool|upsample_(bi|tri)?(linear|cubic)\w*backward|"
    r"reflection_pad\dd_backward|nll_loss|ctc_loss|embedding_bag|put_$|histc|bincount|median|grid_sampler\w*backward|"
    r"cumsum|scatter_reduce"
)
card = types.SimpleNamespace(capability=(8, 9))  # of the pretended card; a case may change it

# ------------------------------------------------------------------------------------------------- the second process


def pretend(shim):
    """Replaces, before anything else is imported, what has to be: once, at the start of the second process."""
    assert "torch" not in sys.modules, "the shim must come before torch"
    libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for library in (libraries / "libc10.so", libraries / "libtorch_cpu.so", shim):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["HF_HUB_OFFLINE"] = "1"

    import safetensors.torch
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

    cuda, gib = torch.cuda, 2**30
    properties = types.SimpleNamespace(total_memory=24 * gib, name="pretended", major=8, minor=9)
    # what torch answers about the card, and what it is told to do
    answers = {"is_available": True, "is_bf16_supported": True, "device_count": 1, "current_device": 0}
    answers.update(get_device_properties=properties, get_device_name="pretended", mem_get_info=(23 * gib, 24 * gib))
    answers.update(dict.fromkeys(("memory_allocated", "max_memory_allocated"), 0))
    answers.update(dict.fromkeys(("memory_reserved", "max_memory_reserved"), 0))
    answers.update(dict.fromkeys(("set_device", "_lazy_init", "empty_cache", "reset_peak_memory_stats")))
    for name, answer in answers.items():
        setattr(cuda, name, lambda *a, _answer=answer, **k: _answer)
    cuda.get_device_capability = lambda device=None: card.capability
    cuda.synchronize = lambda device=None: watch.waits.append(f"synchronize {origin()}")
    torch.Tensor.pin_memory = lambda self, *a, **k: self
    FakeTensorMode.avoid_device_init = property(lambda self: True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def really(function):
        """`function` on real tensors: for what reads and writes files, and the scheduler's table of sigmas."""

        @functools.wraps(function)
        def call(*arguments, **options):
            with _disable_current_modes():
                return function(*arguments, **options)

        return call

    def origin():
        """file:line of the innermost call that is neither torch's nor of this test."""
        frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
        return f"{frames[-1].filename}:{frames[-1].lineno}"

    def tensors(values):
        lists = (value if isinstance(value, (list, tuple)) else (value,) for value in values)
        return [t for values in lists for t in values if isinstance(t, torch.Tensor)]

    class Watch(TorchDispatchMode):
        """Writes down what makes the CPU wait for the GPU and what the CPU computes; refuses mixed dtypes."""

        waits, on_cpu, operations, passes = [], [], set(), []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.prim.device.default:  # .device of a fake tensor: most of all calls
                return function(*args)
            name, kwargs = function.name().split("::")[1].split(".")[0], kwargs or {}
            inputs = tensors([*args, *kwargs.values()])
            if name == "_local_scalar_dense" and isinstance(inputs[0], FakeTensor):
                if inputs[0].is_cuda:
                    self.waits.append(f"{name} {origin()}")
                if inputs[0].dtype == torch.bool:  # the scripts ask for faults, libraries for what is wanted
                    return Path(origin().rpartition(":")[0]).parent not in (ROOT, ROOT / "svd_parts")
                return 0.5 if inputs[0].is_floating_point() else -1
            if name in PRODUCTS:
                dtypes = {t.dtype for t in inputs}
                assert len(dtypes) == 1, f"{function} of {dtypes}"
                # A forecast computes on the CPU on purpose, in a mode of its own; so does the pipeline blur its image.
                if getattr(inputs[0], "fake_mode", None) is mode and inputs[0].is_cpu and inputs[0].shape[1:2] != (3,):
                    self.on_cpu.append(f"{name} {origin()}")
            if name.startswith(("_foreach_", "_fused_")) and name != "_foreach_copy_":  # fake tensors do not look
                devices = {t.device.type for t in inputs if t.ndim or name.startswith("_fused_")}
                assert len(devices) <= 1, f"{function} of {devices}"
            out = function(*args, **kwargs)
            devices = {t.device.type for t in [*inputs, *tensors([out])]}
            blocking = not (kwargs.get("non_blocking") or any(a is True for a in args[2:3]))
            if name in ("_to_copy", "copy_", "_foreach_copy_") and len(devices) == 2 and blocking:
                self.waits.append(f"{name} {origin()}")
            if "cuda" in devices:
                self.operations.add(name)
            return out

    watch = Watch()

    def attention(q, k, v, mask=None, p=0.0, causal=False, scale=None, **_):  # what CUDA would take
        if q.device.type != "cuda":
            return real_attention(q, k, v, mask, p, causal, scale=scale)
        if q.dtype != torch.float32 and q.shape[-1] <= 256 and mask is None and card.capability >= (8, 0):
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, p, causal, False, scale=scale)[0]
        grad = torch.is_grad_enabled()
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, grad, p, causal, scale=scale)[0]

    real_attention = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = attention

    def apply(self, function, recurse=True):  # torch would swap the tensors, which it cannot with fake ones
        for child in self.children():
            child._apply(function)
        for p in self._parameters.values():
            if p is not None:
                with torch.no_grad():
                    new = function(p)
                p.data, p.fake_device = new, new.device
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else function(buffer)
        return self

    torch.nn.Module._apply = apply

    def without_data(model):
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.nn.Parameter(mode.from_tensor(p.data), p.requires_grad)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else mode.from_tensor(buffer)
        return model

    def to_numpy(self, *arguments, **options):
        if not isinstance(self, FakeTensor):
            return real_numpy(self, *arguments, **options)
        assert self.device.type == "cpu", ".numpy() of a CUDA tensor"
        return np.full(tuple(self.shape), 0.5, str(self.dtype).split(".")[1])

    real_numpy, torch.Tensor.numpy = torch.Tensor.numpy, to_numpy

    class Opened:
        def __init__(self, *arguments, **options):
            self.file = real_open(*arguments, **options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def __getattr__(self, name):  # a slice would read when it is indexed
            return really(getattr(self.file, name.replace("get_slice", "get_tensor")))

    def save_file(tensors, *arguments, **options):
        with _disable_current_modes():
            zeros = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}
            return real_save(zeros, *arguments, **options)

    real_open, safetensors.safe_open = safetensors.safe_open, Opened
    real_save, safetensors.torch.save_file = safetensors.torch.save_file, save_file
    safetensors.torch.load_file = really(safetensors.torch.load_file)

    from diffusers import EulerDiscreteScheduler, ModelMixin, UNetSpatioTemporalConditionModel
    from transformers import PreTrainedModel

    for cls in (ModelMixin, PreTrainedModel):
        load = cls.from_pretrained.__func__
        cls.from_pretrained = classmethod(lambda cls, *a, _load=load, **k: without_data(really(_load)(cls, *a, **k)))
    EulerDiscreteScheduler.__init__ = really(EulerDiscreteScheduler.__init__)
    EulerDiscreteScheduler.index_for_timestep = lambda self, *arguments: 0
    real_set = EulerDiscreteScheduler.set_timesteps

    def set_timesteps(self, steps=None, device=None, **options):  # two steps show all that 25 do
        really(real_set)(self, min(steps, 2), device="cpu", **options)
        self.timesteps = self.timesteps.to(device)

    EulerDiscreteScheduler.set_timesteps = set_timesteps
    real_forward = UNetSpatioTemporalConditionModel.forward

    def forward(self, sample, *arguments, **options):  # the forecast calls it too, on the CPU
        if sample.device.type == "cuda":
            watch.passes.append((torch.is_grad_enabled(), len(watch.waits), torch.get_deterministic_debug_mode()))
        return real_forward(self, sample, *arguments, **options)

    UNetSpatioTemporalConditionModel.forward = forward
    card.modes = (mode, watch)

    class AdamW8bit(torch.optim.Optimizer):
        """The interface of bitsandbytes 0.50 without its kernels, which a pretended GPU cannot run. As there, step() is
        init_state where there is none, update_step, and a wait for the GPU after every tensor; the states' names, types
        and devices are the real ones, so a step that calls the parts is held to what it may call and must not wait."""

        def __init__(self, params, lr, weight_decay):
            super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

        def init_state(self, group, p, gindex, pindex):
            small, state = p.numel() < 4096, self.state[p]
            state["step"] = 0
            for i in "12":
                state[f"state{i}"] = torch.zeros_like(p, dtype=torch.float32 if small else torch.uint8)
                if not small:
                    state[f"qmap{i}"] = torch.zeros(256, device=p.device)
                    state[f"absmax{i}"] = torch.zeros(-(-p.numel() // 256), device=p.device)

        @torch.no_grad()
        def update_step(self, group, p, gindex, pindex):
            state = self.state[p]
            state["step"] += 1
            devices = {t.device.type for t in (p, p.grad, *state.values()) if torch.is_tensor(t)}
            assert devices == {"cuda"}, devices
            p.add_(p.grad)

        def step(self, closure=None):
            for gindex, group in enumerate(self.param_groups):
                for pindex, p in enumerate(group["params"]):
                    if p.grad is not None:
                        if not self.state[p]:
                            self.init_state(group, p, gindex, pindex)
                        self.update_step(group, p, gindex, pindex)
                        torch.cuda.synchronize()

    bitsandbytes = sys.modules["bitsandbytes"] = types.ModuleType("bitsandbytes")
    bitsandbytes.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    bitsandbytes.optim = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    bitsandbytes.nn = types.SimpleNamespace()  # peft looks for its layers there


def drive(script, arguments, capability):
    """Runs a script's main(); returns what the watch saw, and what the script printed."""
    import torch
    from accelerate.state import AcceleratorState

    signal.alarm(240)  # ends this process if a case hangs
    mode, watch = card.modes
    card.capability, printed = capability, io.StringIO()
    for seen in (watch.waits, watch.on_cpu, watch.operations, watch.passes):
        seen.clear()
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the case before
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), mode, watch:
            status = importlib.import_module(script).main([*map(str, arguments)])
    except (Exception, SystemExit):
        status = traceback.format_exc()
    finally:
        torch.use_deterministic_algorithms(False)
        signal.alarm(0)
    training = [waits for grad, waits, _ in watch.passes if grad]
    return types.SimpleNamespace(
        status=status, printed=printed.getvalue(), passes=len(training), on_cpu=watch.on_cpu[:10],
        waits=watch.waits[training[0] : training[-1]] if training else watch.waits, operations=set(watch.operations),
        debug_modes={debug_mode for *_, debug_mode in watch.passes},
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """Runs a script on the pretended GPU: gpu("train_svd", *arguments); fails where it does not end well."""
    import torch

    if torch.backends.cuda.is_built() or sys.platform != "linux" or not shutil.which("g++"):
        pytest.skip("needs Linux, g++ and a CPU build of torch")
    folder, include = tmp_path_factory.mktemp("shim"), Path(torch.__file__).parent / "include"
    (folder / "shim.cpp").write_text(SHIM)
    compiler = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "shim.cpp", "-o", "shim.so", f"-I{include}"]
    done = subprocess.run(compiler, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"torch {torch.__version__} has other hooks: {done.stderr[:500]}")

    def run(script, *arguments, capability=(8, 9)):
        done = pool.submit(drive, script, [*arguments, *SIZE], capability).result()
        assert done.status == 0, f"{done.printed[-2000:]}\n{done.status}"
        assert "validation failed" not in done.printed, done.printed[-3000:]
        assert not done.on_cpu, done.on_cpu
        return done

    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, pretend, (folder / "shim.so",)) as pool:
        yield run


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for name in ("clip0", "clip1", "held_out/clip2"):
        write_clip(root / name, moving_square(9))
        np.save(root / name / "actions.npy", np.random.default_rng(0).random((9, 3), np.float32))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model with two levels of its three, untrained: every kind of operation, and half as many."""
    from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel

    folder = tmp_path_factory.mktemp("model") / "svd"
    shutil.copytree(TINY, folder)
    for part, cls in (("unet", UNetSpatioTemporalConditionModel), ("vae", AutoencoderKLTemporalDecoder)):
        config = cls.load_config(TINY, subfolder=part)
        cls.from_config({k: v[::2] if isinstance(v, list) else v for k, v in config.items()}).save_pretrained(
            folder / part
        )
    return folder


TRAINING = {  # name: (flags, CUDA's capability, waits for the GPU that a step may have)
    "ema-full": (["--use_ema", "--gradient_checkpointing", "full", "--deterministic"], (8, 9), 0),
    "freed-early-uncached": (
        ["--max_grad_norm", 0, "--trainable", "all", "--no-cache_latents"],
        (8, 9),
        2,
    ),  # to CLIP and back
    "fp16-accumulation": (["--gradient_accumulation_steps", 2], (7, 5), 0),  # with a scaler, as on a T4
    "adamw8bit-actions": (["--optimizer", "adamw8bit", "--condition_on", "actions"], (8, 9), 0),
    "lora": (["--lora_rank", 4, "--gradient_checkpointing", "full"], (8, 9), 0),
}


@pytest.mark.parametrize("name", TRAINING)
def test_training(gpu, model, clips, tmp_path, name):
    flags, capability, waits = TRAINING[name]
    if name == "lora":
        pytest.importorskip("peft")
    run = ["train_svd", "--pretrained_model_name", model, "--dataset_dir", clips, "--output_dir", tmp_path / "out"]
    run += ["--logging_steps", 100, *flags]
    if name == "ema-full":  # one case is enough for validation and for going on
        first = gpu(*run, "--max_train_steps", 1, "--validation_dir", clips / "held_out", capability=capability)
        assert any((tmp_path / "out").rglob("*.mp4")), first.printed
        run += ["--resume_from_checkpoint", "latest"]
    done = gpu(*run, "--max_train_steps", 3 if name == "ema-full" else 2, capability=capability)
    assert done.passes == (4 if "accumulation" in name else 2)
    assert len(done.waits) <= waits, done.waits
    if "--deterministic" in flags:  # raises, for what has no deterministic form, and nothing here is of that kind
        assert done.debug_modes == {2} and not list(filter(NONDETERMINISTIC.match, done.operations | first.operations))


@pytest.mark.parametrize("flags", [["--num_segments", 2], ["--low_vram"]], ids=["whole", "low_vram"])
def test_generating(gpu, model, clips, tmp_path, flags):
    run = ["infer_svd", "--model_dir", model, "--input_image", clips / "clip0" / "00000.png"]
    gpu(*run, "--output_video", tmp_path / "clips", "--num_inference_steps", 2, *flags)
