"""What `instability`, `regret` and `defaults` share: workloads, methods, and the statistics of paired runs."""
