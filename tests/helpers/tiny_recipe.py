"""A recipe of two tiny teachers and a tiny student: format it with the folders `output` and `images`."""

from . import tiny_teachers as tiny_teachers  # loaded, it is code that this process trusts

RECIPE = """
output_dir: {output}
student:
  size: vit-ti-16
  config: {{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, mlp_ratio: 2.0, patch_size: 8,
           max_img_size: 64, num_registers: 1, pos_dropout: 0.1}}
teachers:
  clip: {{type: python, checkpoint: "helpers.tiny_teachers:PatchTeacher", image_size: 24, options: {{width: 16}}}}
  sam:
    type: python
    checkpoint: "helpers.tiny_teachers:PatchTeacher"
    image_size: 48
    options: {{width: 20, summary: false}}
data: {{path: {images}, num_workers: 0, shuffle_window: 8}}
stages:
  main: {{steps: 12, resolution: 32, batch_size: 4, warmup_steps: 2}}
checkpoints: {{every_steps: 3, keep: 2}}
log_every_steps: 2
tracker: null
"""
