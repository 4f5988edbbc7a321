"""Output of commands: text tables, sizes in text, progress, durable files; hidden warnings of libraries."""
