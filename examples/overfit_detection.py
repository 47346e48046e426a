"""A student as the backbone of torchvision's Mask R-CNN, trained on four images until it finds every object.

    python examples/overfit_detection.py [STUDENT] [--steps 40]

STUDENT is the folder or Hub id of a student of any type; a small one with random weights when missing. The images are
drawn here: red and blue rectangles on noise. It prints the losses, and at the end how many of the objects are found
(right class, intersection over union of box and mask above 0.5).
"""

import argparse

import torch
from torchvision.ops import box_iou

from transformers_radio import RadioConfig, RadioModel
from transformers_radio.integrations import mask_rcnn

SIDE = 96  # of the images, in pixels
LEARNING_RATE = 1e-3
COLORS = {1: 0, 2: 2}  # class -> its channel: red, blue


def draw(seed: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An image (3, SIDE, SIDE) in [0, 1] with one rectangle of each class, and torchvision's target for it."""
    generator = torch.Generator().manual_seed(seed)
    image = 0.3 * torch.rand(3, SIDE, SIDE, generator=generator)
    boxes, masks = [], []
    for number, channel in enumerate(COLORS.values()):
        height, width = torch.randint(SIDE // 4, SIDE * 11 // 24, (2,), generator=generator).tolist()
        top = int(torch.randint(0, SIDE - height, (1,), generator=generator))
        left = number * SIDE // 2 + int(torch.randint(0, max(1, SIDE // 2 - width), (1,), generator=generator))
        mask = torch.zeros(SIDE, SIDE, dtype=torch.uint8)
        mask[top : top + height, left : left + width] = 1
        image[channel][mask.bool()] = 1.0
        boxes.append([left, top, left + width, top + height])
        masks.append(mask)
    target = {"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(list(COLORS)), "masks": torch.stack(masks)}
    return image, target


def small_student() -> RadioModel:
    config = RadioConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2.0, max_img_size=SIDE)
    return RadioModel(config)


@torch.no_grad()
def count_found(model, images, targets) -> int:
    """Objects for which the model's best detection of their class has the right box and mask."""
    found = 0
    for output, target in zip(model.eval()(images), targets, strict=True):
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            best = (output["labels"] == label).nonzero()[:1, 0]  # sorted by score
            for index in best:
                predicted = output["masks"][index, 0] > 0.5
                overlap = (predicted & mask.bool()).sum() / (predicted | mask.bool()).sum()
                found += bool(overlap > 0.5 and box_iou(output["boxes"][index][None], box[None]) > 0.5)
    return found


def main(arguments: list[str] | None = None) -> float:
    """Returns the share of the objects that were found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", nargs="?", help="folder or Hub id")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    student = options.student or small_student()
    # few proposals and narrow maps: there are two simple objects in an image
    few = {"rpn_post_nms_top_n_train": 64, "box_batch_size_per_image": 16, "box_detections_per_img": 10}
    few |= {"rpn_post_nms_top_n_test": 64, "out_channels": 64}
    model = mask_rcnn(student, num_classes=1 + len(COLORS), image_size=SIDE, **few)
    images, targets = (list(one) for one in zip(*(draw(seed) for seed in range(4)), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    for step in range(options.steps):
        losses = model.train()(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    objects = sum(len(target["labels"]) for target in targets)
    found = count_found(model, images, targets)
    print(f"found {found} of {objects} objects")
    return found / objects


if __name__ == "__main__":
    main()
