"""`dmae-ds doctor`: checks before a run starts of what would stop it on these machines, and how to fix it.

Three steps: every node reports facts (inspect_*.py, later_rounds.py), pure functions turn the facts of all
nodes into checks (judge_*.py), and over_ssh.py or without_ssh.py asks the nodes, prints the checks and the
command that will work.
"""
