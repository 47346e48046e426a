"""Small classification sets and processes for the tests of k-NN, zero-shot and their stores."""

import io
import multiprocessing
import os
import socket
import tarfile

import datasets
import numpy as np
from PIL import Image

CLASSES = ["red ball", "green_Box!", "blue cone"]
COLORS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200]])


def pictures(count: int, seed: int) -> list[tuple[np.ndarray, int]]:
    """uint8 (h, w, 3) of several sizes and shapes, in the color of its class, and so noisy that some are mistaken."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        label = int(rng.integers(3)) if number > 2 else number  # every class is there
        height, width = ((24, 24), (40, 24), (32, 57), (90, 30))[rng.integers(4)]
        color = np.clip(COLORS[label] + rng.normal(0, 90, 3), 0, 255)
        noise = rng.normal(0, 30, (height // 4 + 1, width // 4 + 1, 3))
        coarse = Image.fromarray(np.clip(color + noise, 0, 255).astype(np.uint8))
        made.append((np.array(coarse.resize((width, height), Image.Resampling.BICUBIC)), label))
    return made


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_folders(folder, split: str, made: list[tuple[np.ndarray, int]], broken: int = 0):
    """Class folders; the last `broken` files are cut off in the middle."""
    for number, (pixels, label) in enumerate(made):
        path = folder / split / CLASSES[label] / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = png(pixels)
        path.write_bytes(content[: len(content) // 2] if number >= len(made) - broken else content)
    return folder


def write_parquet(
    folder, split: str, made: list[tuple[np.ndarray, int]], files: int, names: list[str] | None = CLASSES
):
    """Parquet files, as the Hub has them."""
    folder.mkdir(parents=True, exist_ok=True)
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    for file in range(files):
        part = made[file * len(made) // files : (file + 1) * len(made) // files]
        rows = {
            "image": [{"bytes": png(pixels), "path": None} for pixels, _ in part],
            "label": [label for _, label in part],
        }
        path = folder / f"{split}-{file:05d}-of-{files:05d}.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    return folder


def write_tar(folder, split: str, made: list[tuple[np.ndarray, int]]):
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
        for number, (pixels, label) in enumerate(made):
            for extension, content in {"png": png(pixels), "cls": str(label).encode()}.items():
                info = tarfile.TarInfo(f"{number:06d}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def start_process(target, *arguments, rank: int = 0, world: int = 1, port: int = 0):
    """`target(*arguments)` in a process of its own, one of `world` that Accelerate joins over gloo."""
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_enter, args=(target, arguments, rank, world, port))
    process.start()
    return process


def run_processes(target, *arguments, world: int = 2) -> None:
    """`target(*arguments)` on `world` processes; fails when one of them does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [start_process(target, *arguments, rank=rank, world=world, port=port) for rank in range(world)]
    for process in processes:
        process.join(timeout=100)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung and [process.exitcode for process in processes] == [0] * world


def _enter(target, arguments, rank, world, port):
    os.environ.update(ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    if world > 1:
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        os.environ.update({name: str(value) for name, value in place.items()})
    import torch
    from accelerate import PartialState

    torch.set_num_threads(1)
    target(*arguments)
    assert world == 1 or PartialState().num_processes == world
