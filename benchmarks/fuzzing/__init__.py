"""Fuzzing of every reader: damaged inputs, the processes that parse them, and the judgement of what came out."""
