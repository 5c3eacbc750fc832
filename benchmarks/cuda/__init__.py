"""What `gpu` does on a CUDA device: named checks, costs by size of the model, and trainings within a time."""
