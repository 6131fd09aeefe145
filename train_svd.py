r"""Fine-tunes Stable Video Diffusion on a folder of clips, on one GPU.

    python train_svd.py --pretrained_model_name stabilityai/stable-video-diffusion-img2vid-xt \
        --dataset_dir ./dataset --output_dir ./outputs --train_batch_size 1 --max_train_steps 5000 \
        --learning_rate 1e-5 --num_frames 25 --width 512 --height 320

To resume a stopped run, repeat the command with --resume_from_checkpoint latest. A finished run leaves a standard
diffusers pipeline in --output_dir, for infer_svd.py or StableVideoDiffusionPipeline.from_pretrained.

This file has the options, the checks of them, `train` (one run) and `run_steps` (the loop). In svd_parts/ lie the loss
(objective.py), the samples of a step (samples.py), the choice of layers (unet.py) and the update (state.py).
"""

import argparse
import contextlib
import importlib.util
import os
import platform
import shlex
import statistics
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

from svd_parts.checkpoints import checkpoints_of
from svd_parts.console import Parser, check_launcher, number, run_script
from svd_parts.dataset import DEFAULT_BUCKET, DEFAULT_FPS
from svd_parts.files import UserError, counted, frozen, listed, lock_file, pattern_names, printable, read_patterns, tidy
from svd_parts.metrics import METRICS
from svd_parts.optimizers import OPTIMIZERS
from svd_parts.unet import DTYPES, RECOMPUTED, TRAINABLE, trained_layers
from svd_parts.weights import PARTS, SETTINGS, encoders_fingerprint, read_settings, trained_marks, weights_fingerprint

SCHEDULES = "linear cosine cosine_with_restarts polynomial constant constant_with_warmup".split()  # diffusers' names


