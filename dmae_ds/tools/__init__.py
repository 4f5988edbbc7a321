"""The commands `dmae-ds teacher ...` and `dmae-ds checkpoint ...`: look at weights and checkpoints, cut and convert them."""
