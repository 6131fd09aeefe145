"""Runs ffmpeg on one file and reads its error messages."""

import os
import re
import subprocess

import imageio_ffmpeg


class Failure(Exception):
    """The reason why one video gives no clip. The other videos go on."""


def start_ffmpeg(video, decoder_options, output_options, **popen):
    """Starts ffmpeg on one file, given as an open descriptor, so that its name is never taken for a URL, a pattern or
    an option. The whitelist keeps the content of the file from opening other files or the network."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-hide_banner", "-nostats", "-v", "level+info"]
    try:
        file = open(video.path, "rb")
    except OSError as error:  # deleted since it was found
        raise Failure(f"cannot be read: {error.strerror}") from None
    named_so = os.path.splitext(video.path)[1].lower() in (".mjpeg", ".mjpg")
    demuxer = ["-f", "mjpeg"] * (named_so and file.read(2) == b"\xff\xd8")  # else ffmpeg takes it for a still image
    os.lseek(file.fileno(), 0, os.SEEK_SET)
    command += [*demuxer, *decoder_options, "-protocol_whitelist", "fd", "-i", "fd:", "-map", "0:V:0", *output_options]
    with file:  # in a session of its own: Ctrl-C must not end it in the middle of a video
        popen |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0, "start_new_session": True}
        return subprocess.Popen(command, stdin=file, **popen)


def run_ffmpeg(video, decoder_options, output_options, **popen):
    """Runs ffmpeg on one file. Returns the lines of its output and of its log. Raises `Failure` where it crashes."""
    process = start_ffmpeg(video, decoder_options, output_options, **popen)
    rows, log = (part.decode("utf-8", "replace").splitlines() for part in process.communicate())
    check_exit(process.returncode)
    return rows, log


def check_exit(code):
    """Raises `Failure` where a signal ended ffmpeg (a negative exit status; on Windows, a large one)."""
    if code == -9:
        raise Failure("ffmpeg was killed by signal 9: too little memory?")
    if code < 0 or code > 255:
        version = imageio_ffmpeg.get_ffmpeg_version()  # 7.0 crashes on every .ts
        cure = ": a newer imageio-ffmpeg is needed, and for that a newer Python, 3.10 or later"
        raise Failure(f"ffmpeg {version} crashed on it (signal {-code})" + cure * version.startswith("7.0"))


SHOWINFO = re.compile(  # a whole line of the showinfo filter
    r"\[Parsed_showinfo_\d+ @ \S+\] \[info\] (config .*|n: *\d+ pts:.* type:\S ?"
    r"|color_range:\S+ color_space:\S+ color_primaries:\S+ color_trc:\S+| *side data .*|User Data=[0-9a-f]*)?"
)


def is_cut(line):
    """Whether a message of another part of ffmpeg may have come in the middle of this line of showinfo.

    Such a message has no prefix (`color_primaries:unknownco located POCs unavailable`), so `error_messages` is deaf to
    it: about 1 in 60 times, where one message is all that a file gives.
    """
    return "[Parsed_showinfo_" in line and not SHOWINFO.fullmatch(line)


def error_messages(lines, *speakers):
    """The errors of these parts of ffmpeg, from lines such as `[h264 @ 0x55d] [error] no frame!`

    A message may come in the middle of another line, because all threads of ffmpeg write at once.
    """
    names = "|".join(map(re.escape, speakers))
    pattern = re.compile(rf"\[(?:\S+ @ \S+\] \[dec:)?(?:{names})(?:/\S+)? @ \S+\] \[error\] (.*)")
    return [match[1] for match in map(pattern.search, lines) if match]


BESIDE_THE_PICTURE = re.compile(
    r"(?i)\b(sei|vui|app\d*|com|icc|exif|side data|metadata|user ?data|timecode|caption|header packet)\b"
)


def picture_errors(lines, probe):
    """The messages about damaged pictures: ffmpeg's own verdict on a frame, and the errors of this video's decoder. Not
    those about sound, the container, or data beside the picture."""
    corrupt = [f"{probe.codec}: corrupt decoded frame" for line in lines if "corrupt decoded frame" in line]
    said = error_messages(lines, probe.codec, probe.decoder)
    return corrupt + [text for text in said if not BESIDE_THE_PICTURE.search(text)]
