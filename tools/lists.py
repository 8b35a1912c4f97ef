"""Turns Kinetics' CSV files or Something-Something V2's JSON files into lists that the scripts read.

    python -m tools.lists --videos k400/videos --out k400 train.csv val.csv
    python -m tools.lists --videos ssv2/videos --out ssv2 --labels labels.json train.json validation.json

Writes out/train.txt and so on, one `path label` per line, and out/names.txt, the classes' names, label 0 first.
Give all files in one call: the classes of Kinetics are numbered in alphabetical order over all of them. Prints
how many entries have no video in the folder of videos, which is searched at any depth.
"""

import csv
import json
import os
import re
from pathlib import Path

import cmaev


def read_entries(path):
    """An annotation file -> [(possible stems of the video's file name, class name or None)]."""
    entries = []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for row in json.load(file) if path.suffix == ".json" else csv.DictReader(file):
                if path.suffix == ".json":
                    name = row.get("template")
                    entries.append(([str(row["id"])], None if name is None else re.sub(r"[\[\]]", "", name)))
                else:
                    video, start, end = row["youtube_id"], int(row["time_start"]), int(row["time_end"])
                    entries.append(([f"{video}_{start:06d}_{end:06d}", video], row.get("label")))
        if not entries:
            raise ValueError("no entries")
        return entries
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise cmaev.CMAEVError(
            f"{path} is not a Kinetics CSV (label,youtube_id,time_start,time_end,split) or Something-Something "
            f"JSON (id, template): {type(error).__name__} {error}") from None


def main():
    parser = cmaev.argument_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="Kinetics' CSV or Something-Something's JSON")
    parser.add_argument("--videos", required=True, type=Path, help="folder of the videos")
    parser.add_argument("--out", required=True, type=Path, help="folder for the lists and names.txt")
    parser.add_argument("--labels", type=Path, help="Something-Something's labels.json: the classes' numbers")
    s = parser.parse_args()
    entries = {file: read_entries(file) for file in s.files}
    names = sorted({name for rows in entries.values() for _, name in rows if name is not None})
    if s.labels:
        numbers = json.loads(s.labels.read_text(encoding="utf-8"))
        missing = sorted(set(names) - numbers.keys())
        if missing:
            raise cmaev.CMAEVError(f"{s.labels} has no {missing[0]!r}")
        names = sorted(numbers, key=lambda name: int(numbers[name]))
    number = {name: i for i, name in enumerate(names)}

    videos = {}  # by the stem of the file name
    for folder, _, files in os.walk(s.videos.absolute()):
        videos |= {stem: os.path.join(folder, stem + suffix) for stem, suffix in map(os.path.splitext, files)
                   if suffix.lower() in cmaev.VIDEO_SUFFIXES and not stem.startswith(".")}
    s.out.mkdir(parents=True, exist_ok=True)
    for file, rows in entries.items():
        lines, missing = [], []
        for stems, name in rows:
            paths = [videos[stem] for stem in stems if stem in videos]
            if not paths:
                missing.append(stems[0])
            else:
                lines.append(paths[0] if name is None else f"{paths[0]} {number[name]}")
        if not lines:
            raise cmaev.CMAEVError(f"{s.videos} has no video of {file}, for example no {missing[0]}")
        with cmaev.atomic_write(s.out / f"{file.stem}.txt") as out:
            out.writelines(line + "\n" for line in lines)
        without = f"; {len(missing)} entries of {file} have none, for example {missing[0]}" if missing else ""
        print(f"{s.out / file.stem}.txt: {len(lines)} videos{without}")
    if names:
        with cmaev.atomic_write(s.out / "names.txt") as out:
            out.writelines(name + "\n" for name in names)
        print(f"{s.out / 'names.txt'}: {len(names)} classes")


if __name__ == "__main__":
    cmaev.run_script(main)
