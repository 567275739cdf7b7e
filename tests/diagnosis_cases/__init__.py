"""Tables of models for the diagnosis by exact tests: name → model, batch and loss, and the expected code."""
