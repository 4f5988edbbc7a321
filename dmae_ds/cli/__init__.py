"""The command `dmae-ds`: a file a group of subcommands; rooms that need torch are imported when a command runs."""
