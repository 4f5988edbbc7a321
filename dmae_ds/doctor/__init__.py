"""`dmae-ds doctor`: what would stop a run on these machines, said before it starts.

Three things apart: a probe gathers facts on every node (probe*.py), pure functions turn the facts of all nodes into
checks (judge_*.py), and examine.py asks, prints, and names the command that will work.
"""
