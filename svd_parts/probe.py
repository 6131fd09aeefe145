"""Reads what a video file says of itself: its header, its packets and its key frames."""

import collections
import contextlib
import dataclasses
import os
import re
import stat
import statistics
from concurrent.futures import ThreadPoolExecutor

import imageio_ffmpeg

from svd_parts.ffmpeg import Failure, error_messages, run_ffmpeg
from svd_parts.files import UserError

PLAIN_CODECS = {"h264", "hevc", "mpeg4", "mpeg1video", "mpeg2video", "vp8", "vp9", "mjpeg"}
PLAIN_MATRICES = {"unknown", "bt709", "bt470bg", "smpte170m"}  # OpenCV turns these into RGB as ffmpeg does
HDR = {"smpte2084", "arib-std-b67"}  # PQ and HLG
NO_TIMESTAMP = -(1 << 62)  # a packet without a timestamp has a smaller value
LOOK = re.compile(  # a line of the showinfo filter about a frame
    r" fmt:(\w+) .*sar:(\S+) s:(\d+)x(\d+) i:(\w)(?s:.*?displaymatrix: rotation of (\S+))?"
    r"(?s:.*?)color_space:(\S+) .*color_trc:(\S+)"
)
Packet = collections.namedtuple("Packet", "stream dts pts duration size flags")  # times in ticks; flags: see below
MIDDLE = 640, 360  # most pixels of a frame (width, height) by which two decoders are compared
KEY_FRAME, UNSURE, HIDDEN = 1, 2, 4  # UNSURE: data is lost before this packet or in it; HIDDEN: cut away


@dataclasses.dataclass
class Probe:
    """What a file's header, packets and key frames say. No other frame of it has been decoded yet."""

    codec: str
    decoder: str  # ffmpeg's name for its decoder
    pixel_format: str
    matrix: str  # of the colours
    transfer: str
    pixel_aspect: float  # a pixel's width divided by its height
    sideways: bool  # the file says that players turn it by 90 degrees
    size: tuple  # (width, height) as players show it: cropped, turned, and with square pixels
    ordinary: bool  # one video track, neither turned nor cropped nor interlaced, and all key frames alike
    fps: float  # as the header says; 0 where it says nothing
    times: list  # seconds of every packet in display order; None where the file has none, or they run backwards
    packets: int  # listed, of the video track
    total: int  # frames of the whole video, an estimate where only its beginning was listed
    middle: bytes  # RGB of the first key frame's middle, at most `MIDDLE`; empty where it cannot be decoded
    truncated: bool = False
    problems: list = dataclasses.field(default_factory=list)  # [text]: a part of the video is missing or damaged
    notes: list = dataclasses.field(default_factory=list)  # [text]: the video is whole, but worth a look


NO_VIDEOS = {  # how a file begins, in lower case: what it is
    (b"version https://git-lfs",): "a git-lfs pointer, not the video itself: run `git lfs pull`",
    (b"<!doctype html", b"<html"): "an HTML page, not a video: a failed download?",
    (b"#extm3u", b"ffconcat", b"[playlist]", b"<asx", b"<smil", b"file ", b"v=0"): (
        "a playlist, not a video: put the files that it names into --video_dir"
    ),
}


def check_file(video):
    """Returns a file's status. Raises `Failure` for what is clearly no video. Never opens a pipe, which would block."""
    try:
        status = os.stat(video.path)
        if not stat.S_ISREG(status.st_mode):
            raise Failure("a folder that cannot be listed" if stat.S_ISDIR(status.st_mode) else "not a regular file")
        if status.st_size == 0:
            raise Failure("an empty file (0 bytes)")
        with open(video.path, "rb") as file:
            head = file.read(1024)
    except FileNotFoundError:
        raise Failure("a link to something that is not there") from None
    except OSError as error:
        raise Failure(f"cannot be read: {error.strerror}") from None
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginnings, reason in NO_VIDEOS.items():
        if text.startswith(beginnings):
            raise Failure(reason)
    if not text.startswith(b"yuv4mpeg") and all(byte in b"\t\n\r\f\x1b" or 32 <= byte < 127 for byte in head):
        raise Failure("a playlist, not a video" if b"<mpd" in text else "text, not a video")
    return status


