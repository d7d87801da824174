"""Pages that a person looks at: the run report and what it is drawn from."""
