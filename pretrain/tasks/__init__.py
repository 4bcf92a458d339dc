"""What a system is, one file each: its recipe's sections, samples, network, losses, scores and predictions."""
