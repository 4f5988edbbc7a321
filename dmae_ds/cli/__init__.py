"""The command `dmae-ds`: one file for each group of subcommands.

A room that needs torch is imported when one of its commands runs.
"""
