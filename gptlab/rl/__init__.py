"""What the policy-gradient loop computes: rollouts, advantages, KL, rewards."""
