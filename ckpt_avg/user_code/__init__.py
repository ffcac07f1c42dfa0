"""The user's model, data and metric."""
