"""What every command writes: text tables, sizes for people, files that survive a power cut."""