def build_parser():
    parser = Parser(description=__doc__, advice={"--prompt": "SVD takes no text"})
    positive, at_least_zero = number(int, 1), number(float, 0)
    add = parser.add_argument_group("model and data").add_argument
    add("--pretrained_model_name", required=True, help="model to start from: a hub name or a local diffusers folder")
    add("--base_model_name", metavar="OWNER/NAME", help="the hub name of a local model, for the model card")
    add("--dataset_dir", required=True, help="folder of clip folders, made by prepare_dataset.py")
    add("--output_dir", required=True, help="folder for the checkpoints and the fine-tuned pipeline")
    add("--push_to_hub", metavar="OWNER/NAME", help="upload the result to this repository; a new one is private")
    several = {"nargs": "+", "action": "extend", "default": [], "metavar": "CLIP"}
    names = "names, 'patterns*', or @FILE for a text file of names, such as a page's kept.txt"
    add("--include", **several, help=f"train on these clips alone: {names}")
    add("--exclude", **several, help="leave these clips out")
    add("--num_frames", type=number(int, 2), default=25, help="frames in a training window (default 25)")
    add("--width", type=positive, default=512, help="pixels, a multiple of 64 for SVD (default 512)")
    add("--height", type=positive, default=320, help="pixels, a multiple of 64 for SVD (default 320)")
    add("--fps", type=at_least_zero, default=DEFAULT_FPS, help="fps of clips without metadata.jsonl (default 7)")
    bucket, switch = number(float, 0, 255), argparse.BooleanOptionalAction
    add("--motion_bucket_id", type=bucket, default=DEFAULT_BUCKET, help="motion of such clips (default 127)")
    add("--cache_latents", action=switch, default=True, help="encode every frame only once (default)")
    add("--cache_dir", help="folder for the encoded frames (default: DATASET_DIR/.cache)")
    add("--dataloader_num_workers", type=positive, default=4, help="threads that load samples (default 4)")

    add = parser.add_argument_group("training").add_argument
    add("--train_batch_size", type=positive, default=1, help="clips in a batch on each GPU (default 1)")
    add("--gradient_accumulation_steps", type=positive, default=1, help="batches in one optimizer step (default 1)")
    add("--max_train_steps", type=positive, default=5000, help="optimizer steps (default 5000)")
    add("--learning_rate", type=at_least_zero, help="peak of the schedule (default 1e-5; 1e-4 for a LoRA)")
    add("--lr_scheduler", choices=SCHEDULES, default="constant", help="learning-rate schedule (default constant)")
    add("--lr_warmup_steps", type=int, default=0, help="optimizer steps of linear warm-up (default 0)")
    clipping = "clip gradients to this norm; 0: no clipping, and gradients freed early (default 1; 0 with adamw8bit)"
    add("--max_grad_norm", type=at_least_zero, help=clipping)
    add("--optimizer", choices=list(OPTIMIZERS), default="adamw", help="adamw8bit needs bitsandbytes (default adamw)")
    add("--adam_weight_decay", type=at_least_zero, default=1e-2, help="AdamW's decoupled decay (default 0.01)")
    add("--trainable", choices=list(TRAINABLE), default="temporal", help="UNet layers to train (default temporal)")
    lora = "train only a LoRA of this rank, in the linear layers of the transformer blocks; needs peft"
    add("--lora_rank", type=positive, default=0, metavar="N", help=lora)
    add("--lora_alpha", type=at_least_zero, help="the LoRA's strength is alpha / rank (default: the rank)")
    merged = "save OUTPUT_DIR/lora and also the whole pipeline with the LoRA merged in (default)"
    add("--save_merged", action=switch, default=True, help=merged)
    add("--loss", choices=["v", "noise"], default="v", help="v: SVD's weighting; noise: plain noise MSE (default v)")
    add("--P_mean", type=number(float, -20, 20), default=0.7, help="mean of ln sigma (default 0.7; 1.0 favours motion)")
    add("--P_std", type=number(float, 0, 10), default=1.6, help="standard deviation of ln sigma (default 1.6)")
    dropped = "share of samples trained without their image; guidance needs some (default 0.1)"
    add("--conditioning_dropout_prob", type=number(float, 0, 1), default=0.1, help=dropped)
    acts = "learn to follow the actions.npy of each clip; infer_svd.py --actions then steers the model"
    add("--condition_on", choices=["actions"], help=acts)
    dropped = "share of samples trained without their actions, so that the model also works without (default 0.1)"
    add("--action_dropout_prob", type=at_least_zero, help=dropped)
    add("--action_learning_rate", type=at_least_zero, help="of the actions' encoder, which begins at 0 (default 1e-3)")
    add("--use_ema", action="store_true", help="keep a running average of the trained weights and save that")
    add("--ema_decay", type=at_least_zero, default=0.9999, help="the average's decay, after warm-up (default 0.9999)")
    add("--seed", type=int, default=0, help="all random numbers depend on the seed and the step alone (default 0)")

    add = parser.add_argument_group("memory and speed").add_argument
    add("--mixed_precision", choices=list(DTYPES), help="default bf16; fp16 on cards without bf16; no on a CPU")
    recompute = "which activations to recompute to save memory; auto: the fastest choice that fits (default auto)"
    modes = [*RECOMPUTED, "auto"]
    add("--gradient_checkpointing", nargs="?", const="full", default="auto", choices=modes, help=recompute)
    add("--deterministic", action="store_true", help="same bits in every run: slower kernels, one CPU thread")
    add("--compile", action="store_true", help="torch.compile the blocks: slow to start, faster to run on a GPU")
    add("--dry_run", action="store_true", help="print what the run needs and whether it fits; needs no weights")

    add = parser.add_argument_group("validation").add_argument
    add("--validation_dir", help="prepared folder of held-out clips")
    held_out = "clips of the dataset to hold out, in whole episodes (default 0); with --validation_dir: the most to use"
    add("--num_validation_videos", type=number(int, 0), default=0, help=held_out)
    add("--validation_steps", type=positive, default=500, help="steps between two validations (default 500)")
    denoising = "denoising steps of a validation's clips: fewer are faster and blurred (default 25)"
    add("--validation_inference_steps", type=positive, default=25, help=denoising)
    metrics = [name for name, metric in METRICS.items() if metric.picks_best]
    best = "OUTPUT_DIR/best keeps the step with the best score of this metric (default psnr_moving)"
    add("--validation_metric", default="psnr_moving", choices=metrics, help=best)

    add = parser.add_argument_group("checkpoints and logs").add_argument
    add("--checkpointing_steps", type=positive, default=500, help="steps between two checkpoints (default 500)")
    add("--checkpoints_total_limit", type=positive, default=2, help="how many checkpoints to keep (default 2)")
    resume = "go on from a checkpoint of this run: latest, checkpoint-N, or its folder"
    add("--resume_from_checkpoint", metavar="latest|FOLDER", help=resume)
    add("--logging_steps", type=positive, default=10, help="steps between two lines in metrics.jsonl (default 10)")
    add("--report_to", choices=["tensorboard", "wandb"], help="log there as well; the package must be installed")
    return parser


