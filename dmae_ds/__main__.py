"""Entry point of `python -m dmae_ds`, which `deepspeed --module dmae_ds` and torchrun start, too."""

from dmae_ds.cli.main import main

raise SystemExit(main())
