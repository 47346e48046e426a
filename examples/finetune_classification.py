"""Fine-tune a student on labeled images, with datasets and transformers.Trainer.

    python examples/finetune_classification.py runs/quickstart/run/student IMAGES --output runs/classifier

IMAGES is what `datasets.load_dataset` opens, such as a folder with train/CLASS/*.png and test/CLASS/*.png. The folder
that is written opens with `AutoModelForImageClassification` and in `pipeline("image-classification")`.

On the images of tests/examples (stripes in four directions, 64 of each to train on and 16 to test) the smallest
student goes from 25 % by chance to more than 90 % in 60 steps.
"""

import argparse

import numpy as np
from datasets import load_dataset
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

from transformers_radio import RadioImageProcessor  # with it, the Auto classes know all students


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the metrics of the last evaluation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="folder or Hub id")
    parser.add_argument("data", help="what datasets.load_dataset opens")
    parser.add_argument("--output", required=True)
    parser.add_argument("--split", default="test", help="what to evaluate on")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--label-column", default="label")
    parser.add_argument("--size", type=int, help="side in pixels; the student's own unless given")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--freeze", action="store_true", help="train the head alone: a linear probe")
    args = parser.parse_args(argv)

    set_seed(0)
    data = load_dataset(args.data)
    names = data["train"].features[args.label_column].names
    sizes = {"size": {"height": args.size, "width": args.size}} if args.size else {}
    processor = RadioImageProcessor.from_pretrained(args.student, **sizes)
    model = AutoModelForImageClassification.from_pretrained(
        args.student,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        trust_remote_code=True,
    )
    model.base_model.requires_grad_(not args.freeze)

    def prepare(batch):
        images = [image.convert("RGB") for image in batch[args.image_column]]
        return {**processor(images, return_tensors="pt"), "labels": batch[args.label_column]}

    def accuracy(prediction):
        return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}

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
            weight_decay=0.05,
            logging_steps=max(1, args.steps // 20),
            save_strategy="no",
            remove_unused_columns=False,  # the images
            report_to="none",
        ),
        train_dataset=data["train"].with_transform(prepare),
        eval_dataset=data[args.split].with_transform(prepare),
        compute_metrics=accuracy,
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    processor.save_pretrained(args.output)
    print(f"accuracy on {args.split}: {100 * metrics['eval_accuracy']:.2f} %")
    return metrics


if __name__ == "__main__":
    main()
