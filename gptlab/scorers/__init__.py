"""Text in, a number out: the stuff rewards, judges and simulated labellers are made of."""
