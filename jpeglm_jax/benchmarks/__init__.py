"""Speed, as ratios measured in one run: the input pipeline, the training step."""
