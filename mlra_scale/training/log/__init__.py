"""Where the numbers of a run go: the record, the console and Weights & Biases."""