def probe_video(video, max_packets=None):
    """Lists a file's packets, or the first `max_packets`, and looks at its key frames -> `Probe`.

    Raises `Failure` with the reason if there is no video.
    """
    rows, log, middle = list_packets(video, max_packets)
    header, _, output = "\n".join(log).partition("\n[info] Stream mapping:")
    packets = [parse_packet(row) for row in rows if row[:1].isdigit()]
    shown = [packet for packet in packets if packet.stream == 0]
    if not max_packets:  # all video tracks are listed, so the track that is prepared comes twice
        twin = next((p.stream for p in packets if p.stream and p[1:] == shown[0][1:]), None) if shown else None
        packets = [packet for packet in packets if packet.stream != twin]
    if max_packets and len(shown) < max_packets:  # a short video: list all tracks, to see where the file should end
        return probe_video(video)
    shown = [packet for packet in shown if not packet.flags & HIDDEN] or shown  # an edit list leaves the others out
    encrypted = any(row[:2] == "0," and "Encryption info" in row for row in rows)
    if encrypted or re.search(r"\((encv|drm\w) / |DRM protected", header):
        raise Failure("encrypted: only a copy without protection can be read")
    if not shown:
        raise Failure(why_unreadable(video, header))
    if re.search(r"^\[info\] Input #0, (\w+_pipe|image2|tty), from ", header, re.MULTILINE):
        raise Failure("a still image or text, not a video")
    fields = dict(match.groups() for row in rows if (match := re.match(r"#(\w+ \d+): (.*)", row)))
    ticks = {packet.stream: parse_ratio(fields[f"tb {packet.stream}"]) for packet in packets}
    stamps = sorted(packet.pts for packet in shown)
    if stamps[0] < NO_TIMESTAMP:  # AVI and bare streams lack presentation times, but their decoding times are steady
        stamps = sorted(packet.dts for packet in shown)
        if len(stamps) > 2:  # with B-frames the first decoding time is too early
            stamps[0] = 2 * stamps[1] - stamps[2]
    steady = stamps[0] > NO_TIMESTAMP and len(set(stamps)) == len(stamps)  # ffmpeg repeats one that runs backwards
    fps = re.search(r"Stream #0:0.*: Video: .*, ([\d.]+)(k?) fps", output)
    decoder = re.search(r"Stream #0:\d+ \((\w+)\) -> showinfo", output)
    frames = re.split(r"\] n: *\d+ ", "\n".join(line for line in log if "showinfo" in line))
    looks = [match.groups() for match in map(LOOK.search, frames) if match]
    stored = fields["dimensions 0"].split("x")
    unknown = ("", "1/1", *stored, "P", "", "unknown", "")
    pixel_format, aspect, *coded, scan, turn, matrix, transfer = looks[0] if looks else unknown
    aspect = parse_ratio(aspect) if 0.1 < parse_ratio(aspect) < 10 else 1
    sideways = bool(turn) and 45 < abs(float(turn)) < 135
    size = round(int(coded[0]) * aspect), int(coded[1])
    one_track = len(re.findall(r"^\[info\]   Stream #0:\d+.*?: Video: ", header, re.MULTILINE)) == 1
    alike = len(set(looks)) == 1 and coded == stored
    probe = Probe(
        codec=fields["codec_id 0"], decoder=decoder[1] if decoder else "", pixel_format=pixel_format, matrix=matrix,
        transfer=transfer, pixel_aspect=aspect, sideways=sideways, size=size[::-1] if sideways else size,
        ordinary=one_track and alike and aspect == 1 and not turn and scan == "P",
        fps=float(fps[1]) * (1000 if fps[2] else 1) if fps else 0.0,
        times=[(stamp - stamps[0]) * ticks[0] for stamp in stamps] if steady else None,
        packets=len(shown), total=len(shown), middle=middle,
    )  # fmt: skip
    probe.notes += ["interlaced"] * (scan != "P") + [f"HDR ({transfer}) made SDR"] * (transfer in HDR)
    probe.notes += ["alpha dropped"] * bool(re.match(r"yuva|gbra|rgba|bgra|argb|abgr|ya\d", pixel_format))
    if re.match(r"(gray|ya|rgb|bgr|rgba|bgra|gbra?p)(9|1[0-6]|48|64|f)", pixel_format):
        probe.notes.append(f"more than 8 bits a channel ({pixel_format}) made 8")
    if max_packets and (clock := re.search(r"^\[info\]   Duration: (\d+):(\d+):([\d.]+)", header, re.MULTILINE)):
        hours, minutes, seconds = map(float, clock.groups())
        probe.total = max(len(shown), round((hours * 3600 + minutes * 60 + seconds) * probe.fps))
    if re.search(r"DOVI configuration record:.*profile: 5\b", header):
        probe.notes.append("Dolby Vision profile 5: its colours are wrong without Dolby's decoder")
    if not max_packets:
        judge_ending(video, probe, packets, ticks, header)
    judge_packets(probe, shown, error_messages(log, "in#0"))
    return probe


