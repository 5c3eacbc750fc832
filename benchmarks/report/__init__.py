"""What a run leaves behind: records, summaries, figures and progress bars."""
