"""The tasks of `transformers-radio eval`, one file each: its settings, and `run(models, config, output)`."""