def list_packets(video, max_packets):
    """ffmpeg's list of packets (its framecrc format), its log with what showinfo says of up to 1000 key frames, and the
    middle of the first key frame, as `Probe` has it.

    Lists all tracks, because another track may last longer than the video. With `max_packets`, lists only the video's.
    """
    tracks, until = "-map 0:v? -map 0:a? -map 0:s? -map 0:d? -copy_unknown", ""  # the first video is listed twice
    if max_packets:
        tracks, until = f"-frames:v {max_packets}", f"-t {max_packets / 5}"  # seconds, more than these packets last
    packets = f"{tracks} -c copy -f framecrc pipe:1"
    looks = f"-map [look] -frames:v 1000 {until} -f null -"
    decoder, graph = "-threads 1 -noautorotate -skip_frame nokey".split(), "-filter_complex [0:V:0]showinfo=checksum=0"
    if os.name != "posix":  # a process gets no third pipe there
        return *run_ffmpeg(video, decoder, f"{packets} {graph}[look] {looks}".split()), b""
    crop = f"crop=min(iw\\,{MIDDLE[0]}):min(ih\\,{MIDDLE[1]}):trunc((iw-ow)/2):trunc((ih-oh)/2)"
    # One graph for both, so that ffmpeg's lines about the outputs do not come in the middle of showinfo's first line.
    graph += f",split[look][frame];[frame]format=rgb24,{crop}[middle]"
    receiver, sender = os.pipe()
    with open(receiver, "rb") as pipe, ThreadPoolExecutor(1) as pool:
        received = pool.submit(pipe.read)
        try:
            picture = f"-map [middle] -frames:v 1 -f rawvideo pipe:{sender}"
            output = f"{packets} {graph} {looks} {picture}".split()
            rows, log = run_ffmpeg(video, decoder, output, pass_fds=[sender])
        finally:
            os.close(sender)
        return rows, log, received.result()


def parse_packet(row):
    """`0, 512, 1024, 512, 648, 0xa299, F=0x0, S=1, ...` -> Packet."""
    parts = row.split(",")
    flags = int(parts[6][3:], 16) if len(parts) > 6 and parts[6].startswith(" F=") else KEY_FRAME
    return Packet(*map(int, parts[:5]), flags)


def parse_ratio(text):
    """`1/12288` -> a number; 1 for `0/1` and `1/0`, which stand for "unknown"."""
    n, d = map(int, text.split("/"))
    return n / d if n and d else 1


def judge_ending(video, probe, packets, ticks, header):
    """Adds a problem or a note where the file ends too early or too late, by its header, lengths and last packet."""
    clock = re.search(r"^\[info\]   Duration: (\d+):(\d+):([\d.]+)(?:, start: ([\d.]+))?", header, re.MULTILINE)
    if "Input #0, mpegts" in header:  # the format has no duration in it, so this is ffmpeg's own estimate
        clock = None
    hours, minutes, seconds, start = (float(part or 0) for part in (clock.groups() if clock else "0000"))
    claim = hours * 3600 + minutes * 60 + seconds - start
    timed = [(max(p.dts, p.pts), p.duration, ticks[p.stream]) for p in packets if max(p.dts, p.pts) > NO_TIMESTAMP]
    begin = min((stamp * tick for stamp, _, tick in timed), default=0)
    lasts = max(((stamp + duration) * tick - begin for stamp, duration, tick in timed), default=claim)
    size, end = os.path.getsize(video.path), container_end(video.path)
    used = sum(packet.size for packet in packets)
    if claim - lasts > max(0.5, 0.05 * claim) + 1 / (probe.fps or 25):
        probe.problems.append(f"ends after {lasts:.1f} s of the {claim:.1f} s that its header claims")
    elif end > size + 1024:
        probe.problems.append(f"ends after {size} of the {end} bytes that its header claims")
    elif packets[-1].flags & UNSURE:
        probe.problems.append("ends in the middle of a packet")
    elif 0 < end < size - 1024 and used <= end:
        probe.notes.append(f"its last {size - end} bytes of {size} belong to nothing: another file behind it?")
    elif not end and used < 0.6 * size and "Input #0, mpeg" not in header:  # MPEG streams may hold padding
        probe.notes.append(f"{size - used} bytes of {size} belong to nothing: another file behind it?")
    probe.truncated = bool(probe.problems)


BOXES = frozenset(b"ftyp styp moov moof mdat mfra free skip wide uuid meta sidx ssix emsg prft pdin pnot udta".split())
ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"  # the two parts of a Matroska file
MXF, MXF_HEADER = b"\x06\x0e\x2b\x34", bytes.fromhex("060e2b34020501010d0102010102")


