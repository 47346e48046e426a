"""Configuration of a RADIO backbone with ViTDet's simple pyramid, for detectors that need several strides."""

from dataclasses import field

from transformers import AutoConfig

from .configuration_radio_backbone import RadioBackboneConfig
from .pyramid_radio import check_strides


class RadioPyramidConfig(RadioBackboneConfig):  # type: ignore[misc]
    """A RADIO configuration plus the strides of the maps, for `backbone_config=` of RT-DETR, D-FINE, Mask2Former, ...

    It reads the folder of a RADIO student: `RadioPyramidConfig.from_pretrained(folder, strides=[8, 16, 32])`. A model
    that is built from it has random weights; `load_student(model, folder)` replaces those of the student. The
    pyramid's own are new, and train with the detector. Set `window_size` for images of about 1024 pixels.

    Args:
        strides: of the maps in pixels, from fine to coarse: the patch size times or divided by powers of two.
        pyramid_size: channels of each map.

    Raises:
        ValueError: Strides that the patch size does not give, or `reshape_hidden_states=False`.
    """

    model_type = "radio_pyramid"

    strides: list[int] = field(default_factory=lambda: [8, 16, 32])
    pyramid_size: int = 256

    def __post_init__(self, **kwargs):
        check_strides(self.strides, self.patch_size)
        if kwargs.get("out_features") is None and kwargs.get("out_indices") is None:
            kwargs["out_features"] = self._stages()
        super().__post_init__(**kwargs)

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "strides" and hasattr(self, "stage_names"):  # the maps follow
            check_strides(value, self.patch_size)
            self.stage_names = self._stages()
            self.set_output_features_output_indices(self._stages(), None)

    def _stages(self) -> list[str]:
        return [f"stride{stride}" for stride in self.strides]

    def validate(self):
        """Check what concerns several fields; models do it before they are built, and saving does."""
        super().validate()
        check_strides(self.strides, self.patch_size)
        if not self.reshape_hidden_states:
            raise ValueError(f"{type(self).__name__}: reshape_hidden_states is false, but a pyramid has maps only.")


RadioPyramidConfig.register_for_auto_class()
AutoConfig.register("radio_pyramid", RadioPyramidConfig, exist_ok=True)
