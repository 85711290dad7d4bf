"""Training and fine-tuning: data, augmentation, losses and the loop."""
