"""Training a classifier on labels: fine-tuning (`dmae-ds eval finetune`), supervised distillation, MAE's linear probe."""