def parse_args(argv=None):
    """Parses the command line and refuses every mistake that it alone shows, before torch is loaded.

    Returns the options as a named tuple. `fit_to_device` fills in the precision, which depends on the GPU.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    check_launcher()
    for name, is_right, wanted in (
        ("fps", 0 < args.fps <= 240, "over 0 and at most 240"),
        ("action_dropout_prob", (args.action_dropout_prob or 0) <= 1, "0..1"),
        ("lr_warmup_steps", 0 <= args.lr_warmup_steps <= args.max_train_steps, f"0..{args.max_train_steps}"),
        ("ema_decay", args.ema_decay < 1, "under 1"),
        ("lora_alpha", args.lora_alpha != 0, "over 0, as it is the LoRA's strength"),
    ):
        if not is_right:
            parser.error(f"--{name} must be {wanted}, got {getattr(args, name)}")
    if (args.validation_dir or args.num_validation_videos) and not args.cache_latents:
        parser.error("validation reads the latent cache: leave out --no-cache_latents")
    for option, default in (("action_dropout_prob", 0.1), ("action_learning_rate", 1e-3)):
        if getattr(args, option) is not None and not args.condition_on:
            parser.error(f"--{option} needs --condition_on actions: give that too")
        if getattr(args, option) is None:
            setattr(args, option, default)
    if args.lr_warmup_steps and args.lr_scheduler == "constant":
        args.lr_scheduler = "constant_with_warmup"  # diffusers' `constant` would ignore the warm-up
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if args.lora_rank else 1e-5
    if not args.lora_rank and (args.lora_alpha is not None or not args.save_merged):
        parser.error("--lora_alpha and --no-save_merged are for a LoRA: give --lora_rank too")
    if args.lora_alpha is None:
        args.lora_alpha = float(args.lora_rank)
    if args.lora_rank and importlib.util.find_spec("peft") is None:
        parser.error("--lora_rank needs: pip install peft")
    if args.lr_scheduler == "polynomial" and args.learning_rate <= 1e-7:
        parser.error(f"--learning_rate must be over 1e-7, where polynomial ends, got {args.learning_rate}")
    if args.max_grad_norm is None:
        args.max_grad_norm = OPTIMIZERS[args.optimizer].max_grad_norm
    args.include, args.exclude = (read_patterns(getattr(args, n), f"--{n}") for n in ("include", "exclude"))
    if args.dry_run:  # a plan needs no package, no login and no output folder
        return frozen(args)
    needed = {"--optimizer": OPTIMIZERS[args.optimizer].package, "--report_to": args.report_to}
    for flag, module in needed.items():
        if module and importlib.util.find_spec(module) is None:
            parser.error(f"{flag} needs: pip install {module}")
    if args.base_model_name or args.push_to_hub:
        check_hub_names(parser, args)
    check_output_dir(frozen(args))
    return frozen(args)


def check_hub_names(parser, args):
    """Refuses names that the hub would not take, and an upload that could not succeed."""
    import huggingface_hub

    from svd_parts.hub import is_hub_name, is_token_valid

    for flag in ("base_model_name", "push_to_hub"):
        if getattr(args, flag) and not is_hub_name(getattr(args, flag)):
            parser.error(f"--{flag} must have the form OWNER/NAME, got {getattr(args, flag)}")
    if args.push_to_hub and not is_token_valid():
        parser.error("--push_to_hub needs a token that may write: run `hf auth login`, or set HF_TOKEN")
    if args.push_to_hub and huggingface_hub.constants.HF_HUB_OFFLINE:
        parser.error("--push_to_hub cannot upload while HF_HUB_OFFLINE is set; unset it")


def fit_to_device(options):
    """The options with the precision filled in. Raises `UserError` if an option needs a CUDA GPU and there is none."""
    import torch

    cuda = torch.cuda.is_available()
    if options.mixed_precision is None:
        without_bf16 = cuda and torch.cuda.get_device_capability() < (8, 0)
        precision = "fp16" if without_bf16 else "bf16" if cuda or options.dry_run else "no"
        options = options._replace(mixed_precision=precision)
    if OPTIMIZERS[options.optimizer].needs_cuda and not cuda and not options.dry_run:
        raise UserError(f"--optimizer {options.optimizer} needs a CUDA GPU; leave it out on the CPU")
    if options.mixed_precision == "fp16" and not cuda and not options.dry_run:
        raise UserError("--mixed_precision fp16 needs a CUDA GPU; on the CPU use no or bf16")
    return options


def check_output_dir(options):
    """Refuses an output folder in which this run would write over another run, a dataset or other files."""
    output = Path(options.output_dir)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output_dir {output}: there is a file of that name; give another folder")
    datasets = [Path(folder).resolve() for folder in (options.dataset_dir, options.validation_dir) if folder]
    if output.resolve() in datasets:
        raise UserError(f"--output_dir {output} is the dataset's folder; give another")
    if printable(output.resolve()) != str(output.resolve()):
        raise UserError(f"--output_dir {output}: its path is not UTF-8, which safetensors needs; give another")
    if options.validation_dir and datasets[:1] == datasets[1:]:
        cure = "give other clips, or hold some of these out with --num_validation_videos"
        raise UserError(f"--validation_dir {options.validation_dir} is also the --dataset_dir; {cure}")
    run = checkpoints_of(output) or (output / "metrics.jsonl").is_file()
    ours = ("model_index.json", SETTINGS, "README.md", "metrics.jsonl", "validation", "best", "lora", "actions")
    there = [name for name in (*ours, *PARTS) if (output / name).exists()]
    if there and not run:
        raise UserError(f"--output_dir {output} holds {there[0]}, but no run of this script; give another")
    if run and not options.resume_from_checkpoint:
        raise UserError(f"--output_dir {output} already holds a run; give another, or --resume_from_checkpoint latest")


def describe_run(options, base, clips, held_out, before, earlier, num_processes):
    """The settings that are saved with every checkpoint and with the result.

    before: the settings in the checkpoint that the run resumes; their training and held-out clips stay listed.
    earlier: the settings of the training that made the base, or {}.
    """
    from svd_parts.hub import find_base_name

    name, local = options.pretrained_model_name, Path(options.pretrained_model_name).is_dir()
    fps, buckets = ([clip[key] for clip in clips] for key in ("fps", "motion_bucket_id"))
    now, kept_out = trained_on(clips), {clip["directory"]: clip.get("digest") for clip in held_out}
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "diffusers")}}
    return {
        **options._asdict(),
        "include": pattern_names(options.include),
        "exclude": pattern_names(options.exclude),
        "global_batch_size": options.train_batch_size * options.gradient_accumulation_steps * num_processes,
        "pretrained_model_name": str(base.resolve()) if local else name,
        "base_model_name": find_base_name(options, base),
        "base_fingerprint": weights_fingerprint(base, "unet"),
        "encoders_fingerprint": encoders_fingerprint(base),
        "trained_on": {**before.get("trained_on", {}), **now["trained_on"]},
        "held_out": {**(known_held_out(before) if not options.validation_dir else {}), **kept_out},
        "marks": {**trained_marks(earlier), **before.get("marks", {}), **now["marks"]},
        "num_clips": len(clips),
        "median_fps": statistics.median(fps),
        "median_motion_bucket_id": round(statistics.median(buckets)),  # infer_svd.py takes whole numbers
        "motion_bucket_id_range": [min(buckets), max(buckets)],
        "versions": versions,
    }


def trained_on(clips):
    """{trained_on: {name: digest}, marks: {recording: name}}: what tells these clips, wherever they are prepared."""
    recordings = {clip["recording"]: clip["directory"] for clip in clips if isinstance(clip.get("recording"), str)}
    return {"trained_on": {clip["directory"]: clip.get("digest") for clip in clips}, "marks": recordings}


def warn_of_remembered(held_out, training, who):
    """Warns of held-out clips that a training used, by its settings. who: as in `this run trains on`."""
    from svd_parts.judging import find_trained_on

    if seen := find_trained_on({clip["directory"]: clip for clip in held_out}, [training]):
        what = f"{len(seen)} of the {counted(len(held_out), 'held-out clip')} ({listed(sorted(seen))})"
        print(f"warning: {who} {what}; their scores show how well it remembers")


def known_held_out(before):
    """{directory: digest} of the dataset's clips that the run with the settings `before` held out."""
    return {} if before["validation_dir"] else before["held_out"]


