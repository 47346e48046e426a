"""Folders with odd files, lists with nonsense lines and patterns that are none as `data.path`; fields beside it."""

import functools
import os
import socket
from pathlib import Path

import numpy as np
from damage import choose, damage
from isolation import Case
from streams import check_stream, picture, read_all

NAMES = (
    "line\nbreak.jpg", "b'\udcff.jpg", "a" * 251 + ".jpg", "[1].jpg", "{0..3}.jpg", "*.jpg", "two words.jpg", "#.jpg",
    "~.jpg", "-x.jpg", "\u202e.jpg", "x.JPG", "x.jpg.jpeg", "%00.jpg", "x;y.jpg", "http:.jpg", "x\r.jpg",
    "\x1b[31m.jpg",
)  # fmt: skip
PATTERNS = (
    "*.[jpg", "[", "]", "{", "}", "{}", "{1..", "{1..99999999999999999999}.jpg", "{0..99999}.jpg", "{a,b", "{,}",
    "{,}.jpg", "{{1..3}..5}.jpg", "{3..0}.jpg", "{0..0}.jpg", "{-1..2}.jpg", "{1..2..3}.jpg",
    "**/**/**/**/**/**/*.jpg", "**", "***", "\0.jpg", "a\nb.jpg", "a" * 300 + ".jpg", "a/" * 3000, "?" * 300,
    "*" * 200 + ".jpg", "[!]", "[a-", "~nobody/x.jpg", "../", "\udcff*.jpg", "{0..3}" * 9 + ".jpg", "{0..3}.jpg?x#y",
    "missing.jpg", "missing.tar", "missing/", ".", "*.txt",
)  # fmt: skip
URLS = (
    "http://", "http://[", "http://127.0.0.1:1/x.jpg", "http://127.0.0.1:1/{0..3}.tar", "http://127.0.0.1:99999/x.tar",
    "http://a b/x.tar", "s3://bucket/x.tar", "hf://", "hf://x", "file://", "file:///none/", "ftp://x/y.tar", "xyz://x.tar",
    "://",
)  # fmt: skip
TEXTS = ("", " ", "\0", "..", "../..", "*", "[", "(", "train\n", "a" * 5000, "\udcff", "val", "\\", "jpg", "0", "null")


def prepare(folder: Path):
    (folder / "sound").mkdir()
    for number in range(6):
        (folder / "sound" / f"{number}.jpg").write_bytes(picture(number))
    return read_all(folder / "sound")[0]


def draw(rng: np.random.Generator, sound: dict[str, bytes], folder: Path) -> Case:
    data = folder / "data"
    data.mkdir()
    for number in range(len(sound)):
        (data / f"{number}.jpg").write_bytes(picture(number))
    return choose(rng, (odd_file, odd_name, odd_list, odd_path, odd_field))(rng, sound, data)


def odd_file(rng, sound, data: Path) -> Case:
    kind = choose(rng, ODD_FILES)
    name = "odd" + choose(rng, (".jpg", ".jpg", ".png", ".tar", ".parquet", ".txt", ""))
    ODD_FILES[kind](data / name)
    path = choose(rng, (data, data, data / "*", data / "**", data / name))
    what = f"{name} is {kind}, path {path.relative_to(data.parent)}"
    may_lose = len(sound) if path.name == name or path.name.startswith("*") else 0
    return Case(what, ("odd", "data.path"), functools.partial(check_stream, path, sound, False, may_lose, ("odd",)))


def odd_name(rng, sound, data: Path) -> Case:
    name = choose(rng, NAMES)
    (data / name).write_bytes(picture(0))
    sound = {**sound, name: sound["0.jpg"]}
    path = choose(rng, (data, data / "*", data / name))
    run = functools.partial(check_stream, path, sound, True, len(sound) if path.name == name else 0, (name,))
    return Case(f"a file {name!r}, path {path.name!r}", ("data.path", name), run)


def odd_list(rng, sound, data: Path) -> Case:
    lines = sorted(sound)
    extra = choose(rng, (*PATTERNS, *URLS, *NAMES, "files.txt", "#", "", str(data), "0.jpg", "\ufeff"))
    lines.insert(int(rng.integers(len(lines) + 1)), extra)
    content, what = "\n".join(lines).encode("utf-8", "surrogateescape"), f"a list with the line {extra!r}"
    if rng.random() < 0.3:
        damaged, content = damage(rng, content)
        what += f", {damaged}"
    (data / "files.txt").write_bytes(content)
    run = functools.partial(
        check_stream, data / "files.txt", sound, False, len(sound) if "," in what else 0, ("files.txt",)
    )
    return Case(what[:300], ("data.path", "files.txt"), run)


def odd_path(rng, sound, data: Path) -> Case:
    path = choose(rng, (*(f"{data}/{pattern}" for pattern in PATTERNS), *URLS, *TEXTS))
    names = ("data.path", path.rpartition("/")[2].removesuffix(".jpg") or "data.path")
    return Case(f"path {path!r}"[:300], names, functools.partial(check_stream, path, sound, False, len(sound)))


def odd_field(rng, sound, data: Path) -> Case:
    field, text = choose(rng, ("split", "image_column", "name")), choose(rng, TEXTS)
    run = functools.partial(check_stream, data, sound, False, 0, (), **{field: text})
    return Case(f"{field} {text!r}"[:300], ("data.path", f"data.{field}"), run)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))  # such a path may have 107 bytes


def _sparse(path: Path) -> None:
    path.write_bytes(picture(0))
    os.truncate(path, 2**36)


ODD_FILES = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": _socket,
    "empty": Path.touch,
    "text": lambda path: path.write_text("no image"),
    "64 GiB": _sparse,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to its folder": lambda path: path.symlink_to("."),
    "a link to the root": lambda path: path.symlink_to("/dev"),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
}
