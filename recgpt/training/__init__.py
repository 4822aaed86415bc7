"""The two training stages: engine, trainer, prompts, checkpoints."""