def main(argv=None):
    options = parse_args(argv)  # answers --help and mistakes before torch is loaded, which takes seconds
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # the first of several processes says it for all
    import cv2
    import torch

    from svd_parts.memory import advice, is_out_of_memory, usable_memory
    from svd_parts.plan import print_training_plan
    from svd_parts.unet import compute_dtype
    from svd_parts.weights import resolve_model

    options = fit_to_device(options)
    cv2.setNumThreads(0)  # the loader's own threads are enough
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # torch does not see `take_step`
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)  # the order of sums must not depend on the number of cores
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.dry_run:
        return print_training_plan(options, device)
    try:
        return train(options, device)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        available = usable_memory(device, torch.cuda.get_device_properties(device).total_memory)
        folder = resolve_model(options.pretrained_model_name)
        advised = advice(options, folder, compute_dtype(options.mixed_precision), available)
        raise UserError(f"not enough GPU memory ({str(error).splitlines()[0]}). {advised}") from None


def train(options, device):
    """Runs the training, from step 0 or from a checkpoint, and saves the result. Returns the exit status.

    Everything that can be refused is refused before any weight is loaded.
    """
    from svd_parts.actions import prepare_actions
    from svd_parts.checkpoints import check_resume, find_checkpoint, put_aside_newer, put_aside_other_run
    from svd_parts.dataset import warn_of_crop
    from svd_parts.hub import push_to_hub
    from svd_parts.latent_cache import load_frozen
    from svd_parts.log import start_trackers
    from svd_parts.memory import why_no_cuda
    from svd_parts.plan import warn_of_disk
    from svd_parts.processes import build_accelerator, end_processes
    from svd_parts.result import save_result
    from svd_parts.samples import ClipDataset, leave_out
    from svd_parts.state import TrainingState
    from svd_parts.validation import Validation
    from svd_parts.weights import check_sizes, resolve_model, size_multiple

    base = resolve_model(options.pretrained_model_name)
    check_sizes(options, base)
    folder, saved = find_checkpoint(options)
    before = saved["settings"] if saved else {"validation_dir": None, "held_out": {}}
    chosen = choose_clips(options, known_held_out(before) if saved else None)
    clips, held_out = leave_out(chosen, options.exclude)
    warn_of_crop([*clips, *held_out], options.width, options.height, size_multiple(base))
    accelerator = build_accelerator(options, device)
    earlier = read_settings(base / SETTINGS, "copy the folder again") if (base / SETTINGS).is_file() else {}
    warn_of_remembered(held_out, earlier, f"{options.pretrained_model_name} was trained on")
    settings = describe_run(options, base, clips, chosen[1], before, earlier, accelerator.num_processes)
    warn_of_remembered(held_out, trained_on(clips), "this run trains on")
    settings |= prepare_actions(options.condition_on, clips, held_out, before.get("actions"), base)
    frames = {clip["directory"]: clip_fingerprint(clip) for clip in clips}
    if saved:
        check_resume(settings, frames, saved, folder)
    with lock_output(options, accelerator):
        if device.type == "cpu":
            accelerator.print(f"no CUDA GPU: {why_no_cuda()}. A CPU trains only tiny models in reasonable time.")
        if options.resume_from_checkpoint and accelerator.is_main_process:
            put_aside_newer(options, folder, saved["step"] if saved else 0)
        start_trackers(options, accelerator, saved["step"] if saved else 0)
        encoders, everything = settings["encoders_fingerprint"], [*clips, *held_out]
        pipe, vae, decoder = load_frozen(everything, options, base, encoders, accelerator)
        dataset = ClipDataset(clips, options, vae.config, cached=not pipe)
        unet, checkpointing = load_unet(options, base, accelerator.device, settings.get("actions"))
        vae.to(accelerator.device)
        state = TrainingState(unet, options, accelerator, settings, frames)
        if saved:
            state.load(folder, saved)
        if accelerator.is_main_process:
            put_aside_other_run(state)
            state.prune()
            warn_of_disk(state, base)
        scored = held_out if accelerator.is_main_process else []
        validation = Validation(options, base, scored, vae, decoder) if scored else None
        accelerator.print(describe_start(state, clips, held_out, checkpointing))
        if saved:
            accelerator.print(describe_resumed(folder, state))
        with saved_on_error(state):
            status = run_steps(state, dataset, pipe, vae, validation)
        if not status and accelerator.is_main_process:
            save_result(state, base)
            print_next(options, settings)
        end_processes(state)
        if options.push_to_hub and not status and accelerator.is_main_process:
            push_to_hub(options)
        return status


