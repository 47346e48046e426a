"""Fine-tune a student on images with masks, with datasets and transformers.Trainer: the paper's linear probe, or all.

    python examples/finetune_segmentation.py runs/quickstart/run/student SCENES --classes 3 --output runs/segmenter

SCENES is what `datasets.load_dataset` opens, with a column of images and one of masks whose gray values are classes;
255 does not count. Without --all the student is frozen and a batch norm and a 1x1 convolution are trained (paper,
section 5.3). The folder that is written opens with `AutoModelForSemanticSegmentation` and in
`pipeline("image-segmentation")`.

On the images of tests/examples (striped regions in two directions on noise, 64 to train on and 16 to test) the
smallest student, all of it trained, reaches more than 90 % mIoU in 80 steps; one class everywhere has less than 20 %.
"""

import argparse

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainingArguments, set_seed

from transformers_radio import RadioImageProcessor  # with it, the Auto classes know all students
from transformers_radio.evaluation.segmentation.miou import confusion_matrix, iou_scores


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the metrics of the last evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="folder or Hub id")
    parser.add_argument("data", help="what datasets.load_dataset opens")
    parser.add_argument("--output", required=True)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--split", default="test", help="what to evaluate on")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--mask-column", default="mask")
    parser.add_argument("--size", type=int, default=512, help="side in pixels")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--all", action="store_true", help="train the student too; choose a rate of about 1e-4")
    args = parser.parse_args(argv)

    set_seed(0)
    data = load_dataset(args.data)
    processor = RadioImageProcessor.from_pretrained(args.student, size={"height": args.size, "width": args.size})
    model = AutoModelForSemanticSegmentation.from_pretrained(
        args.student, num_labels=args.classes, trust_remote_code=True
    )
    model.base_model.requires_grad_(args.all)

    def prepare(batch):
        images = [image.convert("RGB") for image in batch[args.image_column]]
        masks = [mask.resize((args.size, args.size), Image.Resampling.NEAREST) for mask in batch[args.mask_column]]
        labels = [torch.from_numpy(np.array(mask, dtype=np.int64)) for mask in masks]
        return {**processor(images, return_tensors="pt"), "labels": labels}

    def scores(prediction):
        found, labels = torch.from_numpy(prediction.predictions), torch.from_numpy(prediction.label_ids)
        return {"miou": iou_scores(confusion_matrix(found, labels, args.classes))["mIoU"]}

    def classes_of(logits, labels):  # of each batch, so that no logits are kept
        return torch.nn.functional.interpolate(logits.float(), labels.shape[-2:], mode="bilinear").argmax(1)

    trainer = Trainer(
        model,
        TrainingArguments(
            args.output,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            warmup_steps=args.steps // 10,
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            logging_steps=max(1, args.steps // 20),
            save_strategy="no",
            remove_unused_columns=False,  # the images
            report_to="none",
        ),
        train_dataset=data["train"].with_transform(prepare),
        eval_dataset=data[args.split].with_transform(prepare),
        compute_metrics=scores,
        preprocess_logits_for_metrics=classes_of,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    processor.save_pretrained(args.output)
    print(f"mIoU on {args.split}: {metrics['eval_miou']:.2f} %")
    return metrics


if __name__ == "__main__":
    main()
