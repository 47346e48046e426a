"""COCO files of four images with every kind of mask."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from segment_anything import SamPredictor

from helpers.tiny_sam import literal_iou, picture
from transformers_radio.evaluation.sam_coco.config import SamCocoConfig


def run_lengths(mask):
    """COCO's uncompressed RLE: lengths of runs down the columns, background first."""
    counts, value = [0], False
    for pixel in np.asarray(mask).T.flatten():
        if pixel != value:
            counts.append(0)
            value = not value
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compressed(mask):
    """COCO's compressed RLE: from the fourth on differences to the count two before, in 5-bit groups with a sign."""
    text, counts = "", run_lengths(mask)["counts"]
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        last = False
        while not last:
            group, value = value & 31, value >> 5
            last = value == (-1 if group & 16 else 0)
            text += chr(48 + group + (0 if last else 32))
    return {"size": list(mask.shape), "counts": text}


def rectangle(size, x0, y0, x1, y1):
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def polygon(x0, y0, x1, y1):
    return [x0, y0, x1, y0, x1, y1, x0, y1]


class Dataset:
    """COCO-format files of four images; `truths` holds the literal mask of each annotation that counts."""

    def __init__(self, folder: Path):
        self.folder, self.annotations, self.truths, self.boxes = folder, [], {}, {}
        self.sizes = {7: (40, 56), 3: (90, 60), 12: (64, 64), 4: (30, 30)}  # image 4 has nothing to prompt for
        (folder / "val2017" / "deep").mkdir(parents=True)
        (folder / "annotations").mkdir()
        for image_id, size in self.sizes.items():
            Image.fromarray(picture(size, image_id)).save(folder / "val2017" / "deep" / f"{image_id}.png")
        rng = np.random.default_rng(0)
        for image_id, size in list(self.sizes.items())[:3]:
            blob = rectangle(size, 9, 9, 28, 25) & (rng.random(size) < 0.8)
            self.add(image_id, [polygon(4, 6, 30, 20)], rectangle(size, 4, 6, 30, 20), (4, 6, 30, 20))
            parts = rectangle(size, 2, 3, 9, 12) | rectangle(size, 20, 5, 28, 26)
            self.add(image_id, [polygon(2, 3, 9, 12), polygon(20, 5, 28, 26)], parts, (2, 3, 28, 26))
            self.add(image_id, run_lengths(blob), blob, (9, 9, 28, 25))
            self.add(image_id, compressed(~blob), ~blob, (0, 0, size[1], size[0]))
            self.add(image_id, run_lengths(blob), None, (9, 9, 28, 25), iscrowd=1)
            self.add(image_id, run_lengths(np.zeros(size)), None, (1, 1, 2, 2))
        self.add(12, [], None, (1, 1, 2, 2))
        self.write()

    def add(self, image_id, segmentation, truth, box, iscrowd=0):
        number = 100 + len(self.annotations)
        x0, y0, x1, y1 = box
        entry = {"id": number, "image_id": image_id, "category_id": 1 + number % 2, "iscrowd": iscrowd}
        entry |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": segmentation}
        entry |= {"area": 0 if truth is None else int(truth.sum())}
        self.annotations.append(entry)
        if truth is not None:
            self.truths[number], self.boxes[number] = truth, np.array(box)

    def content(self):
        images = [
            {"id": image_id, "file_name": f"deep/{image_id}.png", "height": size[0], "width": size[1]}
            for image_id, size in self.sizes.items()
        ]
        return {"images": images, "annotations": self.annotations, "categories": [{"id": 1}, {"id": 2}]}

    def write(self, content=None, name="annotations/instances_val2017.json"):
        (self.folder / name).write_text(json.dumps(self.content() if content is None else content))

    def config(self, **changes):
        return SamCocoConfig(data=str(self.folder), **changes)

    def count_crowds(self):
        """Crowd regions are the same blob as the annotation two before them."""
        for number in [entry["id"] for entry in self.annotations if entry["iscrowd"]]:
            self.truths[number], self.boxes[number] = self.truths[number - 2], self.boxes[number - 2]

    def literal_score(self, sam, best_of_three=False):
        """One predictor call and one set of pixels per annotation."""
        predictor, scores = SamPredictor(sam), {}
        for image_id, size in self.sizes.items():
            predictor.set_image(picture(size, image_id))
            for entry in self.annotations:
                number = entry["id"]
                if entry["image_id"] == image_id and number in self.truths:
                    masks, predicted, _ = predictor.predict(box=self.boxes[number], multimask_output=best_of_three)
                    scores[number] = literal_iou(masks[predicted.argmax()], self.truths[number])
        return 100 * np.mean(list(scores.values()))
