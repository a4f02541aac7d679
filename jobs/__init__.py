"""What to run and where it stands: the job protocol on a folder in object storage."""
