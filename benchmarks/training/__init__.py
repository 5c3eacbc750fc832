"""What trains: models, data, methods, and the run that brings them together."""
