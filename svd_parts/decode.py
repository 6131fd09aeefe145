"""Frames out of a video file, by OpenCV or by ffmpeg."""

import contextlib
import ctypes
import dataclasses
import os
import queue
import re
import sys
import tempfile
import threading

import cv2
import numpy as np

import svd_common as common
from svd_parts.console import Guarded
from svd_parts.ffmpeg import check_exit, is_cut, picture_errors, run_ffmpeg, start_ffmpeg
from svd_parts.probe import HDR, MIDDLE


class DecodeAgain(Exception):
    """The frames of this attempt may be wrong. The next decoder, or a single thread, has to decode the video again."""


@dataclasses.dataclass
class Decoded:
    """What a reader has found so far."""

    frames: int = 0
    errors: list = dataclasses.field(default_factory=list)  # messages about damaged pictures
    notes: list = dataclasses.field(default_factory=list)
    said: str = ""  # ffmpeg's first error of any kind
    flaws: object = None  # `flaws.Flaws` of the frames


def read_opencv(video, probe, options, threads, decoded):
    """Yields (seconds, (H, W, 3) uint8 BGR) by OpenCV. Raises `DecodeAgain` at the first sign of wrong frames."""
    capture = cv2.VideoCapture(video.path, cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, threads])
    for time in probe.times:
        ok, frame = capture.read()
        if not ok or frame.shape != (*probe.size[::-1], 3):
            raise DecodeAgain("fewer frames than packets, or another size")
        if decoded.frames == 0 and not is_alike(frame, probe.middle):
            raise DecodeAgain("other colours or another crop than ffmpeg gives")
        if not frame[::16, ::16].any() and not frame.any():
            raise DecodeAgain("an all-black frame, as interlaced video gives")
        decoded.frames += 1
        yield time, frame
    if capture.grab():
        raise DecodeAgain("more frames than packets")


def is_alike(frame, middle):
    """Whether the middle of a frame, (H, W, 3) BGR, equals `Probe.middle` up to rounding."""
    width, height = (min(*sizes) for sizes in zip(MIDDLE, frame.shape[1::-1]))
    if len(middle) != 3 * width * height:
        return not middle
    top, left = (frame.shape[0] - height) // 2, (frame.shape[1] - width) // 2
    shown = frame[top : top + height, left : left + width, ::-1].astype(np.int16)
    return np.abs(shown - np.frombuffer(middle, np.uint8).reshape(shown.shape)).mean() < 3


@contextlib.contextmanager
def hear_opencv():
    """Gives a function that says how many bytes of errors the decoders of OpenCV, for all videos, have printed so far.

    That is the only sign of damage that they conceal. They print to the C library's standard output, which goes into a
    file until the block ends. Python's own prints go to the real one.
    """
    libc = ctypes.CDLL(None if os.name == "posix" else "ucrtbase")

    def heard():
        libc.fflush(None)
        return os.fstat(file.fileno()).st_size

    sys.stdout.flush()
    real = open(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors="backslashreplace")
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            with contextlib.redirect_stdout(Guarded(real)):
                yield heard
        finally:
            libc.fflush(None)
            os.dup2(real.fileno(), 1)
            with contextlib.suppress(OSError):  # nobody reads it any more
                real.close()


def find_damage(video, probe, options, threads):
    """Decodes the wanted frames once more, only to hear ffmpeg's messages about damaged pictures: [text], in order.

    With one thread these are always the same, because no line of showinfo can come between them.
    """
    first_only = options.max_frames and not options.fps and video.episodes is None
    output = [*(["-frames:v", str(options.max_frames)] if first_only else []), "-f", "null", "-"]
    return picture_errors(run_ffmpeg(video, ["-threads", str(threads)], output)[1], probe)


