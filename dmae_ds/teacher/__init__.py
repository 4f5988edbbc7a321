"""The frozen teacher: the needed blocks only, replicated, in pipeline stages or sharded by ZeRO-3."""
