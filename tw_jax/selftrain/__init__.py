"""Self-training: a model's own best trajectories become its next training set."""
