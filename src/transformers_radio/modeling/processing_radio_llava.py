"""The processor of a LLaVA with a RADIO vision tower: as many image tokens as each image has patches."""

from transformers import AutoImageProcessor, AutoProcessor, LlavaProcessor

from .configuration_radio_tower import RadioVisionTowerConfig
from .image_processing_radio import RadioImageProcessor


class RadioLlavaProcessor(LlavaProcessor):
    """`transformers.LlavaProcessor` for [`RadioVisionTower`], with images of different sizes in one batch.

    Arguments are those of LlavaProcessor; give it a [`RadioImageProcessor`], `patch_size=tower.config.patch_size`,
    `num_additional_image_tokens=1` and the `vision_feature_select_strategy` of the model. It returns `image_sizes`
    (number of images, 2), the (height, width) of each image without the padding of its batch. The tower computes each
    image without that padding and the text holds no tokens for it, so the answer does not depend on the batch.

    With the strategy "full", transformers cannot place one summary token per image if the images differ in size, so
    all images of a batch must come out in one size.

    Raises:
        ValueError: images of different sizes with the strategy "full"; arguments of a wrong type.
    """

    def _process_images(self, images, **kwargs):
        if not isinstance(self.patch_size, int) or self.patch_size < 1:
            raise ValueError(f"patch_size={self.patch_size!r}: expected the tower's config.patch_size, in pixels")
        count = self.num_additional_image_tokens
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"num_additional_image_tokens={count!r}: expected 1, the summary of each image")
        if self.vision_feature_select_strategy not in ("default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy={self.vision_feature_select_strategy!r}: expected 'default' or 'full'"
            )
        kwargs |= {"return_pixel_mask": False, "return_image_sizes": True}
        image_inputs, replacements = super()._process_images(images, **kwargs)
        if self.vision_feature_select_strategy == "full":
            sizes = {tuple(int(side) for side in size) for size in image_inputs.pop("image_sizes")}
            if len(sizes) > 1:
                raise ValueError(
                    f'vision_feature_select_strategy="full" takes images of one size in a batch, got {sorted(sizes)}; '
                    'pass them one by one, or use the strategy "default".'
                )
        return image_inputs, replacements

    def replace_image_token(self, image_inputs, image_idx: int, **kwargs) -> str:
        height, width = (int(side) // self.patch_size for side in image_inputs["image_sizes"][image_idx])
        count = height * width + self.num_additional_image_tokens
        return self.image_token * (count - (self.vision_feature_select_strategy == "default"))


# Only this package has this type of tower, so no class of transformers is replaced; AutoProcessor finds ours by name.
AutoImageProcessor.register(
    RadioVisionTowerConfig, image_processor_classes={"torchvision": RadioImageProcessor}, exist_ok=True
)
AutoProcessor.register(RadioVisionTowerConfig, RadioLlavaProcessor, exist_ok=True)
