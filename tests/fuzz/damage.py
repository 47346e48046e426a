"""What disks, networks, programs and people do to the bytes of a file and to the values in it."""

import json
import math
from pathlib import Path

import numpy as np

EXTREME = (
    b"\x00" * 4,
    b"\xff" * 4,
    b"\x7f\xff\xff\xff",
    b"\x80\x00\x00\x00",
    b"\xff\xff\xff\x7f",
    b"\x00\x00\x00\x80",
)


def damage(rng: np.random.Generator, data: bytes, first: int = 0, last: int | None = None) -> tuple[str, bytes]:
    """-> (what was done, the damaged bytes): at one place, from byte `first` on and before `last`."""
    last = len(data) if last is None else last
    low, high = choose(
        rng, ((first, last), (first, last), (first, min(last, first + 64)), (max(first, last - 64), last))
    )
    place = int(rng.integers(low, max(low + 1, high)))  # often in headers and trailers, where a change says most
    length = int(rng.choice([1, 2, 4, 16, 200]))
    kind = str(rng.choice(["flip", "flip", "flip", "cut", "extreme", "zero", "insert", "delete", "repeat", "garbage"]))
    if kind == "flip":
        bit = int(rng.integers(8))
        changed = data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :] if data else data
        return f"bit {bit} of byte {place} flipped", changed
    if kind == "cut":
        return f"cut after {place} bytes", data[:place]
    if kind == "extreme":
        value = EXTREME[rng.integers(len(EXTREME))]
        return f"bytes {place} on are {value.hex()}", data[:place] + value + data[place + 4 :]
    if kind == "zero":
        return f"{length} bytes from {place} on are zero", data[:place] + bytes(length) + data[place + length :]
    if kind == "delete":
        return f"{length} bytes from {place} on are missing", data[:place] + data[place + length :]
    if kind == "repeat":
        return f"{length} bytes from {place} on come twice", data[: place + length] + data[place:]
    other = rng.bytes(length)
    if kind == "insert":
        return f"{length} other bytes before byte {place}", data[:place] + other + data[place:]
    return f"{length} bytes from {place} on are others", data[:place] + other + data[place + length :]


def choose(rng: np.random.Generator, options):
    """One of them; `rng.choice` would make arrays of texts and lists."""
    options = list(options)
    return options[int(rng.integers(len(options)))]


VALUES = (
    None, "", " ", "x", "null", "no", -1, 0, 1, 7, 1.5, 1e308, -1e-308, math.inf, math.nan, 2**31, 2**70, True, [], {},
    [1], ["x"], [[]], [0.5, "x"], [math.nan, 1], {"a": 1}, "???", "${x}", "a" * 3000, "\0", "line\nbreak", "../..",
    "1_000", "0x10",
)  # fmt: skip


def nonsense_field(rng: np.random.Generator, path: Path, more: tuple[str, ...] = ()) -> tuple[str, str]:
    """Another value in a JSON file, or none -> (what was done, the field); `more` fields that it need not have."""
    values = inside = json.loads(path.read_text())
    field = choose(rng, (*inside, *more))
    name = field
    while isinstance(inside.get(field), dict) and inside[field] and rng.random() < 0.8:
        inside = inside[field]
        field = choose(rng, inside)
    if field in inside and rng.random() < 0.1:
        del inside[field]
        what = f"{path.name} without {field}"
    else:
        inside[field] = choose(rng, VALUES)
        what = f"{field} in {path.name} is {inside[field]!r}"
    path.write_text(json.dumps(values))
    return what[:200], name if name == field else field


def damage_file(rng: np.random.Generator, path: Path) -> str:
    """Any damage to a file, or another thing in its place."""
    kind = choose(rng, ("bytes", "bytes", "bytes", "bytes", "bytes", "missing", "empty", "a folder", "zeros"))
    if kind == "bytes":
        what, data = damage(rng, path.read_bytes())
        path.write_bytes(data)
        return f"{path.name}: {what}"
    data = path.read_bytes()
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(bytes(len(data)) if kind == "zeros" else b"")
    return f"{path.name} is {kind}"
