"""Pictures that explain a run, one file per figure."""
