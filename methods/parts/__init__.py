"""What several methods share: mixtures of losses, mixed batches, averaged networks, a pass over the training set."""
