"""What every training loop shares: mesh, state, optimizer, step, losses, checkpoints."""
