"""Pictures that explain a run: a folder per figure, from what is measured to how it is drawn."""
