"""What a run needs before it runs: memory, arithmetic, traffic and a bracket of its step time."""
