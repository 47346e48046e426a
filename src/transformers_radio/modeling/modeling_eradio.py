"""E-RADIO, the efficient student: convolutions, attention in windows, a neck at stride 16 (paper Sec. 5.1)."""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import can_return_tuple

from .adaptors_radio import RadioAdaptor
from .caching_radio import WeightCache
from .configuration_eradio import ERadioConfig
from .convolution_eradio import ERadioConv
from .inputs_radio import check_adaptors, check_images, check_outputs, returns_tensors_only
from .student_radio import RadioInputConditioner, RadioModelOutput, RadioStudentMixin, init_shared_part
from .weights_radio import CheckedLoadingMixin


class ERadioConvNorm(nn.Module):
    """Convolution without bias, then batch norm. `_fuse` makes one convolution of the two."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1):
        super().__init__()
        padding = kernel_size // 2
        self.conv = ERadioConv(in_channels, out_channels, kernel_size, stride, padding, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(out_channels)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(maps))

    def _fuse(self):
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = nn.utils.fusion.fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class ERadioStem(nn.Module):
    """`(B, 3, H, W)` -> `(B, C, H/4, W/4)`."""

    def __init__(self, config: ERadioConfig):
        super().__init__()
        self.conv1 = ERadioConvNorm(config.num_channels, config.stem_channels, stride=2)
        self.conv2 = ERadioConvNorm(config.stem_channels, config.embed_dim, stride=2)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(pixels))))


class ERadioBottleneck(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = ERadioConvNorm(channels, channels)
        self.conv2 = ERadioConvNorm(channels, channels)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps + F.silu(self.conv2(F.silu(self.conv1(maps))))


class ERadioC2f(GradientCheckpointingLayer):
    """The block of YOLOv8: half of the channels go through `depth` bottlenecks, and every step's output is kept."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        half = channels // 2
        self.conv1 = ERadioConvNorm(channels, channels, kernel_size=1)
        self.bottlenecks = nn.ModuleList([ERadioBottleneck(half) for _ in range(depth)])
        self.conv2 = ERadioConvNorm((2 + depth) * half, channels, kernel_size=1)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        parts = list(F.silu(self.conv1(maps)).chunk(2, dim=1))
        for bottleneck in self.bottlenecks:
            parts.append(bottleneck(parts[-1]))
        return F.silu(self.conv2(torch.cat(parts, dim=1)))


class ERadioPositionBias(nn.Module):
    """The continuous relative position bias of Swin v2: a small MLP of the offset between two places of a window.

    The bias is 16 * sigmoid(MLP(offset)), offsets being in [-1, 1] on the scale sign(o) * log2(1 + 8 |o|) / log2(8).
    In evaluation it is computed once per size.
    """

    def __init__(self, num_heads: int, hidden: int = 512):
        super().__init__()
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, num_heads, bias=False)
        self._cache = WeightCache()

    def forward(self, size: int, tokens: torch.Tensor) -> torch.Tensor:
        """Windows of `size` x `size` places -> `(heads, size**2, size**2)`, with dtype and device of the tokens."""
        if self.training:
            return self._bias(size, tokens)
        weights = [self.fc1.weight, self.fc1.bias, self.fc2.weight]
        key = (size, tokens.dtype, tokens.device, torch.is_autocast_enabled(tokens.device.type))
        return self._cache.get(key, weights, lambda: self._bias(size, tokens))

    def train(self, mode: bool = True):
        self._cache.clear()
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self._cache.clear()  # a move or cast; the old bias must not stay in memory
        return super()._apply(fn, recurse)

    def _bias(self, size: int, tokens: torch.Tensor) -> torch.Tensor:
        device, dtype = tokens.device, tokens.dtype  # weights that are quantized or offloaded do not say them
        steps = torch.arange(1 - size, size, device=device, dtype=torch.float32)
        steps = 8 * steps / max(size - 1, 1)
        steps = steps.sign() * torch.log2(1 + steps.abs()) / 3
        offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1)  # (2s-1, 2s-1, 2): rows, columns
        table = 16 * torch.sigmoid(self.fc2(F.relu(self.fc1(offsets.to(dtype)))))  # (2s-1, 2s-1, heads)
        place = torch.arange(size, device=device)
        difference = place[:, None] - place[None, :] + size - 1  # (s, s): from each query to each key
        # (2s-1, 2s-1, heads) -> (s, s, s, s, heads): query row, key row, query column, key column
        bias = table[difference[:, :, None, None], difference[None, None, :, :]]
        # -> (heads, query row, query column, key row, key column) -> (heads, s*s, s*s)
        return bias.permute(4, 0, 2, 1, 3).reshape(-1, size**2, size**2)


