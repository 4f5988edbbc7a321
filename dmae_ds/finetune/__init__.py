"""Training of a classifier on labels: fine-tuning, supervised distillation, MAE's linear probe."""
