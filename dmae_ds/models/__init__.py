"""Networks on visible patches: masking, patches, timm's ViTs, decoder, positional embeddings, oneDNN."""
