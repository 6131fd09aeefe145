"""Writes metadata.jsonl, the page and LeRobot's tables of a generated set, all from the records of its clips."""

import json
import os
import shutil
from pathlib import Path

from svd_parts.files import UserError, fits, inside, natural_key, read_json, read_lines, tidy, write_file, write_json
from svd_parts.lerobot_writer import DEFAULT_CAMERA, EPISODES_A_FOLDER, LEROBOT_FILE, write_lerobot
from svd_parts.page import write_clips_page

DAMAGED = "damaged, or not UTF-8; repair or delete it"
LEROBOT_FIELDS = {"stats": dict, "task": str, "height": int, "width": int, "fps": (int, float)}


def record_name(where, record):
    """The name of the clip in a record. Raises `UserError` where the object is no record as `ClipSet` writes it."""
    name = record.get("directory", record.get("file_name"))
    name = inside(name, where)
    kinds = {"requested": dict, "segments": list, "video_info": dict}
    kinds = {key: kind for key, kind in kinds.items() if key in record}
    kinds |= LEROBOT_FIELDS if record.get("output_format") == "lerobot" else {}
    if not fits(record, kinds):
        raise UserError(f"{where}: {DAMAGED}")
    return name


def is_of_format(record, output_format):
    return record.get("output_format", output_format) == output_format


class Publisher:
    """Reads and writes the records of the set in `folder`, and writes the files that are made from them.

    records: {name: record} of all clips ever made here. listed: {name: line} of metadata.jsonl.
    """

    def __init__(self, folder, output_format):
        self.folder, self.hidden, self.lerobot = folder, folder / ".infer", output_format == "lerobot"
        self.records, self.listed = {}, {}

    def number_clips(self, jobs, reserve=False):
        """Names the clips of a LeRobot set by number: the line of their title in .infer/episodes.txt. New titles come
        after these, and `reserve` adds them. Lines are only added, by one write, so all processes count alike."""
        path, titles = self.hidden / "episodes.txt", [json.dumps(job["title"]) for job in jobs]
        lines = path.read_text().splitlines() if path.exists() else []
        if reserve and set(titles) - set(lines):
            with open(path, "ab", buffering=0) as file:
                file.write("\n".join(["", *titles, ""]).encode())
                os.fsync(file.fileno())
            lines = path.read_text().splitlines()
        numbers = {title: number for number, title in enumerate(dict.fromkeys(filter(None, [*lines, *titles])))}
        for job, title in zip(jobs, titles):
            chunk, file = divmod(numbers[title], EPISODES_A_FOLDER)
            place = LEROBOT_FILE.format(chunk_index=chunk, file_index=file)
            job["name"] = f"videos/{job['camera'] or DEFAULT_CAMERA}/{place}.mp4"
            job["target"] = self.folder / job["name"]

    def reserve(self, jobs):
        """Writes down the numbers of the clips of a LeRobot set, for good."""
        if self.lerobot:
            self.number_clips(jobs, reserve=True)

    def read(self, jobs):
        """Reads all records and metadata.jsonl. Returns the names of those clips of `jobs` that are there."""
        path, self.listed = self.folder / "metadata.jsonl", {}
        for where, record in read_lines(path, DAMAGED):
            self.listed[record_name(where, record)] = record
            if "generated" not in record:
                raise UserError(f"{path}: not written by infer_svd.py (real clips?); give another --output_video")
        if self.lerobot:
            self.number_clips(jobs)
        # Look for the clips before the records: other processes make clips meanwhile, and write the record first.
        there = {job["name"] for job in jobs if os.path.lexists(job["target"])}
        self.records = {}
        walk = os.walk(self.hidden)  # unlike `rglob`, it allows that others move folders away
        for path in (Path(folder, file) for folder, _, files in walk for file in files if file.endswith(".json")):
            name = path.relative_to(self.hidden).as_posix().removesuffix(".json")
            record_name(path, record := read_json(path, "repair or delete it"))
            self.records[name] = {**self.listed.get(name, {}), **record}
        return there

    def write_record(self, name, record):
        path = self.hidden / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        self.records[name] = record

    def publish(self):
        """Writes metadata.jsonl, the page and LeRobot's tables, of the clips that are there."""
        path, lines, made, shown = self.folder / "metadata.jsonl", "", [], {}
        for name in sorted(self.records, key=natural_key):
            record = self.records[name]
            if (self.folder / name).exists():
                made.append(record)
                lines += json.dumps({key: value for key, value in record.items() if key != "deleted"}) + "\n"
                shown[name] = record
                self.listed[name] = record
            elif name in self.listed and not record.get("deleted"):
                self.write_record(name, {**record, "deleted": True})
        if not lines and not path.exists():
            return
        write_file(path, lines)
        write_clips_page(self.folder, shown)
        if self.lerobot and made:
            write_lerobot(self.folder, made)
        elif self.lerobot:  # all clips have been deleted
            for left in ("meta", "data"):
                shutil.rmtree(self.folder / left, ignore_errors=True)

    def tidy(self):
        """Removes what killed processes left half written. No other process may be at work on the set."""
        ours = [".metadata.jsonl.*.part", ".index.html.*.part", ".metrics.json.*.part", "side_by_side/.*.part"]
        ours += ["meta/**/.*.part", "data/**/.*.part"] * self.lerobot
        for pattern in ours:
            tidy(self.folder.glob(pattern))
        tidy([*self.hidden.glob(".making-*"), *self.hidden.rglob(".*.part")])
