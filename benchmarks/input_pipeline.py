"""What the input pipeline costs over bare decoding: `python benchmarks/input_pipeline.py [--workers N]`.

Both sides read the same JPEG files with the same number of processes and make the same sizes from them. One side is
`ImageStream`: random crops, epochs, shuffling, counting, batches that reach the training process. The other is a loop
that decodes each file the fastest way that is right (at a fraction of its size where that suffices, uint8 resize) and
throws the result away. Rounds of both alternate and each is compared to its neighbour, so that a machine that slows
down slows both. By default one core is left to the process that takes the batches, as training needs it.
"""

import argparse
import io
import itertools
import os
import statistics
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded, as the commands do

import numpy as np
import skimage.data
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from transformers_radio.data import DataConfig, ImageStream

RESOLUTIONS = [224, 256, 378]  # stage 1 of the paper: DINOv2, the student, CLIP
FILES = 480
BATCH_SIZE = 16
ROUNDS = 11
PREFETCHED = 2  # batches that the stream keeps ready for each worker


def make_photos(folder: Path) -> None:
    """JPEGs of about 500 x 375, cut from photographs and scaled up, as if from a web-scale dataset."""
    photos = [skimage.data.astronaut(), skimage.data.chelsea(), skimage.data.coffee(), *load_sample_images().images]
    generator = np.random.default_rng(0)
    for number in range(FILES):
        photo = Image.fromarray(photos[number % len(photos)])
        width, height = int(generator.integers(420, 580)), int(generator.integers(315, 435))
        share = generator.uniform(0.4, 0.7)
        w, h = int(photo.width * share), int(photo.height * share)
        left, top = int(generator.integers(0, photo.width - w)), int(generator.integers(0, photo.height - h))
        crop = photo.crop((left, top, left + w, top + h)).resize((width, height), Image.Resampling.BICUBIC)
        crop.save(folder / f"{number:05}.jpg", quality=90)


def decode(path: Path) -> int:
    """One file to all resolutions, without any crop, checks or batch."""
    image = Image.open(io.BytesIO(path.read_bytes()))
    image.draft(None, (max(RESOLUTIONS), max(RESOLUTIONS)))
    pixels = F.pil_to_tensor(image.convert("RGB"))
    return sum(F.resize(pixels, [r, r], InterpolationMode.BICUBIC, antialias=True).shape[1] for r in RESOLUTIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    workers = parser.parse_args().workers
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder))
        files = itertools.cycle(sorted(Path(folder).iterdir()))
        stream = ImageStream(DataConfig(folder, num_workers=workers), RESOLUTIONS, BATCH_SIZE, seed=0)
        batches, count = iter(stream), FILES // BATCH_SIZE
        ours, plain = [], []
        with get_context("spawn").Pool(workers, initializer=torch.set_num_threads, initargs=[1]) as pool:
            pool.map(decode, [next(files) for _ in range(BATCH_SIZE * workers)])
            for round_number in range(ROUNDS):
                for _ in range(PREFETCHED * workers):  # made while the other side ran
                    next(batches)
                started = time.perf_counter()
                for _ in range(count):
                    next(batches)
                ours.append(count * BATCH_SIZE / (time.perf_counter() - started))
                time.sleep(0.3)  # the workers fill up and rest
                chosen = [next(files) for _ in range(count * BATCH_SIZE)]
                started = time.perf_counter()
                pool.map(decode, chosen, chunksize=BATCH_SIZE)
                plain.append(len(chosen) / (time.perf_counter() - started))
                print(f"round {round_number + 1}: stream {ours[-1]:.0f}, plain {plain[-1]:.0f} images/s", flush=True)
        stream.close()
    ratio = statistics.median(mine / bare for mine, bare in zip(ours, plain, strict=True))
    print(
        f"{workers} worker(s), {RESOLUTIONS}: stream {statistics.median(ours):.0f} images/s, plain decoding"
        f" {statistics.median(plain):.0f} images/s, ratio {ratio:.2f} (aim: 0.9 or more)"
    )


if __name__ == "__main__":
    main()
