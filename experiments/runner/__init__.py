"""What all experiments share: runs side by side, one row for each finished run, figures and intervals."""
