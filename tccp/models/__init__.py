"""Networks: plain modules with no knowledge of files of clips, schedules or training."""
