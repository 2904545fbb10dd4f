"""
Interpolate between real pictures in the space of noise.

    python examples/interpolate.py first.png second.png --output interpolation.png

Both pictures are encoded with `GenieInverseScheduler`, the two noises are interpolated along the great circle between
them, and every point is decoded. Any even number of pictures may be named; each pair makes two rows: the pictures of
the noises in between and, for comparison, the mixtures of the pixels. The first and last column are the originals.
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps

from genie_diffusers import GenieInverseScheduler, GeniePipeline, GenieScheduler
from genie_diffusers.cli import PACKAGED_MODEL

ENCODER = Path(PACKAGED_MODEL).parent / "genie-inverse-cifar10-16"


def slerp(first: torch.Tensor, second: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Points on the great circle from `first` to `second`, whose length is between theirs."""
    angle = torch.arccos(torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0).clamp(-1, 1))
    shares = shares.reshape(-1, *(1,) * first.ndim)
    if angle < 1e-3:
        return torch.lerp(first[None], second[None], shares)
    return (torch.sin((1 - shares) * angle) * first + torch.sin(shares * angle) * second) / torch.sin(angle)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", help="An even number of pictures.")
    parser.add_argument("--model", default=PACKAGED_MODEL, help="Folder or Hub id of a `GeniePipeline`.")
    parser.add_argument("--encoder", default=ENCODER, help="Folder or Hub id of a `GenieInverseScheduler`.")
    parser.add_argument("--steps", type=int, default=20, help="Model calls, each way.")
    parser.add_argument("--points", type=int, default=7, help="Noises from one picture to the other.")
    parser.add_argument("--output", default="interpolation.png")
    args = parser.parse_args()
    if len(args.images) % 2 or args.points < 2:
        parser.error("`images` must be an even number and `--points` at least 2.")

    pipe = GeniePipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size
    opened = [
        ImageOps.fit(Image.open(path).convert("RGB"), (side, side), Image.Resampling.BOX) for path in args.images
    ]
    pictures = 2 * pipe.image_processor.pil_to_numpy(opened) - 1
    pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()

    encoder = GenieInverseScheduler.from_pretrained(args.encoder)
    pipe.scheduler = encoder
    pipe.scheduler.attach(None)  # the rows of this encoder are for a decoder without a head
    noises = pipe(latents=pictures, num_inference_steps=args.steps, output_type="latent").images

    pipe.scheduler = GenieScheduler.from_config(encoder.config)
    pipe.scheduler.attach(None)
    shares = torch.linspace(0, 1, args.points)
    rows = []
    for pair in range(0, len(pictures), 2):
        between = slerp(noises[pair], noises[pair + 1], shares)
        decoded = pipe(latents=between, num_inference_steps=args.steps).images
        mixed = torch.lerp(pictures[pair][None], pictures[pair + 1][None], shares[:, None, None, None])
        for images in (decoded, pipe.image_processor.postprocess(mixed)):
            rows += [opened[pair], *images, opened[pair + 1]]
    large = [image.resize((6 * side, 6 * side), Image.Resampling.NEAREST) for image in rows]
    make_image_grid(large, rows=len(opened), cols=args.points + 2).save(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
