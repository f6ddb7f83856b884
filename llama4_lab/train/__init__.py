"""Train the shipped models: data, curriculum, loop."""