def container_end(path):
    """The length in bytes of an MP4, AVI, WMV, Matroska (WebM) or MXF by the lengths in it; 0 for other files.

    A length beyond the file's end means that the file was cut. A shorter one means that something else follows.
    """
    end, size = 0, os.path.getsize(path)
    with contextlib.suppress(OSError), open(path, "rb") as file:  # of a bad disk the decoder will tell
        _, wmv, properties = file.read(4096).partition(ASF_FILE_PROPERTIES)
        if wmv:
            return int.from_bytes(properties[24:32], "little")
        while end < size:
            file.seek(end)
            head = file.read(64).ljust(64, b"\0")
            if end and (head.startswith((EBML, MXF_HEADER)) or head[4:8] == b"ftyp"):  # another file begins here
                break
            length = part_length(head)
            if length is None:
                break
            if not length:  # 0 stands for "up to the file's end", or was never filled in
                return 0
            end += length
    return end


def part_length(head):
    """Bytes of the part of a file that begins with these 64 bytes; 0 where the part does not say; None for no such."""
    if head[:4] == b"RIFF":
        length = int.from_bytes(head[4:8], "little")
        return 8 + length if 0 < length < 0xFFFFFFFF else 0
    if head[4:8] in BOXES:
        return int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
    if head.startswith((EBML, SEGMENT)):  # then a length, whose leading zero bits say of how many bytes
        count = 9 - head[4].bit_length()
        length = int.from_bytes(head[4 : 4 + count], "big") - (1 << 7 * count)
        return 4 + count + length if 0 < length < (1 << 7 * count) - 1 else 0
    if head.startswith(MXF):  # a key of 16 bytes, then a length of one byte, or of as many as that byte says
        count = head[16] & 0x7F if head[16] & 0x80 else 0
        if head.startswith(MXF_HEADER):  # it says where the last part begins
            return int.from_bytes(head[41 + count : 49 + count], "big")
        return 17 + count + (int.from_bytes(head[17 : 17 + count], "big") if count else head[16])
    return None


def judge_packets(probe, packets, said):
    """Adds a problem where the container lost pictures: an `UNSURE` packet, or an error message and a gap in time.

    An `UNSURE` packet right before a key frame does not count: two recordings were joined there. `said` are ffmpeg's
    error messages. Without a gap they are about other things, and become a note.
    """
    for number, packet in enumerate(packets[:-1]):
        if packet.flags & UNSURE and not any(after.flags & KEY_FRAME for after in packets[number + 1 : number + 4]):
            probe.problems.append("damaged: the container has lost a part of the video")
            break
    gaps = [b - a for a, b in zip(probe.times or [], (probe.times or [])[1:])]
    broken = any(re.search("Error during demuxing|ended prematurely", text) for text in said)
    if said and (broken or probe.truncated or (gaps and max(gaps) > 1.6 * statistics.median(gaps))):
        probe.problems.append(f"damaged: {said[0]}")
    elif said:
        probe.notes.append(f"ffmpeg says: {said[0]}")


def why_unreadable(video, header):
    """The reason why ffmpeg lists no packet of a video. Raises `UserError` where ffmpeg is too old."""
    with open(video.path, "rb") as file:
        if not file.read(1024).strip(b"\0"):
            return "holds zeros instead of a video: an interrupted download?"
    tracks = re.findall(r"^\[info\]   Stream #0:\d+.*?: (\w+): ", header, re.MULTILINE)
    errors = re.findall(r"\[(?:error|fatal)\] (.*)", header)
    if any("Protocol not found" in error for error in errors):
        raise UserError(f"{imageio_ffmpeg.get_ffmpeg_exe()} is too old: pip install -U imageio-ffmpeg")
    if "Video" in tracks and not any("matches no streams" in error for error in errors):
        return "its video track holds no frame"
    if tracks:
        return "no video track" + (" (audio only)" if "Audio" in tracks else "")
    if any("moov atom not found" in error for error in errors):
        return "no index in it (moov atom not found): the recording or the download was cut short"
    return "not a video that ffmpeg can read" + (f" ({errors[0]})" if errors else "")


def opencv_is_right(video, probe):
    """Whether OpenCV gives a file's frames as players show them. It makes interlaced ones black, and turns mirrored."""
    plain_colours = probe.matrix in PLAIN_MATRICES and probe.transfer not in HDR
    plain_frames = probe.codec in PLAIN_CODECS and probe.pixel_format in ("yuv420p", "yuvj420p") and plain_colours
    plain_name = "%" not in video.path and not re.search("[\udc80-\udcff]", video.path)  # a pattern; not UTF-8: a crash
    return probe.ordinary and plain_frames and plain_name and probe.times is not None
