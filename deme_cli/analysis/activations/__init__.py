"""What finetuning does to the features of a network (the paper's figure 2)."""
