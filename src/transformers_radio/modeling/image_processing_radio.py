"""Image processor of RADIO students: any image in, RGB in [0, 1] at a supported resolution out.

The mean and standard deviation belong to the model (its input conditioner), so nothing is normalized here.
"""

import base64
import os

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import InterpolationMode
from transformers import image_utils
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageType, PILImageResampling, get_image_type
from transformers.processing_utils import ImagesKwargs

from .decoding_radio import MAX_PIXELS, SkippedImage, decode_rgb, load_rgb, read_file
from .errors_radio import naming_checkpoint


class RadioImageProcessorKwargs(ImagesKwargs, total=False):
    """Options beyond those of transformers; see [`RadioImageProcessor`]."""

    size_divisor: int | None
    return_pixel_mask: bool | None
    return_image_sizes: bool | None


_SIZES = "positive integers as {'height': h, 'width': w}, {'shortest_edge': s} or {'longest_edge': s}"
_FILTERS = [
    *image_utils.pil_torch_interpolation_mapping,
    *InterpolationMode,
    *(mode.value for mode in InterpolationMode),
]


def _is_positive(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and bool(value >= 1)


def _unreadable(name: str, error: Exception) -> ValueError:
    detail = " ".join(str(getattr(error, "strerror", None) or error).split())
    return ValueError(f"{name} cannot be read as an image ({detail}); replace or convert it.")


class RadioImageProcessor(TorchvisionBackend):
    """Turns images into `pixel_values` (batch_size, 3, height, width), float32 in [0, 1], at a supported resolution.

    Takes one image or a batch, as paths, PIL images, numpy arrays or torch tensors, gray, RGB or RGBA (laid over
    white). Integer arrays hold 0..255 and are divided by 255; float ones must already be in [0, 1] and keep their
    values; boolean ones are black and white. Files (by path, URL or as base64 text) and PIL images are read as in
    training: upright, as their EXIF orientation says, 16-bit gray scaled to 8 bits, the first frame of several. Files
    of more than 120 million pixels are refused; reading one takes up to 25 bytes of memory per pixel.

    `size` selects how an image is resized (bicubic with antialiasing by default):

    - `{"height": h, "width": w}`: to this size; the aspect ratio is not kept. An int means a square.
    - `{"shortest_edge": s}`: the shortest side to `s`, the aspect ratio kept, then each side to the nearest multiple
      of `size_divisor`.
    - `{"longest_edge": s}`: the longest side to `s`, the aspect ratio kept, then zeros (black) at the bottom and right
      up to the next multiple, or up to the largest image of the batch. This is what the paper gives LLaVA-1.5, with
      s = 432 (section 5.4). Also returns `pixel_mask` (batch_size, height, width), int64, 1 on the image and 0 on the
      padding. A RADIO student takes it, `model(**inputs)`, and then computes each image as if it were alone in the
      batch; without the mask it attends to the padding like to any other patch.

    Sides named in `size` that are not multiples of `size_divisor` are rounded to the nearest (at least one step).

    Args:
        size_divisor (int, defaults to 16): multiple that both sides must be of; the model's `min_resolution_step`.
        return_pixel_mask (bool, defaults to True): set it to False for models that take no mask, such as UperNet.
        return_image_sizes (bool, defaults to False): also return `image_sizes` (batch_size, 2), int64, the (height,
            width) of each image without the padding of its batch, as [`RadioLlavaProcessor`] needs them.

    Raises:
        ValueError: for another kind of `size`; for options of a wrong type; for `do_normalize`, `do_center_crop` or
            `do_pad`; for files that cannot be read; for a `size` that makes more than 120 million pixels of an image;
            for float arrays outside [0, 1]; for integers outside 0..255; for PIL images without a defined range (mode
            "F", or "I" outside 0..65535).
    """

    valid_kwargs = RadioImageProcessorKwargs

    resample = PILImageResampling.BICUBIC
    size = {"height": 432, "width": 432}  # the paper's resolution (Table 1)
    size_divisor = 16
    return_pixel_mask = True
    return_image_sizes = False
    default_to_square = True
    do_resize = True
    do_rescale = True
    do_normalize = False
    do_convert_rgb = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        with naming_checkpoint(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _standardize_kwargs(self, *args, **kwargs) -> dict:
        given = {name: kwargs.get(name) for name in ("size", "crop_size", "pad_size") if kwargs.get(name) is not None}
        try:
            kwargs = super()._standardize_kwargs(*args, **kwargs)
            size = dict(kwargs["size"])
        except Exception as error:  # arithmetic with wrong types may raise anything
            raise ValueError(f"{given or 'size=None'} is not supported; give {_SIZES}") from error
        for name in ("do_resize", "do_rescale", "do_convert_rgb", "return_pixel_mask", "return_image_sizes"):
            if kwargs[name] not in (True, False):
                raise ValueError(f"{name}={kwargs[name]!r}: expected true or false")
        if kwargs.get("do_normalize"):
            raise ValueError(
                "do_normalize=True: the model normalizes its own input; give it [0, 1] (do_normalize=False)"
            )
        for name in ("do_center_crop", "do_pad"):
            if kwargs.get(name):
                raise ValueError(
                    f"{name}=True is not supported; crop before, or choose a padded size: size={{'longest_edge': s}}"
                )
        if kwargs.get("rescale_factor", self.rescale_factor) != 1 / 255:
            raise ValueError(f"rescale_factor={kwargs['rescale_factor']}: the model takes [0, 1], which is 1 / 255")
        if kwargs["resample"] not in _FILTERS:
            raise ValueError(f"resample={kwargs['resample']!r}: expected a filter of Pillow, such as 3 (bicubic)")
        if kwargs.get("device") is not None:
            try:
                torch.empty(0, device=kwargs["device"])
            except Exception as error:  # torch raises different types for unknown, malformed and unavailable devices
                raise ValueError(f"device={kwargs['device']!r} is not a device of this machine; use 'cpu'") from error
        if not _is_positive(kwargs["size_divisor"]):
            raise ValueError(
                f"size_divisor={kwargs['size_divisor']!r} must be a positive integer; use the model's "
                "min_resolution_step"
            )
        keys = ({"height", "width"}, {"shortest_edge"}, {"longest_edge"})
        if set(size) not in keys or not all(map(_is_positive, size.values())):
            raise ValueError(f"size={size} is not supported; give {_SIZES}")
        return kwargs

    def _prepare_images_structure(self, images, *args, **kwargs):
        # transformers takes arrays of three dimensions only; a gray image may come as (height, width)
        images = self.fetch_images(images)
        batch = images if isinstance(images, (list, tuple)) else [images]
        batch = [image[None] if getattr(image, "ndim", 3) == 2 else image for image in batch]
        return super()._prepare_images_structure(batch, *args, **kwargs)

    def fetch_images(self, images):
        """Files, URLs and base64 texts as PIL images; everything else as it is.

        Raises:
            ValueError: there is no such image, or it cannot be read.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(image) for image in images]
        if isinstance(images, (str, os.PathLike)):
            return self._read(images)
        if not image_utils.is_valid_image(images):
            raise ValueError(
                f"an image of type {type(images).__name__} is not supported; give a path, URL, PIL image, "
                "numpy array or torch tensor"
            )
        return images

    def _read(self, source: str | os.PathLike[str]) -> Image.Image:
        name = os.fspath(source)
        is_file = not isinstance(source, str) or os.path.lexists(name)
        is_url = not is_file and name.startswith(("http://", "https://"))
        try:
            if is_file:
                return decode_rgb(read_file(source))
            if is_url:  # as in transformers, but with a timeout, and transparency is kept
                answer = image_utils.httpx.get(name, timeout=60, follow_redirects=True)
                return decode_rgb(answer.raise_for_status().content)
            return decode_rgb(base64.decodebytes(name.rpartition(",")[2].encode()))
        except Exception as error:  # also errors of the HTTP client
            if is_file or is_url:
                raise _unreadable(name, error) from error
            raise ValueError(
                f"{name[:100]!r} is not an image: there is no such file, and it is neither a URL nor base64 of an "
                f"image ({error})."
            ) from error

    def process_image(self, image, *args, **kwargs) -> torch.Tensor:
        """One image as a (channels, height, width) tensor: uint8 in 0..255 or float in [0, 1]."""
        if get_image_type(image) == ImageType.PIL:
            try:
                image = load_rgb(image)
            except SkippedImage as error:
                raise _unreadable(getattr(image, "filename", "") or "a PIL image", error) from error
        else:
            if 0 in image.shape:
                raise ValueError(f"an image of shape {tuple(image.shape)} has no pixels")
            dtype = str(image.dtype).removeprefix("torch.")
            if dtype == "bool":
                image = 255 * image
            elif dtype in ("uint16", "uint32", "uint64"):  # torch supports few operations on these
                image = torch.as_tensor(image).long()
            if image.ndim == 3 and image.shape[-1] == 4 and image.shape[0] not in (1, 3, 4):
                kwargs["input_data_format"] = "channels_last"  # transformers 5.20 does not infer it
        image = super().process_image(image, *args, **kwargs)
        if image.shape[0] == 4:  # transformers 5.20 leaves arrays of one and four channels as they are
            scale = 1 if image.is_floating_point() else 255
            opacity = image[3:] / scale
            image = (image[:3] * opacity + scale * (1 - opacity)).to(image.dtype)  # over white
        elif image.shape[0] == 1:
            image = image.expand(3, -1, -1)
        low, high = image.min().item(), image.max().item()
        if image.is_floating_point():
            if not (0.0 <= low and high <= 1.0):
                raise ValueError(
                    f"float images must be in [0, 1], got values from {low} to {high}; divide by 255 or pass uint8"
                )
            return image.float()
        if low < 0 or high > 255:
            raise ValueError(f"integer images must be in 0..255, got values from {low} to {high}; convert to 8 bits")
        return image.to(torch.uint8)

    def _nearest_multiple(self, side: float, divisor: int) -> int:
        return max(divisor, round(side / divisor) * divisor)

    def _output_size(self, height: int, width: int, size, divisor: int) -> tuple[int, int]:
        """`(height, width)` that an image is resized to, before any padding."""
        if size.height:
            return self._nearest_multiple(size.height, divisor), self._nearest_multiple(size.width, divisor)
        if size.shortest_edge:
            scale = size.shortest_edge / min(height, width)
            return self._nearest_multiple(height * scale, divisor), self._nearest_multiple(width * scale, divisor)
        scale = self._nearest_multiple(size.longest_edge, divisor) / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))

    def _check_pixels(self, height: int, width: int, size, image: torch.Tensor) -> None:
        if height * width > MAX_PIXELS:
            raise ValueError(
                f"size={dict(size)} makes {height} x {width} pixels of an image of {image.shape[-2]} x"
                f" {image.shape[-1]}, more than {MAX_PIXELS:,}; give a smaller size, or leave the image out"
            )

    def _preprocess(  # type: ignore[override]
        self,
        images,
        do_resize,
        size,
        size_divisor,
        resample,
        do_rescale,
        return_pixel_mask,
        return_image_sizes,
        return_tensors,
        **kwargs,
    ) -> BatchFeature:
        processed = []
        for image in images:  # each (3, height, width)
            if do_resize:
                height, width = self._output_size(image.shape[-2], image.shape[-1], size, size_divisor)
                self._check_pixels(height, width, size, image)
                image = self.resize(image, type(size)(height=height, width=width), resample=resample)
            if image.is_floating_point():
                image = image.clamp(0.0, 1.0)  # bicubic overshoots at edges
            elif do_rescale:
                image = image.float() / 255
            else:
                raise ValueError("do_rescale=False needs float images in [0, 1], got integers; leave do_rescale=True")
            processed.append(image)

        data: dict = {"pixel_values": processed}
        if do_resize and size.longest_edge:
            # up to the next multiple of the largest height and width of the batch
            height = -(-max(image.shape[-2] for image in processed) // size_divisor) * size_divisor
            width = -(-max(image.shape[-1] for image in processed) // size_divisor) * size_divisor
            self._check_pixels(height, width, size, processed[0])
            pad_size = type(size)(height=height, width=width)
            data["pixel_values"], masks = self.pad(processed, pad_size=pad_size, return_mask=True)
            if return_pixel_mask:
                data["pixel_mask"] = masks
        if return_image_sizes:
            data["image_sizes"] = [
                tuple(-(-side // size_divisor) * size_divisor for side in image.shape[-2:]) for image in processed
            ]
        shapes = sorted({tuple(image.shape) for image in data["pixel_values"]})
        if return_tensors is not None and len(shapes) > 1:
            raise ValueError(
                f"images of one batch came out in different shapes {shapes}; use size={{'height': h, 'width': w}}, "
                "size={'longest_edge': s} (pads), one image at a time, or return_tensors=None"
            )
        return BatchFeature(data=data, tensor_type=return_tensors)

    def post_process_semantic_segmentation(
        self,
        outputs,
        target_sizes: list[tuple[int, int]] | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Class maps from the `logits` (batch_size, num_labels, h, w) of a semantic segmentation model.

        Args:
            outputs: output of `RadioForSemanticSegmentation`, or anything with such `logits`.
            target_sizes: (height, width) of each map, usually the original image's; the logits are resized to it
                bilinearly. Without it each map keeps the size of the logits.
            pixel_mask (batch_size, height, width): marks the images of a padded batch; the padding is cut off before
                resizing.

        Returns:
            One int64 tensor (height, width) of class indices per image.

        Raises:
            ValueError: another number of target sizes than of images, or a `pixel_mask` without target sizes.
        """
        logits = outputs.logits
        if target_sizes is None:
            if pixel_mask is not None:
                raise ValueError("pixel_mask needs target_sizes: the (height, width) of each image without padding")
            return list(logits.argmax(dim=1))
        if len(target_sizes) != len(logits):
            raise ValueError(f"got {len(target_sizes)} target_sizes for {len(logits)} images; give one per image")
        maps = []
        for index, target_size in enumerate(target_sizes):
            scores = logits[index : index + 1]  # (1, num_labels, h, w)
            if pixel_mask is not None:
                mask = pixel_mask[index]
                # the image's border falls between patches, so cut at pixel accuracy
                scores = F.interpolate(scores, size=mask.shape, mode="bilinear", align_corners=False)
                scores = scores[..., : int(mask[:, 0].sum()), : int(mask[0].sum())]
            target_size = (int(target_size[0]), int(target_size[1]))
            scores = F.interpolate(scores, size=target_size, mode="bilinear", align_corners=False)
            maps.append(scores[0].argmax(dim=0))
        return maps


RadioImageProcessor.register_for_auto_class("AutoImageProcessor")
