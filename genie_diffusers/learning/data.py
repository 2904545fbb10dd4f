"""Pictures, and an endless stream of training samples in which each is a pure function of its position."""

import argparse
from collections.abc import Iterator

import datasets
import numpy as np
import torch
from PIL import Image


def load_pictures(
    dataset_name: str,
    resolution: int,
    channels: int,
    *,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    image_column: str = "image",
    label_column: str | None = None,
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """
    A data set of pictures, each cut to its central square and averaged over areas to `resolution`, decoded once.

    Args:
        dataset_name (`str`): Hub id, or a folder that `datasets.load_dataset` can open.
        resolution (`int`): Side of the result in pixels. No picture may be smaller.
        channels (`int`): 1 for grayscale, 3 for RGB.
        dataset_config_name (`str`, *optional*): Configuration of the data set.
        dataset_split (`str`, defaults to `"train"`): Split of the data set.
        image_column (`str`, defaults to `"image"`): Column of pictures.
        label_column (`str`, *optional*): Column of integer labels.
        cache_dir (`str`, *optional*): Folder of the data set cache.

    Returns:
        `datasets.Dataset`: `"pixels"`, the bytes of a (resolution, resolution, channels) array, and `"label"`.

    Raises:
        ValueError:
            If a column is missing or of another type, a picture is too small, or `channels` is neither 1 nor 3.
    """
    if channels not in (1, 3):
        raise ValueError(f"`channels` must be 1 (grayscale) or 3 (RGB), got {channels}.")
    columns = {"image": image_column} | ({"label": label_column} if label_column is not None else {})
    return open_dataset(dataset_name, columns, dataset_config_name, dataset_split, cache_dir).map(
        _to_pixels,
        fn_kwargs={"resolution": resolution, "mode": "RGB" if channels == 3 else "L"},
        remove_columns="image",
        desc=f"Averaging to {resolution}x{resolution}",
    )


def pictures_of(
    args: argparse.Namespace, resolution: int, channels: int, labelled: bool, split: str | None = None
) -> datasets.Dataset:
    """The pictures that the arguments of a recipe name, see [`load_pictures`]; labels where they are needed."""
    return load_pictures(
        args.dataset_name,
        resolution,
        channels,
        dataset_config_name=args.dataset_config_name,
        dataset_split=split or args.dataset_split,
        image_column=args.image_column,
        label_column=args.label_column if labelled else None,
        cache_dir=args.cache_dir,
    )


def _to_pixels(example: dict, resolution: int, mode: str) -> dict:
    return {"pixels": square(example["image"], resolution, mode).tobytes()}


def open_dataset(
    dataset_name: str,
    columns: dict[str, str],
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    cache_dir: str | None = None,
) -> datasets.Dataset:
    """
    A data set with nothing but the named columns, renamed to what they are for: `"image"`, `"label"` or `"caption"`.

    Raises:
        ValueError: If a column is missing or of another type.
    """
    dataset = datasets.load_dataset(dataset_name, dataset_config_name, split=dataset_split, cache_dir=cache_dir)
    held = {"image": "pictures", "label": "integers", "caption": "text"}
    for role, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(
                f"`--{role}_column` must be one of the columns {', '.join(dataset.column_names)} of "
                f"{dataset_name}, got {column!r}."
            )
        feature = dataset.features[column]
        kind = str(getattr(feature, "dtype", ""))
        fits = {"image": isinstance(feature, datasets.Image), "label": "int" in kind, "caption": "string" in kind}
        if not fits[role]:
            raise ValueError(f"`--{role}_column` must hold {held[role]}, got {column!r} of type {feature}.")
    return dataset.select_columns(list(columns.values())).rename_columns(
        {column: role for role, column in columns.items()}
    )


def square(image: Image.Image, resolution: int, mode: str) -> Image.Image:
    """The central square, averaged over areas to `resolution`."""
    image = image.convert(mode)
    side = min(image.size)
    if side < resolution:
        raise ValueError(
            f"`--resolution` must not exceed the side of any picture, got {resolution} and a picture of "
            f"{image.width}x{image.height} pixels."
        )
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.BOX, box=box)


