"""The network: transformer, heads, presets, sharding rules, decoding."""
