"""One pass of the data stream over damaged sources, beside what the sound ones give."""

import io
import logging

import numpy as np
from isolation import COUNTED, SOUND, UNDETECTABLE, OtherBits
from PIL import Image

from transformers_radio.data import DataConfig, ImageStream, count_images


def picture(number: int, file_format: str = "JPEG") -> bytes:
    """An image file that differs from that of every other number."""
    noise = np.random.default_rng(number).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((24, 24), Image.Resampling.BICUBIC).save(buffer, file_format)
    return buffer.getvalue()


class Said(logging.Handler):
    """What the package says while it works."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []
        self.log = logging.getLogger("transformers_radio")

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        self.log.addHandler(self)
        return self

    def __exit__(self, *error):
        self.log.removeHandler(self)


def config(path, **fields) -> DataConfig:
    """Whole images, none of them too many to skip."""
    whole = dict(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), max_skipped_share=1.0, min_side=1)
    return DataConfig(**{"path": str(path), "num_workers": 0, "lanes": 1, "retry_seconds": 0.0, **whole, **fields})


def read_all(path, **fields) -> tuple[dict[str, bytes], set[str]]:
    """-> (key -> its crop, keys that were skipped) of the first pass; a pass ends with the first image of the next."""
    from transformers_radio.data.stream import _warn_once

    _warn_once.cache_clear()  # each case is a run of its own
    stream = ImageStream(config(path, **fields), [16], batch_size=1, seed=0)
    found: dict[str, bytes] = {}
    for batch in stream:
        if batch.epochs[0] > 0:
            break
        found[batch.keys[0]] = batch.images[16].numpy().tobytes()
    stream.close()
    offenders = (offender for lane in stream.state_dict()["lanes"].values() for offender in lane["offenders"])
    return found, {offender.rpartition(" (")[0] for offender in offenders}


def check_stream(
    path, sound: dict[str, bytes], detects: bool, may_lose: int = 0, names: tuple[str, ...] = (), **fields
):
    """`detects`: other images would show in a checksum; `may_lose`: so many the damage may take away unseen."""
    with Said() as said:
        found, skipped = read_all(path, **fields)
    lost = len(sound) - len(found.keys() | skipped)
    if lost > may_lose and not any(name in line for line in said.lines for name in names):
        raise OtherBits(f"{lost} of {len(sound)} images are neither there nor counted as skipped")
    if any(found[key] != sound.get(key) for key in found):
        if detects:
            others = sorted(key for key in found if found[key] != sound.get(key))
            raise OtherBits(f"other images, though a checksum does not fit: {', '.join(others)}")
        return UNDETECTABLE
    return SOUND if found == sound else COUNTED if lost <= 0 else UNDETECTABLE if may_lose else COUNTED


def check_count(path, count: int, may_lose: int = 0) -> str:
    if (counted := count_images(config(path))) == count:
        return SOUND
    if abs(count - counted) > may_lose:  # a sample whose member has another name is two
        raise OtherBits(f"counts {counted} images instead of {count}")
    return UNDETECTABLE
