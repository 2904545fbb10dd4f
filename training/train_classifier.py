"""
Train a small classifier, on whose features the quality of samples is measured.

From labelled pictures, by cross-entropy with smoothed labels. The result is a folder with the model, the features of
real pictures and a card; see README.md here for examples. A run that is killed at any moment goes on from its last
checkpoint with the loss curve it would have had.
"""

import argparse

import torch
import torch.nn.functional as F

from genie_diffusers import ImageClassifier
from genie_diffusers.learning.arguments import repository_of, source_of
from genie_diffusers.learning.classifiers import parse_args, picture_features, random_crop
from genie_diffusers.learning.data import TrainingStream, pictures_of
from genie_diffusers.learning.run import Run
from genie_diffusers.metrics import ReferenceFeatures


def main(args: argparse.Namespace) -> None:
    run = Run(args)
    with run.accelerator.main_process_first():
        pictures, test_pictures = (
            pictures_of(args, args.resolution, 3, labelled=True, split=split)
            for split in (args.dataset_split, args.test_split)
        )
    model = ImageClassifier(
        sample_size=args.resolution,
        num_classes=max(pictures.unique("label")) + 1,
        block_out_channels=tuple(args.block_out_channels),
        layers_per_block=args.layers_per_block,
    )
    shape = (model.config.in_channels, args.resolution, args.resolution)
    stream = TrainingStream(pictures, shape, (0, 0, 0), args.seed, args.random_flip)
    run.learn(model)
    batches = run.batches(stream)

    def loss(step: int, part: int) -> torch.Tensor:
        batch = next(batches)
        images = random_crop(batch["images"], args.crop_padding, batch["choices"]).to(run.device)
        logits = run.model(images).float()
        return F.cross_entropy(logits, batch["labels"].to(run.device), label_smoothing=args.label_smoothing)

    run.fit(loss, f"{model.num_parameters():,} parameters, {len(pictures)} pictures")
    if run.is_main:
        finish(run, model, pictures, test_pictures)
    run.end()


def finish(run: Run, model: ImageClassifier, pictures, test_pictures) -> None:
    """Save the model in half precision with the features of both splits, and a card with the accuracy."""
    args = run.args
    # The features are those of the saved, rounded weights.
    model.eval().half().save_pretrained(args.output_dir)
    model.float()
    features, test_features = (picture_features(model, split) for split in (pictures, test_pictures))
    mean, covariance = features.double().mean(dim=0), features.double().T.cov()
    ReferenceFeatures(mean, covariance, test_features).save_pretrained(args.output_dir)
    predictions = model.cpu().classifier(test_features).argmax(dim=1)
    accuracy = (predictions == torch.tensor(test_pictures["label"])).double().mean()
    run.publish(
        "A small classifier trained with genie_diffusers. The distance of generated from real pictures is measured on "
        "its features: numbers that compare samplers of one model, and that nothing measured on another network "
        "compares to.",
        usage=(
            "from genie_diffusers import ImageClassifier\n\n"
            f'classifier = ImageClassifier.from_pretrained("{repository_of(args)}")\n'
            "features = classifier.features(images)  # pictures in [-1, 1]"
        ),
        facts={
            "Data": f"{source_of(args.dataset_name)}, {len(pictures):,} pictures",
            "Resolution": f"{args.resolution}x{args.resolution}, averaged over areas",
            "Parameters": f"{model.num_parameters():,}",
            "Classes": f"{model.config.num_classes}",
            "Features": f"{args.block_out_channels[-1]}",
            "Steps": f"{args.max_train_steps:,} of {run.total_batch_size} pictures",
            "Accuracy": f"{accuracy:.2%} of the {len(test_pictures):,} pictures of the test split",
        },
        pipeline_tag="image-classification",
    )


if __name__ == "__main__":
    main(parse_args())