def clip_fingerprint(clip):
    """A text that changes with the clip's frames, fps, motion or actions: a resumed run compares it."""
    actions = f" {clip['actions_digest']}" if "actions_digest" in clip else ""
    return f"{clip['digest']} {clip['fps']:g} {clip['motion_bucket_id']:g}{actions}"


def describe_start(state, clips, held_out, checkpointing):
    """One line that says what the run trains, on which clips, and how."""
    options, device = state.options, state.accelerator.device
    data = counted(len(clips), "clip") + (f" and {len(held_out)} held out" if held_out else "")
    steps = f"{counted(options.max_train_steps, 'step')}, batch {state.settings['global_batch_size']}"
    count = sum(p.numel() for p in state.trained.values()) / 1e6
    trained = f"{count:.1f} M parameters trained ({trained_layers(options)})"
    precision = "fp32" if options.mixed_precision == "no" else options.mixed_precision
    return f"{data}, {steps}; {trained}, {precision} on {device.type}, recomputed: {checkpointing}"


def describe_resumed(folder, state):
    """One line that says from which step a resumed run goes on."""
    last = state.options.max_train_steps
    if state.steps >= last:
        steps = counted(last, "step")
        return f"{folder} has all {steps} already: nothing is trained; a larger --max_train_steps trains on"
    return f"going on from {folder}: step {state.steps} of {last}"


