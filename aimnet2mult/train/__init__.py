"""Training: losses, metrics, configuration and the Ignite engines."""
