"""PassKey: a key said once, asked for much later. The task, the training, and the evaluation on exported graphs."""