def print_next(options, settings):
    """Prints where the result is, where to look at it, and the command that generates with it."""
    from svd_parts.checkpoints import read_best

    output, (best, _) = Path(options.output_dir), read_best(options.output_dir)
    kind = "a diffusers pipeline" if options.save_merged else "a LoRA"
    print(f"done: {output if options.save_merged else output / 'lora'} is {kind}; look at {output / 'index.html'}")
    if best is not None:
        print(f"best by {METRICS[options.validation_metric].title}: step {best}, in {output / 'best'}")
    model = ["--model_dir", str(output)]
    if not options.save_merged:
        model = ["--model_dir", options.pretrained_model_name, "--lora", str(output / "lora")]
    size = ["--width", str(options.width), "--height", str(options.height), "--num_frames", str(options.num_frames)]
    motion = ["--fps", f"{settings['median_fps']:g}", "--motion_bucket_id", f"{settings['median_motion_bucket_id']:g}"]
    actions = ["--actions", "ACTIONS.npy"] if options.condition_on else []
    command = shlex.join(["python", "infer_svd.py", *model, *size, *motion, *actions])
    print(f"next: {command} --input_image IMAGE.png --output_video CLIP.mp4")


def choose_clips(options, held_out_before):
    """(training clips, held-out clips). held_out_before: names that the resumed run held out; None for a new run."""
    from svd_parts.dataset import add_digests
    from svd_parts.files import is_named
    from svd_parts.samples import hold_out, load_clips, take_included

    defaults, folder = (options.num_frames, options.fps, options.motion_bucket_id), options.validation_dir
    clips, held_out = take_included(load_clips(options.dataset_dir, *defaults), options.include), []
    if folder and not Path(folder).is_dir():
        raise UserError(f"--validation_dir {folder}: no such folder; make it with prepare_dataset.py")
    if folder:
        held_out = load_clips(folder, *defaults)[: options.num_validation_videos or None]
    add_digests([clip for clip in [*clips, *held_out] if not is_named(options.exclude, clip["directory"])])
    if folder:
        return clips, held_out
    return hold_out(clips, options.num_validation_videos, options.seed, held_out_before)