class ERadioAttention(nn.Module):
    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels, bias=False)
        self.position_bias = ERadioPositionBias(num_heads)

    def forward(self, tokens: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """tokens: `(B * windows, W*W, C)`, bias: `(heads, W*W, W*W)`, added to the logits."""
        # (N, L, 3C) -> (N, L, 3, heads, C/heads) -> 3 x (N, heads, L, C/heads)
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype)[None])
        # (N, heads, L, C/heads) -> (N, L, C)
        return self.proj(output.transpose(1, 2).flatten(2))


class ERadioMLP(nn.Module):
    def __init__(self, channels: int, ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(channels, int(ratio * channels), bias=False)
        self.fc2 = nn.Linear(int(ratio * channels), channels, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class ERadioWindowBlock(GradientCheckpointingLayer):
    """Attention within windows, at half the resolution for "global" attention; half input, half result.

    Args:
        subsample (`bool`): Halve the map before and double it behind attention.
        pre_convolution (`bool`): A 3x3 convolution with a residual before attention that is not subsampled.
    """

    def __init__(self, channels: int, num_heads: int, config: ERadioConfig, subsample: bool):
        super().__init__()
        self.reduce = ERadioConv(channels, channels, 2, stride=2) if subsample else None
        self.expand = nn.ConvTranspose2d(channels, channels, 2, stride=2) if subsample else None
        self.pre_conv = ERadioConvNorm(channels, channels) if config.pre_convolution and not subsample else None
        self.norm1 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.attention = ERadioAttention(channels, num_heads)
        self.norm2 = nn.LayerNorm(channels, eps=config.layer_norm_eps)
        self.mlp = ERadioMLP(channels, config.mlp_ratio)

    def forward(self, maps: torch.Tensor, window: int) -> torch.Tensor:
        """maps: `(B, C, H, W)`, sides multiples of `window`, of twice that where the block subsamples."""
        shortcut = maps
        if self.reduce is not None:
            maps = self.reduce(maps)
        elif self.pre_conv is not None:
            maps = maps + self.pre_conv(maps)
        batch, channels, rows, cols = maps.shape
        # (B, C, H, W) -> (B, H, W, C) -> (B, H/w, w, W/w, w, C) -> (B, H/w, W/w, w, w, C) -> (B*windows, w*w, C)
        tokens = maps.permute(0, 2, 3, 1).reshape(batch, rows // window, window, cols // window, window, channels)
        tokens = tokens.transpose(2, 3).reshape(-1, window**2, channels)
        tokens = tokens + self.attention(self.norm1(tokens), self.attention.position_bias(window, tokens))
        tokens = tokens + self.mlp(self.norm2(tokens))
        # (B*windows, w*w, C) -> (B, H/w, W/w, w, w, C) -> (B, H/w, w, W/w, w, C) -> (B, H, W, C) -> (B, C, H, W)
        tokens = tokens.reshape(batch, rows // window, cols // window, window, window, channels)
        maps = tokens.transpose(2, 3).reshape(batch, rows, cols, channels).permute(0, 3, 1, 2)
        if self.expand is not None:
            maps = self.expand(maps)
        return (maps + shortcut) / 2


class ERadioWindowStage(nn.ModuleList):
    """Window blocks, one after the other.

    Args:
        scale (`int`): 2 where blocks subsample, else 1.
    """

    def __init__(self, blocks: list[ERadioWindowBlock], scale: int):
        super().__init__(blocks)
        self.scale = scale

    def forward(self, maps: torch.Tensor, window: int) -> torch.Tensor:
        """A map whose sides windows do not divide is enlarged, nearest neighbors, and at the end brought back."""
        (rows, cols), step = maps.shape[-2:], window * self.scale
        size = ((rows + step - 1) // step * step, (cols + step - 1) // step * step)
        fits = isinstance(rows, int) and size == (rows, cols)  # no branch in an export, where sides are symbols
        if not fits:
            maps = F.interpolate(maps, size=size, mode="nearest")
        for block in self:
            maps = block(maps, window)
        return maps if fits else F.interpolate(maps, size=(rows, cols), mode="nearest")


class ERadioNeck(nn.Module):
    """The maps of stages 3 and 4 as one, `(B, hidden_size, H/16, W/16)`: each to that size and width, then the sum.

    `config.neck` says how: "pixel_shuffle" (batch norm, a 1x1 convolution to four times the channels for stage 4,
    which become 2x2 places) or "depthwise" (nearest neighbors, a depthwise 3x3 convolution, batch norm, 1x1).
    """

    def __init__(self, config: ERadioConfig):
        super().__init__()
        self.kind, out = config.neck, config.hidden_size
        self.depthwise, self.norms, self.convs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for channels, scale in ((config.channels[2], 1), (config.channels[3], 2)):
            if self.kind == "depthwise":
                self.depthwise.append(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
            self.norms.append(nn.BatchNorm2d(channels))
            self.convs.append(nn.Conv2d(channels, out * (scale**2 if self.kind == "pixel_shuffle" else 1), 1))

    def forward(self, stage3: torch.Tensor, stage4: torch.Tensor) -> torch.Tensor:
        if self.kind == "pixel_shuffle":
            fine, coarse = self.convs[0](self.norms[0](stage3)), self.convs[1](self.norms[1](stage4))
            return fine + F.pixel_shuffle(coarse, 2)
        coarse = F.interpolate(stage4, scale_factor=2, mode="nearest")
        fine, coarse = (
            self.convs[index](self.norms[index](self.depthwise[index](maps)))
            for index, maps in enumerate((stage3, coarse))
        )
        return fine + coarse

    def _fuse(self):
        for index, norm in enumerate(self.norms):
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            if self.kind == "depthwise":
                self.depthwise[index] = nn.utils.fusion.fuse_conv_bn_eval(self.depthwise[index], norm)
            else:  # a 1x1 convolution behind the norm takes scale and shift, in new weights: others may share the old
                conv = self.convs[index]
                scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # (C,)
                shift = norm.bias - norm.running_mean * scale
                bias = conv.bias + conv.weight.flatten(1) @ shift  # (out, C) @ (C,)
                conv.bias = nn.Parameter(bias, conv.bias.requires_grad)
                conv.weight = nn.Parameter(conv.weight * scale[:, None, None], conv.weight.requires_grad)
            self.norms[index] = nn.Identity()


class ERadioPreTrainedModel(CheckedLoadingMixin, PreTrainedModel):
    config_class: Any = ERadioConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ERadioC2f", "ERadioWindowBlock"]
    _input_embed_layer = "stem"
    _keep_in_fp32_modules_strict = ["input_conditioner"]
    _supports_sdpa = True
    _supports_flash_attn = False

    def __init__(self, config, *args, **kwargs):
        super().__init__(self.config_class.adopt(config), *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # functions of `transformers.initialization` leave parameters that were loaded alone
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif not init_shared_part(module, self.config):
            super()._init_weights(module)

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; the folder carries this code, and opens as a student or as a backbone."""
        from .modeling_eradio_heads import ERadioBackbone  # here, as that file imports this one

        self.config.auto_map = {
            "AutoModel": f"modeling_eradio.{ERadioModel.__name__}",
            "AutoBackbone": f"modeling_eradio_heads.{ERadioBackbone.__name__}",
            "AutoModelForImageClassification": "modeling_eradio_heads.ERadioForImageClassification",
            "AutoModelForSemanticSegmentation": "modeling_eradio_heads.ERadioForSemanticSegmentation",
        }
        super().save_pretrained(*args, **kwargs)


class ERadioModel(RadioStudentMixin, ERadioPreTrainedModel):
    """E-RADIO (paper Sec. 5.1, Table 6) with the adaptors of `config.adaptors`.

    A stem, two stages of convolutions, two of attention in windows, and a neck that joins the last two to features at
    stride 16 (32 without). The summary is the mean of the features. Sides are multiples of 32 pixels.

    For speed: `model.to(memory_format=torch.channels_last)`, and `model.eval().fuse()` for inference. Attention is
    always `scaled_dot_product_attention`, whatever `attn_implementation` says.
    """

    def __init__(self, config: ERadioConfig):
        super().__init__(config)
        config = self.config
        config.validate()  # fields may have been set after construction
        widths, depths = config.channels, config.depths
        self.input_conditioner: nn.Module = RadioInputConditioner(config)
        self.stem = ERadioStem(config)
        low, high = (
            nn.Sequential(ERadioC2f(width, depth)) for width, depth in zip(widths[:2], depths[:2], strict=True)
        )
        pairs = [
            ERadioWindowBlock(widths[2], config.num_heads[0], config, subsample=subsample)
            for _ in range(depths[2])
            for subsample in (True, False)
        ]
        plain = [ERadioWindowBlock(widths[3], config.num_heads[1], config, subsample=False) for _ in range(depths[3])]
        self.stages = nn.ModuleList([low, high, ERadioWindowStage(pairs, 2), ERadioWindowStage(plain, 1)])
        self.downsamples = nn.ModuleList(ERadioConvNorm(width, 2 * width, stride=2) for width in widths[:3])
        self.neck = ERadioNeck(config) if config.neck else None
        self.norm = nn.Identity() if config.neck else nn.BatchNorm2d(widths[3])
        self.adaptors = nn.ModuleDict(
            {name: RadioAdaptor(config.hidden_size, adaptor) for name, adaptor in config.adaptors.items()}
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        adaptors: list[str] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> RadioModelOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): Floats in [0, 1]; sides are
                multiples of 32.
            adaptors (`list[str]`, *optional*): Adaptors to run; all when missing, none with `[]`.
            output_hidden_states (`bool`, *optional*): Return the maps of the stem and of the four stages,
                `(B, C, h, w)` each, at strides 4, 4, 8, 16 and 32.
            output_attentions, pixel_mask: Refused: there are no probabilities of attention to return, and convolutions
                mix padding and image. They are here to say so.

        Raises:
            ValueError: Not floats, a wrong number of channels or dimensions, a side that is not a multiple of 32, an
                unknown adaptor, attentions or a mask.
        """
        names = check_adaptors(adaptors, list(self.adaptors))
        check_outputs(output_hidden_states, output_attentions)
        if output_attentions:
            raise ValueError("output_attentions is True, but E-RADIO keeps no attention probabilities; leave it out.")
        if pixel_mask is not None:
            raise ValueError(
                "E-RADIO takes no pixel_mask: its convolutions mix padding and image. Resize without padding: "
                'RadioImageProcessor(size={"height": h, "width": w}, size_divisor=32).'
            )
        stages = self.stage_maps(pixel_values)
        maps = self._last_maps(stages)
        features = maps.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h*w, D)
        summary, grid = features.mean(1), self.grid(*pixel_values.shape[-2:])

        dense = features.contiguous() if names else features  # one copy for all heads
        heads = {name: self.adaptors[name](summary.unsqueeze(1), dense, [grid]) for name in names}
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return RadioModelOutput(
            summary=summary,
            features=features,
            last_hidden_state=features,
            hidden_states=tuple(stages) if wanted else None,
            adaptors=heads,
            pooler_output=summary,
            grid=None if returns_tensors_only() else grid,
        )

    def stage_maps(self, pixel_values: torch.Tensor, stop: int | None = None) -> list[torch.Tensor]:
        """Images as in `forward` -> the maps of the stem and of each stage (of the first `stop`), `(B, C, h, w)`."""
        self.check_images(pixel_values)
        self._warn_about_range(pixel_values)
        height, width = pixel_values.shape[-2:]
        if torch.compiler.is_dynamo_compiling() and not getattr(torch.compiler, "is_exporting", lambda: True)():
            # a program for each size: with formulas of the sides in five stages, torch does not end
            height, width = operator.index(height), operator.index(width)
        window = self.window_for(height, width)
        maps = self.stem(self.input_conditioner(pixel_values).to(self.stem.conv1.conv.weight.dtype))
        stages = [maps]
        for index, stage in enumerate(self.stages[:stop]):
            if index > 0:
                maps = self.downsamples[index - 1](maps)
            maps = stage(maps) if index < 2 else stage(maps, window)
            stages.append(maps)
        return stages

    def _last_maps(self, stages: list[torch.Tensor]) -> torch.Tensor:
        """The maps of the features, `(B, hidden, h, w)`, from those of all stages."""
        return self.norm(stages[-1]) if self.neck is None else self.neck(stages[-2], stages[-1])

    @property
    def num_intermediates(self) -> int:
        """Number of stages, the maps that `forward_intermediates` chooses among; the neck is no stage."""
        return len(self.stages)

    def _intermediates(self, pixel_values, wanted, stop, norm):
        stages = self.stage_maps(pixel_values, stop)[1:]  # without the stem's
        is_whole = len(stages) == self.num_intermediates
        last = self._last_maps(stages) if is_whole else stages[-1]
        if norm and is_whole:
            stages[-1] = self.norm(stages[-1])
        # (B, D, h, w) -> (B, h*w, D)
        return last.flatten(2).transpose(1, 2), [(stages[index], None) for index in wanted]

    def window_for(self, height: int, width: int) -> int:
        """Side of the attention windows for images of this size in pixels, in places of 32 x 32 pixels.

        `config.window_size`, or one window for a map of at most 7 places at stride 32, which has the longer side. For
        others, from the shorter side of the map, n places: the largest divisor of n up to `config.max_window_size`.
        Where that is below 7 and below n (n = 17, 19, 34, ...), the smallest window of which as few as possible cover
        the side; the map is then enlarged to their size.
        """
        if self.config.window_size is not None:
            return self.config.window_size
        side, largest = min(height, width) // 32, self.config.max_window_size
        if max(height, width) // 32 <= min(largest, 7):
            return max(height, width) // 32
        divisor = next(size for size in range(min(side, largest), 0, -1) if side % size == 0)
        if divisor >= min(side, 7):
            return divisor
        windows = -(-side // largest)
        return -(-side // windows)

    # ---------------------------------------------------------------- the contract of every student

    @property
    def min_resolution_step(self) -> int:
        """Image sides must be multiples of this many pixels: the stride of the last stage."""
        return 32

    def check_images(self, pixel_values: torch.Tensor):
        """Raises ValueError unless `forward` takes these images."""
        check_images(pixel_values, self.config.num_channels, self.min_resolution_step, self.stem.conv1.conv.weight)

    @property
    def blocks(self) -> list[nn.Module]:
        """C2f blocks and window blocks, in order."""
        return [block for stage in self.stages for block in stage.children()]

    def no_weight_decay(self) -> set[str]:
        """The position biases, as for Swin v2."""
        return {name for name, _ in self.named_parameters() if ".position_bias." in name}


ERadioModel.register_for_auto_class("AutoModel")

__all__ = ["ERadioModel", "ERadioPreTrainedModel"]
