"""What each trainer writes: one file per trainer."""