def load_unet(options, base, device, actions=None):
    """(the UNet on the device, ready to train; its mode of --gradient_checkpointing). actions: `describe_actions`."""
    import torch

    import svd_common as common
    from svd_parts.action_encoder import add_encoder, load_action_encoder
    from svd_parts.actions import read_described
    from svd_parts.forecast import choose_checkpointing
    from svd_parts.lora import add_adapters
    from svd_parts.memory import usable_memory
    from svd_parts.objective import random_generator
    from svd_parts.shortcuts import compile_blocks
    from svd_parts.unet import compute_dtype, prepare_unet

    weight_dtype = compute_dtype(options.mixed_precision)
    mode = choose_checkpointing(options, base, weight_dtype, usable_memory(device))
    unet = common.load_part(base, "unet", torch.float32)
    if options.lora_rank:
        add_adapters(unet, options, random_generator(options.seed, "adapters"))
    if actions and actions == read_described(base):
        load_action_encoder(unet, {}, Path(base))
    elif actions:
        add_encoder(unet, actions["count"], random_generator(options.seed, "actions"))
    prepare_unet(unet, options.trainable, weight_dtype, mode)
    if options.compile:
        compile_blocks(unet)
    return unet.to(device), mode


def run_steps(state, dataset, pipe, vae, validation):
    """The training loop, from `state.steps` on; each pass is one optimizer step. Returns the exit status."""
    from svd_parts.latent_cache import add_latents
    from svd_parts.log import Log, is_validated
    from svd_parts.objective import training_loss
    from svd_parts.processes import StopSignal
    from svd_parts.samples import batches, index_batches, next_batches
    from svd_parts.unet import compute_dtype

    options, accelerator, weight_dtype = state.options, state.accelerator, compute_dtype(state.options.mixed_precision)
    loader = batches(dataset, index_batches(state), accelerator.device.type == "cuda", options.dataloader_num_workers)
    stop, log, first = StopSignal(accelerator), Log(state), state.steps
    has_validation = bool(options.validation_dir or options.num_validation_videos)  # the same on all processes
    if validation and is_validated(options, first) and not log.has_scores(first):  # the base, or a killed validation
        validation(state, log, stop)
    for step in range(first, options.max_train_steps):
        with log.waiting():
            micro_batches, failure = next_batches(loader, options.gradient_accumulation_steps)
        received = stop.requested(failure)
        # At least one step before a stop, so that a run that is stopped again and again still makes progress.
        if failure or received < 0 or (received and state.steps > first):
            return end_early(state, received, failure)
        for micro, batch in enumerate(micro_batches):
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
            if pipe:
                batch = add_latents(batch, pipe, options, accelerator.device)
            with state.synchronized(last=micro == len(micro_batches) - 1):
                loss, losses = training_loss(state.unet, vae, batch, weight_dtype, options.loss)
                state.backward(loss / len(micro_batches))
            log.add(losses)

        done = step + 1
        ended = done == options.max_train_steps
        saving = ended or done % options.checkpointing_steps == 0
        validating = has_validation and is_validated(options, done)
        logging = ended or saving or validating or done % options.logging_steps == 0
        if not state.update(check=logging):
            raise UserError(describe_bad_step(state, dataset))
        log.step_done(done, write=logging)
        if saving and accelerator.is_main_process:
            state.save()
        if validating and validation:
            validation(state, log, stop)
    log.progress.close()
    accelerator.wait_for_everyone()
    return 0


