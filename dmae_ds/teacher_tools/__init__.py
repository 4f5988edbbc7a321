"""`dmae-ds teacher inspect | slice | stats`: looking at a teacher, cutting it, measuring its targets. Once, before any run."""