def video_filters(probe, options):
    """ffmpeg's filters: HDR to SDR, square pixels, --width x --height (cover, then crop the centre), RGB.

    Sizes are formulas of the frame's own size, because the size of a video may change midway.
    """
    filters = []
    if probe.transfer in HDR:
        matrix = probe.matrix if probe.matrix.startswith("bt2020") else "bt2020nc"
        filters.append("format=yuv444p12le|gbrp12le")  # zscale cannot halve an odd size
        filters.append(f"setparams=color_primaries=bt2020:color_trc={probe.transfer}:colorspace={matrix}")
        filters.append("zscale=t=linear:npl=100,format=gbrpf32le")
        filters.append("zscale=p=bt709,tonemap=hable:desat=0,zscale=t=bt709:m=bt709:r=tv,format=yuv444p")
    aspect = "if(between(sar,0.1,10),sar,1)"
    width, height = ("iw", f"ih/{aspect}") if probe.sideways else (f"iw*{aspect}", "ih")
    if options.width:
        scale = f"max({options.width}/({width}),{options.height}/({height}))"
        width, height = f"max({options.width},round({width}*{scale}))", f"max({options.height},round({height}*{scale}))"
        smaller = max(options.width / probe.size[0], options.height / probe.size[1]) < 1
        filters.append(f"scale='{width}':'{height}':flags={'area' if smaller else 'bicubic'}")
        if probe.pixel_format == "yuv420p" and smaller:  # cheaper and more exact than scaling to RGB in one step
            filters.append("format=yuv444p")
        filters.append(f"crop={options.width}:{options.height}")
    elif probe.pixel_aspect != 1:
        filters.append(f"scale='round({width})':'round({height})'")
    return ",".join([*filters, "setsar=1", "format=rgb24", "showinfo=checksum=0"])


def read_ffmpeg(video, probe, options, threads, decoded):
    """Yields (seconds, (H, W, 3) uint8 BGR) from a pipe of ffmpeg, which crops, turns and mirrors as the file says.

    If the size changes midway, later frames are fitted to the size of the first. If timestamps begin again, as in
    recordings joined into one file, they are shifted to follow the ones before.
    """
    output = ["-vf", video_filters(probe, options), *"-noautoscale -fps_mode passthrough -f rawvideo pipe:1".split()]
    process = start_ffmpeg(video, ["-threads", str(threads)], output)
    with contextlib.suppress(ImportError, AttributeError, OSError):  # a larger pipe, where the system has that
        import fcntl

        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 1 << 20)
    announced = queue.Queue()  # (seconds or NOPTS, width, height) of each frame that will come, then None

    log_is_cut = False  # so messages may be missing

    def read_log():
        nonlocal log_is_cut
        stamp = "NOPTS"
        for line in process.stderr:  # a decoder's message may cut a line of showinfo in two
            line = line.decode("utf-8", "replace").rstrip()
            if match := re.search(r"\bpts_time:(\S+)", line):
                stamp = match[1]
            if match := re.search(r"\bs:(\d+)x(\d+) i:", line):
                announced.put((stamp, int(match[1]), int(match[2])))
            decoded.errors.extend(picture_errors([line], probe))
            log_is_cut |= is_cut(line)
            decoded.said = decoded.said or line.partition("[error] ")[2]
        announced.put(None)

    threading.Thread(target=read_log, daemon=True).start()
    step, size, begin, last, shift, joined = 1 / (probe.fps or 25), None, None, -1, 0, False
    try:
        while (coming := announced.get()) is not None:
            stamp, *own_size = coming
            frame = np.empty((*own_size[::-1], 3), np.uint8)
            view = memoryview(frame).cast("B")
            while view and (count := process.stdout.readinto(view)):
                view = view[count:]
            if view:
                break
            time = decoded.frames * step if stamp == "NOPTS" else float(stamp)
            begin, size = (time, own_size) if begin is None else (begin, size)
            again, joined = joined, time - begin + shift <= last  # MXF repeats the last one instead of beginning again
            if joined:
                shift = last + step - (time - begin)
            if joined and not again:
                decoded.notes.append(f"timestamps begin again at {last + step:.3f} s: recordings joined?")
            last = time - begin + shift
            if own_size != size:
                frame = common.fit_frame(frame, *size)
                decoded.notes.append(f"its size changes midway, to {own_size[0]}x{own_size[1]}: fitted to the first")
            decoded.frames += 1
            yield last, cv2.cvtColor(frame, cv2.COLOR_RGB2BGR, dst=frame)  # ffmpeg's own BGR differs a little
        check_exit(process.wait())
        if log_is_cut and not decoded.errors:
            decoded.errors = find_damage(video, probe, options, threads)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
