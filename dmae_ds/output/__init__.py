"""Output of commands: text tables, sizes in text, durable files."""
