"""What every program shares: command line, artifacts, metrics, progress, errors."""
