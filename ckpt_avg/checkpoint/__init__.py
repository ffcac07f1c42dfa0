"""What a checkpoint is: its tensors, its files and its training record."""
