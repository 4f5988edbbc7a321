"""Output of commands: text tables, sizes, progress, colours of figures, durable files; hidden warnings."""
