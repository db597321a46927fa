"""Maximum likelihood for softmax regression: passes over data, objective, solvers, information."""