def from_pixels(pixels: list[bytes], shape: tuple[int, int, int]) -> np.ndarray:
    """Pictures of `shape`, in channels, height and width, in [−1, 1]."""
    channels, height, width = shape
    values = np.frombuffer(b"".join(pixels), dtype=np.uint8).reshape(-1, height, width, channels)
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2), dtype=np.float32) / 127.5 - 1.0


def check_labels(labels: list[int], classes: int) -> None:
    if min(labels) < 0 or max(labels) >= classes:
        raise ValueError(
            f"Labels must be between 0 and {classes - 1} for this model (its classes, less the null class), got "
            f"{min(labels)} to {max(labels)}."
        )


class TrainingStream(torch.utils.data.Dataset):
    """
    An endless stream of training samples, each a pure function of `seed` and its position in the stream.

    A run that resumes at any position, or is split over any number of processes or workers, therefore sees the same
    pictures in the same order with the same flips, dropped labels, noise and times. Position p is picture p modulo
    the size of the data set, in an order drawn anew every epoch.

    Args:
        pictures (`datasets.Dataset`): From [`load_pictures`].
        image_shape (`tuple[int, int, int]`): Channels, height and width of a picture.
        noise_shape (`tuple[int, int, int]`): Shape of the noise, in channels, height and width.
        seed (`int`): Any non-negative number.
        random_flip (`bool`, defaults to `False`): Flip half of the pictures horizontally.
        label_dropout (`float`, defaults to 0.0): Probability of replacing a label by `null_class`.
        null_class (`int`, *optional*): The class that stands for no class.
    """

    def __init__(
        self,
        pictures: datasets.Dataset,
        image_shape: tuple[int, int, int],
        noise_shape: tuple[int, int, int],
        seed: int,
        random_flip: bool = False,
        label_dropout: float = 0.0,
        null_class: int | None = None,
    ):
        self.pictures, self.image_shape, self.noise_shape, self.seed = pictures, image_shape, noise_shape, seed
        self.random_flip, self.label_dropout, self.null_class = random_flip, label_dropout, null_class
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitems__(self, positions: list[int]) -> dict[str, torch.Tensor]:
        """
        The samples at `positions`: `"images"` in [−1, 1], standard normal `"noise"`, `"times"` uniform on [0, 1) in
        float64, `"choices"` (two more such numbers, for what a script draws besides) and, if the data set has them,
        `"labels"`.
        """
        images, labels = self._rows([self._picture(position) for position in positions])
        batch = {"images": images, "times": np.empty(len(positions))}
        batch["noise"] = np.empty((len(positions), *self.noise_shape), dtype=np.float32)
        batch["choices"] = np.empty((len(positions), 2))
        if labels is not None:
            batch["labels"] = np.array(labels, dtype=np.int64)
        for i, position in enumerate(positions):
            generator = np.random.default_rng([self.seed, 1, position])
            batch["times"][i], flip, drop = generator.random(3)
            generator.standard_normal(out=batch["noise"][i], dtype=np.float32)
            if self.random_flip and flip < 0.5:
                images[i] = images[i, :, :, ::-1].copy()
            if drop < self.label_dropout:
                batch["labels"][i] = self.null_class
            batch["choices"][i] = generator.random(2)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def _rows(self, numbers: list[int]) -> tuple[np.ndarray, list[int] | None]:
        """The pictures with these numbers, and their labels if there are any."""
        rows = self.pictures[numbers]
        return from_pixels(rows["pixels"], self.image_shape), rows.get("label")

    def _picture(self, position: int) -> int:
        epoch, place = divmod(position, len(self.pictures))
        if epoch != self._epoch:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.pictures))
            self._epoch, self._order = epoch, order
        return int(self._order[place])


class PositionSampler(torch.utils.data.Sampler):
    """The stream positions of one process's batches from `start` on; all processes together leave no gap."""

    def __init__(self, start: int, batch_size: int, process_index: int, num_processes: int):
        self.first, self.batch_size = start + process_index * batch_size, batch_size
        self.stride = num_processes * batch_size

    def __iter__(self) -> Iterator[list[int]]:
        first = self.first
        while True:
            yield list(range(first, first + self.batch_size))
            first += self.stride
