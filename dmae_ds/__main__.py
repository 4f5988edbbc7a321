"""`python -m dmae_ds ...`, which is also what `deepspeed --module dmae_ds ...` and torchrun start."""

from dmae_ds.cli.main import main

raise SystemExit(main())