def end_early(state, received, failure):
    """Saves and says how to go on, after the signal `received` or a failure to read data (-1: in another process)."""
    accelerator = state.accelerator
    if accelerator.is_main_process:
        state.save()
    accelerator.wait_for_everyone()  # once one process has ended, the launcher ends the others
    if failure:
        raise UserError(f"{failure} --resume_from_checkpoint latest") from failure
    accelerator.print(f"\nstopped after step {state.steps}, saved; go on with --resume_from_checkpoint latest")
    return 128 + received if received > 0 else 1


def describe_bad_step(state, dataset):
    """The message for a step whose loss or gradient was not finite; names the clips of that step."""
    if state.overflows():
        return "fp16 gradients overflow at every step; use --mixed_precision bf16 or a lower --learning_rate"
    total = state.settings["global_batch_size"]
    indices = range(state.steps * total, (state.steps + 1) * total)
    names = sorted({dataset.clip_of(index)["directory"] for index in indices})
    reached = "some weights may have been changed" if state.freed_early else "it did not reach the weights"
    what = f"step {state.steps + 1}: the loss or a gradient is not finite; {reached}"
    cure = "Look at these clips, or try a lower --learning_rate, or --mixed_precision bf16"
    return f"{what}. Its clips: {', '.join(names)}. {cure}"


@contextlib.contextmanager
def saved_on_error(state):
    """Saves the finished steps when an error ends the run: a full disk, a bad clip, too little GPU memory, a bug.

    Any process that fails saves, since the others may wait for it until they are killed.
    """
    try:
        yield
    except Exception:
        if state.consistent and state.steps:
            with contextlib.suppress(OSError, RuntimeError):  # show the first error, not one of saving
                state.save()
                print(f"\nsaved: the {counted(state.steps, 'step')} before this error", file=sys.stderr)
        raise


@contextlib.contextmanager
def lock_output(options, accelerator):
    """Makes and locks --output_dir, so that a second run there is refused; tidies what a killed run left in it."""
    output = Path(options.output_dir)
    if not accelerator.is_main_process:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    with lock_file(output / ".lock", f"--output_dir {output}: another run is at work on it"):
        check_output_dir(options)  # again: another run may have begun and ended since the first check
        for left in [*output.glob(".checkpoint-*.*"), *output.glob(".best.*")]:
            if left.suffix == ".old" and not (whole := output / left.name.split(".")[1]).exists():
                os.replace(left, whole)  # the run was killed before the new folder took the old one's place
            else:
                tidy([left])
        tidy(filter(Path.is_file, output.glob(".*.part")))
        yield


if __name__ == "__main__":
    run_script(main)
