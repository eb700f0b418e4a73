"""All that touches a training script."""
