"""LoRA below a projector at low resolution: does the scale of the features make the loss jump, and what helps?

    transformers-radio quickstart student=vit
    python benchmarks/lora_stability.py runs/quickstart

As in LLaVA, a projector (Linear, GELU, Linear) reads the features of a student with LoRA, here averaged for a linear
classifier of the quickstart's 96 classes. Compared: the features as they are; a LayerNorm in front of the projector; a
feature normalizer, which subtracts the mean and divides by the standard deviation of each channel, measured once on
frozen features. `--scale` multiplies the features, as a network without a final norm may have any scale.

A spike is a step whose loss is above 1.5 times the median of the 20 steps before it. Prints a Markdown table.
"""

import argparse
import statistics
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from transformers_radio import RadioModel
from transformers_radio.quickstart.measure import resize_images
from transformers_radio.quickstart.scenes import CLASS_NAMES
from transformers_radio.quickstart.teacher_data import Split, load_split

TARGETS = r".*encoder\.layer\.\d+\.(attention\.[qkvo]_proj|mlp\.fc[12])"


class Standardize(nn.Module):
    """`(x - mean) / std` per channel, of features `(N, h*w, D)` that it is given once."""

    def __init__(self, features: torch.Tensor):
        super().__init__()
        flat = features.flatten(0, 1)  # (N, h*w, D) -> (N*h*w, D)
        self.mean, self.std = nn.Buffer(flat.mean(0)), nn.Buffer(flat.std(0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return (features - self.mean) / self.std


def train(folder: str, images: torch.Tensor, labels: torch.Tensor, args: argparse.Namespace, kind: str, seed: int):
    """Losses of all steps, and the largest norm of the gradient."""
    torch.manual_seed(seed)
    student = RadioModel.from_pretrained(folder).with_adaptors([]).eval()  # eval: no random crops of positions
    with torch.no_grad():
        example = args.scale * student(images[:256]).features
    width = student.feature_dim
    norm = {
        "as they are": nn.Identity,
        "LayerNorm": lambda: nn.LayerNorm(width),
        "normalizer": lambda: Standardize(example),
    }
    projector = nn.Sequential(norm[kind](), nn.Linear(width, 256), nn.GELU(), nn.Linear(256, 256))
    classifier = nn.Linear(256, len(CLASS_NAMES))
    student = get_peft_model(student, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS))
    weights = [w for part in (student, projector, classifier) for w in part.parameters() if w.requires_grad]
    optimizer, losses, largest = torch.optim.AdamW(weights, lr=args.learning_rate), [], 0.0
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1, (step + 1) / 20)
        chosen = torch.randint(len(images), (args.batch_size,))
        features = args.scale * student(images[chosen]).features  # (B, h*w, D)
        loss = nn.functional.cross_entropy(classifier(projector(features).mean(1)), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        largest = max(largest, torch.nn.utils.get_total_norm([w.grad for w in weights]).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, largest


def spikes(losses: list[float]) -> int:
    return sum(losses[i] > 1.5 * statistics.median(losses[i - 20 : i]) for i in range(20, len(losses)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the quickstart")
    parser.add_argument("--side", type=int, default=32, help="of the images, in pixels")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    data: Split = load_split(args.folder / "world", "train", 1500)
    images = resize_images(data.images, args.side).float() / 255
    print("| features | spikes | largest loss after 20 steps | largest gradient | loss of the last 20 steps |")
    print("|---|---|---|---|---|")
    for kind in ("as they are", "LayerNorm", "normalizer"):
        runs = [
            train(str(args.folder / "run-vit" / "student"), images, data.classes, args, kind, s)
            for s in range(args.seeds)
        ]
        count = sum(spikes(losses) for losses, _ in runs)
        top = max(max(losses[20:]) for losses, _ in runs)
        last = statistics.mean(statistics.mean(losses[-20:]) for losses, _ in runs)
        print(f"| {kind} | {count} | {top:.2f} | {max(norm for _, norm in runs):.1f} | {last:.2f} |", flush=True)


if __name__ == "__main__":
    main()
