"""Those who judge: people and, always marked as such, simulated labellers."""
