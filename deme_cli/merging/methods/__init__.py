"""What becomes of the task vectors before, or instead of, their linear combination."""
